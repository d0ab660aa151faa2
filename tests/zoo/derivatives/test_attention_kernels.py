"""Which attention kernel each derivative backend takes, and the flash kernel that is refused."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from backbone_cases import awake, inputs, small
from derivative_cases import ROUNDING, Kernels, along, error, output
from torch.autograd import forward_ad

import registry
from benchmarks.experiments.build import run
from registry import gin_setup
from trainers.derivative_probe import probe_derivatives
from zoo.derivatives.methods import Dual
from zoo.objectives.mean_flow import MeanFlow

each_backend = pytest.mark.parametrize("backend", registry.derivatives.names())
each_exact = pytest.mark.parametrize("backend", ["dual", "jvp"])  # in a pass of their own


def fused_calls(fn) -> int:
    with Kernels() as kernels:
        fn()
    return kernels.calls("_scaled_dot_product")


@each_backend
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_only_the_forward_mode_pass_takes_the_math_kernel(backbone, backend, training):
    primals, tangents, cond = along(backbone)
    net = awake(small(backbone)).train(training)
    f, derivative = output(net, cond), registry.derivatives.build(backend)
    layers = len(net.trunk.blocks) if backbone == "dit" else 1
    expected = f(*primals)
    assert fused_calls(lambda: f(*primals)) == layers
    evaluations = {"finite_difference": 2 * layers, "one_pass": layers}.get(backend, 0)
    assert fused_calls(lambda: derivative(f, primals, tangents)) == evaluations
    assert fused_calls(lambda: f(*primals)) == layers
    assert f(*primals).equal(expected)
    with pytest.raises(ZeroDivisionError):
        derivative(lambda x, t, r: f(x, t, r) / (1 // 0), primals, tangents)
    assert fused_calls(lambda: f(*primals)) == layers


@each_exact
def test_fused_attention_has_no_forward_mode_rule_without_the_math_kernel(backend, monkeypatch):
    # What the math kernel is for; where torch gains a rule, derivatives.py may lose a line.
    monkeypatch.setattr("zoo.derivatives.methods.sdpa_kernel", lambda _: nullcontext())
    primals, tangents, cond = along("dit")
    with pytest.raises(NotImplementedError, match="flash_attention"):
        registry.derivatives.build(backend)(output(awake(small("dit")), cond), primals, tangents)


class Flash:
    """A stand-in for jvp_flash_attention on a CPU: attention of dual numbers by plain products."""

    def __init__(self, wrong: bool = False):
        self.calls, self.wrong = 0, wrong

    def fwd_dual(self, q, k, v, attn_mask=None, dropout_p=0.0, causal=False, sm_scale=None):
        assert forward_ad.unpack_dual(q).tangent is not None
        assert (attn_mask, dropout_p, causal) == (None, 0.0, False)
        self.calls += 1
        k = k.detach() if self.wrong else k
        return (q @ k.mT * (sm_scale or q.shape[-1] ** -0.5)).softmax(-1) @ v


def flash(monkeypatch, **given) -> Flash:
    kernel = Flash(**given)
    module = SimpleNamespace(JVPAttn=kernel)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", SimpleNamespace(jvp_attention=module))
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", module)
    monkeypatch.setattr("zoo.derivatives.flash_attention.DEVICES", ("cpu",))
    return kernel


@pytest.mark.parametrize("backbone", ["dit", "lightning_dit", "unet"])
def test_flash_kernel_serves_the_derivative_alone(backbone, monkeypatch):
    kernel, (primals, tangents, cond) = flash(monkeypatch), along(backbone)
    net = awake(small(backbone)).train()
    f = output(net, cond)
    expected = Dual()(f, primals, tangents)
    assert kernel.calls == 0
    found = Dual(attention="jvp_flash")(f, primals, tangents)
    assert kernel.calls == (1 if backbone == "unet" else len(net.trunk.blocks))
    assert error(found, expected) < ROUNDING
    called = kernel.calls
    assert fused_calls(lambda: f(*primals)) == called
    assert kernel.calls == called


def test_a_wrong_flash_kernel_is_refused_by_the_probe(monkeypatch):
    x, _, _, cond = inputs("dit", 4)
    objective = MeanFlow(derivative=Dual(attention="jvp_flash"))
    net = small("dit", ("u",))
    flash(monkeypatch)
    assert probe_derivatives(objective, net, x, cond)["derivative_error"] < ROUNDING
    flash(monkeypatch, wrong=True)
    with pytest.raises(ValueError, match=r"dual\(attention='jvp_flash'\), is wrong"):
        probe_derivatives(objective, net, x, cond)


def test_flash_kernel_is_refused_where_it_cannot_run(monkeypatch):
    primals, tangents, cond = along("dit")
    f, derivative = output(small("dit"), cond), Dual(attention="jvp_flash")
    with pytest.raises(ValueError, match="runs on cuda alone, and the network is on cpu; bind"):
        derivative(f, primals, tangents)
    flash(monkeypatch)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", None)
    with pytest.raises(ValueError, match="pip install jvp-flash-attention"):
        derivative(f, primals, tangents)
    with pytest.raises(ValueError, match="dual.attention = 'flash'; allowed: math, jvp_flash"):
        Dual(attention="flash")


def test_flash_kernel_is_a_binding_that_a_run_on_a_cpu_refuses():
    files = ["data/digits.gin", "objective/mean_flow.gin", "trainer/cpu.gin"]
    chosen = ["run.objective = @mean_flow()", "run.steps = 1", "run.backbone = @dit"]
    tiny = ["dit.dim = 16", "dit.depth = 1", "dit.num_heads = 2", "run.recorder = @null()"]
    flash = ["mean_flow.derivative = @dual()", "dual.attention = 'jvp_flash'"]
    gin_setup.parse(files, [*chosen, *tiny, *flash])
    with pytest.raises(ValueError, match=r"objective 'mean_flow' .* runs on cuda alone"):
        run()
