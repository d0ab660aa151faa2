"""Every trunk: shapes, conditioning, derivatives, precision; the errors of construction."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from backbone_cases import NUM_CLASSES, awake, inputs, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import registry
from backbones import build_network
from backbones.dit import DiT
from backbones.embeddings import (
    LabelEmbedding,
    TimeEmbedding,
    frequencies,
    positions_2d,
    time_features,
)
from backbones.mlp import MLP
from backbones.unet import UNet
from registry.protocols import NULL_LABEL

each_backbone = pytest.mark.parametrize("backbone", registry.backbones.names())
tiny_dit = partial(DiT, dim=16, depth=1, num_heads=2)
tiny_unet = partial(UNet, channels=8, num_heads=2)


def tangent(net, primals, tangents, cond=None, key="u") -> Tensor:
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        x, t, r = map(forward_ad.make_dual, primals, tangents)
        return forward_ad.unpack_dual(net(x, t, r, cond)[key]).tangent


# shapes


@pytest.mark.parametrize("channels", [1, 3, 4, 16, 32])
@pytest.mark.parametrize("backbone", [tiny_dit, tiny_unet])
def test_any_number_of_channels_returns_the_shape_of_x(backbone, channels):
    net = awake(build_network(backbone, (channels, 8, 4), 0, ("u",)))
    x, t = torch.randn(2, channels, 8, 4), torch.rand(2)
    assert net(x, t, t, None)["u"].shape == x.shape


@settings(max_examples=12)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    multipliers=st.sampled_from([(1,), (1, 2), (2, 1, 2)]),
    blocks=st.integers(1, 2),
)
def test_unet_takes_images_of_any_size(height, width, multipliers, blocks):
    trunk = partial(tiny_unet, multipliers=multipliers, blocks=blocks)
    net = awake(build_network(trunk, (2, height, width), 0, ("u",)))
    x, t = torch.randn(2, 2, height, width), torch.rand(2)
    out = net(x, t, t, None)["u"]
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_dit_patches_return_to_their_place():
    # Without blocks no token sees another, so a changed patch changes that patch alone.
    net = awake(build_network(partial(tiny_dit, depth=0, patch=2), (3, 4, 6), 0, ("u",)))
    x, t = torch.randn(1, 3, 4, 6), torch.rand(1)
    changed = x.clone()
    changed[..., 0:2, 4:6] += 1
    moved = (net(x, t, t, None)["u"] != net(changed, t, t, None)["u"])[0].all(0)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[0:2, 4:6] = True
    assert moved.equal(expected)


def test_dit_blocks_mix_all_patches():
    net = awake(build_network(tiny_dit, (3, 4, 6), 0, ("u",)))
    x, t = torch.randn(1, 3, 4, 6), torch.rand(1)
    changed = x.clone()
    changed[..., 0, 0] += 1
    assert (net(x, t, t, None)["u"] != net(changed, t, t, None)["u"]).all()


def test_positions_are_those_of_the_released_dit():
    # Token (y, x) of a 2x3 grid: sin and cos of x, then of y, at frequencies 10000^(-k/2).
    position = positions_2d(2, 3, 8)[1 * 3 + 2]
    w = torch.tensor([1.0, 0.01])
    expected = torch.cat([(2 * w).sin(), (2 * w).cos(), (1 * w).sin(), (1 * w).cos()])
    torch.testing.assert_close(position, expected)


@each_backbone
def test_rows_do_not_see_each_other(backbone):
    net = awake(small(backbone)).double()
    x, t, r, cond = inputs(backbone, dtype=torch.float64)
    alone = net(x[1:2], t[1:2], r[1:2], {"label": cond["label"][1:2]})["u"]
    torch.testing.assert_close(net(x, t, r, cond)["u"][1:2], alone)


@each_backbone
def test_pool_gives_dim_numbers_per_row(backbone):
    trunk = small(backbone).trunk
    features, c = trunk(*inputs(backbone))
    assert trunk.pool(features).shape == c.shape == (5, trunk.dim)


# conditioning


@each_backbone
def test_second_time_is_the_interval_or_the_end_as_selected(backbone):
    interval, end = (awake(small(backbone, second_time=s)) for s in ("h", "r"))
    x, t, r, cond = inputs(backbone)
    out = interval(x, t, r, cond)["u"]
    assert out.equal(end(x, t, t - r, cond)["u"])
    assert not torch.allclose(out, end(x, t, r, cond)["u"])


@each_backbone
def test_one_time_network_ignores_r_and_two_time_network_does_not(backbone):
    x, t, r, cond = inputs(backbone)
    one, two = awake(small(backbone, ("v",))), awake(small(backbone, ("u",)))
    assert one(x, t, r, cond)["v"].equal(one(x, t, 0 * r, cond)["v"])
    assert not torch.allclose(two(x, t, r, cond)["u"], two(x, t, 0 * r, cond)["u"])
    assert not torch.allclose(one(x, t, r, cond)["v"], one(x, r, r, cond)["v"])


@each_backbone
def test_null_label_equals_no_label(backbone):
    net = awake(small(backbone))
    x, t, r, _ = inputs(backbone)
    null = net(x, t, r, {"label": torch.full((5,), NULL_LABEL)})["u"]
    # A batch of one null row multiplies in another order than five: rounding only.
    for without in (None, {}):
        torch.testing.assert_close(net(x, t, r, without)["u"], null)
    for label in range(NUM_CLASSES):
        assert not torch.allclose(net(x, t, r, {"label": torch.full((5,), label)})["u"], null)


def test_label_embedding_keeps_the_null_row_last():
    embedding = LabelEmbedding(6, 3)
    out = embedding({"label": torch.tensor([0, 2, NULL_LABEL])})
    assert out.equal(embedding.table.weight[[0, 2, 3]])


@each_backbone
def test_network_without_classes_takes_any_cond(backbone):
    net = awake(small(backbone, num_classes=0))
    x, t, r, cond = inputs(backbone)
    assert net(x, t, r, cond)["u"].equal(net(x, t, r, None)["u"])


def test_time_features_are_unscaled_and_bounded():
    w = frequencies(16.0, "unit")
    assert w.min() == 1
    assert w.max() == 16
    assert (w.diff() >= 0).all()
    # DeepSpeed's bf16 mode casts all that a module holds; the frequencies must survive it.
    embedding = TimeEmbedding(8, 16.0)
    assert not list(embedding.buffers())
    features = []
    embedding.hidden.register_forward_pre_hook(lambda _, given: features.append(given[0].float()))
    t = torch.rand(5)
    embedding(t)
    embedding.bfloat16()(t)
    torch.testing.assert_close(features[1], features[0], atol=2**-8, rtol=0)


def test_dit_time_features_are_those_of_the_released_codes():
    t, k = torch.rand(5, dtype=torch.float64), torch.arange(128, dtype=torch.float64)
    angles = 1000 * t[:, None] * 10000 ** (-k / 128)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    # A frequency of 1000 in float32 is right to 6e-5.
    torch.testing.assert_close(time_features(t, 1000.0, "dit"), expected, atol=1e-4, rtol=0)


# derivatives


@each_backbone
@pytest.mark.parametrize("second_time", ["h", "r"])
def test_forward_mode_matches_finite_differences(backbone, second_time):
    net = awake(small(backbone, ("u", "v"), second_time=second_time)).double()
    x, t, r, cond = inputs(backbone, dtype=torch.float64)
    v = torch.randn_like(x)
    step = 1e-5  # error about step^2 * 16^2 from truncation, 1e-16 / step from rounding
    for tangents in (
        (v, torch.ones_like(t), torch.zeros_like(r)),
        (torch.zeros_like(v), torch.zeros_like(t), torch.ones_like(r)),
    ):
        ahead, behind = (
            net(*(p + s * d for p, d in zip((x, t, r), tangents, strict=True)), cond)
            for s in (step, -step)
        )
        for key in ("u", "v"):
            expected = (ahead[key] - behind[key]) / (2 * step)
            found = tangent(net, (x, t, r), tangents, cond, key)
            assert expected.norm() > 1e-3
            assert (found - expected).norm() < 1e-6 * expected.norm()


@each_backbone
def test_functional_jvp_equals_dual_numbers(backbone):
    net = awake(small(backbone)).double()
    x, t, r, cond = inputs(backbone, dtype=torch.float64)
    tangents = (torch.randn_like(x), torch.ones_like(t), torch.zeros_like(r))
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(lambda *p: net(*p, cond)["u"], (x, t, r), tangents)
    torch.testing.assert_close(found, tangent(net, (x, t, r), tangents, cond))


FIRST_BLOCK = {
    "dit": "blocks.0",
    "lightning_dit": "blocks.0",
    "unet": "body.down.0",
    "ddpmpp": "down.0",
}


@pytest.mark.parametrize("backbone", sorted(FIRST_BLOCK))
def test_checkpointing_changes_neither_gradient_nor_tangent(backbone):
    plain, saving = (awake(small(backbone, checkpointing=c)).double() for c in (False, True))
    x, t, r, cond = inputs(backbone, dtype=torch.float64)
    tangents = (torch.randn_like(x), torch.ones_like(t), torch.zeros_like(r))
    expected = tangent(plain, (x, t, r), tangents, cond)
    assert tangent(saving, (x, t, r), tangents, cond).equal(expected)
    calls = []
    block = saving.trunk.get_submodule(FIRST_BLOCK[backbone])
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    for net in (plain, saving):
        net(x, t, r, cond)["u"].square().mean().backward()
    assert len(calls) == 2  # once forward, once to recompute
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@each_backbone
def test_every_parameter_receives_a_gradient(backbone):
    net = awake(small(backbone, ("u", "v", "logvar")))
    out = net(*inputs(backbone))
    sum(value.square().sum() for value in out.values()).backward()
    dead = [
        name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert dead == []


# precision


@each_backbone
def test_time_embedding_stays_float32_under_autocast(backbone):
    net = awake(small(backbone))
    _, t, r, cond = inputs(backbone)
    expected = net.trunk.conditioning(t, r, cond)
    with torch.autocast("cpu", torch.bfloat16):
        c = net.trunk.conditioning(t, r, cond)
    assert c.dtype == torch.float32
    assert c.equal(expected)


@each_backbone
def test_bfloat16_autocast_keeps_the_outputs_float32_and_the_tangent_close(backbone):
    net = awake(small(backbone))
    x, t, r, cond = inputs(backbone)
    tangents = (torch.randn_like(x), torch.ones_like(t), torch.zeros_like(r))
    expected, slope = net(x, t, r, cond)["u"], tangent(net, (x, t, r), tangents, cond)
    with torch.autocast("cpu", torch.bfloat16):
        out, found = net(x, t, r, cond)["u"], tangent(net, (x, t, r), tangents, cond)
    assert out.dtype == found.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % per rounding, a few roundings deep.
    assert (out - expected).norm() < 0.02 * expected.norm()
    assert (found - slope).norm() < 0.03 * slope.norm()
    assert not out.equal(expected)


@each_backbone
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_network_of_another_precision_takes_and_returns_float32(backbone, dtype):
    net = awake(small(backbone, ("u", "logvar")))
    x, t, r, cond = inputs(backbone)
    expected = net(x, t, r, cond)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    for key, value in net.to(dtype)(x, t, r, cond).items():
        assert value.dtype == torch.float32
        assert (value - expected[key]).norm() < tolerance * expected[key].norm()


@pytest.mark.parametrize("backbone", ["dit", "lightning_dit", "unet", "ddpmpp"])
def test_dropout_draws_from_the_global_rng_in_training_alone(backbone):
    net = awake(small(backbone, dropout=0.5))
    args = inputs(backbone)

    def draw(seed):
        torch.manual_seed(seed)
        return net(*args)["u"]

    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))
    net.eval()
    assert draw(0).equal(draw(1))


@pytest.mark.parametrize("backbone", ["dit", "lightning_dit"])
def test_dit_normalises_queries_and_keys_on_request(backbone):
    net = awake(small(backbone, qk_norm=True)).double()
    x, t, r, cond = inputs(backbone, dtype=torch.float64)
    with torch.no_grad():  # the scale of queries no longer matters
        before = net(x, t, r, cond)["u"]
        for block in net.trunk.blocks:
            block.attn.qkv.weight[: net.trunk.dim] *= 100
            block.attn.qkv.bias[: net.trunk.dim] *= 100
    torch.testing.assert_close(net(x, t, r, cond)["u"], before, rtol=1e-4, atol=1e-5)


def test_dit_may_norm_by_root_mean_squares_and_train_its_positions():
    net = awake(small("dit", norm="rms", trained_positions=True))
    assert isinstance(net.trunk.positions, torch.nn.Parameter)
    x, t, r, cond = inputs("dit")
    net(x, t, r, cond)["u"].square().sum().backward()
    assert net.trunk.positions.grad.abs().max() > 0
    with torch.no_grad():  # a mean of the tokens matters to this norm alone
        for trunk, depends in ((net.trunk, True), (small("dit").trunk, False)):
            norm = trunk.blocks[0].norm1
            tokens = torch.randn(2, 3, trunk.dim)
            assert torch.allclose(norm(tokens + 1), norm(tokens), atol=1e-4) is not depends
    with pytest.raises(ValueError, match=r"dit.norm = 'batch'; allowed are 'layer', 'rms'"):
        small("dit", norm="batch")


# learning


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "ddpmpp" else ())  # as the U-Net
        for name in registry.backbones.names()
    ],
)
def test_backbone_learns_the_velocity_of_a_gaussian(backbone):
    # Data N(mu, s^2): v*(x, t) = -mu + c_t (x - (1-t) mu), c_t = (t - (1-t) s^2) / S_t^2.
    mu, s = 1.0, 0.5
    net = small(backbone, ("v",))
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    shape = inputs(backbone)[0].shape[1:]
    rng = torch.Generator().manual_seed(0)

    def point(n):
        x1 = torch.randn(n, *shape, generator=rng)
        x0 = mu + s * torch.randn(n, *shape, generator=rng)
        t = torch.rand(n, generator=rng)
        a = t.reshape(-1, *[1] * len(shape))
        x = (1 - a) * x0 + a * x1
        slope = (a - (1 - a) * s**2) / ((1 - a) ** 2 * s**2 + a**2)
        return x, t, x1 - x0, -mu + slope * (x - (1 - a) * mu)

    for _ in range(120):
        x, t, velocity, _ = point(32)
        optimizer.zero_grad()
        (net(x, t, t, None)["v"] - velocity).square().mean().backward()
        optimizer.step()
    x, t, _, exact = point(512)
    with torch.no_grad():
        error = (net(x, t, t, None)["v"] - exact).square().mean() / exact.square().mean()
    assert error < 0.1  # the zero network has 1, the constant -mu about 0.4


# errors


@pytest.mark.parametrize("backbone", [DiT, UNet])
def test_image_backbones_refuse_vectors(backbone):
    with pytest.raises(ValueError, match=r"shape \(2,\)\. For vectors use @mlp"):
        backbone(shape=(2,))


def test_mlp_refuses_images():
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\)\. For images use @dit or @unet"):
        MLP(shape=(1, 8, 8))


def test_dit_names_the_nearest_legal_sizes():
    message = r"9x12 .* dit.patch = 2\. Patches that fit: 1, 3\. .*height: 8 or 10; width: 12"
    with pytest.raises(ValueError, match=message):
        DiT(shape=(1, 9, 12), patch=2)
    with pytest.raises(ValueError, match="Nearest legal height: 4; width: 4"):
        DiT(shape=(1, 3, 3), patch=4)
    with pytest.raises(ValueError, match=r"dim = 100 .*num_heads = 6\. Nearest .*: 96 or 108"):
        DiT(shape=(1, 8, 8), dim=100, num_heads=6)


def test_unet_refuses_heads_that_do_not_divide_its_width():
    with pytest.raises(ValueError, match=r"= 12 channels, which unet.num_heads = 5"):
        UNet(shape=(1, 8, 8), channels=6, num_heads=5)


@each_backbone
def test_second_time_and_frequency_are_checked(backbone):
    with pytest.raises(ValueError, match="second_time = 's'; allowed are 'h' .* and 'r'"):
        small(backbone, second_time="s")
    with pytest.raises(ValueError, match="max_frequency = 0.5"):
        small(backbone, max_frequency=0.5)
    with pytest.raises(ValueError, match="time_features = 'x'; allowed are unit, dit, ddpm"):
        small(backbone, time_features="x")
