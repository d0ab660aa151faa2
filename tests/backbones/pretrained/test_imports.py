"""Public checkpoints: what is imported computes what the public code computes."""

from __future__ import annotations

import pytest
import torch
from public_networks import (
    CHANNELS,
    CLASSES,
    DEPTH,
    DIM,
    HEADS,
    PATCH,
    SIDE,
    mf_dit,
    transformer,
    transformer_state,
    unet,
    unet_state,
)

from backbones import build_network, warm_start
from backbones.dit import DiT
from backbones.noise import vp_step
from backbones.pretrained import layouts
from backbones.pretrained.imports import import_weights
from registry.protocols import NULL_LABEL

PIXELS = SIDE * PATCH
# Sums of a few hundred float32 products in another order; outputs are of order one.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def points(n: int = 5, side: int = PIXELS):
    torch.manual_seed(3)
    x, t = torch.randn(n, CHANNELS, side, side), torch.rand(n)
    label = torch.arange(n) % (CLASSES + 1) - 1  # one of them NULL_LABEL
    return x, t, t * torch.rand(n), label, torch.where(label == NULL_LABEL, CLASSES, label)


@pytest.mark.parametrize("out", [CHANNELS, 2 * CHANNELS])
def test_sit_velocity_is_ours_with_the_clock_and_the_sign_turned(out):
    state = transformer_state(out=out)  # released weights make variances too
    imported = import_weights(state, "sit", num_heads=HEADS)
    x, t, _, label, theirs = points()
    expected = -transformer(state, x, 1 - t, theirs)[:, :CHANNELS]
    assert expected.std() > 0.1
    found = imported.network()(x, t, t, {"label": label})["v"]
    torch.testing.assert_close(found, expected, **CLOSE)
    variances = [name for name in imported.unused if "second half" in name]
    assert len(variances) == (2 if out > CHANNELS else 0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_lightning_dit_velocity_is_ours_with_the_clock_and_the_sign_turned(qk_norm):
    state = transformer_state(swiglu=True, qk_norm=qk_norm)
    imported = import_weights(state, num_heads=HEADS)
    assert imported.layout == "lightning_dit"
    x, t, _, label, theirs = points()
    expected = -transformer(state, x, 1 - t, theirs)
    found = imported.network()(x, t, t, {"label": label})["v"]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"} == set(imported.unused)


def test_mean_flow_port_keeps_its_times_and_signs():
    state = transformer_state(second=True)
    imported = import_weights({"ema": state, "opt": {}, "step": 3}, num_heads=HEADS)
    assert imported.layout == "mean_flow_sit"
    assert {"opt", "step"} <= set(imported.unused)
    x, t, r, label, theirs = points()
    expected = transformer(state, x, t, theirs, second=t - r)
    found = imported.network()(x, t, r, {"label": label})["u"]
    torch.testing.assert_close(found, expected, **CLOSE)


def with_scales(state):
    """The names that DMF's code gives to the weights of its norms."""
    return {
        name.replace("_norm.weight", "_norm.scale") if ".attn." in name else name: value
        for name, value in state.items()
    }


@pytest.mark.parametrize("qk_norm", [False, True])
def test_dmf_keeps_its_times_and_signs(qk_norm, monkeypatch):
    monkeypatch.setitem(layouts.DECODER_FROM, DEPTH, 1)
    state = transformer_state(qk_norm=qk_norm)
    more = {"logvar_linear.weight": torch.zeros(1, 256), "logvar_linear.bias": torch.zeros(1)}
    imported = import_weights({"ema": with_scales(state) | more}, num_heads=HEADS)
    assert imported.layout == "dmf"
    assert "logvar_linear" in imported.unused
    assert "block 1 is taken" in imported.notes[-1]
    x, t, r, label, theirs = points()
    expected = transformer(state, x, t, theirs, end=(r, 1))
    found = imported.network()(x, t, r, {"label": label})["u"]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, transformer(state, x, t, theirs), atol=1e-2)


def test_dmf_of_a_depth_that_was_not_released_is_refused():
    with pytest.raises(ValueError, match="which of its 2 blocks is the first that sees r"):
        import_weights(transformer_state(), "dmf", num_heads=HEADS)


