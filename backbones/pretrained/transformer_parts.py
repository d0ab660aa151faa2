"""What the layouts of transformers share: patches, embedders, blocks, positions, final layers.

Each function takes tensors from the `Source` into what a layout of layouts.py makes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from backbones.embeddings import positions_2d
from backbones.pretrained.source import Source

NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}  # released sizes
TABLE = "trunk.conditioning.label.table.weight"


def transformer(
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


def gelu_mlps(source: Source, made: dict[str, Any]) -> None:
    for i in range(made["fields"]["depth"]):
        for part in ("fc1", "fc2"):
            ours = f"trunk.blocks.{i}.mlp.{part}"
            made["weights"] |= source.linear(f"blocks.{i}.mlp.{part}", ours)
    hidden = len(made["weights"]["trunk.blocks.0.mlp.fc1.bias"])
    made["fields"]["mlp_ratio"] = hidden / made["fields"]["dim"]


def fixed_positions(source: Source, made: dict[str, Any]) -> None:
    side = made["shape"][1] // made["fields"]["patch"]
    expected = positions_2d(side, side, made["fields"]["dim"])
    source.check_equal("pos_embed", expected, "the fixed positions")


def readout(
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


def plain(source: Source, num_heads: int | None) -> dict[str, Any]:
    """A transformer with the positions and the MLPs of DiT, without its final layer."""
    made = transformer(source, num_heads)
    fixed_positions(source, made)
    gelu_mlps(source, made)
    return made
