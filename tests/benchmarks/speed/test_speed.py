"""Costs: passes counted against closed forms, turns, shares, tables, the guard, the command."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbone_cases import awake, inputs, small
from tiny_runs import entries, zoo
from torch import Tensor, nn

from backbones.mlp import MLP
from backbones.network import build_network
from benchmarks.grids.request import Request
from benchmarks.runs.passes import count_passes, passes_per_step
from benchmarks.runs.peak_memory import PeakMemory
from benchmarks.speed.bench import by_turns, outside_share
from benchmarks.speed.cases import Case, SteppedRun, cases_of
from benchmarks.speed.overheads import Overheads, bare_loop, sampling_pair
from benchmarks.speed.published_mean_flow import PublishedMeanFlow
from benchmarks.speed.table import Speed, StepCost, compare, speed_table
from registry.protocols import Batch, Share, required_heads
from trainers.engines import TrainStep
from trainers.rng import generator
from zoo.derivatives.dual_tensors import LinearizedRecord
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import apart
from zoo.objectives.decm import DECM
from zoo.objectives.dumo import DuMo
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.shortcut import Shortcut
from zoo.residuals import Exact, Rcgm
from zoo.teachers import Frozen

CPU = torch.device("cpu")
ROWS = 32
SMALL = ("dit.dim = 16", "dit.depth = 1", "dit.num_heads = 2", "run.batch_size = 8")
REQUEST = Request(file=Path("bench.gin"), bindings=(*SMALL, "run.log_every = 2"))


def network(keys: tuple[str, ...]) -> nn.Module:
    torch.manual_seed(0)
    return build_network(lambda **given: MLP(dim=8, depth=1, **given), (3,), 0, keys)


def frozen() -> Frozen:
    teacher = Frozen(pretrain=0.5)
    teacher.attach(network(("v",)))
    return teacher


def passes(objective, steps=6, share=Share()):  # noqa: B008  frozen
    net = network(required_heads(objective))
    x0 = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))
    batches = [Batch(x0, step=i, progress=i / steps, share=share) for i in range(steps)]
    return count_passes(TrainStep(net, objective).train(), batches, 0)


# what a step must cost, in forwards of the batch: 1 forward, 2 backward

COSTS = [
    (FlowMatching(), 3),
    (MeanFlow(), 3 + 1 / 4),  # a quarter of the rows: a tangent beside the value
    (apart(MeanFlow()), 3 + 2 / 4),  # their value once more
    (MeanFlow(derivative=Jvp()), 3 + 2 / 4),
    (MeanFlow(derivative=FiniteDifference()), 3 + 2 / 4),
    (Shortcut(), 3 + 2 / 8),  # two half steps of an eighth of the rows
    (Shortcut(bootstrap_fraction=0.25), 3 + 2 / 4),
    (DuMo(residual=Exact()), 3 + 1),
    (apart(DuMo(residual=Exact())), 3 + 2),
    (DuMo(residual=Rcgm(order=1)), 3 + 1),
    (DuMo(residual=Rcgm(order=3)), 3 + 3),
    (DECM(n2n_every=0), 6 + 1),
    (DECM(n2n_every=1), 9 + 2 + 2),
    (DECM(), (2 * (6 + 1) + 9 + 2 + 2) / 3),
    (apart(DECM()), (2 * (6 + 2) + 9 + 4 + 2) / 3),
    (DECM(teacher=frozen()), (2 * (6 + 1 + 1) + 9 + 2 + 2 + 1) / 3),
]


@pytest.mark.parametrize(("objective", "total"), COSTS)
def test_passes_are_what_the_method_needs(objective, total):
    assert passes(objective).total == pytest.approx(total)


def test_passes_tell_forward_tangent_and_backward_apart():
    found = passes(MeanFlow())
    assert (found.forward, found.tangent, found.backward) == (1.0, 0.25, 1.0)
    found = passes(apart(MeanFlow()))
    assert (found.forward, found.tangent, found.backward) == (1.25, 0.25, 1.0)


def test_passes_of_a_share_are_those_of_the_batch():
    assert passes(MeanFlow(), share=Share(1, 4)).total == 3.25


class Doubled(FlowMatching):
    """Calls the network again, by names and with gradient, and leaves it out of the loss."""

    def loss(self, net, batch, rng):
        out = super().loss(net, batch, rng)
        t = torch.ones(len(batch))
        net(x=batch.x0, t=t, r=t, cond=None)
        return out


def test_a_call_that_the_loss_does_not_use_costs_no_backward():
    assert passes(Doubled()).total == 4


def test_a_run_counts_its_passes_on_its_own_batch():
    case = Case(request=REQUEST, bindings=(), arm="mean_flow")
    assert passes_per_step(case.build()).total == 3.25


# measuring


def test_turns_interleave_and_leave_the_first_out():
    order = []
    steps = [lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.01))]
    a, b = by_turns(steps, 2, CPU, each=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert len(a) == len(b) == 2
    assert min(b) > 0.01 > max(a)


def test_cases_begin_with_flow_matching_and_vary_the_derivative_where_there_is_one():
    groups = cases_of(REQUEST, objectives=["dumo", "dumo_exact"], derivatives=["dual", "jvp"])
    assert {group: [case.name for case in cases] for group, cases in groups.items()} == {
        "dit/fp32": ["flow_matching", "dumo", "dumo_exact/dual", "dumo_exact/jvp"]
    }
    exact = groups["dit/fp32"][3].build().objective
    assert exact.residual == Exact(derivative=Jvp())
    with pytest.raises(ValueError, match=r"no arm dumi; there are: flow_matching, mean_flow"):
        cases_of(REQUEST, objectives=["dumi"])


def test_compiled_cases_are_named_after_the_derivative_that_they_take():
    compiled = replace(REQUEST, bindings=(*REQUEST.bindings, "run.compile = True"))
    ((group, cases),) = cases_of(
        compiled, objectives=["mean_flow"], derivatives=["one_pass", "dual"]
    ).items()
    assert group == "dit/fp32/compiled"
    assert [case.name for case in cases] == ["flow_matching", "mean_flow/dual"]
    assert cases[1].build().objective.derivative == Dual()


def test_the_derivative_that_was_asked_for_is_the_one_that_is_probed():
    # A step of 0.9 is no derivative: the probe refuses it, so a case must not build with it.
    coarse = replace(REQUEST, bindings=(*REQUEST.bindings, "finite_difference.step = 0.9"))
    assert Case(request=coarse, bindings=(), arm="mean_flow").build().objective == MeanFlow()
    with pytest.raises(ValueError, match=r"finite_difference\(step=0.9\), is wrong"):
        Case(request=coarse, bindings=(), arm="mean_flow", derivative="finite_difference").build()


def loss_and_gradient(objective: MeanFlow) -> tuple[Tensor, Tensor]:
    net = awake(small("dit", ("u",))).train()
    x, _, _, cond = inputs("dit", 16)
    per_sample = objective.loss(net, Batch(x, cond), generator(0, 0, 0)).per_sample
    per_sample.mean().backward()
    return per_sample.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("given", [{}, {"omega": 1.5, "kappa": 0.5}], ids=["plain", "guided"])
def test_the_published_algorithm_has_our_loss_and_gradient(given):
    """To float32 rounding: the same draws, sums in another order; measured 0 and 2e-7."""
    ours = MeanFlow(**given)
    rows, gradient = loss_and_gradient(ours)
    published = PublishedMeanFlow.of(ours)
    assert type(published).loss is not MeanFlow.loss
    published_rows, published_gradient = loss_and_gradient(published)
    torch.testing.assert_close(published_rows, rows, rtol=1e-5, atol=1e-6)
    assert float((published_gradient - gradient).norm() / gradient.norm()) < 1e-5


def test_the_published_algorithm_is_a_case_of_its_own():
    groups = cases_of(REQUEST, objectives=["mean_flow", "dumo"], published=True)
    (cases,) = groups.values()
    assert [case.name for case in cases] == [
        "flow_matching",
        "mean_flow/one_pass",
        "mean_flow/published",
        "dumo",
    ]
    built = cases[2].build()
    assert type(built.objective) is MeanFlow  # whose passes are the method's least
    run = cases[2].training(built)
    assert type(run.experiment.objective) is PublishedMeanFlow
    run.step()


def test_cuda_is_waited_for_and_its_allocated_peak_is_read(monkeypatch):
    cuda, allocated, waits = torch.device("cuda"), [3 * 2**20], []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: waits.append(device))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
    by_turns([lambda: None], 1, cuda, each=1)
    assert waits == [cuda] * 4  # before and after the warm-up and the turn
    peak = PeakMemory(cuda)
    with peak.paused():
        allocated[0] = 2**20  # as after a reset
    assert peak.mib == 3


def training(arm="flow_matching") -> SteppedRun:
    return SteppedRun(Case(request=REQUEST, bindings=(), arm=arm).build())


def test_share_outside_the_network_sees_slow_data(monkeypatch):
    run = training()
    run.step()
    quick = outside_share(run)
    data = type(run.experiment.dataset)
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda *a: (time.sleep(0.5), batch(*a))[1])
    assert 0 < quick < 0.8 < outside_share(run)
    assert run.state.engine is run.experiment.engine


def test_a_derivative_that_follows_its_forward_is_inside_the_network(monkeypatch):
    run = Case(request=REQUEST, bindings=(), arm="dumo_exact").training()
    run.step()
    replay = LinearizedRecord.replay
    monkeypatch.setattr(LinearizedRecord, "replay", lambda *a: (time.sleep(0.2), replay(*a))[1])
    assert outside_share(run) < 0.5


def test_bare_loop_and_bare_sampling_do_what_the_framework_does():
    run = training()
    loop = bare_loop(run.experiment)
    assert [next(loop) for _ in range(2)] == [None, None]
    for _ in range(3):
        run.step()
    ours, bare = sampling_pair(run.experiment)
    assert torch.allclose(ours(), bare(), atol=1e-6)


# results


def cost(case="mean_flow/dual", **given) -> StepCost:
    fields = {"seconds": 2.0, "ratio": 1.2, "passes": 3.5, "theory": 3.5 / 3, "outside": 0.04}
    fields |= {"images_per_second": 16.0, "memory_mib": 110.0, "memory_ratio": 1.1}
    return StepCost(case=case, group="dit/fp32", **fields | given)


OWN = Overheads(group="dit/fp32", loop=0.012, sampling=0.004, logging=0.0006)
FM = cost("flow_matching", ratio=1.0, theory=1.0, memory_ratio=1.0)
SPEED = Speed(machine="a machine", costs=[FM, cost()], overheads=[OWN])


def test_table_names_the_machine_and_shows_time_theory_gap_and_memory():
    table = speed_table(SPEED)
    assert "a machine" in table
    row = next(line for line in table.splitlines() if "mean_flow" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["mean_flow/dual", "1.20", "1.17", "+3%", "16.0", "4.0%", "1.10 (110 MiB)"]
    assert "+1.2%" in table


def test_result_is_read_back_and_anything_else_refused(tmp_path):
    (tmp_path / "speed.json").write_text(SPEED.json())
    assert Speed.load(tmp_path / "speed.json") == SPEED
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is no result"):
        Speed.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("now", "grown"),
    [
        ({"ratio": 1.31}, []),  # allowed is 1.2 * 1.1 = 1.32
        ({"ratio": 1.33}, ["time"]),
        ({"memory_ratio": 1.22}, ["memory"]),
        ({"seconds": 9.0, "images_per_second": 1.0, "outside": 0.5}, []),
        ({"memory_ratio": None}, []),
    ],
)
def test_comparison_looks_at_ratios_alone(now, grown):
    new = replace(SPEED, costs=[FM, cost(**now)])
    lines, found = compare(new, SPEED)
    assert [line.split(": ")[1].split()[0] for line in found] == grown
    assert lines[0].startswith("dit/fp32 flow_matching: time 1.00, now 1.00")


def test_comparison_names_what_is_not_stored():
    lines, grown = compare(replace(SPEED, costs=[FM, cost("new")]), SPEED)
    assert (lines[-1], grown) == ("dit/fp32 new: not in the stored result", [])
    with pytest.raises(ValueError, match="none of the cases"):
        compare(replace(SPEED, costs=[cost("new")]), SPEED)


# the command


def bench(tmp_path, *words):
    sets = [word for binding in REQUEST.bindings for word in ("--set", binding)]
    where = ["--out", tmp_path / "out", "--set", "run.recorder = @jsonl()"]
    return zoo("bench", "--objectives", "mean_flow", "--repeats", 1, *where, *sets, *words)


def test_bench_prints_records_and_compares(tmp_path):
    done = bench(tmp_path, "--published", "--no-memory", "--json", tmp_path / "a.json")
    assert done.status == 0, done.err
    assert "| mean_flow/one_pass " in done.out
    assert "| mean_flow/published " in done.out
    assert (tmp_path / "out" / "speed.md").read_text() in done.out
    (metrics,) = entries(tmp_path / "out", "metrics")
    stored = json.loads((tmp_path / "a.json").read_text())
    assert metrics["values"]["dit/fp32/mean_flow/one_pass/ratio"] == stored["costs"][1]["ratio"]
    stored["costs"][1]["ratio"] = 0.01
    (tmp_path / "a.json").write_text(json.dumps(stored))
    done = bench(tmp_path, "--no-memory", "--compare", tmp_path / "a.json", "--out", tmp_path / "b")
    assert (done.status, "1 ratios have grown" in done.err) == (1, True)


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process(tmp_path):
    done = bench(tmp_path, "--json", tmp_path / "a.json", "--set", "run.batch_size = 256")
    assert done.status == 0, done.err
    base, mean_flow = json.loads((tmp_path / "a.json").read_text())["costs"]
    assert base["memory_ratio"] == 1
    assert 0.5 < mean_flow["memory_ratio"] < 2
    assert 1 < base["memory_mib"] < 500  # without the libraries, which hold more
