"""Attention in a forward-mode pass by jvp_flash_attention, an optional package for CUDA.

Its Triton kernel makes the value and its tangent in one pass over blocks of keys, in memory linear
in the number of tokens, where torch's math kernel writes matrices of tokens x tokens. It takes 32
tokens or more, an even number, heads of 32, 64, 128 or 256 channels, and no dropout.

https://github.com/amorehead/jvp_flash_attention; the tangent is that of Lu and Song, "Simplifying,
Stabilizing and Scaling Continuous-Time Consistency Models", arXiv 2410.11081.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

DEVICES = ("cuda",)
REMEDY = "bind dual.attention = 'math'"


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention for dual numbers [b heads tokens channels].

    ValueError if they are not on CUDA, or if jvp_flash_attention cannot be imported.
    """
    if query.device.type not in DEVICES:
        raise ValueError(
            f"dual.attention = 'jvp_flash' runs on {', '.join(DEVICES)} alone, and the network is "
            f"on {query.device.type}; {REMEDY}"
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # norms leave float32 under autocast
    return _kernel()(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        causal=is_causal,
        sm_scale=scale,
    )


def _kernel() -> Callable[..., Tensor]:
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
    except ImportError as error:
        raise ValueError(
            "dual.attention = 'jvp_flash' needs a package that cannot be imported here "
            f"({error}): pip install jvp-flash-attention, or {REMEDY}"
        ) from error
    kernel: Callable[..., Tensor] = JVPAttn.fwd_dual
    return kernel
