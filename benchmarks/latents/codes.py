"""What turns codes back into pixels: the scale and the shift of each channel, and the VAE.

A network is trained on (latent - shift) scale, so that a latent is code / scale + shift. A finished
run keeps these as JSON, and is sampled where its latents are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from registry import vaes
from registry.protocols import Vae


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The constants of codes [n k h w] and the VAE behind them."""

    scale: Sequence[float]  # k numbers
    shift: Sequence[float]
    vae: Vae
    decode_batch: int  # latents that are decoded at a time

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [n c h w] in [-1, 1] of codes [n k h w], on the device of the codes."""
        device = torch.device("cuda") if torch.cuda.is_available() else codes.device
        scale, shift = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (self.scale, self.shift)
        )
        latents = codes.to(device) / scale + shift
        pixels = [self.vae.decode(part) for part in latents.split(self.decode_batch)]
        return torch.cat(pixels).to(codes.device)

    def to_json(self) -> dict[str, Any]:
        return {
            "scale": list(self.scale),
            "shift": list(self.shift),
            "decode_batch": self.decode_batch,
            "vae": self.vae.provenance(),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Codes:
        """The codes that `to_json` described; ValueError unless the same VAE can be loaded."""
        vae = same_vae(content["vae"], "the latents of this run")
        return cls(
            scale=content["scale"],
            shift=content["shift"],
            decode_batch=content["decode_batch"],
            vae=vae,
        )


@runtime_checkable
class KnowsCodes(Protocol):
    """A data set of codes that says what decodes them."""

    @property
    def codes(self) -> Codes: ...


def same_vae(about: Mapping[str, str], what: str, vae: Vae | None = None) -> Vae:
    """The VAE with this provenance, or `vae` in its place; ValueError unless it has its weights.

    `what` names the latents in an error.
    """
    kind = about["kind"]
    try:
        if vae is None:
            vae = vaes.get(kind)(path=about["path"], subfolder=about["subfolder"])
        found = vae.provenance()["sha256"]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error}\nThis VAE made {what} and is needed to decode them. If it moved, bind "
            f"latents.vae = @{kind}() and {kind}.path = 'FOLDER'"
        ) from error
    if found != about["sha256"]:
        raise ValueError(
            f"{what} were made by a VAE with other weights (SHA-256 {about['sha256'][:16]}, here "
            f"{found[:16]}); give the one from {about['path']}"
        )
    return vae
