"""The layouts of public checkpoints: their names, shapes and conventions, turned into ours.

Each layout is one function. It takes every tensor that it knows from a `Source` and returns the
fields of an `Imported` (imports.py): the backbone and its fields, the shape of the data and the
weights under our names. The transformers are here, with what they share in transformer_parts.py,
and the U-Net is in ddpmpp_layout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.embeddings import NUM_FREQUENCIES, frequencies, time_features
from backbones.lightning_dit import rotary_2d
from backbones.pretrained.ddpmpp_layout import py_mean_flow
from backbones.pretrained.source import Source
from backbones.pretrained.transformer_parts import (
    fixed_positions,
    gelu_mlps,
    plain,
    readout,
    transformer,
)

DECODER_FROM = {28: 20}  # DMF's first block that sees r, by the number of blocks
LOG_VARIANCE = "the log-variance by which its loss is weighted in training"
MAX_GUIDANCE = 4.0  # MFDiT divides a scale by this before embedding it


def _other_way(made: dict[str, Any]) -> None:
    """Turn a network F, with t = 1 at the data, into v(x, t) = -F(x, 1 - t)."""
    weights = made["weights"]
    for part in ("weight", "bias"):
        name = f"heads.velocity.readouts.v.linear.{part}"
        weights[name] = -weights[name]
    name = "trunk.conditioning.time.hidden.weight"
    w = frequencies(made["fields"]["max_frequency"], made["fields"]["time_features"]).double()
    if weights[name].ndim != 2 or weights[name].shape[1] != 2 * NUM_FREQUENCIES:
        raise ValueError(
            f"t_embedder.mlp.0.weight has shape {list(weights[name].shape)}; only embeddings of "
            f"{2 * NUM_FREQUENCIES} time features can be read"
        )
    cos, sin = weights[name].double().split(NUM_FREQUENCIES, dim=1)
    turned = torch.cat([cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()], dim=1)
    weights[name] = turned.float()


def _dit(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = plain(source, num_heads)
    made["fields"]["max_frequency"] = 1000.0
    readout(source, made, "velocity", "v")
    return made


def _sit(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = plain(source, num_heads)
    readout(source, made, "velocity", "v")
    _other_way(made)
    return made


def _repa(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = plain(source, num_heads)
    source.leave_out("projectors.", "its alignment with features in training")
    _scaled_norms(source, made)
    readout(source, made, "velocity", "v")
    return made


def _dmf(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = plain(source, num_heads)
    depth = made["fields"]["depth"]
    if depth not in DECODER_FROM:
        raise ValueError(
            f"which of its {depth} blocks is the first that sees r is in no tensor; it is known "
            f"for a depth of {', '.join(map(str, DECODER_FROM))} alone"
        )
    made["fields"]["decoder_from"] = DECODER_FROM[depth]
    source.notes.append(
        f"the first block that sees r is in no tensor; block {DECODER_FROM[depth]} is taken, as in "
        "the commands of its code"
    )
    source.leave_out("logvar_linear.", LOG_VARIANCE)
    _scaled_norms(source, made)
    readout(source, made, "average_velocity", "u")
    return made


def _scaled_norms(source: Source, made: dict[str, Any]) -> None:
    """The norms of q and k, where there are any, whose weights are called scales."""
    if "blocks.0.attn.q_norm.scale" not in source:
        return
    made["fields"]["qk_norm"] = True
    for i in range(made["fields"]["depth"]):
        for norm in ("attn.q_norm", "attn.k_norm"):
            scale = source.take(f"blocks.{i}.{norm}.scale")
            made["weights"][f"trunk.blocks.{i}.{norm}.weight"] = scale


def _mean_flow_sit(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = plain(source, num_heads)
    source.leave_out("logvar_linear.", LOG_VARIANCE)  # ESC's
    for number, part in ((0, "hidden"), (2, "output")):
        ours = f"trunk.conditioning.second_time.{part}"
        made["weights"] |= source.linear(f"r_embedder.mlp.{number}", ours)
    readout(source, made, "average_velocity", "u")
    return made


def _lightning_dit(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = transformer(source, num_heads)
    fixed_positions(source, made)
    made["backbone"] = "lightning_dit"
    fields, weights = made["fields"], made["weights"]
    fields["qk_norm"] = "blocks.0.attn.q_norm.weight" in source
    norms = ["norm1", "norm2"] + ["attn.q_norm", "attn.k_norm"] * fields["qk_norm"]
    for i in range(fields["depth"]):
        theirs, ours = f"blocks.{i}", f"trunk.blocks.{i}"
        weights |= source.linear(f"{theirs}.mlp.w12", f"{ours}.mlp.fc1")
        weights |= source.linear(f"{theirs}.mlp.w3", f"{ours}.mlp.fc2")
        for norm in norms:
            weights[f"{ours}.{norm}.weight"] = source.take(f"{theirs}.{norm}.weight")
    name = "heads.velocity.readouts.v.norm.weight"
    weights[name] = source.take("final_layer.norm_final.weight")
    side = made["shape"][1] // fields["patch"]
    sines, cosines = rotary_2d(side, side, fields["dim"] // fields["num_heads"]).chunk(2, dim=1)
    source.check_equal("feat_rope.freqs_sin", sines, "the rotary positions")
    source.check_equal("feat_rope.freqs_cos", cosines, "the rotary positions")
    readout(source, made, "velocity", "v")
    _other_way(made)
    return made


def _mf_dit(source: Source, num_heads: int | None) -> dict[str, Any]:
    labels = "y_embedder.embedding"
    made = transformer(source, num_heads, labels if f"{labels}.weight" in source else None)
    gelu_mlps(source, made)
    fields, weights = made["fields"], made["weights"]
    fields |= {"max_frequency": 1000.0, "second_time": "r", "norm": "rms", "qk_norm": True}
    fields["trained_positions"] = True
    weights["trunk.positions"] = source.take("pos_embed", ndim=3)[0]
    for i in range(fields["depth"]):
        for norm in ("attn.q_norm.weight", "attn.k_norm.weight"):
            weights[f"trunk.blocks.{i}.{norm}"] = source.take(f"blocks.{i}.{norm}")
    for number, part in ((0, "hidden"), (2, "output")):
        ours = f"trunk.conditioning.second_time.{part}"
        weights |= source.linear(f"r_embedder.mlp.{number}", ours)
    name = "trunk.conditioning.time.output.bias"
    weights[name] = weights[name] + _without_guidance(source)
    readout(source, made, "dual_head", "u", "final_layer_u")
    readout(source, made, "dual_head", "v", "final_layer_v")
    return made


def _without_guidance(source: Source) -> Tensor:
    """MFDiT's embedding [dim] of the guidance scale 1."""
    source.unused["w_embedder"] = f"guidance scales other than 1, of at most {MAX_GUIDANCE:g}"
    x = time_features(torch.tensor([1 / MAX_GUIDANCE]), 1000.0, "dit")[0]
    for number in (0, 2):
        layer = source.linear(f"w_embedder.mlp.{number}", "layer")
        x = F.linear(x, layer["layer.weight"], layer["layer.bias"])
        x = F.silu(x) if number == 0 else x
    return x


CONVERTERS: dict[str, Callable[[Source, int | None], dict[str, Any]]] = {
    "dit": _dit,
    "sit": _sit,
    "repa": _repa,
    "dmf": _dmf,
    "lightning_dit": _lightning_dit,
    "mean_flow_sit": _mean_flow_sit,
    "mf_dit": _mf_dit,
    "py_mean_flow": py_mean_flow,
}
