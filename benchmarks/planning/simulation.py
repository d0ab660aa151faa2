"""What a training step holds in memory and computes, found by running it on tensors without data.

The objective's own loss and its backward run on fake tensors, which have shapes and no contents, so
a network of any size takes no memory and a few seconds. A dispatch mode sees every tensor that is
made and, by weak references to storages, when it is freed. So passes without graph, recomputed
blocks, dual numbers and attention matrices of forward-mode derivatives are counted as they happen.
Workspaces inside a kernel are not seen. Attention is the fused kernel where training takes it.

A loss that looks at values (a coupling, a mask) cannot run on fake tensors. Two small shares of it
are measured on real tensors instead.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.planning.outline import Outline
from benchmarks.runs.passes import COUNTED_STEPS, LATE, count_passes, counted_rows
from registry.protocols import Batch, Cond, Objective, Share, parts, required_heads
from trainers.engines import TrainStep
from trainers.rng import generator
from zoo.teachers import Frozen

CPU = torch.device("cpu")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Bytes of one share's loss and backward beside weights, and its floating-point operations.

    `kept` waits for the backward pass. `moments` are the peaks between one weight's gradient and
    the next. Each has the bytes of the gradients made by then, which are no part of the peak.
    """

    kept: float
    moments: tuple[tuple[float, float], ...]
    flops: float

    @property
    def peak(self) -> float:
        return max(peak for peak, _ in self.moments)

    def towards(self, other: Activity, share: float) -> Activity:
        """On the line between the two: this one at share 0, the other at share 1."""

        def mean(a: float, b: float) -> float:
            return a + share * (b - a)

        return Activity(
            kept=mean(self.kept, other.kept),
            moments=tuple(
                (mean(a, b), made)
                for (a, made), (b, _) in zip(self.moments, other.moments, strict=True)
            ),
            flops=mean(self.flops, other.flops),
        )


@dataclass(frozen=True, kw_only=True)
class Update:
    """Bytes of the optimizer's state, and those that an update takes beside it."""

    state: float
    workspace: float


