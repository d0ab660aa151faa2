"""What is under test: an objective by name, made anew for every claim, and data to test it on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
    Unlabelled,
)
from registry import weights
from registry.protocols import (
    NULL_LABEL,
    Batch,
    Cond,
    LossOutput,
    Network,
    Teacher,
    couples_rows,
    differentiated_by,
    group_of,
    parts,
    required_heads,
    rows_of,
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
    form: int = 0  # which of the changes of `exact_with` make it exact
    needs_labels: bool = False  # then data without labels get some that say nothing of them
    # The values of each field with which losses were taken; of a part, its kind.
    tried: dict[str, set[str]] = field(default_factory=dict, compare=False)

    def objective(
        self,
        *,
        exact: bool = False,
        teacher: nn.Module | None = None,
        average: nn.Module | None = None,
    ) -> Any:
        """A new objective; `exact` applies what its fixed point needs, `teacher` is attached.

        `average` is attached instead of it to teachers that follow the network in training.
        """
        objective = self.make()
        if exact and (changes := self.exact_with()):
            objective = replace(objective, **changes)
        objective = self.edit(objective)
        for part in {id(part): part for _, part in parts(objective)}.values():
            if holds_weights(part):
                follows = average is not None and not getattr(part, "distils", False)
                if (network := average if follows else teacher) is not None:
                    part.attach(network)
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
        if self.needs_labels and batch.cond is None:
            label = torch.arange(len(batch)) // self.group % NUM_CLASSES
            batch = replace(batch, cond={"label": label})
        with self.around():
            return objective.loss(self.wrap(net), batch, rng)

    def batch(self, shape: Shape = (2,), n: int = 8, **how: Any) -> Batch:
        """Normal data as those of `random_batch`, in whole groups: n rows or a few more."""
        return random_batch(shape, n, group=self.group, **how)

    def batch_of(self, law: Oracle, n: int, seed: int, step: int) -> Batch:
        """Rows of a law; where labels say nothing, they are those that `loss` gives."""
        batch = law_batch(law, n, seed, step, self.group)
        return replace(batch, cond=None) if self.needs_labels else batch

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
        return weighted | dict(self._declared_exact()[self.form])

    def forms(self) -> tuple[Subject, ...]:
        """The subject with each of the changes of `exact_with`."""
        return tuple(replace(self, form=form) for form in range(len(self._declared_exact())))

    def variants(self) -> Iterator[tuple[Subject, bool]]:
        """The objective with its defaults and, where that is another one, each exact form."""
        yield self, False
        yield from ((form, True) for form in self.forms() if form.exact_with())

    def with_changes(self) -> str:
        """Such as " with other clip, weight", of the form that is tested; "" without any."""
        return f" with other {', '.join(changes)}" if (changes := self.exact_with()) else ""

    def stages(self, *, exact: bool) -> tuple[int, ...]:
        """Those of STEPS at which the objective differs: its schedules decide which these are."""
        kept: dict[int, Tensor] = {}
        for step in STEPS:
            toy = self.on_toy(exact=exact)
            per_sample = toy(self.batch(n=32, step=step, labels="given")).per_sample
            gradient = gradients(per_sample, list(toy.net.parameters()))
            seen = torch.cat([per_sample.detach(), *(g.flatten() for g in gradient)])
            if not any(torch.equal(seen, other) for other in kept.values()):
                kept[step] = seen
        return tuple(kept)

    def _declared_exact(self) -> tuple[Mapping[str, Any], ...]:
        declared = getattr(self.make(), "exact_with", {})
        return (declared,) if isinstance(declared, Mapping) else tuple(declared)

    @property
    def fixed_point(self) -> str:
        return getattr(self.make(), "fixed_point", "pointwise")

    @property
    def differentiates(self) -> tuple[str, ...]:
        return differentiated_by(self.make())

    @property
    def exact_outputs(self) -> dict[str, str]:
        """For each output whose exact value is known: which of the velocities it is."""
        known = {key: key for key in VELOCITIES} | dict(getattr(self.make(), "exact_outputs", {}))
        return {key: known[key] for key in self.make().heads if key in known}

    @property
    def couples_rows(self) -> bool:
        return couples_rows(self.make())

    @property
    def group(self) -> int:
        return group_of(self.make())

    @property
    def changes_coupling(self) -> bool:
        """Whether a part couples the rows of a batch: data and noise are then dependent."""
        return any(getattr(part, "couples_rows", False) for _, part in parts(self.make()))

    @property
    def keys(self) -> tuple[str, ...]:
        return required_heads(self.objective())

    def exact_network(self, law: Oracle, *, exact: bool = True) -> nn.Module:
        """The law's solution on the objective's own path, with the outputs that it may read."""
        keys = self.exact_keys if exact else self.keys
        return ExactNetwork(self.exact_field(law), keys, self.exact_outputs)

    @property
    def exact_keys(self) -> tuple[str, ...]:
        return required_heads(self.objective(exact=True))

    def exact_field(self, law: Oracle) -> nn.Module:
        solution = exact_on(law, path_of(self.make()))
        return Unlabelled(solution) if self.needs_labels else solution


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
    group: int = 1,
) -> Batch:
    """Normal data with no labels, "given" ones, or only "null" ones.

    The rows of a group have one label, and the last group is made whole.
    """
    rng, groups = torch.Generator().manual_seed(1000 + seed), math.ceil(n / group)
    n = groups * group
    x0 = torch.randn(n, *shape, generator=rng, dtype=F64).to(dtype)
    label = torch.randint(NUM_CLASSES, (groups,), generator=rng).repeat_interleave(group)
    if labels == "null":
        label = torch.full_like(label, NULL_LABEL)
    cond = None if labels == "none" else {"label": label}
    return Batch(x0=x0, cond=cond, step=step, progress=progress(step))


def law_batch(law: Oracle, n: int, seed: int, step: int | None = None, group: int = 1) -> Batch:
    """Rows of a law; the seed also chooses the step of the run, unless one is given.

    Rows are in whole groups of one label each, where the law has labels.
    """
    n, rng = math.ceil(n / group) * group, torch.Generator().manual_seed(10_000 + seed)
    x0, cond = law.sample(n, rng) if group == 1 else _in_groups(law, n, group, rng)
    step = STEPS[seed % len(STEPS)] if step is None else step
    return Batch(x0=x0, cond=cond, step=step, progress=progress(step))


def _in_groups(law: Oracle, n: int, group: int, rng: torch.Generator) -> tuple[Tensor, Cond | None]:
    """n rows, of which each `group` in turn have one label; labels come about as often as ever."""
    x0, cond = law.sample(2 * n + 4 * group * NUM_CLASSES, rng)
    labels = torch.zeros(len(x0)) if cond is None else cond["label"]
    of_label = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    groups = torch.cat([rows[: len(rows) // group * group].view(-1, group) for rows in of_label])
    chosen = groups[torch.randperm(len(groups), generator=rng)[: n // group]].flatten()
    return x0[chosen], rows_of(cond, chosen)


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