def test_flow_models_of_repa_keep_their_times_and_signs():
    state = transformer_state()
    projectors = {"projectors.0.0.weight": torch.zeros(3, DIM)}
    projectors["projectors.0.0.bias"] = torch.zeros(3)
    imported = import_weights(state | projectors, num_heads=HEADS)
    assert imported.layout == "repa"
    assert "projectors" in imported.unused
    x, t, _, label, theirs = points()
    found = imported.network()(x, t, t, {"label": label})["v"]
    torch.testing.assert_close(found, transformer(state, x, t, theirs), **CLOSE)


def test_explicit_shortcut_is_read_as_the_mean_flow_port_without_its_log_variance():
    state = transformer_state(second=True)
    more = {"logvar_linear.weight": torch.zeros(1, DIM), "logvar_linear.bias": torch.zeros(1)}
    imported = import_weights({"ema": state | more}, num_heads=HEADS)
    assert imported.layout == "mean_flow_sit"
    assert "logvar_linear" in imported.unused
    x, t, r, label, theirs = points()
    expected = transformer(state, x, t, theirs, second=t - r)
    found = imported.network()(x, t, r, {"label": label})["u"]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("labelled", [True, False])
def test_mf_dit_keeps_its_times_and_signs_without_guidance(labelled):
    state = transformer_state(second=True, qk_norm=True, mf_dit=True)
    if not labelled:
        del state["y_embedder.embedding.weight"]
    imported = import_weights({"model": state}, num_heads=HEADS)
    assert imported.layout == "mf_dit"
    assert imported.unused == {"w_embedder": "guidance scales other than 1, of at most 4"}
    x, t, r, label, theirs = points()
    u, v = mf_dit(state, x, t, r, theirs if labelled else None)
    found = imported.network()(x, t, r, {"label": label} if labelled else None)
    torch.testing.assert_close(found["u"], u, **CLOSE)
    torch.testing.assert_close(found["v"], v, **CLOSE)
    guided, _ = mf_dit(state, x, t, r, theirs if labelled else None, scale=2.0)
    assert (guided - u).abs().max() > 0.01


@pytest.mark.parametrize("augmented", [False, True])
def test_py_mean_flow_unet_keeps_its_times_and_signs(augmented):
    state = unet_state()
    wrapped = {f"net_ema.{k}": v for k, v in state.items()} | {"num_updates": torch.tensor(1)}
    wrapped |= {f"net.{k}": v + 1 for k, v in state.items()}
    imported = import_weights({"model": wrapped, "optimizer": {}})
    assert imported.layout == "py_mean_flow"
    assert {"model.num_updates", "optimizer", "model.net"} <= set(imported.unused)
    x, t, r, *_ = points(side=8)
    augment = torch.randn(5, 6) if augmented else None
    expected = unet(state, x, t, t - r, augment)
    cond = None if augment is None else {"augment": augment}
    torch.testing.assert_close(imported.network()(x, t, r, cond)["u"], expected, **CLOSE)


def test_dit_noise_is_read_at_its_own_steps():
    """At a whole step k of its process our point is x_k / (alpha + sigma) at t = sigma / (...)."""
    state = transformer_state(out=2 * CHANNELS)
    net = import_weights(state, "dit", num_heads=HEADS).network()
    step = torch.tensor([0, 1, 250, 500, 999])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)[step].float()
    alpha, sigma = (z.view(-1, 1, 1, 1) for z in (kept.sqrt(), (1 - kept).sqrt()))
    x, _, _, label, theirs = points()
    noise = transformer(state, x, step.float(), theirs)[:, :CHANNELS]
    velocity = noise - (x - sigma * noise) / alpha
    t = (sigma / (alpha + sigma)).flatten()
    found = net(x / (alpha + sigma), t, t, {"label": label})["v"]
    # At step 999 the noise is divided by alpha = 0.0064, and with it float32's rounding.
    torch.testing.assert_close(alpha * found, alpha * velocity, atol=1e-4, rtol=1e-3)


