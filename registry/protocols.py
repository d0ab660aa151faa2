"""The contracts between the parts; see each class for shapes, units and ranges.

Time runs from t=0 (data) to t=1 (noise); `0 <= r <= t <= 1`, float32, shape [b]. `v` is the
velocity dx/dt at t, `u` the average velocity over [r, t]: `x_r = x_t - (t - r) u`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path as FilePath
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

Cond = Mapping[str, Tensor]
"""Conditioning by name. "label": int64 [b], where `NULL_LABEL` marks a row without a label.

"guidance": [b 3], a scale and the interval of times where it holds; "augment": [b k], how a row was
augmented. Networks that do not take these leave them alone.
"""

NULL_LABEL = -1

Network = Callable[[Tensor, Tensor, Tensor, "Cond | None"], dict[str, Tensor]]
"""net(x [b *d], t [b], r [b], cond) -> {"u": [b *d], "v": [b *d], "logvar": [b], ...}.

Which keys there are depends on the heads; velocity-only networks ignore r.
"""


@dataclass(frozen=True)
class Reference:
    """Where a part comes from; `arxiv` is the bare identifier, such as "2505.13447"."""

    title: str
    authors: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        where = f"arXiv {self.arxiv}" if self.arxiv else str(self.year)
        return f"{self.authors}, {self.title}, {where}"

    def bibtex(self) -> str:
        key = self.authors.split()[0].strip(",").lower() + str(self.year)
        lines = [f"  title = {{{self.title}}}", f"  author = {{{self.authors}}}"]
        lines += [f"  year = {{{self.year}}}"]
        if self.arxiv:
            lines += [f"  eprint = {{{self.arxiv}}}", "  archivePrefix = {arXiv}"]
        return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"


@dataclass(frozen=True)
class Share:
    """Every `count`-th row of a batch from row `number` on: what comes first there does so here."""

    number: int = 0
    count: int = 1

    def rows(self, *values: Any) -> tuple[Any, ...]:
        """The rows of tensors and of conditions by name; what is None stays None."""
        return values if self.count == 1 else tuple(self._cut(value) for value in values)

    def size(self, n: int) -> int:
        """How many of the batch's first n rows belong to this share."""
        return len(range(self.number, n, self.count))

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: rows[self.number :: self.count] for name, rows in value.items()}
        return None if value is None else value[self.number :: self.count]


@dataclass(frozen=True)
class Batch:
    """One batch of data; schedules read `step` and `progress`: objectives hold no counter.

    An objective draws noise, times and labels for the whole batch and computes its `share`: so
    neither they nor quotas depend on how many processes or micro-batches there are.
    """

    x0: Tensor  # [b *d]
    cond: Cond | None = None
    step: int = 0
    progress: float = 0.0  # share of the run's budget that is spent, in [0, 1]
    share: Share = Share()

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    `per_sample` [rows of the share] is weighted and differentiable, and the only thing reduced (by
    the loop, as its mean). `terms` {name: [rows]} are raw and detached: adaptive losses are flat by
    construction, so the unweighted mean squared error per element of the rows that it concerns is
    what gets logged.
    `diagnostics` {name: [rows]} are detached. `t` and `r` [b], where given, let a non-finite loss
    name the offending rows.
    """

    per_sample: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    t: Tensor | None = None
    r: Tensor | None = None


@dataclass(frozen=True)
class PathSample:
    """A point of a path and its conditional velocity d x_t / dt at fixed x0, x1."""

    x_t: Tensor
    velocity: Tensor


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


class GuidanceLaw(Protocol):
    """Draws cond["guidance"] [n 3]: scales >= 1 and intervals of times, low <= high."""

    def __call__(self, n: int, rng: torch.Generator) -> Tensor: ...


class Coupling(Protocol):
    """(x0, x1) -> the same rows of noise x1, in the order in which they are paired with x0.

    A class with `couples_rows = True` looks at the whole batch, and so changes the velocity field.
    """

    def __call__(self, x0: Tensor, x1: Tensor) -> Tensor: ...


class TimeLaw(Protocol):
    """Draws (t, r). The rows with r < t come first, and their number depends on n alone."""

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]: ...
    def num_off_diagonal(self, n: int) -> int: ...


@runtime_checkable
class Derivative(Protocol):
    """(fn, primals, tangents) -> d/ds fn(primals + s tangents) at s=0, without gradient."""

    needs_forward_ad: ClassVar[bool]

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor: ...


class Residual(Protocol):
    """How far a predicted average velocity u [b *d] is from self-consistency, without gradient.

    `direction` is the velocity along which the state is moved; `teacher` evaluates targets. The
    residual vanishes at the truth and has the sign of an error in u. `du_along` gives du/ds along
    tangents of (x, t, r), by `derivative`; a residual that has none must not call it.
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
    """Turns a squared error [b] into the loss [b]; `heads` are the outputs that it reads."""

    heads: ClassVar[tuple[str, ...]]

    def __call__(self, error: Tensor, out: Mapping[str, Tensor]) -> Tensor: ...


