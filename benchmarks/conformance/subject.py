"""What is under test: an objective by name, made anew for every claim, and data to test it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conformance.networks import (
    NUM_CLASSES,
    VELOCITIES,
    ExactNetwork,
    Shape,
    Toy,
)
from registry import weights
from registry.protocols import (
    NULL_LABEL,
    Batch,
    LossOutput,
    Network,
    Teacher,
    couples_rows,
    parts,
    required_heads,
)
from zoo.oracles import GaussianOracle, MixtureOracle, Oracle, exact_on
from zoo.paths import path_of
from zoo.weighting import Unweighted

F64 = torch.float64

# It lies within +-4, to which some methods clip their states, and its elements differ.
GAUSSIAN = GaussianOracle([0.6, -0.4], [0.4, 0.8])
# It is skewed given x_t, within a class and over all classes.
MIXTURE = MixtureOracle(
    [[2.2, -1.6], [-0.5, 0.4], [0.3, 1.2]],
    [[0.3, 0.4], [0.5, 0.4], [0.4, 0.3]],
    [0.15, 0.65, 0.2],
    labels=[0, 0, 1],
    rtol=1e-6,
)
ALL = "all rows"
# Steps below it are as good as none at all: Shortcut's anchor has t - r = 2^-14 where it is exact.
SHORT = 0.05
FEWEST = 8  # rows of a kind, below which it is not weighed
STEPS = (0, 1, 9_000, 30_001)  # schedules: first steps, in between, and long after


def _same(thing: Any) -> Any:
    return thing


@dataclass(frozen=True)
class Subject:
    """An objective and, for a negative control, the mistake that is planted in it."""

    name: str
    make: Callable[[], Any]  # a new objective with its defaults
    edit: Callable[[Any], Any] = _same
    wrap: Callable[[Network], Network] = _same
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    edit_sampler: Callable[[Any], Any] = _same
    # The values of each field with which losses were taken; of a part, its kind.
    tried: dict[str, set[str]] = field(default_factory=dict, compare=False)

    def objective(self, *, exact: bool = False, teacher: nn.Module | None = None) -> Any:
        """A new objective; `exact` applies what its fixed point needs, `teacher` is attached."""
        objective = self.make()
        if exact and (changes := self.exact_with()):
            objective = replace(objective, **changes)
        objective = self.edit(objective)
        for part in {id(part): part for _, part in parts(objective)}.values():
            if teacher is not None and holds_weights(part):
                part.attach(teacher)
        return objective

    def on_toy(self, shape: Shape = (2,), *, exact: bool = False, scale: float = 1.0) -> OnToy:
        """A new objective with a random network, and another one as its teacher."""
        keys = self.exact_keys if exact else self.keys
        teacher = Toy(shape, keys, seed=1)
        return OnToy(
            self, self.objective(exact=exact, teacher=teacher), Toy(shape, keys, scale=scale)
        )

    def loss(self, objective: Any, net: Network, batch: Batch, seed: int = 0) -> LossOutput:
        for f in fields(objective) if is_dataclass(objective) else ():
            value = getattr(objective, f.name)
            plain = isinstance(value, (int, float, str, tuple)) or value is None
            kind = repr(value) if plain else type(value).__name__
            self.tried.setdefault(f.name, set()).add(kind)
        rng = torch.Generator().manual_seed(seed)
        with self.around():
            return objective.loss(self.wrap(net), batch, rng)

    def exact_with(self) -> dict[str, Any]:
        """The fields under which the exact solution is a fixed point of every row's loss."""
        objective = self.make()
        known = tuple(weights.get(name) for name in weights.names())
        weighted = {
            f.name: Unweighted()
            for f in (fields(objective) if is_dataclass(objective) else ())
            if f.init and isinstance(part := getattr(objective, f.name), known)
            if not isinstance(part, Unweighted)
        }
        return weighted | dict(getattr(objective, "exact_with", {}))

    @property
    def fixed_point(self) -> str:
        return getattr(self.make(), "fixed_point", "pointwise")

    @property
    def full_gradient(self) -> bool:
        return getattr(self.make(), "full_gradient", False)

    @property
    def couples_rows(self) -> bool:
        return couples_rows(self.make())

    @property
    def changes_coupling(self) -> bool:
        """Whether a part couples the rows of a batch: data and noise are then dependent."""
        return any(getattr(part, "couples_rows", False) for _, part in parts(self.make()))

    @property
    def keys(self) -> tuple[str, ...]:
        return required_heads(self.objective())

    def exact_network(self, law: Oracle, *, exact: bool = True) -> nn.Module:
        """The law's solution on the objective's own path, with the outputs that it may read."""
        return ExactNetwork(self.exact_field(law), self.exact_keys if exact else self.keys)

    @property
    def exact_keys(self) -> tuple[str, ...]:
        return required_heads(self.objective(exact=True))

    def exact_field(self, law: Oracle) -> nn.Module:
        return exact_on(law, path_of(self.make()))

    @property
    def velocity_keys(self) -> tuple[str, ...]:
        return tuple(key for key in self.make().heads if key in VELOCITIES)


