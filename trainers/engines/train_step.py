"""The module of network, objective and teachers whose call is the loss.

The objective runs inside `TrainStep.forward`, so every network call of a step passes through the
hooks that an engine may put on that module. An engine shares the global batch out to processes, and
to micro-batches of gradient accumulation. An objective draws for the whole batch and computes the
loss of a share of its rows, and the mean over equal shares of their mean losses is the mean over
the batch. So neither the noise, times, labels, couplings and quotas nor the gradient depend on how
a batch is shared out. Only dropout draws for each share. An engine numbers the shares alone: that
the groups of an objective stay whole is the business of `TrainStep`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from backbones.pretrained.tensors import digest_of
from registry.protocols import (
    Batch,
    Features,
    LossOutput,
    Objective,
    Teacher,
    couples_rows,
    group_of,
    parts,
)
from trainers.ema.averages import Ema, PowerEma, frozen_copy
from zoo.dropout import shared_dropout, shares_dropout

log = logging.getLogger(__name__)


class TrainStep(nn.Module):
    """A network, its objective, teachers, features and averages: one module whose call is the loss.

    `needs_whole` tells whether the loss of a share may read data of other rows. It is True until a
    call has shown that the objective computes its share alone.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        ema_decays: Sequence[float] = (),
        power_emas: Sequence[float] = (),
    ):
        super().__init__()
        self.net = net
        self.objective = objective
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.needs_whole = True
        self.group = group_of(objective)
        self._couples_rows = couples_rows(objective)
        self.teachers = nn.ModuleDict()
        self._owners: list[Teacher] = []
        for path, teacher in _distinct(objective, Teacher):
            key = _key(path)
            if teacher.needs_copy:
                self.teachers[key] = frozen_copy(net)
                teacher.attach(self.teachers[key])
                self._owners.append(teacher)
            elif isinstance(own := getattr(teacher, "network", None), nn.Module):
                self.teachers[key] = own
        self.features = nn.ModuleDict({_key(path): net for path, net in _feature_nets(objective)})
        self._shares_dropout = any(shares_dropout(part) for _, part in parts(objective))
        self._emas: list[Ema | PowerEma] = [Ema(net, decay) for decay in ema_decays]
        self._emas += [PowerEma(net, sigma_rel) for sigma_rel in power_emas]
        self.averages = nn.ModuleDict({_key(ema.name): ema.net for ema in self._emas})

    def forward(self, batch: Batch, rng: torch.Generator) -> LossOutput:
        batch = replace(batch, share=replace(batch.share, group=self.group))
        with self.autocast(), shared_dropout() if self._shares_dropout else nullcontext():
            out = self.objective.loss(self.net, batch, rng)
        rows, shape = batch.share.size(len(batch)), tuple(out.per_sample.shape)
        self.needs_whole = self._couples_rows or shape != (rows,)
        if shape == (len(batch),) != (rows,):
            _warn_of_waste(type(self.objective).__name__)
            per_sample, t, r = batch.share.rows(out.per_sample, out.t, out.r)
            return replace(out, per_sample=per_sample, t=t, r=r)
        if shape != (rows,):
            raise ValueError(
                f"{type(self.objective).__name__}.loss returned per_sample of shape {shape}; it "
                f"must hold one loss per row, ({rows},)"
            )
        return out

    def train(self, mode: bool = True) -> TrainStep:
        super().train(mode)
        self.teachers.eval()  # targets are evaluated without dropout
        self.averages.eval()
        self.features.eval()
        return self

    @property
    def emas(self) -> dict[str, nn.Module]:
        """The averages by their decay, then by `power_name` of their `sigma_rel`."""
        return {ema.name: ema.net for ema in self._emas}

    def compile_networks(self) -> None:
        """Compile the network and its teachers; everything around them stays eager."""
        for net in (self.net, *self.teachers.values()):
            compile_in_place(net)

    def update_averages(self, step: int) -> None:
        """After update number `step`, counting from 0."""
        for teacher in self._owners:
            teacher.update(self.net, step)
        for ema in self._emas:
            ema.update(step)


def compile_in_place(net: nn.Module) -> None:
    """Compile the network: one set of kernels for each number of rows, with eager's roundings.

    Without `emulate_precision_casts` the compiler leaves out a cast down and up again, and that
    moved time frequencies by 0.4 %.
    """
    net.compile(dynamic=False, options={"emulate_precision_casts": True})


@lru_cache  # once per class
def _warn_of_waste(name: str) -> None:
    log.warning(
        "%s.loss computes every row of the batch for each of its shares. The gradient is right, "
        "but the work is repeated; to share it out, keep the rows of the share after all draws: "
        "x0, x1, t, cond = batch.share.rows(batch.x0, x1, t, batch.cond)",
        name,
    )


def _key(path: str) -> str:
    """The path as the name of a module, which must not have dots."""
    return path.replace(".", "-")


def _distinct(objective: Objective, contract: Any) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, part in parts(objective):
        if isinstance(part, contract) and not isinstance(part, type) and id(part) not in seen:
            seen.add(id(part))
            yield path, part


def feature_sha256(objective: Objective) -> dict[str, str]:
    """What identifies the weights of each of the objective's features, by its field."""
    return {path: digest_of(net.state_dict()) for path, net in _feature_nets(objective)}


def _feature_nets(objective: Objective) -> Iterator[tuple[str, nn.Module]]:
    for path, part in _distinct(objective, Features):
        if part.feature_net is not None:
            yield path, part.feature_net