@runtime_checkable
class Teacher(Protocol):
    """net -> a Network without gradient.

    `needs_copy` teachers own weights: the trainer makes the module, hands it over with `attach`,
    shards, checkpoints and restores it, and calls `update` after each optimizer step. Until then
    the teacher is the network itself, which is the state at step 0. A teacher that `distils` is
    another network, trained before: its velocity is the target, not the conditional one.
    """

    needs_copy: ClassVar[bool]
    distils: ClassVar[bool]

    def __call__(self, net: Network) -> Network: ...
    def attach(self, network: torch.nn.Module) -> None: ...
    def update(self, net: torch.nn.Module, step: int) -> None: ...


class Objective(Protocol):
    """A frozen dataclass with one method; every choice that a paper varies is a field.

    `heads` names the outputs that it trains. Optional: `samplers`, the registered samplers that are
    valid for it, best first (default: every sampler whose outputs it trains), and `reference`.

    Optional, for `objective-zoo check`: `exact_with`, the fields {name: value} that make the exact
    solution a fixed point of the loss (besides `unweighted` weights); `fixed_point`, where it is
    one: "pointwise" (default), for the "distribution" alone, or "none"; `couples_rows = True` if a
    row's loss depends on other rows, `full_gradient = True` if targets are differentiated.
    """

    heads: ClassVar[tuple[str, ...]]

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput: ...


class Trunk(Protocol):
    """The shared body of a network, an nn.Module: (x, t, r, cond) -> (features, c).

    Built as `trunk(shape=(channels, *size), num_classes=k, two_times=...)`; `readout()` makes one
    new output layer (features, c) -> [b *d], zero at initialisation; `pool(features)` -> [b dim].
    """

    dim: int

    def __call__(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None
    ) -> tuple[Tensor, Tensor]: ...
    def readout(self) -> torch.nn.Module: ...
    def pool(self, features: Tensor) -> Tensor: ...


class Head(Protocol):
    """An nn.Module built as `head(trunk)`: (features, c) -> {key: tensor} for its `keys`."""

    keys: ClassVar[tuple[str, ...]]
    needs_r: ClassVar[bool]

    def __call__(self, features: Tensor, c: Tensor) -> dict[str, Tensor]: ...


class Sampler(Protocol):
    """(net, x1 noise, cond, rng) -> x0, in `nfe` network calls; a dataclass with the field nfe.

    `heads` is the tuple of alternatives: it needs one of these outputs. Raises ValueError at
    construction for an nfe that the method cannot have.
    """

    heads: ClassVar[tuple[str, ...]]

    @property
    def nfe(self) -> int: ...
    def __call__(
        self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator
    ) -> Tensor: ...


class Dataset(Protocol):
    """Training batches by step, and a fixed reference to measure against.

    `shape` is one sample's, `num_classes` 0 without labels, `identity` says which data these are
    (name, count and content hash), `size` the number of samples (0: drawn without end).
    `sample_labels` are the conditions for n generated samples, with the frequencies of the data.
    """

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def size(self) -> int: ...
    def identity(self) -> str: ...
    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Cond | None]: ...
    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]: ...
    def sample_labels(self, n: int) -> Cond | None: ...