def test_steps_of_the_noise_process_grow_with_time_and_stop_at_its_ends():
    step, alpha, sigma = vp_step(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (step.diff() >= 0).all()
    assert step[0] == 0
    assert step[-1] == 999
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


# the student starts as its teacher


@pytest.mark.parametrize("keys", [("u",), ("u", "v"), ("v", "logvar")])
@pytest.mark.parametrize("layout", ["sit", "lightning_dit"])
def test_student_equals_its_imported_teacher_at_step_zero(layout, keys):
    state = transformer_state(swiglu=layout == "lightning_dit")
    imported = import_weights(state, layout, num_heads=HEADS)
    teacher = imported.network()
    student = build_network(same_trunk(imported), imported.shape, CLASSES, keys)
    warm_start(student, teacher)
    x, t, r, label, _ = points()
    expected = teacher(x, t, t, {"label": label})["v"]
    for key in {"u", "v"} & set(keys):
        assert student(x, t, r, {"label": label})[key].equal(expected)


def same_trunk(imported, **other):
    cls = type(imported.network().trunk)
    return lambda **given: cls(**{**imported.fields, **other}, **given)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"time_features": "unit"}, "time_features = 'unit', the teacher's 'dit'"),
        ({"max_frequency": 8.0}, "max_frequency = 8.0, the teacher's 1.0"),
        ({"num_heads": 2}, "num_heads = 2, the teacher's 4"),
    ],
)
def test_student_whose_trunk_computes_something_else_is_refused(other, said):
    imported = import_weights(transformer_state(), "sit", num_heads=HEADS)
    student = build_network(same_trunk(imported, **other), imported.shape, CLASSES, ("u",))
    with pytest.raises(ValueError, match=said):
        warm_start(student, imported.network())


def test_student_may_drop_out_and_checkpoint_where_its_teacher_did_not():
    imported = import_weights(transformer_state(), "sit", num_heads=HEADS)
    trunk = same_trunk(imported, dropout=0.1, checkpointing=True, second_time="r")
    student = build_network(trunk, imported.shape, CLASSES, ("u",))
    warm_start(student, imported.network())


# strictness


def test_layout_must_be_said_where_names_do_not_tell():
    with pytest.raises(ValueError, match="a DiT's or a SiT's; say which"):
        import_weights(transformer_state(), num_heads=HEADS)


def test_unknown_layouts_and_files_are_named():
    with pytest.raises(ValueError, match="no checkpoint layout 'sti'. Did you mean 'sit'"):
        import_weights(transformer_state(), "sti", num_heads=HEADS)
    with pytest.raises(ValueError, match="none of the layouts .* first names are conv.weight"):
        import_weights({"conv.weight": torch.zeros(1)})


def test_every_tensor_of_the_file_is_used_or_named():
    state = transformer_state() | {"blocks.0.gate": torch.zeros(1), "extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place for 2 tensors .*: blocks.0.gate, extra"):
        import_weights(state, "sit", num_heads=HEADS)


def test_missing_tensor_is_named():
    state = transformer_state()
    del state["blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"has no 'blocks.1.mlp.fc1.bias', which layout 'sit'"):
        import_weights(state, "sit", num_heads=HEADS)


def test_wrong_shape_is_named():
    state = transformer_state()
    state["blocks.1.attn.proj.weight"] = torch.zeros(DIM, DIM + 1)
    message = r"trunk.blocks.1.attn.proj.weight has shape \(32, 33\), here \(32, 32\)"
    with pytest.raises(ValueError, match=message):
        import_weights(state, "sit", num_heads=HEADS).network()


def test_other_positions_are_refused():
    state = transformer_state()
    state["pos_embed"] = state["pos_embed"] + 0.01
    with pytest.raises(ValueError, match="'pos_embed' of the checkpoint differs from the fixed"):
        import_weights(state, "sit", num_heads=HEADS)


def test_number_of_heads_is_asked_for_where_no_released_size_has_the_width():
    with pytest.raises(ValueError, match="heads at width 32 is in no tensor; give num_heads"):
        import_weights(transformer_state(), "sit")


def test_architecture_is_read_off_the_tensors():
    imported = import_weights(transformer_state(), "sit", num_heads=HEADS)
    assert imported.shape == (CHANNELS, PIXELS, PIXELS)
    assert imported.num_classes == CLASSES
    assert imported.fields["depth"] == DEPTH
    assert imported.fields["mlp_ratio"] == 4
    assert isinstance(imported.network().trunk, DiT)
