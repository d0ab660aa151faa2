"""Passes of torch's forward mode: what they refuse, and what they leave as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainers.derivative_probe import probe_derivatives
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import OnePass
from zoo.objectives.dumo import DuMo
from zoo.residuals import Exact

W = torch.linspace(-1, 1, 16).reshape(4, 4).sin()


@torch.library.custom_op("zoo_forward_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, gradient: 3 * gradient * ctx.x**2,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
)


def exchanged(x):
    h = x @ W
    h.data = h + h**2
    return h


def filled(x):
    held = torch.zeros(3, 4)
    held.data = x @ W
    return held + x


def written(x):
    out = torch.empty(3, 4)
    torch.mul(x @ W, 2, out=out)
    return out


def inner(x):
    return torch.func.jvp(torch.tanh, (x @ W,), (torch.ones(3, 4),))[1]


REFUSED = {
    "x.data = y": (exchanged, "exchanges the data"),
    "a constant's data": (filled, "exchanges the data"),
    "torch.library": (lambda x: x + cube(x @ W), "cube.* no forward-mode rule"),
    "torch.ops": (lambda x: x + torch.ops.zoo_forward_tests.cube(x @ W), "no forward-mode rule"),
    "out=": (written, "out= function"),
    "no rule in torch": (lambda x: torch.cdist(x @ W, W), "_cdist_forward"),
    "reentrant checkpointing": (
        lambda x: checkpoint(lambda y: torch.tanh(y @ W), x @ W, use_reentrant=True),
        "autograd.Function",
    ),
    "forward mode inside": (inner, "[Nn]ested"),
}
POINT = torch.linspace(-1, 1, 12).reshape(3, 4)
ALONG = POINT.cos()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", REFUSED)
def test_dual_refuses_what_forward_mode_gets_wrong_with_a_remedy_that_works(name):
    fn, words = REFUSED[name]
    with pytest.raises(NotImplementedError, match=rf"(?s){words}.*@finite_difference\(\)"):
        Dual()(fn, (POINT,), (ALONG,))
    found = FiniteDifference(step=1e-2)(fn, (POINT,), (ALONG,))
    plain = (fn(POINT + 1e-2 * ALONG) - fn(POINT - 1e-2 * ALONG)) / 2e-2
    torch.testing.assert_close(found, plain)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("name", ["x.data = y", "torch.library", "out=", "no rule in torch"])
def test_jvp_refuses_them_too(name):
    with pytest.raises(NotImplementedError, match=r"@finite_difference\(\)"):
        Jvp()(REFUSED[name][0], (POINT,), (ALONG,))


@pytest.mark.parametrize("derivative", [Dual(), Jvp()])
def test_what_does_not_move_may_be_exchanged_and_whole_numbers_come_from_any_operator(derivative):
    layer = nn.Linear(4, 4)

    def fn(x):
        layer.weight.data = W
        layer.bias.requires_grad = True
        return layer(x) * (3 - x.shape[0])

    assert derivative(fn, (POINT,), (ALONG,)).equal(torch.zeros(3, 4))


def test_another_error_of_a_network_stays_as_it_is():
    with pytest.raises(RuntimeError, match="cannot be multiplied") as raised:
        Dual()(lambda x: x @ torch.ones(3, 3), (POINT,), (ALONG,))
    assert "finite_difference" not in str(raised.value)


NORMS = {
    "module": lambda norm, x: norm(x),
    "functional": lambda norm, x: F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1
    ),
    "torch.batch_norm": lambda norm, x: torch.batch_norm(
        *(x, norm.weight, norm.bias, norm.running_mean, norm.running_var),
        *(norm.training, 0.1, 1e-5, False),
    ),
    "torch.batch_norm by name": lambda norm, x: torch.batch_norm(
        input=x, weight=norm.weight, bias=norm.bias, running_mean=norm.running_mean,
        running_var=norm.running_var, training=norm.training, momentum=0.1, eps=1e-5,
        cudnn_enabled=False,
    ),
    "torch.native_batch_norm": lambda norm, x: torch.native_batch_norm(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, 0.1, 1e-5
    )[0],
    "torch.instance_norm": lambda norm, x: torch.instance_norm(
        *(x[..., None].expand(3, 4, 2) * W[:2, 0], norm.weight, norm.bias),
        *(norm.running_mean, norm.running_var, norm.training, 0.1, 1e-5, False),
    )[..., 0],
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_follow_the_pass_of_the_value_alone(name, training):
    norm = nn.BatchNorm1d(4).train(training)
    nn.init.uniform_(norm.weight)
    theirs = copy.deepcopy(norm)
    plain = NORMS[name](theirs, POINT)
    out, du = OnePass().with_value(lambda x: {"u": NORMS[name](norm, x)}, (POINT,), (ALONG,), "u")
    assert out["u"].equal(plain)

    def same():
        return all(
            a.equal(b)
            for a, b in zip(
                (norm.running_mean, norm.running_var, norm.num_batches_tracked),
                (theirs.running_mean, theirs.running_var, theirs.num_batches_tracked),
                strict=True,
            )
        )

    assert same()
    assert norm.running_mean.any() == training
    counts = name == "module" and training  # its batches, which torch.func refuses
    others = (Dual(), OnePass(), FiniteDifference(step=1e-2), *([] if counts else [Jvp()]))
    for derivative in others:
        found = derivative(lambda x: NORMS[name](norm, x), (POINT,), (ALONG,))
        torch.testing.assert_close(found, du, rtol=2e-2, atol=1e-2)
        assert same()


class Behind(nn.Module):
    """A layer behind a change of what goes into it."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(4, 2), change

    def forward(self, x, t, r, cond=None):
        u = self.layer(self.change(torch.cat([x, t[:, None], r[:, None]], 1) * 1.0))
        return {"u": u, "v": u}


def data_exchanged(h):
    h.data = h + h**2
    return h


def data_scaled(h):
    h.data.mul_(2)
    return h


def detached_scaled(h):
    h.detach().mul_(2)
    return h


SILENT = {
    "x.data = y": data_exchanged,
    "torch.library": lambda h: h + cube(h),
    "x.data.mul_": data_scaled,
    "x.detach().mul_": detached_scaled,
    "float()": lambda h: h * (1 + float(h.square().mean())),
    "numpy": lambda h: h + torch.from_numpy(h.detach().numpy() ** 2).to(h),
    "tolist": lambda h: h + torch.tensor(h.tolist()).to(h),
}


@pytest.mark.parametrize("derivative", [OnePass(), Dual(), Jvp()])
@pytest.mark.parametrize("name", SILENT)
def test_the_probe_catches_each_and_its_remedy_passes(name, derivative):
    net = Behind(SILENT[name])
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    def probe(by):
        return probe_derivatives(DuMo(residual=Exact(derivative=by)), net, x)

    with pytest.raises(ValueError, match=r"(?s)(wrong on|cannot pass).*@finite_difference\(\)"):
        probe(derivative)
    assert probe(FiniteDifference())["derivative_error"] < 1e-2


def test_one_pass_refuses_exchanged_data_of_a_constant_in_a_pass_of_its_own():
    """The start-up probe is such a pass; without the refusal the process would end."""
    with pytest.raises(NotImplementedError, match=r"exchanges the data.*@finite_difference\(\)"):
        OnePass()(filled, (POINT,), (ALONG,))
