"""The layouts of public checkpoints: their names, shapes and conventions, turned into ours.

Each layout is one function. It takes every tensor that it knows from a `Source` and returns the
fields of an `Imported` (imports.py): the backbone and its fields, the shape of the data and the
weights under our names. The transformers are here, and the U-Net is in ddpmpp_layout.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.embeddings import NUM_FREQUENCIES, frequencies, positions_2d, time_features
from backbones.lightning_dit import rotary_2d
from backbones.pretrained.ddpmpp_layout import py_mean_flow
from backbones.pretrained.source import Source

NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}  # released sizes
TABLE = "trunk.conditioning.label.table.weight"
MAX_GUIDANCE = 4.0  # MFDiT divides a scale by this before embedding it


def _transformer(
    source: Source, num_heads: int | None, labels: str | None = "y_embedder.embedding_table"
) -> dict[str, Any]:
    """The fields and weights of every transformer, except positions, MLPs and final layers."""
    patches = source.take("x_embedder.proj.weight", ndim=4)
    dim, channels, patch, _ = patches.shape
    side = _side(source)
    if num_heads is None and dim not in NUM_HEADS:
        raise ValueError(f"the number of heads at width {dim} is in no tensor; give num_heads")
    weights = {
        "trunk.embed.weight": patches.flatten(1),
        "trunk.embed.bias": source.take("x_embedder.proj.bias"),
        **source.linear("t_embedder.mlp.0", "trunk.conditioning.time.hidden"),
        **source.linear("t_embedder.mlp.2", "trunk.conditioning.time.output"),
    }
    num_classes = 0 if labels is None else _labels(source, f"{labels}.weight", weights)
    depth = source.count(r"blocks\.(\d+)\.")
    if not depth:
        raise ValueError(f"the checkpoint has no blocks, which layout {source.layout!r} needs")
    for i in range(depth):
        theirs, ours = f"blocks.{i}", f"trunk.blocks.{i}"
        for part in ("attn.qkv", "attn.proj"):
            weights |= source.linear(f"{theirs}.{part}", f"{ours}.{part}")
        weights |= source.linear(f"{theirs}.adaLN_modulation.1", f"{ours}.modulation")
    fields = {
        "patch": patch,
        "dim": dim,
        "depth": depth,
        "num_heads": num_heads or NUM_HEADS[dim],
        "time_features": "dit",
        "max_frequency": 1.0,
        "second_time": "h",
    }
    return {
        "backbone": "dit",
        "shape": (channels, side * patch, side * patch),
        "num_classes": num_classes,
        "fields": fields,
        "weights": weights,
    }


def _side(source: Source) -> int:
    """How many patches a side of the image has, which only the table of positions tells."""
    table = source.left.get("pos_embed")
    if table is None:
        raise ValueError(
            "the checkpoint has no 'pos_embed', and no other tensor tells the size of its images. "
            "Its code keeps the positions outside the weights: add them to the file under this name"
        )
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if not side or side * side != table.shape[1]:
        raise ValueError(
            f"'pos_embed' of the checkpoint has shape {list(table.shape)}; only positions of "
            "square images, [1, side * side, dim], can be read"
        )
    return side


def _labels(source: Source, name: str, weights: dict[str, Tensor]) -> int:
    """Take the table of labels [rows dim] into the weights; returns the number of classes.

    Where a code drops labels in training, it keeps one more row than classes, the last, for no
    label. No tensor tells whether it did, so that the caller's number of classes decides. Without
    one the last row stands for no label, and a note says so. A table that has a row for each class
    and no other gets the mean of its rows for no label. One row alone is the same vector for every
    input, which is added to the bias of the time embedding.
    """
    table, wanted = source.take(name, ndim=2), source.num_classes
    rows = len(table)
    if rows == 1 and not wanted:
        bias = "trunk.conditioning.time.output.bias"
        weights[bias] = weights[bias] + table[0]
        source.notes.append(
            "its table of labels has one row, as without labels: the network has no classes"
        )
        return 0
    if wanted == rows:
        weights[TABLE] = torch.cat([table, table.mean(0, keepdim=True)])
        source.notes.append(
            f"its table of labels has a row for each of the {rows} classes and none for no label "
            "(null): it was trained without label dropout. The mean of the rows is taken for that"
        )
        return rows
    weights[TABLE] = table
    if wanted is None:
        source.notes.append(
            f"its table of labels has {rows} rows, read as {rows - 1} classes and, last, the row "
            f"for no label (null). If it was trained without label dropout, it has {rows} classes: "
            f"give num_classes = {rows} (--num-classes {rows})"
        )
    return rows - 1


def _gelu_mlps(source: Source, made: dict[str, Any]) -> None:
    for i in range(made["fields"]["depth"]):
        for part in ("fc1", "fc2"):
            ours = f"trunk.blocks.{i}.mlp.{part}"
            made["weights"] |= source.linear(f"blocks.{i}.mlp.{part}", ours)
    hidden = len(made["weights"]["trunk.blocks.0.mlp.fc1.bias"])
    made["fields"]["mlp_ratio"] = hidden / made["fields"]["dim"]


def _fixed_positions(source: Source, made: dict[str, Any]) -> None:
    side = made["shape"][1] // made["fields"]["patch"]
    expected = positions_2d(side, side, made["fields"]["dim"])
    source.check_equal("pos_embed", expected, "the fixed positions")


def _readout(
    source: Source, made: dict[str, Any], head: str, key: str, theirs: str = "final_layer"
) -> None:
    """The final layer, without the rows of learned variances."""
    ours = f"heads.{head}.readouts.{key}"
    made["weights"] |= source.linear(f"{theirs}.adaLN_modulation.1", f"{ours}.modulation")
    channels, patch = made["shape"][0], made["fields"]["patch"]
    for part, rows in source.linear(f"{theirs}.linear", f"{ours}.linear").items():
        if len(rows) % patch**2:
            raise ValueError(
                f"{theirs}.linear has {len(rows)} rows, which are not {patch}x{patch} pixels each"
            )
        cells = rows.unflatten(0, (patch * patch, -1))  # [p q, channels, ...]
        if cells.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"{theirs}.linear makes {cells.shape[1]} channels a pixel; the data have "
                f"{channels}, twice that with variances"
            )
        if cells.shape[1] == 2 * channels:
            source.unused[f"{theirs}.linear.{part.split('.')[-1]}, second half of the channels"] = (
                "learned variances"
            )
        made["weights"][part] = cells[:, :channels].flatten(0, 1).clone()
    made["keys"] = (*made.get("keys", ()), key)


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
    made = _transformer(source, num_heads)
    _fixed_positions(source, made)
    made["fields"]["max_frequency"] = 1000.0
    _gelu_mlps(source, made)
    _readout(source, made, "velocity", "v")
    return made


def _sit(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = _transformer(source, num_heads)
    _fixed_positions(source, made)
    _gelu_mlps(source, made)
    _readout(source, made, "velocity", "v")
    _other_way(made)
    return made


def _mean_flow_sit(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = _transformer(source, num_heads)
    _fixed_positions(source, made)
    _gelu_mlps(source, made)
    for number, part in ((0, "hidden"), (2, "output")):
        ours = f"trunk.conditioning.second_time.{part}"
        made["weights"] |= source.linear(f"r_embedder.mlp.{number}", ours)
    _readout(source, made, "average_velocity", "u")
    return made


def _lightning_dit(source: Source, num_heads: int | None) -> dict[str, Any]:
    made = _transformer(source, num_heads)
    _fixed_positions(source, made)
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
    _readout(source, made, "velocity", "v")
    _other_way(made)
    return made


def _mf_dit(source: Source, num_heads: int | None) -> dict[str, Any]:
    labels = "y_embedder.embedding"
    made = _transformer(source, num_heads, labels if f"{labels}.weight" in source else None)
    _gelu_mlps(source, made)
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
    _readout(source, made, "dual_head", "u", "final_layer_u")
    _readout(source, made, "dual_head", "v", "final_layer_v")
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
    "lightning_dit": _lightning_dit,
    "mean_flow_sit": _mean_flow_sit,
    "mf_dit": _mf_dit,
    "py_mean_flow": py_mean_flow,
}
