"""Targets under the dropout masks of the prediction, as in ECT, SoFlow, RCGM and TwinFlow.

Every call of a teacher with dropout = "shared" starts from the state that torch's global generators
had when the loss began, and leaves the generators as it found them. So it has the masks of the
first call of the loss that draws any, the prediction, whether it comes before or after that call.

    same masks     a call with as many rows as the prediction, and layers that draw in the same
                   order: the network itself, its average, another network of the same backbone
    other masks    a call with fewer or more rows, a call beside a second prediction of the loss,
                   which draws after the first, and a network with other layers

Activation checkpointing keeps the masks, since it draws them again from the state of its forward.
Compiled kernels draw in another order, and are refused before training. Teachers that are in
training mode normalise by their own batch where they have batch norms, and the running statistics
of `online` then count two batches a step.

The trainer says where a loss begins. In a loop of your own put `with shared_dropout():` around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

from zoo.derivatives.methods import replay_rng

Dropout = Literal["off", "shared"]
GlobalState = tuple[Tensor, Tensor | None]  # of torch's global generators: CPU, current GPU

# The state at the beginning of the loss that is being computed.
_BEGINNING: ContextVar[GlobalState | None] = ContextVar("beginning", default=None)


@contextmanager
def shared_dropout() -> Iterator[None]:
    """The `with` block is one loss: teachers with dropout = "shared" find its masks."""
    token = _BEGINNING.set(_global_state())
    try:
        yield
    finally:
        _BEGINNING.reset(token)


def shares_dropout(teacher: object) -> bool:
    """Whether the teacher's calls have the dropout masks of the prediction."""
    return getattr(teacher, "dropout", "off") == "shared"


@contextmanager
def masks_of_the_prediction() -> Iterator[None]:
    """ValueError if the block draws random numbers and nobody said where the loss begins."""
    with replay_rng():
        beginning = _BEGINNING.get()
        if beginning is not None:
            _restore(beginning)
            yield
            return
        before = _global_state()
        yield
        if not _same(before, _global_state()):
            raise ValueError(
                "a teacher with dropout = 'shared' drew dropout masks, and where the loss began is "
                "not known. In a training loop of your own, compute each loss inside `with "
                "shared_dropout():` of zoo.dropout, or set dropout = 'off'"
            )


def _global_state() -> GlobalState:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda


def _restore(state: GlobalState) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def _same(one: GlobalState, other: GlobalState) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b is None or (a is not None and b is not None and a.equal(b)) for a, b in pairs)


def check_dropout(name: str, dropout: str) -> None:
    if dropout not in get_args(Dropout):
        allowed = ", ".join(map(repr, get_args(Dropout)))
        raise ValueError(f"{name}.dropout = {dropout!r}; allowed: {allowed}")
