"""How functions move: each rule against dual numbers, and what is refused instead of guessed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from derivative_cases import both, each_way
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import benchmarks.grids.axes  # noqa: F401  registers Grid
from zoo.derivatives.dual_tensors import DualTensor

# rules


W, B = torch.linspace(-1, 1, 18).reshape(3, 6), torch.linspace(0, 1, 3)
C = torch.linspace(0.5, 1.5, 6)
K = torch.linspace(-1, 1, 2 * 2 * 9).reshape(2, 2, 3, 3)
M = torch.tensor([[True, False, True, True]] * 4)

FUNCTIONS = {
    "add": lambda a, b: a + b,
    "add a constant of a larger shape": lambda a, b: a[0] + C.expand(2, 6),
    "add a number": lambda a, b: 1 + a,
    "add with alpha": lambda a, b: torch.add(a, b, alpha=3),
    "subtract": lambda a, b: a - b,
    "subtract from a constant": lambda a, b: C - b,
    "subtract a constant": lambda a, b: b - C,
    "subtract from a number": lambda a, b: 2 - a,
    "multiply": lambda a, b: a * b,
    "multiply rows": lambda a, b: a * b[:, :1],
    "multiply by a constant": lambda a, b: C * a,
    "multiply with itself": lambda a, b: a * a,
    "divide": lambda a, b: a / (2 + b**2),
    "divide by a constant": lambda a, b: a / C,
    "divide a number": lambda a, b: 1 / (2 + b**2),
    "power": lambda a, b: (a**2 + 1) ** 1.5,
    "matmul": lambda a, b: a @ b.mT,
    "matmul a constant": lambda a, b: W @ a.T,
    "bmm": lambda a, b: torch.bmm(a[None], b.mT[None]),
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "linear": lambda a, b: F.linear(a, W, B),
    "linear without bias": lambda a, b: F.linear(a, W),
    "linear of two": lambda a, b: F.linear(a, b),
    "conv2d": lambda a, b: F.conv2d(a.reshape(1, 2, 3, 4), K, C[:2], padding=1),
    "conv2d of two": lambda a, b: F.conv2d(a.reshape(1, 2, 3, 4), b.reshape(2, 2, 2, 3)),
    "conv1d": lambda a, b: F.conv1d(a[None], torch.ones(2, 4, 3)),
    "conv_transpose2d": lambda a, b: F.conv_transpose2d(a.reshape(1, 2, 3, 4), K, B[:2], stride=2),
    "reshape and permute": lambda a, b: a.reshape(2, 2, 6).permute(2, 0, 1).flatten(1),
    "view of broadcast rows": lambda a, b: (a[:1] + C.expand(4, 6)).view(24).view_as(b),
    "chunk": lambda a, b: torch.stack(a.chunk(3, dim=1), 1),
    "split": lambda a, b: a.split([2, 4], dim=1)[1],
    "unbind": lambda a, b: torch.unbind(a, 1)[2],
    "index": lambda a, b: a[1:, [0, 3]],
    "ellipsis": lambda a, b: a[..., ::2],
    "cat with a constant": lambda a, b: torch.cat([a, W, b], dim=0),
    "stack": lambda a, b: torch.stack([a, b, torch.ones(4, 6)]),
    "expand": lambda a, b: a[:1].expand(4, 6) + b,
    "mean": lambda a, b: a.mean(1, keepdim=True) + b.sum(0),
    "as another": lambda a, b: a.type_as(b).reshape_as(b),
    "cast": lambda a, b: a.double().to(torch.float32),
    "roll": lambda a, b: torch.roll(a, 1, 0),
    "interpolate": lambda a, b: F.interpolate(a.reshape(1, 2, 3, 4), scale_factor=2),
    "pad with a number": lambda a, b: F.pad(a, (1, 1), value=2.0),
    "gelu": lambda a, b: F.gelu(a),
    "gelu by tanh": lambda a, b: F.gelu(a, approximate="tanh"),
    "silu": lambda a, b: F.silu(a),
    "silu by module": lambda a, b: nn.SiLU()(a),
    "relu": lambda a, b: F.relu(a),
    "tanh": lambda a, b: a.tanh() * torch.sigmoid(b),
    "softmax": lambda a, b: a.softmax(-1) @ b.T,
    "sines": lambda a, b: torch.cat([a.sin(), torch.cos(b)], 1),
    "where": lambda a, b: torch.where(a > 0, a * b, b),
    "maximum": lambda a, b: torch.maximum(a, b) + a.max(1).values[:, None],
    "clamp": lambda a, b: a.clamp(-0.5, 0.5),
    "norm": lambda a, b: a / a.norm(dim=1, keepdim=True),
    "layer_norm": lambda a, b: F.layer_norm(a, (6,), eps=1e-6),
    "layer_norm with weights": lambda a, b: F.layer_norm(a, (6,), C, C, 1e-5),
    "layer_norm over two axes": lambda a, b: F.layer_norm(a, (4, 6)),
    "layer_norm of moving weights": lambda a, b: F.layer_norm(a, (6,), b[0]),
    "group_norm": lambda a, b: F.group_norm(a.reshape(2, 4, 3), 2),
    "group_norm with weights": lambda a, b: F.group_norm(a.reshape(2, 4, 3), 2, C[:4], C[:4]),
    "group_norm not contiguous": lambda a, b: F.group_norm(a.reshape(2, 3, 4).mT, 2),
    "rms_norm": lambda a, b: F.rms_norm(a, (6,)),
    "rms_norm with weights": lambda a, b: F.rms_norm(a, (6,), C, 1e-6),
    "attention": lambda a, b: F.scaled_dot_product_attention(
        a.reshape(1, 1, 4, 6), b.reshape(1, 1, 4, 6), (a * b).reshape(1, 1, 4, 6)
    ),
    "attention of a scale": lambda a, b: F.scaled_dot_product_attention(
        *(x.reshape(1, 1, 4, 6) for x in (a, b, a)), scale=0.7
    ),
    "attention with a mask": lambda a, b: F.scaled_dot_product_attention(
        *(x.reshape(1, 1, 4, 6) for x in (a, b, a)), attn_mask=M
    ),
    "causal attention": lambda a, b: F.scaled_dot_product_attention(
        *(x.reshape(1, 1, 4, 6) for x in (a, b, a)), is_causal=True
    ),
    "attention of constant keys": lambda a, b: F.scaled_dot_product_attention(
        a.reshape(1, 1, 4, 6), torch.ones(1, 1, 4, 6), b.reshape(1, 1, 4, 6)
    ),
    "multihead attention": lambda a, b: MULTIHEAD(a[None], b[None], a[None])[0],
    "multihead attention without weights": lambda a, b: MULTIHEAD(
        a[None], b[None], a[None], need_weights=False
    )[0],
    "complex numbers": lambda a, b: b + torch.fft.irfft(torch.fft.rfft(a) * (1 + 2j), n=6),
    "rotation": lambda a, b: torch.view_as_real(torch.view_as_complex(a.view(4, 3, 2)) * 1j) * 2,
    "no dropout": lambda a, b: F.dropout(a, 0.0) + F.dropout(b, 0.5, training=False),
    "no dropout of channels": lambda a, b: F.dropout1d(a, training=False) + F.rrelu(b),
    "zeros beside": lambda a, b: torch.cat([a, torch.zeros_like(b), b.new_ones(4, 6)]),
    "by name": lambda a, b: torch.mul(input=torch.add(input=a, other=b), other=a.sub(other=C)),
    "by name, one": lambda a, b: torch.sum(input=a / torch.div(input=b, other=C), dim=1),
    "zeros by name": lambda a, b: torch.zeros_like(input=a) + b,
    "whole numbers": lambda a, b: a * b.long() + (10 * a).to(torch.int32).float() + a.argmax(),
    "shape and kind": lambda a, b: a.view(a.shape[0], a.size(1)).to(b.dtype) * a.ndim,
}
torch.manual_seed(0)
MULTIHEAD = nn.MultiheadAttention(6, 2, batch_first=True)


@each_way
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rule_moves_a_function_and_leaves_its_value_and_gradient(name, way):
    fn = FUNCTIONS[name]
    torch.manual_seed(1)
    weight = torch.randn(4, 6, requires_grad=True)
    a, b, da, db = torch.randn(4, 4, 6)
    used = []

    def fed(a, b):  # both depend on a weight, so that values have a graph
        used.append(type(a))
        return fn(a * weight, b + weight)

    out, found = both(way, lambda a, b: {"u": fed(a, b)}, (a, b), (da, db))
    assert used == [DualTensor]
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals = forward_ad.make_dual(a, da), forward_ad.make_dual(b, db)
        expected = forward_ad.unpack_dual(fed(*duals)).tangent.detach()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    assert expected.abs().max() > 1e-3
    assert found.grad_fn is None
    plain = fed(a, b)
    assert out["u"].equal(plain)
    (ours,) = torch.autograd.grad(out["u"].square().sum(), weight)
    (theirs,) = torch.autograd.grad(plain.square().sum(), weight)
    assert ours.equal(theirs)
