"""LightningDiT: a DiT with rotary positions, SwiGLU, root-mean-square norms and, if asked, qk-norm.

    x <- x + gate * f((1 + scale) RmsNorm(x) + shift),  f = attention with rotated q and k, SwiGLU

The norms have weights, the MLP has two thirds of DiT's hidden width, and the fixed positions stay
beside the rotary ones, as in the released code. XL/1 is patch 1 on 32 x 16 x 16 VA-VAE latents.
Times and embeddings are those of this package (embeddings.py).

Yao et al., "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models",
arXiv 2501.01423.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from backbones.dit import PatchReadout, PatchTransformer, check_patches, xavier_
from backbones.embeddings import Conditioning, modulate, zero_
from registry import backbones
from registry.protocols import Reference
from registry.ranges import Count, Positive, Probability


class LightningBlock(nn.Module):
    """Rotary attention and SwiGLU, each modulated and gated by c."""

    rope: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        qk_norm: bool,
        rope: Tensor,
    ):
        from timm.layers import AttentionRope, RmsNorm, SwiGLUPacked  # takes 2 s: torchvision too

        super().__init__()
        self.norm1 = RmsNorm(dim, eps=1e-6)
        self.attn = AttentionRope(
            dim,
            num_heads,
            num_prefix_tokens=0,
            proj_drop=dropout,
            qk_norm=qk_norm,
            norm_layer=RmsNorm,
        )
        self.norm2 = RmsNorm(dim, eps=1e-6)
        self.mlp = SwiGLUPacked(dim, 2 * int(2 / 3 * int(dim * mlp_ratio)), drop=dropout)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.register_buffer("rope", rope, persistent=False)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            xavier_(layer)
        zero_(self.modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        )  # [b 1 dim] each
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope=self.rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


@backbones.register("lightning_dit")
class LightningDiT(PatchTransformer):
    """Diffusion transformer with rotary positions, SwiGLU and RMS norms, for [b c h w].

    Dropout draws from the global RNG of torch. `checkpointing` recomputes each block in the
    backward pass instead of keeping its activations.
    """

    reference: ClassVar = Reference(
        title="Reconstruction vs. Generation: "
        "Taming Optimization Dilemma in Latent Diffusion Models",
        authors="Yao et al.",
        year=2025,
        arxiv="2501.01423",
    )

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int = 0,
        two_times: bool = False,
        patch: Count = 1,
        dim: Count = 384,
        depth: Count = 6,
        num_heads: Count = 6,
        mlp_ratio: Positive = 4.0,
        dropout: Probability = 0.0,
        qk_norm: bool = False,
        second_time: str = "h",
        max_frequency: Positive = 8.0,
        time_features: str = "unit",
        guidance_input: bool = False,
        checkpointing: bool = False,
    ):
        check_patches("lightning_dit", shape, patch, dim, num_heads)
        if dim // num_heads % 4:
            raise ValueError(
                f"lightning_dit: a head has dim / num_heads = {dim // num_heads} channels; rotary "
                "positions need a multiple of 4. Change lightning_dit.dim or num_heads"
            )
        rope = rotary_2d(shape[1] // patch, shape[2] // patch, dim // num_heads)
        super().__init__(
            shape=shape,
            patch=patch,
            dim=dim,
            depth=depth,
            block=partial(LightningBlock, dim, num_heads, mlp_ratio, dropout, qk_norm, rope),
            conditioning=lambda: Conditioning(
                dim,
                num_classes=num_classes,
                two_times=two_times,
                second_time=second_time,
                max_frequency=max_frequency,
                time_features=time_features,
                guidance_input=guidance_input,
            ),
            checkpointing=checkpointing,
        )

    def readout(self) -> nn.Module:
        from timm.layers import RmsNorm

        norm = RmsNorm(self.dim, eps=1e-6)
        return PatchReadout(self.dim, self.channels, self.grid, self.patch, norm)


def rotary_2d(height: int, width: int, head_dim: int) -> Tensor:
    """The rotary positions [height * width, 2 head_dim]: sines, then cosines.

    One half of a head's channels rotates with y, the other half with x.
    """
    from timm.layers import build_rotary_pos_embed

    device = torch.get_default_device()
    tables = build_rotary_pos_embed([height, width], dim=head_dim, in_pixels=False, device=device)
    return torch.cat(tables, dim=-1)
