"""What the rows of a data set must be; every batch is checked as it is read.

    x0      float32 [n *shape], finite; pictures, of 1 or 3 channels, in [-1, 1]
    cond    None, or conditions by name, each with n rows; "label" is int64 [n] and below
            num_classes, or NULL_LABEL. A data set has labels exactly if num_classes is not 0.

Without these checks a network would be trained on other values than those that samples and metrics
are made for, or the run would fail in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from registry.protocols.batches import NULL_LABEL, Cond, Share
from registry.protocols.capabilities import groups_by_label, scaled_by
from registry.protocols.data import Coded, Dataset, Shareable

TOLERANCE = 1e-3  # of the range of pictures, for what arithmetic rounds
_STEP = 1 / 255  # 8 bits in [-1, 1] have no value from 0 to this, 8 bits in [0, 1] have black at 0

_WHOLE = Share()


def is_picture(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are grey or RGB pictures [c h w]."""
    return len(shape) == 3 and shape[0] in (1, 3)


def read_share(
    dataset: Any, step: int, n: int, seed: int, share: Share
) -> tuple[Tensor, Cond | None]:
    """The share's rows of a step's batch, with the conditions of all n rows, checked.

    A data set that is not Shareable reads the whole batch for it. Where the share is cut by groups,
    the rows of each have one label. ValueError for rows that are not what a data set must give.
    """
    check_groups(dataset, share.group)
    labelled = share.group > 1 and dataset.num_classes > 0
    how = {"same_label": share.group} if labelled else {}
    what = f"batch({step}, {n}, {seed}{f', same_label={share.group}' if how else ''})"
    whole = share.count == 1 or not isinstance(dataset, Shareable)
    given = (
        dataset.batch(step, n, seed, **how) if whole else dataset.batch_share(step, n, seed, share)
    )
    x0, cond = _pair(dataset, given, what)
    check_rows(dataset, x0, cond, n, what, _WHOLE if whole else share, first=step == 0)
    if labelled:
        _check_same_label(dataset, (cond or {})["label"], share.group, what)
    return (share.rows(x0)[0] if whole else x0), cond


def check_groups(dataset: Dataset, group: int) -> None:
    """ValueError for labelled data that cannot give groups of so many rows of one label."""
    if group > 1 and dataset.num_classes and not groups_by_label(dataset):
        raise ValueError(
            f"the objective takes groups of {group} rows of one label, and the data set "
            f"{dataset.name!r} cannot give them. Choose another data set, or one without labels; a "
            "data set of your own declares groups_by_label = True and takes "
            "batch(step, n, seed, same_label=k)"
        )


def check_reference(dataset: Dataset, n: int, seed: int) -> tuple[Tensor, Cond | None]:
    """`dataset.reference(n, seed)`, checked; the labels of samples are checked, too.

    ValueError for rows that are not what a data set must give.
    """
    what = f"reference({n}, {seed})"
    x0, cond = _pair(dataset, dataset.reference(n, seed), what)
    expected = min(n, dataset.size) if dataset.size else n
    check_rows(dataset, x0, cond, expected, what, first=True)
    check_conditions(dataset, dataset.sample_labels(n), n, f"sample_labels({n})")
    return x0, cond


def check_rows(
    dataset: Dataset,
    x0: Any,
    cond: Any,
    n: int,
    what: str,
    share: Share = _WHOLE,
    *,
    first: bool = False,
) -> None:
    """ValueError unless these are n rows of the data set, of which x0 has those of the share.

    `what` says in an error which rows these are. The first rows are judged more strictly: pictures
    in [0, 1] are refused there, while later a batch may happen to have no dark pixel.
    """
    where = f"the data set {dataset.name!r}, {what}"
    wanted = (share.size(n), *dataset.shape)
    if not isinstance(x0, Tensor) or x0.dtype != torch.float32:
        given = f"of {x0.dtype}" if isinstance(x0, Tensor) else f"a {type(x0).__name__}"
        raise ValueError(f"{where}: x0 is {given}; give a torch.Tensor of float32")
    if tuple(x0.shape) != wanted:
        raise ValueError(
            f"{where}: x0 has the shape {tuple(x0.shape)}; {wanted[0]} rows of the data set's "
            f"shape {tuple(dataset.shape)} are asked for, which is {wanted}"
        )
    if x0.device.type == "cpu" and x0.numel():  # a look at values elsewhere waits for the device
        _check_values(dataset, x0, where, first)
    check_conditions(dataset, cond, n, what)


