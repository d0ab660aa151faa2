"""Networks: trunks (DiT, LightningDiT, U-Nets, MLP), the (t, r) embedding, heads, parametrisations.

Importing this package registers them all.
"""

from __future__ import annotations

from backbones import ddpmpp, dit, heads, lightning_dit, mlp, noise, parametrisations, unet
from backbones.network import FlowNetwork, build_network, default_heads, warm_start

__all__ = [
    "FlowNetwork",
    "build_network",
    "ddpmpp",
    "default_heads",
    "dit",
    "heads",
    "lightning_dit",
    "mlp",
    "noise",
    "parametrisations",
    "unet",
    "warm_start",
]
