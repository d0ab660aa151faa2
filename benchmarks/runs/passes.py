"""What a step costs in passes of the network, counted on real steps by hooks.

The unit is one forward of the whole batch. A backward costs two (the gradients of activations and
of weights), a forward-mode tangent one more, beside its forward. So flow matching takes
1 + 2 = 3, and a method's cost over it is a ratio that no machine and no implementation can beat
while it makes the same calls. A teacher's calls count like the network's.

A derivative that is trained, in one pass with its value, costs 6: its backward goes back through
the value and through the tangent, by two products each for every product of the forward. A backward
through fixed weights, to the inputs alone, costs one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from benchmarks.experiments.experiment import Experiment
from registry.protocols import Batch, Share, read_share, to_device
from trainers.engines import TrainStep
from trainers.rng import generator
from zoo.derivatives.dual_tensors import DualTensor, primal_of

COUNTED_STEPS = 6  # the mean is exact for what is done at every 2nd, 3rd or 6th step
LATE = 6_000_000  # the first counted step, by which schedules over steps have settled
COUNTED_ROWS = 64  # at most: more rows take longer, fewer round quotas more


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes of the network per step, of the whole batch; a `backward` costs two forwards."""

    forward: float
    tangent: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.tangent + 2 * self.backward


def passes_per_step(experiment: Experiment) -> Passes:
    """The mean over `COUNTED_STEPS` steps late in the run."""
    dataset, device = experiment.dataset, experiment.device
    step = TrainStep(experiment.net, experiment.objective).to(device).train()
    whole = Share(group=step.group)
    rows = min(experiment.batch_size, counted_rows(step.group))

    def batch(number: int) -> Batch:
        x0, cond = read_share(dataset, number, rows, experiment.seed, whole)
        return Batch(x0.to(device), to_device(cond, device), LATE + number, 1.0)

    with experiment.engine.autocast(device):
        return count_passes(step, map(batch, range(COUNTED_STEPS)), experiment.seed)


def counted_rows(group: int) -> int:
    """How many rows are counted on: `COUNTED_ROWS` or fewer in whole groups, one group at least."""
    return max(COUNTED_ROWS // group, 1) * group


def count_passes(step: TrainStep, batches: Iterable[Batch], seed: int) -> Passes:
    """The mean over batches of what the loss of each asks of the network and its teachers.

    Whether a call is differentiated shows in the gradient of the loss by the call's outputs, which
    takes no backward through the network.
    """
    forward, tangent, backward, total = 0, 0, 0.0, 0
    for batch in batches:
        with _Calls(step.net, *step.teachers.values()) as calls:
            per_sample = step(batch, generator(seed, 0, batch.step, batch.x0.device)).per_sample
        for call in calls.made:
            forward += call.rows
            tangent += call.rows if call.has_tangent else 0
            backward += call.rows * _backwards(per_sample.mean(), call)
        total += len(per_sample)
    return Passes(forward=forward / total, tangent=tangent / total, backward=backward / total)


@dataclass(frozen=True)
class _Call:
    rows: int
    has_tangent: bool
    moves_weights: bool
    values: list[Tensor]  # of the outputs, those with a gradient
    tangents: list[Tensor]


class _Calls:
    """Collects the calls of these networks inside the `with` block."""

    def __init__(self, *networks: nn.Module):
        self.networks = networks
        self.made: list[_Call] = []

    def __enter__(self) -> _Calls:
        self._handles = [
            net.register_forward_hook(self._note, with_kwargs=True) for net in self.networks
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(
        self,
        net: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Mapping[str, Tensor],
    ) -> None:
        inputs = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        one_pass = any(isinstance(part, DualTensor) for part in inputs)
        dual = not one_pass and any(_tangent(part) is not None for part in inputs)
        values = [primal_of(value) for value in out.values()]
        tangents = [_tangent(value) for value in values] if dual else []
        moves_weights = any(parameter.requires_grad for parameter in net.parameters())
        self.made.append(
            _Call(
                rows=len(inputs[0]),
                has_tangent=one_pass or dual,
                moves_weights=moves_weights,
                values=_with_gradient(values),
                tangents=_with_gradient(tangents),
            )
        )


def _tangent(x: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(x).tangent
    return tangent


def _with_gradient(outputs: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that have a gradient, as they are outside of torch.func.jvp."""
    found = []
    for part in outputs:
        while part is not None and torch._C._functorch.is_gradtrackingtensor(part):
            part = torch._C._functorch.get_unwrapped(part)
        if part is not None and part.requires_grad:
            found.append(part)
    return found


def _backwards(loss: Tensor, call: _Call) -> float:
    """How many backwards through the network the loss takes for a call."""
    if _reached(loss, call.tangents):
        through = 2.0
    else:
        through = 1.0 if _reached(loss, call.values) else 0.0
    return through if call.moves_weights else through / 2


def _reached(loss: Tensor, outputs: list[Tensor]) -> bool:
    if not outputs:
        return False
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in gradients)
