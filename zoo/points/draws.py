"""What every objective draws first, in one order: noise, times, dropped labels, guidance.

All of it is drawn for the whole batch, and the rows of the share are kept. So no draw depends on
how a batch is shared out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from registry.protocols import Batch, Coupling, Draw, GuidanceLaw, Path, rows_of
from zoo.couplings import coupled_noise
from zoo.guidance import drop_labels, with_guidance
from zoo.ops import normal_like
from zoo.times import law_at

Times = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # such as a time law


def draw(
    batch: Batch,
    rng: torch.Generator,
    path: Path,
    times: Times,
    label_dropout: float,
    *,
    guidance: GuidanceLaw | None = None,
    coupling: Coupling | None = None,
    group: int = 1,
) -> Draw:
    """One point of the path for each row of the batch's share, with its times and conditions.

    A guidance law draws cond["guidance"]; rows with r = t are told the whole interval. The rows of
    a `group` have one t and one r. Where labels are dropped, a row without label has the data of
    another group, so that it is a draw of all data: its own group is one of one label.
    """
    x1 = normal_like(batch.x0, rng)
    if coupling is not None:
        x1 = coupled_noise(coupling, batch.x0, x1, batch.cond)
    t, r = law_at(times, batch.step)(len(batch) // group, rng)
    if group > 1:
        t, r = t.repeat_interleave(group), r.repeat_interleave(group)
    cond, labelled = drop_labels(batch.cond, label_dropout, rng, len(batch))
    x0 = batch.x0
    if group > 1 and label_dropout > 0 and cond is not None and "label" in cond:
        taken = _from_other_groups(labelled, group)
        x0, cond = x0[taken], {**(rows_of(cond, taken) or {}), "label": cond["label"]}
    if guidance is not None:
        cond = with_guidance(cond, guidance, r == t, rng)
    x0, x1, t, r, cond, labelled = batch.share.rows(x0, x1, t, r, cond, labelled)
    sample = path.sample(x0, x1, t)
    return Draw(
        batch=batch,
        path=path,
        x0=x0,
        x1=x1,
        t=t,
        r=r,
        x_t=sample.x_t,
        velocity=sample.velocity,
        cond=cond,
        labelled=labelled,
    )


def _from_other_groups(labelled: Tensor, group: int) -> Tensor:
    """Whose data each row has: its own, or without label those of another group.

    Row j of a group takes row j of the j-th group after it. So no two rows of a group have the data
    of one group, if there are as many groups as a group has rows.
    """
    row = torch.arange(len(labelled), device=labelled.device)
    return torch.where(labelled, row, (row + row % group * group) % len(row))
