"""Public checkpoints as networks of this package, with their names, times and signs converted.

    layout         code                       what it predicts                   becomes
    dit            facebookresearch/DiT       noise, 1000 steps of a VP process  dit, v by vp_noise
    sit            willisma/SiT               data - noise, t = 1 is data        dit, v
    repa           sihyun-yu/REPA             noise - data, our times            dit, v
    dmf            kyungmnlee/dmf             u(x, t, r), our times              dit, u
    lightning_dit  hustvl/LightningDiT        data - noise, t = 1 is data        lightning_dit, v
    mean_flow_sit  zhuyu-cs/MeanFlow          u(x, t, h = t - r), our times      dit, u
                   EDAPINENUT/ExplicitShortCut
    mf_dit         haidog-yaqub/MeanFlow      u and v(x, t, r, w), our times     dit, u and v
    py_mean_flow   Gsunshine/py-meanflow      u(x, t, h = t - r), our times      ddpmpp, u

The result computes what the public code computes, to rounding. Only weights are changed for this.
For v(x, t) = -F(x, 1 - t) the final layer changes its sign; the features of 1 - t are a rotation of
those of t, so the embedding's first matrix is rotated. MFDiT's embedding of the guidance scale w is
taken at w = 1, without guidance, and added to that of t. The largest scale of MFDiT is in no
tensor; it is taken to be 4, the code's default. Learned variances are dropped. Every tensor of the
file is used, or listed in `unused` with its reason; a tensor that is neither is an error.

DiT, SiT and REPA without its projectors name their tensors alike, so their files need the layout
as an argument. The flow models of kyungmnlee/dmf are in the layout `repa`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import registry
from backbones.network import FlowNetwork, build_network
from backbones.noise import VpNoise
from backbones.pretrained.layouts import CONVERTERS
from backbones.pretrained.public_files import read_state, shard_hint
from backbones.pretrained.source import Source
from backbones.pretrained.wrappings import unwrapped
from registry.core import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A network's architecture and weights, and the parts of the file that were not needed."""

    layout: str
    backbone: str
    shape: tuple[int, ...]
    num_classes: int
    fields: Mapping[str, Any]
    keys: tuple[str, ...]  # of "v" and "u"
    weights: Mapping[str, Tensor]
    unused: Mapping[str, str]
    notes: tuple[str, ...] = ()  # what was decided where the file leaves a choice

    def network(self) -> FlowNetwork:
        """The network, its weights loaded strictly."""
        cls = registry.backbones.get(self.backbone)

        def backbone(**given: Any) -> torch.nn.Module:
            return cls(**self.fields, **given)

        meaning = VpNoise() if self.layout == "dit" else None
        net = build_network(
            backbone, self.shape, self.num_classes, self.keys, parametrisation=meaning
        )
        ours = net.state_dict()
        wrong = [f"{name} is missing" for name in ours.keys() - self.weights.keys()]
        wrong += [f"{name} is unknown here" for name in self.weights.keys() - ours.keys()]
        wrong += [
            f"{name} has shape {tuple(value.shape)}, here {tuple(ours[name].shape)}"
            for name, value in self.weights.items()
            if name in ours and value.shape != ours[name].shape
        ]
        if wrong:
            raise ValueError(f"layout {self.layout!r}: {'; '.join(sorted(wrong)[:5])}")
        net.load_state_dict(dict(self.weights))
        return net


def layouts() -> tuple[str, ...]:
    """The layouts that can be read."""
    return tuple(CONVERTERS)


def import_weights(
    state: Mapping[str, Any],
    layout: str = "",
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> Imported:
    """Convert a public checkpoint; ValueError names a tensor that is missing or those left over.

    Without `layout` the names of the tensors decide. Sizes that no paper has need `num_heads`.
    `num_classes` says whether the last row of the table of labels is a class or stands for no
    label; see `transformer_parts._labels`.
    """
    tensors, unused = unwrapped(state)
    layout = layout or _detect(tensors)
    if layout not in CONVERTERS:
        raise ValueError(
            f"no checkpoint layout {layout!r}.{did_you_mean(layout, layouts())} "
            f"There are: {', '.join(layouts())}"
        )
    source = Source(tensors, layout, num_classes)
    imported = CONVERTERS[layout](source, num_heads)
    source.check_empty()
    return Imported(
        **imported, layout=layout, unused=unused | source.unused, notes=tuple(source.notes)
    )


def _detect(names: Mapping[str, Tensor]) -> str:
    if "map_layer0.weight" in names:
        return "py_mean_flow"
    if "blocks.0.mlp.w12.weight" in names:
        return "lightning_dit"
    if "final_layer_u.linear.weight" in names:
        return "mf_dit"
    if "r_embedder.mlp.0.weight" in names:
        return "mean_flow_sit"
    if "logvar_linear.weight" in names:
        return "dmf"
    if "projectors.0.0.weight" in names:
        return "repa"
    if "t_embedder.mlp.0.weight" in names:
        raise ValueError(
            "the checkpoint may be a DiT's or a SiT's; say which: layout 'dit' or 'sit', or "
            "'repa' or 'dmf' for those of these codes"
        )
    raise ValueError(
        f"the checkpoint has none of the layouts {', '.join(layouts())}; its first names are "
        f"{', '.join(sorted(names)[:5])}"
    )


def import_file(
    path: Path, layout: str = "", num_heads: int | None = None, num_classes: int | None = None
) -> Imported:
    """A public checkpoint, converted; ValueError names the file and what is wrong with it."""
    try:
        state = read_state(path)
        try:
            return import_weights(state, layout, num_heads, num_classes)
        except ValueError as error:
            raise ValueError(f"{error}{shard_hint(path)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
