"""Autoencoders of diffusers as registered parts: frozen, in float32, pixels in [-1, 1].

An autoencoder comes from a local folder, from the Hugging Face hub or from one file. Its latents
are stored as the encoder gives them. A network trains on (latent - shift) scale. Both constants are
read from the autoencoder's own config.json and are not repeated in the code. They are, for example:

    Stable Diffusion  scale 0.18215 (some public code has the misprint 0.18125; a warning says so)
    SDXL              scale 0.13025
    SD 3              scale 1.5305, shift 0.0609
    FLUX              scale 0.3611, shift 0.1159

A config without these constants gets the defaults of diffusers: scale 0.18215 for AutoencoderKL and
1 for the other classes. A config with statistics of the channels (latents_mean, latents_std) means
(latent - mean) scale / std, as in the pipelines of diffusers. An autoencoder in a single file, such
as VA-VAE (ldm_checkpoint.py), has no constants; its latents are normalised channel by channel, as
encode.py describes.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.pretrained.public_files import SUFFIXES
from benchmarks.latents.ldm_checkpoint import read_ldm
from registry import vaes
from registry.protocols import Reference

MISPRINT = 0.18125  # where 0.18215 is meant
HUB = {  # short names for the command line, and what they stand for on the hub
    "sd_vae_ft_mse": "stabilityai/sd-vae-ft-mse",
    "sd_vae_ft_ema": "stabilityai/sd-vae-ft-ema",
    "sdxl_vae": "stabilityai/sdxl-vae",
    "taesd": "madebyollin/taesd",
    "dc_ae_f32c32": "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",
}
_VARIANT = re.compile(r"diffusion_pytorch_model\.(\w+)\.(?:safetensors|bin)\Z")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+\Z")

log = logging.getLogger(__name__)


class DiffusersVae:
    """What the autoencoders of diffusers have in common."""

    model: ClassVar[str]  # diffusers' class
    local_paths: ClassVar = ("path",)
    path: str
    subfolder: str

    def __post_init__(self) -> None:
        if self.scale == MISPRINT:  # the scale is read from the VAE, so a missing one fails here
            log.warning("%s has the scaling factor 0.18125; 0.18215 is meant", self.path)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the posterior; no log-variance if the encoder has none."""
        with torch.no_grad():
            return self._posterior(self._net(pixels.device).encode(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self._net(latents.device).decode(latents).sample

    @property
    def scale(self) -> float:
        return float(self._config.get("scaling_factor") or 1.0)

    @property
    def shift(self) -> float:
        return float(self._config.get("shift_factor") or 0.0)

    def constants(self, channels: int) -> tuple[list[float], list[float]]:
        """Scale and shift of each channel, with the statistics of the config if it has them."""
        mean, std = self._config.get("latents_mean"), self._config.get("latents_std")
        if mean is None or std is None:
            return [self.scale] * channels, [self.shift] * channels
        if len(mean) != channels or len(std) != channels or not min(std) > 0:
            raise ValueError(
                f"{self.path}: latents_mean and latents_std in its config.json must have one "
                f"number for each of {channels} channels, and those of latents_std must be positive"
            )
        return [self.scale / s for s in std], list(map(float, mean))

    def provenance(self) -> dict[str, str]:
        return {
            "kind": vaes.name_of(self),
            "path": str(Path(self.path).resolve()) if Path(self.path).exists() else self.path,
            "subfolder": self.subfolder,
            "sha256": self.digest(),
        }

    def digest(self) -> str:
        """The SHA-256 of the weights; it does not depend on the kind of file they came in."""
        return _digest(self.model, self.path, self.subfolder)

    @property
    def has_constants(self) -> bool:
        return not _is_file(self.path)

    def _posterior(self, encoded: Any) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _net(self, device: torch.device | str) -> Any:
        return _load(self.model, self.path, self.subfolder, str(device))

    @property
    def _config(self) -> Any:
        return self._net("cpu").config


@vaes.register("autoencoder_kl")
@dataclass(frozen=True, kw_only=True)
class AutoencoderKl(DiffusersVae):
    """The variational autoencoder of latent diffusion, with a Gaussian posterior."""

    reference: ClassVar = Reference(
        title="High-Resolution Image Synthesis with Latent Diffusion Models",
        authors="Rombach et al.",
        year=2022,
        arxiv="2112.10752",
    )
    model: ClassVar = "AutoencoderKL"

    path: str  # a folder with config.json and weights, a hub id, or a file of latent-diffusion
    subfolder: str = ""

    def _posterior(self, encoded: Any) -> tuple[Tensor, Tensor | None]:
        return encoded.latent_dist.mean, encoded.latent_dist.logvar


@vaes.register("autoencoder_dc")
@dataclass(frozen=True, kw_only=True)
class AutoencoderDc(DiffusersVae):
    """The deep-compression autoencoder: 32 or more pixels a side for each latent; deterministic."""

    reference: ClassVar = Reference(
        title="Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models",
        authors="Chen et al.",
        year=2024,
        arxiv="2410.10733",
    )
    model: ClassVar = "AutoencoderDC"

    path: str
    subfolder: str = ""

    def _posterior(self, encoded: Any) -> tuple[Tensor, Tensor | None]:
        return encoded.latent, None


@vaes.register("autoencoder_tiny")
@dataclass(frozen=True, kw_only=True)
class AutoencoderTiny(DiffusersVae):
    """The tiny autoencoder, whose latents are those of Stable Diffusion after scaling."""

    model: ClassVar = "AutoencoderTiny"

    path: str
    subfolder: str = ""

    def _posterior(self, encoded: Any) -> tuple[Tensor, Tensor | None]:
        return encoded.latents, None


def find_vae(name: str, subfolder: str = "") -> DiffusersVae:
    """The VAE in a folder, under a hub id or under a short name; its config names its class.

    A single file is read as an AutoencoderKL in the layout of latent-diffusion.
    """
    path = HUB.get(name, name)
    if _is_file(path):
        return AutoencoderKl(path=path)
    if not subfolder and (Path(path).expanduser() / "vae" / "config.json").is_file():
        subfolder = "vae"  # the folder is a whole pipeline
    kinds = {vaes.get(kind).model: vaes.get(kind) for kind in vaes.names()}
    found = _class_of(path, subfolder)
    if found not in kinds:
        raise ValueError(f"{path} holds a {found}; it must be one of {', '.join(sorted(kinds))}")
    return kinds[found](path=path, subfolder=subfolder)


def _class_of(path: str, subfolder: str) -> str:
    _check_place(path, subfolder)
    config = _fetched(path, _diffusers().AutoencoderKL.load_config, path, subfolder=subfolder)
    return str(config.get("_class_name", "file without the name of its class"))


def _check_place(path: str, subfolder: str) -> None:
    folder = Path(path).expanduser() / subfolder
    hub_id = _HUB_ID.match(path) and Path(path).suffix not in SUFFIXES and not folder.exists()
    if not (folder / "config.json").is_file() and not hub_id:
        raise FileNotFoundError(
            f"the VAE {str(folder)!r} has no config.json and is no hub id. Give a folder with "
            f"config.json and diffusion_pytorch_model.safetensors, an id such as "
            f"{HUB['sd_vae_ft_mse']}, one of {', '.join(HUB)}, or a file of latent-diffusion's "
            f"layout ({', '.join(SUFFIXES)})"
        )


def _fetched(path: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return load(*args, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        if Path(path).expanduser().is_dir():
            hint = "The folder needs config.json and the weights that save_pretrained writes"
        else:
            hint = (
                f"Without a network, fetch it elsewhere (hf download {path} --local-dir FOLDER) "
                "and give FOLDER"
            )
        raise ValueError(f"the VAE {path} cannot be loaded: {error}\n{hint}") from error


def _diffusers() -> Any:
    try:
        import diffusers  # optional, and takes seconds to import
    except ImportError as error:
        raise ImportError("VAEs need diffusers: pip install 'objective-zoo[latents]'") from error
    return diffusers


def _is_file(path: str) -> bool:
    return Path(path).suffix in SUFFIXES and Path(path).expanduser().is_file()


@lru_cache(maxsize=4)
def _load(model: str, path: str, subfolder: str, device: str) -> nn.Module:
    if _is_file(path):
        return _load_file(model, path).to(device)
    _check_place(path, subfolder)
    place = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
    load = getattr(_diffusers(), model).from_pretrained
    # Without this option, diffusers warns if accelerate is not installed.
    options: dict[str, Any] = {"subfolder": subfolder or None, "low_cpu_mem_usage": False}
    options["variant"] = _variant(Path(place, subfolder))
    if _pickled(Path(place, subfolder)):
        options["use_safetensors"] = False
    net = _fetched(path, load, place, **options)
    return net.float().eval().requires_grad_(False).to(device)


def _variant(folder: Path) -> str | None:
    """The variant of a local folder's weights, if it holds only variants; else None.

    That of diffusion_pytorch_model.fp16.safetensors is fp16.
    """
    files = sorted(path.name for path in folder.glob("diffusion_pytorch_model*"))
    found = [m[1] for name in files if (m := _VARIANT.match(name))]
    return found[0] if found and len(found) == len(files) else None


def _pickled(folder: Path) -> bool:
    """Whether a local folder has its weights as .bin only.

    diffusers looks for safetensors first, and prints a note if it finds none.
    """
    kinds = {path.suffix for path in folder.glob("diffusion_pytorch_model*") if path.is_file()}
    return ".bin" in kinds and ".safetensors" not in kinds


def _load_file(model: str, path: str) -> nn.Module:
    if model != AutoencoderKl.model:
        raise ValueError(f"{path} is read as an AutoencoderKL, not as {model}")
    fields, weights = read_ldm(Path(path).expanduser())
    net = _diffusers().AutoencoderKL(**fields, scaling_factor=None)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit latent-diffusion's autoencoder: {error}") from error
    return net.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def _digest(model: str, path: str, subfolder: str) -> str:
    content = hashlib.sha256()
    for name, value in sorted(_load(model, path, subfolder, "cpu").state_dict().items()):
        content.update(f"{name} {tuple(value.shape)}".encode())
        content.update(value.contiguous().numpy().tobytes())
    return content.hexdigest()
