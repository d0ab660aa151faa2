"""Features of any timm backbone by its name, from local weights; nothing is ever downloaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from benchmarks.metrics.features import extract, image_rules
from registry import extractors
from registry.core import did_you_mean
from trainers.checkpoints.whole_files import remembered_sha256


@extractors.register("timm_features")
@dataclass(frozen=True, kw_only=True)
class TimmFeatures:
    """Pooled features of any timm backbone by name, from a weight file that must be there.

    The model runs without its classifier; images are resized to the square that it was trained on.
    With `vit_large_patch14_dinov2.lvd142m` at size 224 the Frechet distance is the FD-DINOv2 of
    Stein et al., "Exposing Flaws of Generative Model Evaluation Metrics", arXiv 2306.04675.
    """

    canonical: ClassVar[dict[str, str]] = {}
    local_paths: ClassVar = ("weights",)

    model: str = ""
    weights: str = ""  # a file in the layout of timm's own: .safetensors, .pth, .npz
    size: int | None = None  # pixels; None: the model's own
    batch_size: int = 64

    def __post_init__(self) -> None:
        from timm.models import is_model, list_models

        if not (self.model and self.weights):
            raise ValueError(
                "timm_features needs the name of a timm model and a file of its weights: bind "
                "timm_features.model = 'resnet50.a1_in1k' and timm_features.weights = 'FILE'"
            )
        if not is_model(self.model):
            near = did_you_mean(self.model.split(".")[0], list_models())
            raise ValueError(f"timm_features.model: timm has no model named {self.model!r}.{near}")
        if not Path(self.weights).expanduser().is_file():
            raise FileNotFoundError(
                f"timm_features.weights is {self.weights!r}, and there is no such file. Nothing is "
                f"downloaded: get the weights of {self.model} where there is a network, for "
                f"example from https://huggingface.co/timm/{self.model}, and name the file"
            )

    @property
    def label(self) -> str:
        return re.sub(r"\W", "_", self.model)

    def __call__(self, images: Tensor) -> Tensor:
        net, size = self._net(str(images.device))
        mean, std = (
            255 * torch.tensor(net.pretrained_cfg[name], device=images.device)[:, None, None]
            for name in ("mean", "std")
        )
        return extract(
            lambda batch: net((batch - mean) / std), images, size, batch_size=self.batch_size
        )

    def provenance(self) -> dict[str, str]:
        net, size = self._net("cpu")
        return {
            "features": f"{self.model}, {net.num_features} pooled",
            "weights": remembered_sha256(Path(self.weights).expanduser()),
            "timm": version("timm"),
            **image_rules(size),
        }

    def _net(self, device: str) -> tuple[Any, int]:
        net = _timm_net(self.model, str(Path(self.weights).expanduser()), self.size, device)
        return net, self.size or net.pretrained_cfg["input_size"][-1]


@lru_cache(maxsize=2)
def _timm_net(model: str, weights: str, size: int | None, device: str) -> Any:
    from timm.models import create_model, get_pretrained_cfg, load_state_dict

    config = get_pretrained_cfg(model)
    fixed = config is not None and config.fixed_input_size
    resized: dict[str, Any] = {"img_size": size} if size and fixed else {}
    net: Any = create_model(model, pretrained=False, num_classes=0, **resized)
    try:
        found = load_state_dict(weights)
        # timm's own loading passes over missing tensors with a warning; only its layouts are used.
        if to_layout := getattr(import_module(type(net).__module__), "checkpoint_filter_fn", None):
            found = to_layout(found, net)
        classifier = net.pretrained_cfg["classifier"]
        heads = (classifier,) if isinstance(classifier, str) else classifier
        dropped = tuple(f"{head}." for head in heads)
        net.load_state_dict({name: x for name, x in found.items() if not name.startswith(dropped)})
    except (RuntimeError, SafetensorError, UnpicklingError, KeyError) as error:
        raise ValueError(f"{weights} does not fit timm's {model}: {error}") from error
    return net.eval().requires_grad_(False).to(device)
