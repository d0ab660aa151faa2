"""Networks composed of trunk and heads: outputs, choice of heads, initialisation, size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import gin
import pytest
import torch
from backbone_cases import awake, inputs, small
from torch import nn

import registry
from backbones import build_network, default_heads, warm_start
from backbones.dit import DiT
from backbones.heads import AverageVelocity, DualHead, LogVariance, Velocity

BACKBONE_FILES = Path(__file__).parents[2] / "gin" / "backbone"
each_backbone = pytest.mark.parametrize("backbone", registry.backbones.names())


@each_backbone
@pytest.mark.parametrize(
    ("keys", "heads"),
    [
        (("v",), None),
        (("u",), None),
        (("v", "u"), None),
        (("u", "logvar"), None),
        (("u", "v", "logvar"), None),
        (("u", "v"), (AverageVelocity, Velocity)),
        (("u",), (DualHead, LogVariance)),
    ],
)
def test_every_composition_builds_and_starts_at_zero(backbone, keys, heads):
    net = small(backbone, keys, heads=heads)
    x, *rest = inputs(backbone)
    out = net(x, *rest)
    assert set(out) == set(net.keys) >= set(keys)
    for key, value in out.items():
        assert value.shape == (x.shape if key in ("u", "v") else x.shape[:1])
        assert not value.any()


@each_backbone
def test_heads_of_one_network_differ_once_trained(backbone):
    out = awake(small(backbone, ("u", "v")))(*inputs(backbone))
    assert not torch.allclose(out["u"], out["v"])


def test_default_heads_are_the_dual_head_for_both_velocities():
    assert default_heads(("u", "v")) == (DualHead,)
    assert default_heads(("v", "u", "logvar")) == (DualHead, LogVariance)
    assert default_heads(("v",)) == (Velocity,)
    assert default_heads(("u",)) == (AverageVelocity,)


class Energy(nn.Module):
    """A plug-in's head, with a field for gin."""

    keys: ClassVar = ("energy",)
    needs_r: ClassVar = False

    def __init__(self, trunk, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def forward(self, features, c, at):
        return {"energy": self.scale * c.new_ones(len(c))}


def test_plug_in_head_is_found_and_filled_by_gin():
    with registry.heads.temporary("energy", Energy):
        gin.parse_config("energy.scale = 3.0")
        net = small("mlp", ("v", "energy"))
        assert net(*inputs("mlp"))["energy"].tolist() == [3.0] * 5


def test_backbone_and_heads_may_be_gin_references():
    built = []

    class Holder:
        """Takes what a run takes."""

        def __init__(self, backbone, heads):
            built.append(build_network(backbone, (1, 8, 8), 0, ("u",), heads))

    with registry.recorders.temporary("holder", Holder):
        gin.parse_config(
            "holder.backbone = @dit\nholder.heads = (@average_velocity, @log_variance)\n"
            "dit.dim = 48\ndit.depth = 3\n"
        )
        registry.recorders.build("holder")
    assert len(built[0].trunk.blocks) == 3
    assert built[0].trunk.dim == 48
    assert built[0].keys == ("u", "logvar")
    assert list(built[0].heads) == ["average_velocity", "log_variance"]


def test_missing_output_names_the_heads_that_make_it():
    message = (
        "the objective needs the output 'u'; of the heads, velocity makes v. "
        "Registered heads that make 'u': average_velocity, deep_dual, dual_head. Add one of them"
    )
    with pytest.raises(ValueError, match=message):
        small("mlp", ("u", "v"), heads=(Velocity,))
    with pytest.raises(ValueError, match="needs the output 'w'; .*that make 'w': none"):
        small("mlp", ("v", "w"))


def test_two_heads_for_one_output_are_refused():
    with pytest.raises(ValueError, match="'dual_head' and 'velocity' both make 'v'"):
        small("mlp", ("u", "v"), heads=(DualHead, Velocity))


# initialisation

HEADS = {"v": ("v",), "u": ("u",), "dual": ("u", "v"), "logvar": ("v", "logvar")}


@each_backbone
def test_networks_of_one_seed_share_the_weights_of_what_they_share(backbone):
    nets = {name: small(backbone, keys, seed=5) for name, keys in HEADS.items()}
    weights = {name: net.trunk.state_dict() for name, net in nets.items()}
    for trunk in weights.values():
        for name, value in weights["v"].items():
            assert trunk[name].equal(value), name
    added = weights["u"].keys() - weights["v"].keys()
    assert added
    assert all("second_time" in name for name in added)
    assert all(weights["u"][name].equal(weights["dual"][name]) for name in added)
    other = small(backbone, ("v",), seed=6).trunk.state_dict()
    assert not all(other[name].equal(value) for name, value in weights["v"].items())


@each_backbone
@pytest.mark.parametrize("keys", [("u",), ("u", "v"), ("v", "logvar")])
def test_student_equals_its_one_time_teacher_at_the_start(backbone, keys):
    teacher = awake(small(backbone, ("v",)))
    student = small(backbone, keys, seed=7)
    x, t, r, cond = inputs(backbone)
    expected = teacher(x, t, r, cond)["v"]
    assert expected.abs().mean() > 1e-3
    warm_start(student, teacher)
    for key in {"u", "v"} & set(keys):
        assert student(x, t, r, cond)[key].equal(expected)
    awake(student)
    assert teacher(x, t, r, cond)["v"].equal(expected)  # copied, not shared


@each_backbone
def test_student_that_hears_guidance_equals_its_teacher_that_does_not(backbone):
    teacher = awake(small(backbone, ("v",)))
    student = small(backbone, ("u", "v"), seed=7, guidance_input=True)
    warm_start(student, teacher)
    x, t, r, cond = inputs(backbone)
    told = {**cond, "guidance": torch.tensor([[4.0, 0.2, 0.7]]).expand(len(x), 3)}
    for key in ("u", "v"):
        assert student(x, t, r, told)[key].equal(teacher(x, t, r, cond)["v"])
    with pytest.raises(ValueError, match="only one of their trunks has .*guidance"):
        warm_start(small(backbone, ("u", "v")), student)


def test_student_takes_both_outputs_of_a_dual_teacher():
    teacher, student = awake(small("mlp", ("u", "v"))), small("mlp", ("u", "v"), seed=7)
    warm_start(student, teacher)
    for key, value in teacher(*inputs("mlp")).items():
        assert student(*inputs("mlp"))[key].equal(value)


def test_student_refuses_a_teacher_that_it_cannot_equal():
    with pytest.raises(ValueError, match="trunk.*has conditioning.second_time.hidden.bias"):
        warm_start(small("mlp", ("v",)), small("mlp", ("u",)))
    with pytest.raises(ValueError, match="blocks.1"):
        warm_start(small("mlp", depth=1), small("mlp", depth=2))


# size

# Published counts include 0.3M of frozen positions, which are a buffer here.
PUBLISHED = [
    ("dit_xl", {}, ("v",), 675.1),  # DiT-XL/2
    ("dit_xl", {}, ("u",), 676.8),  # MeanFlow-XL/2
    ("dit_xl", {}, ("u", "v"), 679.45),  # DuMo
    ("dit_l", {}, ("u",), 459),
    ("dit_m", {}, ("u",), 308),
    ("dit_b", {"patch": 4}, ("u",), 131),
    ("dit_s", {}, ("v",), 33),
]


def count(name: str, keys: tuple[str, ...], fields: dict[str, int] | None = None) -> int:
    with gin.unlock_config():
        gin.parse_config_file(str(BACKBONE_FILES / f"{name}.gin"))
    backbone = partial(gin.get_configurable(DiT), **(fields or {}))
    with torch.device("meta"):
        net = build_network(backbone, (4, 32, 32), 1000, keys)
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("name", "fields", "keys", "millions"), PUBLISHED)
def test_parameters_match_the_published_count(name, fields, keys, millions):
    assert abs(count(name, keys, fields) / 1e6 - millions) < 0.5


def test_second_readout_costs_under_half_a_percent_at_xl():
    single, dual = count("dit_xl", ("u",)), count("dit_xl", ("u", "v"))
    assert 0 < dual - single < 0.005 * single


def test_backbone_file_headers_state_their_counts():
    files = sorted(BACKBONE_FILES.glob("dit_*.gin"))
    assert len(files) == 5
    for file in files:
        text = file.read_text()
        for keys in (("v",), ("u",), ("u", "v")):
            assert f"{count(file.stem, keys) / 1e6:.1f}M" in text
