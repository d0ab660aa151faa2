"""The contracts of a method of training: an objective, its parts, and a sampler.

Time runs from t=0 (data) to t=1 (noise); `0 <= r <= t <= 1`, float32, shape [b]. `v` is the
velocity dx/dt at t, `u` the average velocity over [r, t]: `x_r = x_t - (t - r) u`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from registry.protocols.batches import Batch, Cond, LossOutput
from registry.protocols.derivatives import Derivative
from registry.protocols.networks import Network


class Objective(Protocol):
    """A frozen dataclass with one method; every choice that a paper varies is a field.

    `heads` names the outputs that it trains. Everything else is optional:

    `trains`          at which times it trains them, in the words of registry/sampling.py, the best
                      way to sample it first: every sampler that needs no more is valid for it, and
                      an error against the exact flow is worked out where it trains the map or the
                      velocity. It may be a property, where fields decide it. The default is ("map",
                      "velocity") for u, ("velocity",) for v alone
    `trains_step(t, r)`  False for a step from t to r that its loss never reaches; the default is
                      True. A sampler that takes such a step is refused
    `path`            the Path that it trains on; samplers and errors follow it. The default is the
                      linear one
    `reference`       a Reference, the paper that it comes from
    `couples_rows`    True if a row's loss depends on any other row of the batch
    `group`           how many rows, one after the other, belong together: a row's loss may depend
                      on the others of its group, and where the data have labels they share one. A
                      batch is shared out by whole groups. It may be a property, where fields decide
                      it, and a part may declare it too; the default is 1
    `differentiates`  what its gradient runs through beside its predictions; the default is (), and
                      every target is then without gradient. "derivative": a derivative of the
                      network, as in Lagrangian self-distillation. "input": the input of another
                      evaluation, as in a map of two steps. "target": the output of an evaluation
                      that a prediction is compared with, as where a residual of the network is made
                      small as a whole. The weights of a teacher stay without gradient. It may be a
                      property, where fields decide it
    `splits_batch`    True if rows that take a derivative pass the network apart from the others
    `fixed_point`     where the exact solution is a fixed point of the loss: "pointwise" (the
                      default) if it is the only one, in every row; "distribution" if every map with
                      the same law is one too, in the mean over batches; or "none"
    `exact_with`      the fields {name: value} that make it one, besides `unweighted` weights; or
                      several such mappings, one for each branch that the fields choose
    `exact_outputs`   for outputs beside u and v, which of the two their exact value is:
                      {"twin": "v"}

    The last three are for `objective-zoo check`.
    """

    heads: ClassVar[tuple[str, ...]]

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput: ...


class Path(Protocol):
    """x_t = alpha(t) x0 + sigma(t) x1, with x_0 = x0 and x_1 = x1."""

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def d_alpha(self, t: Tensor) -> Tensor: ...
    def d_sigma(self, t: Tensor) -> Tensor: ...
    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample: ...
    def to_x0(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor: ...
    def to_x1(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor: ...
    def to_velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PathSample:
    """A point of a path and its conditional velocity d x_t / dt at fixed x0, x1."""

    x_t: Tensor
    velocity: Tensor


class Coupling(Protocol):
    """(x0, x1) -> the same rows of noise x1, in the order in which they are paired with x0.

    `couples_rows = True` declares that a row's noise depends on other rows of the batch. Such a
    coupling changes the velocity field, and it is given the rows of one condition at a time.
    """

    def __call__(self, x0: Tensor, x1: Tensor) -> Tensor: ...


class GuidanceLaw(Protocol):
    """Draws cond["guidance"] [n 3]: a scale >= 1 and an interval of times, low <= high, per row."""

    def __call__(self, n: int, rng: torch.Generator) -> Tensor: ...


class TimeLaw(Protocol):
    """Draws (t, r), [n] each. The rows with r < t come first; their number depends on n alone.

    A law may declare `only_to_data = True`: r is 0 in every row with r < t. A law that changes over
    the run has `at_step(step)`, which gives the law of that step; the law itself is then what it
    settles to. Objectives ask by zoo.times.law_at(law, batch.step). A law may state `cdf(t)` [k] ->
    [k], the probability that the time of a row, of either kind, is at most t; `objective-zoo check`
    compares its draws with that.
    """

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]: ...
    def num_off_diagonal(self, n: int) -> int: ...


@dataclass(frozen=True)
class Draw:
    """What an objective draws for a batch: a point of the path for each row of its share.

    `velocity` is the conditional velocity. `labelled` [b] marks the rows of `cond` that still have
    a label. `batch` is the whole batch, with all of its labels. zoo/points/draws.py makes it.
    """

    batch: Batch
    path: Path
    x0: Tensor
    x1: Tensor
    t: Tensor
    r: Tensor
    x_t: Tensor
    velocity: Tensor
    cond: Cond | None
    labelled: Tensor


class VelocityEstimator(Protocol):
    """What an objective takes for the velocity v(x_t, t) along the path, [b *d].

    `target` is what a velocity is regressed onto, before guidance. It comes from outside the
    network in training, which would learn nothing from its own output. `along` is the velocity
    that moves the state in the target of a map. It is given that target with the objective's
    guidance on top, and a function that gives the velocity of the network in training at the same
    points, which has learned the guidance. Neither has a gradient. It may declare

    `from_network`  True if `along` is the network's own velocity
    `from_teacher`  True if `target` is the velocity of the teacher, which must be a trained one
    `couples_rows`  True if a row's target depends on other rows of the batch
    """

    def target(self, draw: Draw, teacher: Network, rng: torch.Generator) -> Tensor: ...
    def along(self, guided: Tensor, own: Callable[[], Tensor]) -> Tensor: ...


class Residual(Protocol):
    """How far a predicted average velocity u [b *d] is from self-consistency, without gradient.

    `direction` is the velocity along which the state is moved; `teacher` evaluates targets. The
    residual vanishes at the truth and has the sign of an error in u. `du_along` gives du/ds along
    tangents of (x, t, r), by `derivative`. A residual whose `derivative` is None must not call it.
    """

    @property
    def derivative(self) -> Derivative | None: ...

    def __call__(
        self,
        du_along: Callable[[tuple[Tensor, Tensor, Tensor]], Tensor],
        teacher: Network,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Cond | None,
        u: Tensor,
        direction: Tensor,
    ) -> Tensor: ...


class Weight(Protocol):
    """Turns a squared error [b] into the loss [b]; `heads` names the outputs that it reads."""

    heads: ClassVar[tuple[str, ...]]

    def __call__(self, error: Tensor, out: Mapping[str, Tensor]) -> Tensor: ...


@runtime_checkable
class Teacher(Protocol):
    """net -> a Network without gradient.

    A teacher that `needs_copy` owns weights. The trainer makes the module, hands it over with
    `attach`, shards, checkpoints and restores it, and calls `update` after each optimizer step.
    Before `attach` the teacher is the network itself, which is the state at step 0. One that was
    not attached must raise ValueError when training goes on, and never serve the network in
    silence. A teacher that `distils` is another network, trained before: its velocity takes the
    place of the conditional velocity as the target.

    A teacher may have a field `dropout`. With "off", the default, it is evaluated without dropout.
    With "shared" its calls are made under the masks of the first call of the loss, the prediction.
    The masks are the same if both calls have the same number of rows and layers that draw in the
    same order, as those of the network and its average do.
    """

    needs_copy: ClassVar[bool]
    distils: ClassVar[bool]

    def __call__(self, net: Network) -> Network: ...
    def attach(self, network: torch.nn.Module) -> None: ...
    def update(self, net: torch.nn.Module, step: int) -> None: ...


@runtime_checkable
class TransparentTeacher(Teacher, Protocol):
    """A teacher that a gradient passes: `through(net)` has one to its inputs, none to weights."""

    def through(self, net: Network) -> Network: ...


@runtime_checkable
class Features(Protocol):
    """x [b *d] -> features [b k], with a gradient to x and to nothing else.

    An objective has them in a field, such as `features: Features`, and compares them in place of
    x. `feature_net` is the module that computes them, in evaluation mode and without gradient to
    its weights, or None if there are no weights. The trainer puts it on the device, and shards it
    where weights are sharded. It never changes: a checkpoint keeps the SHA-256 of its weights in
    place of the weights, and a run goes on with the same ones alone.
    """

    @property
    def feature_net(self) -> torch.nn.Module | None: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class Sampler(Protocol):
    """(net, x1 noise, cond, rng) -> x0, in `nfe` network calls; a dataclass with the field nfe.

    `needs` says what an objective must have trained, in the words of registry/sampling.py. Its
    construction raises ValueError for an nfe that the method cannot have.
    """

    needs: ClassVar[tuple[str, ...]]

    @property
    def nfe(self) -> int: ...
    def __call__(
        self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator
    ) -> Tensor: ...