@runtime_checkable
class Shareable(Protocol):
    """A data set that reads a share of a batch alone, so that processes share the reading out."""

    def batch_share(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        """As `batch`, x0 of the share's rows alone; the conditions cost little and stay whole."""
        ...


@runtime_checkable
class Coded(Protocol):
    """A data set of codes, such as a VAE's latents; people and metrics see what they decode to."""

    def decode(self, codes: Tensor) -> Tensor:
        """[n *shape] -> pixels [n c h w] in [-1, 1], on the device of the codes."""
        ...


class Vae(Protocol):
    """Frozen weights between pixels in [-1, 1] [n c h w] and latents [n k h' w'].

    `encode` gives the posterior's mean and log-variance, None where the encoder is deterministic;
    neither side is scaled or shifted, but `constants`, the scale and shift of each channel, say
    how: (latent - shift) scale.
    """

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def provenance(self) -> dict[str, str]: ...
    def constants(self, channels: int) -> tuple[list[float], list[float]]: ...


class Metric(Protocol):
    """(samples, reference) -> (name, value) pairs; both [n *d] in the data's own range."""

    def __call__(self, samples: Tensor, reference: Tensor) -> Iterator[tuple[str, float]]: ...


class Optimizer(Protocol):
    """The configuration of a torch optimizer; `lr` is what a schedule multiplies."""

    @property
    def lr(self) -> float: ...
    def build(self, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer: ...


class Schedule(Protocol):
    """(step from 0, share of the budget spent) -> factor on the learning rate."""

    def __call__(self, step: int, progress: float) -> float: ...


class Engine(Protocol):
    """How one TrainStep(net, objective) is run and updated: precision, accumulation, sharding.

    The one part that holds state, so it serves one run at a time; `module` is what it was prepared
    with. `shares` yields the batch once for each of this process's equal shares of it: together
    every n-th row from row k on in process k of n. Each is run by the call, which goes through the
    engine's hooks, and followed by `backward` of its mean loss.
    `autocast` is the precision of that call, for checks that precede `prepare`. `holds_back` tells
    whether no update is made from a gradient that is not finite. `step` applies one
    update at `lr_factor` times the learning rate and returns the gradient's norm before clipping.
    `update_averages` follows with EMA teachers and averages of the weights. `save` and `load` keep
    all of them and the optimizer in a folder, without ever executing code; `save` copies what this
    process holds, and what it returns writes the files, in any thread, and lists them.
    """

    module: Any

    def prepare(
        self, module: Any, optimizer: Optimizer, device: torch.device, batch_size: int
    ) -> None: ...
    def shares(self, batch: Batch) -> Iterator[Batch]: ...
    def __call__(self, batch: Batch, rng: torch.Generator) -> LossOutput: ...
    def autocast(self, device: torch.device) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr_factor: float) -> Tensor: ...
    def holds_back(self, device: torch.device) -> bool: ...
    def update_averages(self, step: int) -> None: ...
    def save(self, folder: FilePath) -> Callable[[], Sequence[FilePath]]: ...
    def load(self, folder: FilePath) -> None: ...


class Recorder(Protocol):
    """Where the records of runs go. `start` opens one, or continues the one that is in the folder.

    `parent` is the folder of the run that this one belongs to.
    """

    def start(
        self,
        name: str,
        folder: pathlib.Path,
        parent: pathlib.Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> RunRecord: ...


class RunRecord(Protocol):
    """The record of one run. Values are plain Python; nothing is lost when a server is away.

    `text` writes a file into the run's folder; `artifact` records one that is there. `close` takes
    "FINISHED", "FAILED" or "KILLED"; leaving the `with` block closes accordingly.
    """

    id: str
    name: str

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, object]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def text(self, content: str, name: str) -> None: ...
    def artifact(self, path: pathlib.Path | str) -> None: ...
    def child(
        self, name: str, folder: pathlib.Path, tags: Mapping[str, str] | None = None
    ) -> RunRecord: ...
    def close(self, status: str = "FINISHED") -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: Any) -> None: ...


def parts(obj: object) -> Iterator[tuple[str, Any]]:
    """The (field name, value) pairs of a dataclass and of the dataclasses inside it."""
    if is_dataclass(obj) and not isinstance(obj, type):
        for f in fields(obj):
            value = getattr(obj, f.name)
            yield f.name, value
            for inner, part in parts(value):
                yield f"{f.name}.{inner}", part


def couples_rows(objective: Any) -> bool:
    """Whether a row's loss depends on other rows, by the objective or by one of its parts."""
    inside = (objective, *(part for _, part in parts(objective)))
    return any(getattr(part, "couples_rows", False) for part in inside)


def read_share(
    dataset: Any, step: int, n: int, seed: int, share: Share
) -> tuple[Tensor, Cond | None]:
    """`batch_share` of any data set, cut from the whole batch where it has none of its own."""
    if isinstance(dataset, Shareable):
        return dataset.batch_share(step, n, seed, share)
    x0, cond = dataset.batch(step, n, seed)
    return share.rows(x0)[0], cond


def required_heads(objective: Any) -> tuple[str, ...]:
    """The outputs that the objective trains, and those that its weights read."""
    names = list(objective.heads)
    for _, part in parts(objective):
        if callable(part) and isinstance(getattr(type(part), "heads", None), tuple):
            names += type(part).heads
    return tuple(dict.fromkeys(names))
