"""A run of each kind of objective: its sampler, its NFEs and its errors follow what it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import DIGITS, FILE_ONLY, TINY

from benchmarks.data.digits import Digits
from benchmarks.experiments.build import run
from benchmarks.grids.request import Request
from benchmarks.metrics.flow_map_error import map_error
from benchmarks.planning.predict import Machine, predict
from benchmarks.runs.measure import measure, measured_names
from benchmarks.runs.passes import passes_per_step
from benchmarks.runs.rehearsal import sizes
from registry import datasets, gin_setup, objectives
from registry.protocols import Batch, LossOutput, Network, Path
from zoo.ops import mean_flat, normal_like
from zoo.paths import Linear, TrigFlow
from zoo.samplers import ClassifierFree, Euler, FlowMap, OneStep, Restart

MIXTURE = (
    "run.backbone = @mlp", "mlp.dim = 8", "mlp.depth = 1", "run.num_samples = 16",
    "run.steps = 2", "run.batch_size = 8", "run.recorder = @null()",
)  # fmt: skip
MAP_ERRORS = ("map_error_1_0", "map_error_1_0.5", "map_error_0.5_0")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """An objective of u that trains what its subclass says."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    path: Path = field(default_factory=Linear)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        x1 = normal_like(batch.x0, rng)
        x0, x1, cond = batch.share.rows(batch.x0, x1, batch.cond)
        t = torch.ones(len(x0), device=x0.device)
        return LossOutput(per_sample=mean_flat((x1 - net(x1, t, 0 * t, cond)["u"] - x0) ** 2))


class AsMap(Kind):
    trains: ClassVar = ("map", "velocity")


class ToData(Kind):
    trains: ClassVar = ("map_to_data",)


class AsVelocity(Kind):
    trains: ClassVar = ("velocity",)


class AsLaw(Kind):
    trains: ClassVar = ("law",)


class InPairs(AsLaw):
    """Refuses a batch whose groups are cut or have several labels."""

    group: ClassVar = 16

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        if batch.cond:
            labels = batch.cond["label"].view(-1, self.group)
            if (labels != labels[:, :1]).any():
                raise ValueError("mixed labels")
        assert len(batch) % self.group == 0
        return super().loss(net, batch, rng)


KINDS = {"a_map": AsMap, "to_data": ToData, "a_velocity": AsVelocity, "a_law": AsLaw}


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.runs.measure.map_error", partial(map_error, num=20))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with ExitStack() as stack:
        for name, kind in {**KINDS, "in_pairs": InPairs}.items():
            stack.enter_context(objectives.temporary(name, kind))
        yield


def built(name: str, *bindings: str, file: str = "data/mixture.gin", small: Any = MIXTURE) -> Any:
    gin_setup.parse([file], [*small, f"run.objective = @{name}()", *bindings])
    return run()


@pytest.mark.parametrize(
    ("name", "path", "sampler", "nfe", "errors"),
    [
        ("a_map", "linear", FlowMap, (1, 2, 4, 8), (*MAP_ERRORS, "velocity_error")),
        ("to_data", "linear", Restart, (1, 2, 4, 8), (MAP_ERRORS[0], MAP_ERRORS[2])),
        ("to_data", "trigflow", Restart, (1, 2, 4, 8), (MAP_ERRORS[0], MAP_ERRORS[2])),
        ("a_velocity", "trigflow", Euler, (1, 2, 4, 8), ("velocity_error",)),
        ("a_law", "trigflow", OneStep, (1,), ()),
    ],
)
def test_run_measures_what_its_objective_trains(name, path, sampler, nfe, errors, caplog) -> None:
    experiment = built(name, f"{name}.path = @{path}()")
    assert type(experiment.sampler) is sampler
    assert experiment.nfe == nfe
    found = measured_names(experiment, "")
    assert tuple(n for n in found if "_error" in n) == errors
    assert {n.split("/")[0] for n in found if "/" in n} == {f"nfe{n}" for n in nfe}
    left_out = "run.nfe: @one_step() is not measured at 2, 4, 8 NFE"
    assert (left_out in caplog.text) == (name == "a_law")
    if sampler is Restart:
        assert experiment.sampler.path == {"linear": Linear(), "trigflow": TrigFlow()}[path]


