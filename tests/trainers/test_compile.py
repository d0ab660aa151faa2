"""torch.compile as a binding: what is compiled, what stays eager, and that results stay."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import compile_work
import pytest
import torch
import zero_work
from backbone_cases import awake, inputs, small
from compile_work import Compiler
from tiny_runs import SIZES, SPACE, losses, sets, zoo

from benchmarks.experiments.build import run
from registry import gin_setup
from registry.protocols import Batch
from trainers.engines import TorchEngine, TrainStep
from trainers.rng import generator
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp, derivative_of_u
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.shortcut import Shortcut

MLP = ("run.backbone = @mlp", "mlp.dim = 8", "mlp.depth = 1", "run.recorder = @jsonl()")
BUILT = ["data/gaussian.gin", "objective/flow_matching.gin", "trainer/cpu.gin"]


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize("derivative", [Dual(), Jvp(), FiniteDifference()])
def test_derivatives_of_a_compiled_network_are_eager(derivative):
    net = awake(small("mlp"))
    x, t, r, cond = inputs("mlp")
    tangents = (torch.randn_like(x), torch.ones_like(t), torch.zeros_like(r))
    expected = derivative_of_u(derivative, net, cond, (x, t, r), tangents)
    net.compile(backend=(compiler := Compiler()))
    net(x, t, r, cond)
    assert compiler.calls == 1
    found = derivative_of_u(derivative, net, cond, (x, t, r), tangents)
    assert compiler.calls == 1
    assert found.equal(expected)
    net(x, t, r, cond)
    assert compiler.calls == 2


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    with (made := Compiler()).takes_the_place():
        yield made


def test_network_and_teachers_are_compiled_and_averages_are_not(compiler):
    x, t, r, cond = inputs("mlp", 16)
    step = TrainStep(small("mlp"), Shortcut(), ema_decays=(0.9,)).train()
    batch = Batch(x, cond)
    expected = step(batch, generator(0, 0, 0)).per_sample
    assert compiler.calls == 0
    step.compile_networks()
    assert step(batch, generator(0, 0, 0)).per_sample.equal(expected)
    assert compiler.calls == 3  # the network, and two half steps of the teacher
    step.emas["0.9"](x, t, r, cond)
    assert compiler.calls == 3
    assert list(step.net.state_dict()) == list(small("mlp").state_dict())


def test_run_compile_trains_compiled(compiler, tmp_path):
    words = ["run", "experiments/mixture.gin", "--arm", "mean_flow", *sets(*SIZES, *SPACE, MLP[-1])]
    for name, more in (("eager", ()), ("compiled", sets("run.compile = True"))):
        done = zoo(*words, "--out", tmp_path / name, *more)
        assert done.status == 0, done.err
    assert compiler.calls == 4  # as many as there are steps: derivatives are not
    eager, compiled = (losses(tmp_path / name / "mean_flow") for name in ("eager", "compiled"))
    assert eager == compiled
    passes = {
        name: losses(tmp_path / name / "mean_flow", "cost/passes_per_step")
        for name in ("eager", "compiled")
    }
    assert passes == {"eager": {0: 3.25}, "compiled": {0: 3.5}}  # by `one_pass` and by `dual`


def built(*bindings: str):
    chosen = ("run.objective = @flow_matching()", "run.steps = 1", *MLP)
    gin_setup.parse(BUILT, [*chosen, "run.compile = True", *bindings])
    return run()


def test_a_missing_compiler_is_said_before_training(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"C\+\+ compiler, and there is no 'no-such-compiler'"):
        built()


def test_zero_stage_3_is_refused_and_the_others_are_not():
    engine = "run.engine = @zero_engine()"
    with pytest.raises(ValueError, match=r"zero_engine.stage = 2, .* run.compile = False"):
        built(engine, "zero_engine.stage = 3")
    assert built(engine, "zero_engine.stage = 2").compile


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_compiled_processes_train_as_one_that_is_not(tmp_path):
    results = zero_work.spawn(2, "compiled", tmp_path, file=compile_work.__file__)
    for name in compile_work.EACH:
        state, watch = zero_work.train(name, TorchEngine(max_grad_norm=1.0))
        plain = zero_work.found(state, watch)
        for stage in compile_work.COMPILED_STAGES:
            ours = results[stage, name]
            assert ours["calls"] >= len(watch.losses)  # once a step, and a teacher's
            # float32 sums in another order; weights are of order 0.1 and move by 0.05
            torch.testing.assert_close(ours["losses"], watch.losses, rtol=1e-5, atol=1e-6)
            assert ours["module"].keys() == plain["module"].keys()
            for key, value in plain["module"].items():
                torch.testing.assert_close(ours["module"][key], value, rtol=1e-5, atol=2e-6)


def test_what_is_left_out_is_said_in_one_sentence(caplog):
    caplog.set_level(logging.WARNING)
    assert built().compile
    assert "run.compile" not in caplog.text
    built("run.objective = @mean_flow()")
    assert caplog.text.count("derivatives of them are not") == 1


@pytest.mark.slow
def test_compiled_kernels_give_the_eager_losses_and_gradients():
    """To 1e-5: float32 sums in another order. Casts that the compiler skips cost 4e-3."""
    x, _, _, cond = inputs("mlp", 16)
    results = []
    for compiled in (False, True):
        step = TrainStep(awake(small("mlp", ("v",))), FlowMatching()).train()
        if compiled:
            step.compile_networks()
        per_sample = step(Batch(x, cond), generator(0, 0, 0)).per_sample
        per_sample.mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in step.net.parameters()])
        results.append((per_sample.detach(), gradient))
    (rows, gradient), (compiled_rows, compiled_gradient) = results
    torch.testing.assert_close(compiled_rows, rows, rtol=1e-5, atol=1e-6)
    assert float((compiled_gradient - gradient).norm() / gradient.norm()) < 1e-5
