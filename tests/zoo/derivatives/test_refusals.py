"""What one_pass cannot follow is refused by name, with a remedy that works."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from derivative_cases import both, each_way, error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainers.derivative_probe import probe_derivatives
from zoo.derivatives.methods import Dual
from zoo.objectives.mean_flow import MeanFlow


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class WithJvp(Square):
    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent * ctx.saved_tensors[0]


class Itself(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


REFUSED = {
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.__imul__(2),
    "__setitem__": lambda x: x.__setitem__(0, 1.0),
    "aten.mul_.Tensor": lambda x: torch.ops.aten.mul_.Tensor(x, 2),
    "exp_": lambda x: torch.ops.aten.exp_(x),
    "copy_": lambda x: torch.zeros(3, 4).copy_(x),
    "silu, which writes in place": lambda x: F.silu(x, inplace=True),
    "relu, which writes in place": lambda x: F.relu(x, inplace=True),
    "dropout, which writes in place": lambda x: F.dropout(x, 0.5, inplace=True),
    "alpha_dropout, which draws anew": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "dropout1d, which draws anew": lambda x: F.dropout1d(x[None], 0.5),
    "dropout, which draws anew": lambda x: torch.dropout(x, 0.5, True),
    "bernoulli, which draws anew": lambda x: torch.bernoulli(x.sigmoid()) * x,
    "normal, which draws anew": lambda x: torch.normal(x, 1, generator=torch.Generator()),
    "multi_head_attention_forward, which draws anew": lambda x: nn.MultiheadAttention(
        4, 2, dropout=0.5
    )(x, x, x)[0],
    "gru, which draws anew": lambda x: nn.GRU(4, 4, num_layers=2, dropout=0.5)(x)[0],
    "dropout within attention": lambda x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], dropout_p=0.5
    ),
    "WithJvpBackward": lambda x: WithJvp.apply(x) + 1,
}
# What dual numbers cannot follow either.
BY_DIFFERENCES = {
    "__set__": lambda x: setattr(x, "data", torch.zeros(3, 4)),
    "exp, which writes in place by out=": lambda x: torch.exp(x, out=torch.empty(3, 4)),
    "SquareBackward": lambda x: Square.apply(x) + 1,
    "ItselfBackward": lambda x: Itself.apply(x),
    "CheckpointFunctionBackward": lambda x: checkpoint(F.silu, x, use_reentrant=True) + 1,
    "(exp, which .* reentrant|CheckpointFunctionBackward)": lambda x: (
        checkpoint(torch.exp, x, use_reentrant=True) + 1
    ),
    "cdist, for which torch has no forward-mode rule": lambda x: torch.cdist(x, x),
    "forward-mode differentiation inside": lambda x: torch.func.jvp(torch.exp, (x,), (x,))[1],
    "a copy without derivative": lambda x: torch.tensor(x) * 2,
}


@each_way
@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_follow_is_named_with_a_way_out(name, way):
    refused(REFUSED[name], way, f"one_pass cannot follow {name}.*@dual")


@each_way
@pytest.mark.filterwarnings("ignore:.*copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("name", BY_DIFFERENCES)
def test_what_dual_cannot_follow_either_is_left_to_differences(name, way):
    refused(BY_DIFFERENCES[name], way, f"one_pass cannot follow {name}.*@finite_difference")


def refused(fn, way, words):
    weight = torch.ones(3, 4, requires_grad=True)
    x = torch.ones(3, 4)
    with pytest.raises(NotImplementedError, match=words):
        both(way, lambda x: {"u": fn(x * weight)}, (x,), (x,))


@pytest.mark.parametrize("change", [lambda h: h.data.mul_(2), lambda h: h.detach().mul_(2)])
@each_way
def test_values_that_change_behind_their_tangent_are_refused(change, way):
    def fn(x, then):
        h = x * 3
        change(h)
        return {"u": then(h)}

    x = torch.ones(3, 4)
    for then in (lambda h: h, lambda h: h + 1):
        with pytest.raises(NotImplementedError, match="changed in place by .data or .detach"):
            both(way, lambda x, then=then: fn(x, then), (x,), (x,))
    out, _ = both(way, lambda x: {"u": x * x.data.mean() * x.detach()}, (x,), (x,))
    assert out["u"].equal(x)


@each_way
def test_an_activation_kept_for_the_next_pass_is_refused_and_a_detached_one_is_not(way):
    x, along, kept = torch.ones(3, 4), torch.ones(3, 4), []

    def fn(x, keep):
        h = x * 3
        out = h * kept[-1] if kept else h
        kept.append(keep(h))
        return {"u": out}

    both(way, lambda x: fn(x, lambda h: h), (x,), (along,))
    with pytest.raises(NotImplementedError, match=r"two passes.*keep activation.detach"):
        both(way, lambda x: fn(x, lambda h: h), (x,), (along,))
    kept.clear()
    both(way, lambda x: fn(x, lambda h: h.detach()), (x,), (along,))
    _, du = both(way, lambda x: fn(x, lambda h: h.detach()), (x,), (along,))
    assert du.equal(torch.full((3, 4), 9.0))  # what was kept is a constant


@each_way
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_norms_of_half_precision_take_sums_in_single_precision(norm, way):
    x, along = torch.linspace(-2, 3, 24).reshape(3, 8), torch.linspace(1, -1, 24).reshape(3, 8)
    layer = nn.LayerNorm(8) if norm == "layer" else nn.GroupNorm(2, 8)
    nn.init.uniform_(layer.weight)
    expected = Dual()(layer, (x.bfloat16().float(),), (along.bfloat16().float(),))
    low = layer.bfloat16()
    out, found = both(way, lambda x: {"u": low(x)}, (x.bfloat16(),), (along.bfloat16(),))
    assert out["u"].equal(low(x.bfloat16()))
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 1e-2  # bfloat16 rounds at 4e-3


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@each_way
def test_a_gradient_that_would_be_lost_is_an_error(way):
    x, weight = torch.randn(3, 4), torch.ones(3, 4, requires_grad=True)
    out, _ = both(way, lambda x: {"u": x * Sign.apply(x * weight)}, (x,), (x,))
    with pytest.raises(NotImplementedError, match=r"an autograd.Function.*@finite_diff"):
        out["u"].sum().backward()


@torch.library.custom_op("zoo_tests::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


square.register_autograd(lambda ctx, gradient: gradient)


@each_way
def test_an_operation_that_loses_the_tangents_of_dual_numbers_is_an_error(way):
    x = torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"zoo_tests.*tangents.*@finite_difference"):
        both(way, lambda x: {"u": x + square(x)}, (x,), (x,))


@each_way
def test_a_cut_is_an_error(way):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="carries no tangent"):
        both(way, lambda x: {"u": x.detach() * 2}, (x,), (x,))


def test_the_probe_refuses_a_network_with_a_cut_and_one_that_writes_in_place():
    class Bad(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.layer, self.change = nn.Linear(4, 2), change

        def forward(self, x, t, r, cond=None):
            h = torch.cat([x, t[:, None], r[:, None]], 1)
            return {"u": self.layer(self.change(h)), "v": x}

    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="along . its relative error"):
        probe_derivatives(MeanFlow(), Bad(lambda h: h + h.detach() * 2), x)
    with pytest.raises(ValueError, match=r"one_pass.*cannot pass this network: .*mul_.*@dual"):
        probe_derivatives(MeanFlow(), Bad(lambda h: h.mul_(2)), x)
    probe_derivatives(MeanFlow(derivative=Dual()), Bad(lambda h: h.clone().mul_(2)), x)
