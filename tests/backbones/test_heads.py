"""Heads see the call of the network, and say which of their keys are velocities."""

from __future__ import annotations

import logging
from typing import ClassVar

import pytest
import torch
from backbone_cases import inputs, small
from torch import nn

import registry
from backbones import network
from backbones.heads import Velocity
from backbones.parametrisations import EDM, Data
from zoo.ops import like


class Echo(nn.Module):
    """A head whose outputs are made of the call."""

    keys: ClassVar = ("twin", "echo")
    velocities: ClassVar = ("twin",)
    needs_r: ClassVar = True

    def __init__(self, trunk):
        super().__init__()

    def forward(self, features, c, at):
        echo = like(at.t - 2 * at.r, at.x) * at.x + like(at.cond["label"], at.x)
        return {"twin": torch.zeros_like(at.x), "echo": echo}


class Former(nn.Module):
    """A head of the version before."""

    keys: ClassVar = ("energy",)
    needs_r: ClassVar = False

    def __init__(self, trunk):
        super().__init__()

    def forward(self, features, c):
        return {"energy": c.sum(1)}


@pytest.mark.parametrize("backbone", registry.backbones.names())
def test_head_sees_the_call_of_the_network_on_every_backbone(backbone):
    x, t, r, cond = inputs(backbone)
    with registry.heads.temporary("echo", Echo):
        for parametrisation in (None, EDM()):  # which shows the trunk something else
            net = small(
                backbone, ("v", "echo"), heads=(Velocity, Echo), parametrisation=parametrisation
            )
            expected = like(t - 2 * r, x) * x + like(cond["label"], x)
            assert net(x, t, r, cond)["echo"].equal(expected)


def test_parametrisation_makes_the_keys_that_a_head_declares_and_no_others():
    x, t, r, cond = inputs("mlp")
    with registry.heads.temporary("echo", Echo):
        net = small("mlp", ("v", "echo"), heads=(Velocity, Echo), parametrisation=Data())
        assert net.velocities == {"v", "twin"}
        out, plain = net(x, t, r, cond), small("mlp", ("echo",), heads=(Echo,))(x, t, r, cond)
    expected = x / like(t.clamp(min=0.05), x)
    torch.testing.assert_close(out["twin"], expected)
    torch.testing.assert_close(out["v"], expected)
    assert out["echo"].equal(plain["echo"])


def test_head_of_two_arguments_works_and_says_what_to_write(caplog):
    network._say_call.cache_clear()
    with registry.heads.temporary("former", Former), caplog.at_level(logging.WARNING):
        x, t, r, cond = inputs("mlp")
        for _ in range(2):
            net = small("mlp", ("v", "energy"), heads=(Velocity, Former))
        assert net(x, t, r, cond)["energy"].equal(net.trunk(x, t, r, cond)[1].sum(1))
    (said,) = caplog.messages
    assert "head 'former' defines forward(self, features, c), which goes on working" in said
    assert "Write forward(self, features, c, at)" in said


@pytest.mark.parametrize(
    ("forward", "sees"),
    [
        (lambda self, features, c: {}, False),
        (lambda self, features, c, scale=1.0: {}, False),
        (lambda self, features, c, at: {}, True),
        (lambda self, features, c, call: {}, True),
        (lambda self, features, c, at=None: {}, True),
    ],
)
def test_signature_decides_what_a_head_is_given(forward, sees):
    made = type("Made", (), {"keys": ("k",), "needs_r": True, "forward": forward})
    with registry.heads.temporary("made_head", made):
        assert registry.sees_call(made) == registry.sees_call(made()) == sees
