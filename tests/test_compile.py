"""torch.compile as a binding: what is compiled, what stays eager, and that results stay."""

from __future__ import annotations

import logging

import pytest
import torch
from backbone_cases import awake, inputs, small
from tiny_runs import SIZES, losses, sets, zoo

from benchmarks.experiment import run
from registry import gin_setup
from registry.protocols import Batch
from trainers.engines import TrainStep
from trainers.rng import generator
from zoo.derivatives import Dual, FiniteDifference, Jvp, derivative_of_u
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.shortcut import Shortcut

MLP = ("run.backbone = @mlp", "mlp.dim = 8", "mlp.depth = 1", "run.recorder = @jsonl()")
BUILT = ["data/gaussian.gin", "objective/flow_matching.gin", "trainer/cpu.gin"]


class Compiler:
    """A backend of torch.compile that counts the calls of what it was given."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, example_inputs):
        def counted(*args):
            self.calls += 1
            return graph(*args)

        return counted


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("derivative", "calls"), [(Dual(), 0), (Jvp(), 0), (FiniteDifference(), 2)]
)
def test_forward_mode_derivatives_of_a_compiled_network_are_eager(derivative, calls):
    net = awake(small("mlp"))
    x, t, r, cond = inputs("mlp")
    tangents = (torch.randn_like(x), torch.ones_like(t), torch.zeros_like(r))
    expected = derivative_of_u(derivative, net, cond, (x, t, r), tangents)
    net.compile(backend=(compiler := Compiler()))
    net(x, t, r, cond)
    assert compiler.calls == 1
    found = derivative_of_u(derivative, net, cond, (x, t, r), tangents)
    assert compiler.calls == 1 + calls
    assert found.equal(expected)
    net(x, t, r, cond)
    assert compiler.calls == 2 + calls


def compiled_with(monkeypatch) -> Compiler:
    plain, compiler = torch.nn.Module.compile, Compiler()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, **_: plain(net, dynamic=False, backend=compiler)
    )
    return compiler


def test_network_and_teachers_are_compiled_and_averages_are_not(monkeypatch):
    compiler = compiled_with(monkeypatch)
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


def test_run_compile_trains_compiled(monkeypatch, tmp_path):
    compiler = compiled_with(monkeypatch)
    words = ["run", "experiments/mixture.gin", "--arm", "mean_flow", *sets(*SIZES, *MLP)]
    for name, more in (("eager", ()), ("compiled", sets("run.compile = True"))):
        done = zoo(*words, "--out", tmp_path / name, *more)
        assert done.status == 0, done.err
    assert compiler.calls == 4  # as many as there are steps: derivatives are not
    eager, compiled = (losses(tmp_path / name / "mean_flow") for name in ("eager", "compiled"))
    assert eager == compiled
    assert losses(tmp_path / "eager" / "mean_flow", "cost/passes_per_step") == {0: 3.5}


def built(*bindings: str):
    chosen = ("run.objective = @flow_matching()", "run.steps = 1", *MLP)
    gin_setup.parse(BUILT, [*chosen, "run.compile = True", *bindings])
    return run()


def test_a_missing_compiler_is_said_before_training(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"C\+\+ compiler, and there is no 'no-such-compiler'"):
        built()


def test_what_is_left_out_is_said_in_one_sentence(caplog):
    caplog.set_level(logging.WARNING)
    assert built().compile
    assert "run.compile" not in caplog.text
    built("run.objective = @mean_flow()")
    assert caplog.text.count("forward-mode derivatives of them are not") == 1


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
