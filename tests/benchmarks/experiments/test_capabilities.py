"""Parts of a third party: what they declare is asked for, and nothing asks for the type of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import DIGITS, FILE_ONLY, TINY, sets, zoo

import registry
from benchmarks.experiments.build import run
from benchmarks.experiments.pruning import SuccessiveHalving, check_pruner
from benchmarks.grids.cells import Plan, plan
from benchmarks.grids.comparison import states_of
from benchmarks.grids.dry_run import TimeEstimate, _estimate
from benchmarks.grids.request import Request
from benchmarks.planning.predict import Machine, predict
from benchmarks.records.recorders import Jsonl
from registry import gin_setup
from registry.protocols import (
    Batch,
    StoredRun,
    has_whole_weights,
    is_serial,
    keeps_records,
    provider_files,
    runs_in_several_processes,
    store_of,
)
from trainers.budget import Budget
from trainers.engines import TorchEngine, as_trained
from trainers.rng import generator
from zoo.derivatives.methods import Dual, FiniteDifference
from zoo.derivatives.one_pass import OnePass
from zoo.objectives.mean_flow import MeanFlow


def test_part_that_declares_nothing_is_taken_as_plain() -> None:
    part: Any = object()
    assert has_whole_weights(part)
    assert not runs_in_several_processes(part)
    assert provider_files(part, 8) == {}
    assert keeps_records(part)
    assert store_of(part, Path()) is None
    assert not is_serial(part)


# an engine


class Wrapped:
    """An engine that shares no class with ours, and hands everything on to one of them."""

    def __init__(self) -> None:
        self._engine = TorchEngine()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, batch: Batch, rng: torch.Generator) -> Any:
        return self._engine(batch, rng)


class InPieces(Wrapped):
    whole_weights = False
    several_processes = True

    def provider_files(self, batch_size: int) -> dict[str, str]:
        return {"pieces.json": f'{{"batch": {batch_size}}}\n'}


@pytest.fixture
def engines() -> Iterator[None]:
    with (
        registry.engines.temporary("in_pieces", InPieces),
        registry.engines.temporary("wrapped", Wrapped),
    ):
        yield


def built(engine: str, *bindings: str) -> Any:
    given = [*TINY, "run.recorder = @null()", "run.objective = @mean_flow()"]
    gin_setup.parse([DIGITS], [*given, f"run.engine = @{engine}()", *bindings])
    return run()


def test_engine_without_whole_weights_gets_derivatives_in_their_own_pass(
    engines: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert built("wrapped").objective.derivative == OnePass()
    assert caplog.text == ""
    assert built("in_pieces").objective.derivative == Dual()
    assert "run.engine = @in_pieces() shards the weights" in caplog.text


def test_engine_without_whole_weights_compiles_nothing(engines: None) -> None:
    with pytest.raises(ValueError, match=r"run\.engine = @in_pieces\(\).*run\.compile = False"):
        built("in_pieces", "run.compile = True")


def test_settings_of_the_library_behind_an_engine_are_recorded(
    engines: None, tmp_path: Path
) -> None:
    words = ["run", DIGITS, "--arm", "mean_flow", "--out", tmp_path / "out"]
    done = zoo(*words, *sets(*FILE_ONLY, "run.engine = @in_pieces()"))
    assert done.status == 0, done.err
    text = (tmp_path / "out" / "mean_flow" / "pieces.json").read_text()
    assert text == '{"batch": 8}\n'


def test_engine_of_one_process_is_planned_beside_the_stages(engines: None) -> None:
    stages = {}
    for engine in ("wrapped", "in_pieces"):
        bindings = (*TINY, f"run.engine = @{engine}()")
        request = Request(file=Path(DIGITS), bindings=bindings, only=("flow_matching",))
        (found,) = predict(request, Machine(gpus=1, memory=80e9), (0,))
        stages[engine] = [fit.stage for fit in found.fits]
    assert stages == {"wrapped": [None, 0], "in_pieces": [0]}


# a derivative


@dataclass(frozen=True, kw_only=True)
class Beside(FiniteDifference):
    """Differences that come with the value; alone they take a coarser step."""

    @property
    def in_own_pass(self) -> FiniteDifference:
        return FiniteDifference(step=1e-2)

    def with_value(self, fn: Any, primals: Any, tangents: Any, key: str) -> Any:
        return fn(*primals), self(lambda *at: fn(*at)[key], primals, tangents)

    def linearized(self, fn: Any, primals: Any, key: str) -> Any:
        moved = lambda tangents: self(lambda *at: fn(*at)[key], primals, tangents)  # noqa: E731
        return fn(*primals), moved


def test_joint_derivative_of_a_third_party_names_what_takes_its_place() -> None:
    objective = MeanFlow(derivative=Beside())
    assert as_trained(objective, TorchEngine()) is objective
    for engine, compile in ((TorchEngine(), True), (InPieces(), False)):
        changed = as_trained(objective, engine, compile)
        assert changed == MeanFlow(derivative=FiniteDifference(step=1e-2))


def test_joint_derivative_of_a_third_party_is_taken_with_the_value() -> None:
    calls = []

    def net(x: Any, t: Any, r: Any, cond: Any) -> dict[str, Any]:
        if torch.is_grad_enabled():
            calls.append(len(x))
        return {"u": x * (1 + t[:, None])}

    x0 = torch.randn(8, 2, generator=generator(0, 0, 0))
    losses = {}
    for derivative in (Beside(), FiniteDifference()):
        calls.clear()
        out = MeanFlow(derivative=derivative).loss(net, Batch(x0), generator(0, 0, 1))
        losses[type(derivative)] = out.per_sample
        # A quarter of the rows is differentiated, and predicted in the same call.
        assert calls == ([2, 6] if isinstance(derivative, Beside) else [8])
    torch.testing.assert_close(losses[Beside], losses[FiniteDifference])


# a recorder


@dataclass(frozen=True)
class TheirStore:
    """Knows every cell as finished."""

    name: str = "their://store"

    def open_hint(self) -> str:
        return "their-browser"

    def finished(self, ids: Iterable[str]) -> dict[str, StoredRun]:
        return {id: StoredRun("their run 7", {"cell.folder": "/there/it/is"}) for id in ids}


class Theirs:
    """Records to files, and to a store of their own."""

    store = TheirStore()

    def start(self, *args: Any, **named: Any) -> Any:
        return Jsonl().start(*args, **named)


class Forgetful(Theirs):
    keeps_records = False


@pytest.fixture
def recorders() -> Iterator[None]:
    with (
        registry.recorders.temporary("theirs", Theirs),
        registry.recorders.temporary("forgetful", Forgetful),
    ):
        yield


@pytest.fixture
def planned(recorders: None) -> Plan:
    bindings = (*TINY, "run.recorder = @theirs()")
    request = Request(file=Path(DIGITS), bindings=bindings, only=("flow_matching",))
    return plan(request, request.declared(), cost_of=lambda _: TimeEstimate(1.0, 1.0))


def test_store_of_a_third_party_is_asked_which_cells_are_finished(
    planned: Plan, tmp_path: Path
) -> None:
    (state,) = states_of(planned, tmp_path).values()
    assert (state.status, state.folder) == ("finished", Path("/there/it/is"))
    assert state.note == "their run 7"


def test_store_of_a_third_party_is_shown(recorders: None, tmp_path: Path) -> None:
    words = ["run", DIGITS, "--arm", "flow_matching", "--out", tmp_path / "out"]
    done = zoo(*words, *sets(*TINY, "run.recorder = @theirs()"))
    assert done.status == 0, done.err
    assert "their://store; open them with\n          their-browser" in done.out


def test_pruner_is_refused_where_a_recorder_keeps_nothing(recorders: None) -> None:
    pruner = SuccessiveHalving(metric="fd", min_steps=2)
    check_pruner(pruner, Theirs(), 2, Budget(steps=9), ["fd"])
    with pytest.raises(ValueError, match=r"@forgetful\(\) keeps no record\.jsonl"):
        check_pruner(pruner, Forgetful(), 2, Budget(steps=9), ["fd"])


# a launcher


@dataclass(frozen=True)
class OneByOne:
    """Runs the cells here, one by one."""

    serial = True
    ran: list[str] = field(default_factory=list)

    def __call__(self, jobs: Any, run_cell: Any) -> Iterator[Any]:
        for job in jobs:
            yield run_cell(job.folder)


class Somewhere(OneByOne):
    serial = False


def test_gain_of_a_launcher_is_said_to_be_unknown_unless_it_is_serial(
    planned: Plan, tmp_path: Path
) -> None:
    states = states_of(planned, tmp_path)
    with (
        registry.launchers.temporary("one_by_one", OneByOne),
        registry.launchers.temporary("somewhere", Somewhere),
    ):
        serial, other = (
            _estimate(replace(planned, launcher=launcher), states, None)
            for launcher in (OneByOne(), Somewhere())
        )
    assert "not estimated" not in serial
    assert "what @somewhere() gains is not estimated" in other