@dataclass(frozen=True)
class OnToy:
    """An objective and a random network; call it on a batch."""

    subject: Subject
    objective: Any
    net: Toy

    def __call__(self, batch: Batch, seed: int = 0, net: Network | None = None) -> LossOutput:
        return self.subject.loss(self.objective, net or self.net, batch, seed)


def holds_weights(part: object) -> bool:
    """Whether it is a teacher that evaluates another network than the one in training."""
    return isinstance(part, Teacher) and (part.needs_copy or getattr(part, "distils", False))


def is_derivative(part: object) -> bool:
    return hasattr(type(part), "needs_forward_ad")


def replaced(objective: object, name: str, part: object) -> object:
    """A copy whose part 'a.b' is another one."""
    first, _, rest = name.partition(".")
    new = replaced(getattr(objective, first), rest, part) if rest else part
    return replace(objective, **{first: new})  # type: ignore[type-var]


def random_batch(
    shape: Shape = (2,),
    n: int = 8,
    *,
    labels: str = "none",
    dtype: torch.dtype = F64,
    step: int = 0,
    seed: int = 0,
) -> Batch:
    """Normal data with no labels, "given" ones, or only "null" ones."""
    rng = torch.Generator().manual_seed(1000 + seed)
    x0 = torch.randn(n, *shape, generator=rng, dtype=F64).to(dtype)
    label = torch.randint(NUM_CLASSES, (n,), generator=rng)
    if labels == "null":
        label = torch.full_like(label, NULL_LABEL)
    cond = None if labels == "none" else {"label": label}
    return Batch(x0=x0, cond=cond, step=step, progress=progress(step))


def law_batch(law: Oracle, n: int, seed: int) -> Batch:
    """Rows of a law; the seed also chooses the step of the run."""
    x0, cond = law.sample(n, torch.Generator().manual_seed(10_000 + seed))
    step = STEPS[seed % len(STEPS)]
    return Batch(x0=x0, cond=cond, step=step, progress=progress(step))


def progress(step: int) -> float:
    return step / max(STEPS)


def gradients(loss: Tensor, inputs: list[Tensor], *, again: bool = False) -> list[Tensor]:
    """The gradient of the mean of a loss, which may be taken `again`; zeros where none reaches."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in inputs]
    return list(
        torch.autograd.grad(
            loss.mean(), inputs, retain_graph=again, allow_unused=True, materialize_grads=True
        )
    )


def rows_by_kind(out: LossOutput) -> dict[str, Tensor]:
    """For each kind of rows, a mask [n] of its rows; ALL comes first.

    An objective may treat few of its rows in another way than most: one row in eight of Shortcut is
    made of two half steps, and a quarter of MeanFlow's rows have r < t. In a mean over all rows a
    mistake in the few is small beside the noise of the many. A kind is told by the length t - r of
    its step, as `LossOutput.t` and `LossOutput.r` give it. Without them all rows are of one kind.
    """
    n = len(out.per_sample)
    found = {ALL: torch.ones(n, dtype=torch.bool)}
    if out.t is None or out.r is None or len(out.t) != n:
        return found
    gap = out.t - out.r
    kinds = {
        "rows with r = t": gap == 0,
        f"rows with 0 < t - r < {SHORT}": (gap > 0) & (gap < SHORT),
        f"rows with t - r >= {SHORT}": gap >= SHORT,
    }
    present = {name: rows for name, rows in kinds.items() if rows.any()}
    return found | present if len(present) > 1 else found


def losses_by_kind(out: LossOutput) -> Iterator[tuple[str, Tensor]]:
    """The mean loss of each kind that has enough rows."""
    for name, rows in rows_by_kind(out).items():
        if name == ALL:
            yield name, out.per_sample.mean()
        elif int(rows.sum()) >= FEWEST:
            yield name, out.per_sample[rows].mean()