def test_errors_of_a_run_are_those_on_its_path() -> None:
    """The same network is measured on the one path and on the other."""
    circle, line = (built("a_map", f"a_map.path = @{p}()") for p in ("trigflow", "linear"))
    for p in line.net.parameters():  # which starts as zero everywhere
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    one, other = measure(circle, line.net), measure(line, line.net)
    assert one["map_error_1_0"] == pytest.approx(other["map_error_1_0"], rel=1e-4)
    for error in ("map_error_1_0.5", "map_error_0.5_0", "velocity_error"):
        assert abs(one[error] / other[error] - 1) > 1e-3


def test_bound_sampler_follows_the_path_too_unless_it_names_one() -> None:
    bindings = ("a_map.path = @trigflow()", "run.sampler = @restart()")
    assert built("a_map", *bindings).sampler.path == TrigFlow()
    with pytest.raises(ValueError, match=r"Leave restart\.path unbound"):
        built("a_map", *bindings, "restart.path = @linear()")
    guided = built("to_data", "to_data.path = @trigflow()", "run.sampler = @cfg()",
                   "cfg.sampler = @restart()")  # fmt: skip
    assert isinstance(guided.sampler, ClassifierFree)
    assert guided.sampler.inner().path == TrigFlow()


def test_law_that_is_asked_for_several_evaluations_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot run at these NFEs:\n  nfe 2: one_step\.nfe = 2"):
        built("a_law", "run.nfe = (2, 4)")
    with pytest.raises(
        ValueError, match=r"a_law'.*'flow_map'.*one step from the noise to the data"
    ):
        built("a_law", "run.sampler = @flow_map()")


# Groups


def test_groups_of_one_label_reach_every_trial_of_a_run() -> None:
    """The first loss, the rehearsal and the count of passes have whole groups of one label."""
    experiment = built("in_pairs", "run.batch_size = 64", file=DIGITS, small=TINY + FILE_ONLY[-1:])
    assert sizes(experiment)[0][0] == 16
    assert passes_per_step(experiment).total == 3


def test_groups_that_do_not_fit_are_refused_before_training() -> None:
    small = TINY + FILE_ONLY[-1:]
    with pytest.raises(ValueError, match="groups of 16 rows, and a batch of 8 is not made of"):
        built("in_pairs", file=DIGITS, small=small)
    with pytest.raises(ValueError, match=r"has 2 parts to share out.*accumulation_steps = 4"):
        built("in_pairs", "run.batch_size = 32", "torch_engine.gradient_accumulation_steps = 4",
              file=DIGITS, small=small)  # fmt: skip

    @dataclass(frozen=True, kw_only=True)
    class Plain(Digits):
        groups_by_label: ClassVar = False

    with (
        datasets.temporary("plain_digits", Plain),
        pytest.raises(ValueError, match="16 rows of one label, and the data set 'digits' cannot"),
    ):
        built("in_pairs", "run.batch_size = 32", "run.dataset = @plain_digits()", file=DIGITS,
              small=small)  # fmt: skip
    assert built("in_pairs", "run.batch_size = 32").batch_size == 32  # points have no labels


def test_planned_micro_batches_are_whole_groups() -> None:
    bindings = (*TINY, "run.objective = @in_pairs()", "run.batch_size = 48")
    request = Request(file=FilePath("data/digits.gin"), bindings=bindings)
    (found,) = predict(request, Machine(gpus=1, memory=1.0), (0,))
    assert [fit.micro_batch for fit in found.fits] == [16, 16]  # nothing fits: one group
    with pytest.raises(ValueError, match=r"2 GPUs in groups of 16 rows; .* a multiple of 32"):
        predict(request, Machine(gpus=2, memory=80e9), (0,))
