"""Networks: trunks (DiT, U-Net, MLP), the (t, r) embedding and the heads.

Importing it registers all.
"""

from __future__ import annotations

from backbones import dit, heads, mlp, unet
from backbones.network import FlowNetwork, build_network, default_heads, warm_start

__all__ = [
    "FlowNetwork",
    "build_network",
    "default_heads",
    "dit",
    "heads",
    "mlp",
    "unet",
    "warm_start",
]