def _check_values(dataset: Dataset, x0: Tensor, where: str, first: bool) -> None:
    low, high = (float(value) / scaled_by(dataset) for value in x0.aminmax())
    if not (abs(low) < torch.inf and abs(high) < torch.inf):  # aminmax gives NaN if one is NaN
        row = int((~x0.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{where}: x0 has values that are not finite, the first in row {row}")
    if not is_picture(dataset.shape) or isinstance(dataset, Coded):
        return
    outside = max(-low, high) > 1 + TOLERANCE
    if outside or (first and 0 <= low < _STEP and 0.5 < high):
        raise ValueError(
            f"{where}: x0 has values from {low:.4g} to {high:.4g}; pictures [c h w] of 1 or 3 "
            "channels are in [-1, 1]. Give 2 x - 1 for x in [0, 1], x / 127.5 - 1 for x from 0 to "
            "255. If they are no pictures, give the data set a `decode` that makes pictures of them"
        )


def check_conditions(dataset: Dataset, cond: Any, n: int, what: str) -> None:
    """ValueError unless these are conditions of n rows of the data set; see the module."""
    where = f"the data set {dataset.name!r}, {what}"
    if cond is not None and not isinstance(cond, Mapping):
        raise ValueError(
            f"{where}: the conditions are a {type(cond).__name__}; give None or a dict such as "
            '{"label": labels}'
        )
    for name, values in (cond or {}).items():
        if not isinstance(values, Tensor) or not values.ndim or len(values) != n:
            given = (
                f"of shape {tuple(values.shape)}"
                if isinstance(values, Tensor)
                else f"a {type(values).__name__}"
            )
            raise ValueError(
                f"{where}: cond[{name!r}] is {given}; give a torch.Tensor with {n} rows"
            )
    _check_labels(dataset, (cond or {}).get("label"), where)


def _check_labels(dataset: Dataset, labels: Tensor | None, where: str) -> None:
    num_classes = dataset.num_classes
    if (labels is None) != (num_classes == 0):
        what = "no labels" if labels is None else "labels"
        raise ValueError(
            f"{where}: there are {what}, and num_classes is {num_classes}. Give cond['label'] for "
            "every batch of a data set with classes; without labels num_classes is 0"
        )
    if labels is None:
        return
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise ValueError(
            f"{where}: cond['label'] is {labels.dtype} of shape {tuple(labels.shape)}; give int64, "
            "one for each row"
        )
    if labels.device.type != "cpu" or not len(labels):
        return
    low, high = map(int, labels.aminmax())
    if low < NULL_LABEL or high >= num_classes:
        raise ValueError(
            f"{where}: the labels are from {low} to {high}, and num_classes is {num_classes}: they "
            f"must be from 0 to {num_classes - 1}, or {NULL_LABEL} for a row without a label"
        )


def _check_same_label(dataset: Dataset, labels: Tensor, group: int, what: str) -> None:
    if labels.device.type != "cpu":
        return
    groups = labels.view(-1, group)
    if len(mixed := (groups != groups[:, :1]).any(1).nonzero()):
        first = int(mixed[0])
        raise ValueError(
            f"the data set {dataset.name!r}, {what}: the rows {first * group} to "
            f"{(first + 1) * group - 1} have the labels {groups[first].tolist()}; they are a "
            "group, and must have one"
        )


def _pair(dataset: Dataset, given: Any, what: str) -> tuple[Any, Any]:
    if not (isinstance(given, tuple | list) and len(given) == 2):
        raise ValueError(
            f"the data set {dataset.name!r}, {what}: it gives a {type(given).__name__}; give two "
            "values, x0 and the conditions (None without any)"
        )
    return given[0], given[1]