class Simulation:
    """The steps of one run without its data; `activity` and `update` say what they take."""

    def __init__(self, outline: Outline):
        self._outline = outline
        self._fake: FakeTensorMode | None = FakeTensorMode(allow_non_fake_inputs=True)
        self._found: dict[int, Activity] = {}
        outline.step.autocast = partial(outline.engine.autocast, CPU)
        with self._fake:
            _remake(outline.step, lambda t: torch.empty(t.shape, dtype=t.dtype))

    def activity(self, rows: int, most: int) -> Activity:
        """The activity of a share of `rows` rows, up to `most`: exact there and at the fewest rows
        that there can be, linear between.

        A peak is the largest of sums that are linear in the rows, but quotas are whole rows.
        """
        low, high = self._ends(most)
        if rows in (low, high):
            return self._at(rows)
        return self._at(low).towards(self._at(high), (rows - low) / (high - low))

    def update(self) -> Update:
        """What one update of all weights takes."""
        net = self._outline.step.net
        with self._fake or nullcontext(), _Live(self._fake) as live:
            params = [nn.Parameter(torch.empty(p.shape)) for p in net.parameters()]
            for p in params:
                p.grad = torch.empty_like(p)
            before = live.bytes
            optimizer = self._outline.optimizer.build(params)
            optimizer.step()
            live.close()
            state = live.bytes - before
            optimizer.step()
        return Update(state=state, workspace=live.moment[0] - before - state)

    def _ends(self, most: int) -> tuple[int, int]:
        group = self._outline.step.group
        if self._fake is not None:
            try:
                self._at(most)
                return group, most
            except RuntimeError as error:  # an error of another reason comes again on real rows
                log.warning(
                    "the loss of %s looks at values, and is measured on few real rows: %s",
                    self._outline.objective,
                    str(error).splitlines()[0],
                )
                self._materialise()
        return group, min(2 * group, most)

    def _at(self, rows: int) -> Activity:
        if rows not in self._found:
            with self._fake or nullcontext():
                self._found[rows] = self._measure(rows)
        return self._found[rows]

    def _measure(self, rows: int) -> Activity:
        out, step = self._outline, self._outline.step
        with _Live(self._fake, step) as live, live.gradients_of(step.net):
            x0 = torch.zeros(out.batch_size, *out.shape)
            label = torch.zeros(out.batch_size, dtype=torch.int64)
            cond = {"label": label} if out.num_classes else None
            share = Share(0, out.batch_size // rows)
            batch = Batch(x0, cond, LATE, 1.0, share)
            loss = step(batch, generator(0, 0, LATE)).per_sample.mean()
            kept = live.bytes
            loss.backward()
        return Activity(kept=kept, moments=(*live.moments, live.moment), flops=live.flops)

    def _materialise(self) -> None:
        self._fake, step = None, self._outline.step
        for module in (step.net, step.teachers, step.features):
            _remake(module, lambda t: torch.randn(t.shape).mul_(0.02).to(t.dtype))


_ATTENTION = {  # torch counts the fused attention of GPUs, by these formulas
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        torch.ops.aten._scaled_dot_product_flash_attention
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages that are not the modules' own, and the operations."""

    def __init__(self, fake: FakeTensorMode | None, *known: nn.Module):
        super().__init__()
        self._fake = fake
        self._sizes: dict[int, float] = {}
        self._refs: dict[int, Any] = {}
        for module in known:
            for tensor in (*module.parameters(), *module.buffers()):
                self._sizes[tensor.untyped_storage()._cdata] = 0.0
        self.moments: list[tuple[float, float]] = []
        self.bytes = self._peak = self._made = 0.0
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._call(func, args, kwargs)
        packet = _ATTENTION.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    @property
    def moment(self) -> tuple[float, float]:
        """The peak since the last moment ended, and the bytes taken out before."""
        return self._peak, self._made

    def close(self, taken: float = 0.0) -> None:
        """End a moment; `taken` bytes leave at its end."""
        self.moments.append(self.moment)
        self._peak, self._made = self.bytes, self._made + taken

    @contextmanager
    def gradients_of(self, net: nn.Module) -> Iterator[None]:
        """Free each weight's gradient as soon as it is made, and add up its bytes separately."""

        def taken(param: Tensor) -> None:
            param.grad = None
            self.close(param.numel() * param.element_size())

        handles = [p.register_post_accumulate_grad_hook(taken) for p in net.parameters()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        # The cache of fake tensors does not know the storage's size, which its result depends on.
        whole = torch.ops.aten._new_zeros_with_same_feature_meta.default
        if self._fake is None or func is not whole:
            return func(*args, **kwargs)
        self._fake.cache_enabled = False
        try:
            return func(*args, **kwargs)
        finally:
            self._fake.cache_enabled = True

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._refs[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.bytes += self._sizes[key]
        self._peak = max(self._peak, self.bytes)

    def _forget(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
        del self._refs[key]


def _remake(module: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(make(p), requires_grad=p.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, make(buffer))


def mean_over_steps(objective: Objective, shape: Sequence[int], labelled: bool) -> float:
    """The network passes of a mean step, relative to step `LATE`, where all that recurs happens.

    They are counted on a network of one weight. No teacher of the objective may have one yet.
    """
    alone = _OneWeight(required_heads(objective))
    for _, part in parts(objective):
        if isinstance(part, Frozen):
            part.attach(_OneWeight(("v",)))
    step = TrainStep(alone, objective).train()
    count = counted_rows(step.group)
    rows = torch.zeros(count, *shape)
    cond = {"label": torch.zeros(count, dtype=torch.int64)} if labelled else None
    batches = [Batch(rows, cond, LATE + i, 1.0) for i in range(COUNTED_STEPS)]
    first = count_passes(step, batches[:1], 0).total
    return count_passes(step, batches, 0).total / first


class _OneWeight(nn.Module):
    """A network of one weight with the outputs that are asked for."""

    def __init__(self, keys: Sequence[str]):
        super().__init__()
        self._keys = keys
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
        return {key: self.weight * (t if key == "logvar" else x) for key in self._keys}
