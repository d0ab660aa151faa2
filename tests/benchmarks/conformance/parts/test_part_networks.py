"""`check` on backbones and heads: right ones pass, and each claim rejects a wrong one first."""

from __future__ import annotations

import math
from typing import ClassVar

import gin
import pytest
import torch
from backbone_cases import SMALL
from part_cases import by_claim, checked, described, first_failure
from torch import nn

from backbones.embeddings import Conditioning, zero_
from backbones.heads import AverageVelocity, LogVariance, Readouts
from backbones.mlp import MLP, VectorReadout
from benchmarks.conformance.parts.networks import backbone, head
from registry import backbones, heads
from registry.protocols import NULL_LABEL


class Small(MLP):
    """The zoo's network of vectors, small enough for many claims."""

    def __init__(self, *, shape, num_classes=0, two_times=False, **fields):
        small = {"dim": 16, "depth": 1}
        super().__init__(
            shape=shape, num_classes=num_classes, two_times=two_times, **{**small, **fields}
        )


class ByHand(nn.Module):
    """Right: any shape by flattening, times multiplied by 1000, no class of the zoo."""

    def __init__(self, shape, num_classes, two_times):
        super().__init__()
        size, self.dim, self.shape, self.two = math.prod(shape), 24, shape, two_times
        self.second = nn.Linear(self.dim, self.dim)
        self.time = nn.Linear(16 * (1 + two_times), self.dim)
        self.classes = nn.Embedding(num_classes + 1, self.dim)
        self.first = nn.Linear(size, self.dim)

    def waves(self, t):
        w = torch.exp(-torch.arange(8).double() * math.log(10000) / 8)
        angles = 1000 * t[:, None].double() * w
        return torch.cat([angles.cos(), angles.sin()], 1).to(self.first.weight.dtype)

    def forward(self, x, t, r, cond):
        times = [self.waves(t), self.waves(r)] if self.two else [self.waves(t)]
        c = self.time(torch.cat(times, 1))
        label = torch.full((len(x),), NULL_LABEL)
        if cond is not None and "label" in cond and self.classes.num_embeddings > 1:
            label = cond["label"]
        c = c + self.classes(label % self.classes.num_embeddings)
        h = nn.functional.silu(self.first(x.flatten(1).to(self.first.weight.dtype)) + c)
        return h + nn.functional.silu(self.second(h)), c

    def pool(self, features):
        return features

    def readout(self):
        return Shaped(self.dim, self.shape)


class Shaped(nn.Module):
    def __init__(self, dim, shape):
        super().__init__()
        self.linear, self.shape = nn.Linear(dim, math.prod(shape)), shape
        zero_(self.linear)

    def forward(self, features, c):
        return self.linear(features + c).reshape(-1, *self.shape)


class Kinked(Small):
    """Right: its derivative jumps, but a derivative it has."""

    def forward(self, x, t, r, cond):
        h, c = super().forward(x, t, r, cond)
        return torch.relu(h + c), c


class Decoupled(Small):
    """Right: one half of the blocks sees t, the other half r."""

    def __init__(self, *, shape, num_classes=0, two_times=False):
        super().__init__(shape=shape, num_classes=num_classes, two_times=two_times, depth=2)
        self.decoder = Conditioning(
            16, num_classes=num_classes, two_times=False, second_time="h", max_frequency=8.0
        )

    def forward(self, x, t, r, cond):
        two = self.conditioning.second_time is not None
        c, d = self.conditioning(t, r, cond), self.decoder(r if two else t, r, cond)
        h = self.blocks[0](self.embed(x.to(self.embed.weight.dtype)), c)
        return self.blocks[1](h, d), d


class Narrow(Small):
    """Outputs for the first two numbers of a vector alone."""

    def readout(self):
        return VectorReadout(self.dim, min(self.size, 2))


class Fixed(ByHand):
    """It takes pictures and fails in them where they are not square, in words of torch."""

    def __init__(self, shape, num_classes, two_times):
        super().__init__(shape, num_classes, two_times)
        if len(shape) == 3:
            torch.zeros(shape[1]) + torch.zeros(shape[2])


class NotZero(Small):
    def readout(self):
        made = super().readout()
        nn.init.normal_(made.linear.bias, std=1e-3)
        return made


class Divided(Small):
    def forward(self, x, t, r, cond):
        h, c = super().forward(x, t, r, cond)
        return h / t[:, None].to(h.dtype), c


class OneTime(Small):
    def __init__(self, *, shape, num_classes=0, two_times=False):
        super().__init__(shape=shape, num_classes=num_classes, two_times=False)


class AlwaysTwo(Small):
    def __init__(self, *, shape, num_classes=0, two_times=False):
        super().__init__(shape=shape, num_classes=num_classes, two_times=True)


class Unlabelled(Small):
    def __init__(self, *, shape, num_classes=0, two_times=False):
        super().__init__(shape=shape, num_classes=0, two_times=two_times)


class LastClass(Small):
    """NULL_LABEL = -1 takes the row of the last class."""

    def forward(self, x, t, r, cond):
        if cond and "label" in cond:
            last = self.conditioning.label and self.conditioning.label.num_classes - 1
            label = cond["label"]
            cond = {**cond, "label": label.masked_fill(label == NULL_LABEL, last or 0)}
        return super().forward(x, t, r, cond)


class Wide(Small):
    def pool(self, features):
        return torch.cat([features, features], 1)


class Batched(Small):
    """It normalises over the batch, in evaluation mode too."""

    def forward(self, x, t, r, cond):
        h, c = super().forward(x, t, r, cond)
        return h - 0.1 * h.mean(0), c


class Declared(Batched):
    couples_rows: ClassVar = True


class Dropping(Small):
    def forward(self, x, t, r, cond):
        h, c = super().forward(x, t, r, cond)
        return nn.functional.dropout(h, 0.1), c


class Cut(Small):
    """The derivative of one block is cut."""

    def forward(self, x, t, r, cond):
        h, c = super().forward(x, t, r, cond)
        return h + self.blocks[0](h, c).detach(), c


class Steps(Small):
    """Times are rounded to one of 1000 steps, beside a branch that sees them as they are."""

    def forward(self, x, t, r, cond):
        h, c = super().forward(x, t, r, cond)
        steps = (1000 * t).floor() / 1000
        return h + torch.sin(8 * steps)[:, None].to(h.dtype), c


class Half(Small):
    """It overflows in half precision under autocast."""

    def forward(self, x, t, r, cond):
        h, c = super().forward(x, t, r, cond)
        if torch.is_autocast_enabled("cpu"):
            h = h * 1e30 * 1e30
        return h, c


class Unused(Small):
    def __init__(self, *, shape, num_classes=0, two_times=False):
        super().__init__(shape=shape, num_classes=num_classes, two_times=two_times)
        self.spare = nn.Linear(3, 3)


OUTPUTS = "outputs of a network"
WRONG = [
    (Narrow, OUTPUTS, "[5, 2] for x [5, 3]", "[5, 3]"),
    (Fixed, "shapes of data", "data [1, 8, 4] fail when it is made: RuntimeError", "ValueError"),
    (NotZero, "starts at zero", "does not start at zero", "zero_"),
    (Divided, "finite", "not finite at times 0 and 1", "no division by t"),
    (OneTime, "x, t and r reach the outputs", "do not depend on r", "two_times"),
    (AlwaysTwo, "x, t and r reach the outputs", "two_times=False, changes with r", "alone"),
    (Unlabelled, "labels reach the outputs", "are the same, with 4 classes", "LabelEmbedding"),
    (LastClass, "labels reach the outputs", "the null label and label 3", "row of its own"),
    (Wide, "c and pooled features", "pool(features) is [3, 32]", "dim"),
    (Batched, "rows are independent", "other rows", "couples_rows"),
    (Dropping, "deterministic in evaluation", "evaluation mode differ", "self.training"),
    (Cut, "derivative backends agree", "the derivative by dual is off by", ".detach()"),
    (Steps, "smooth in x, t and r", "along t the derivatives miss", "rounding"),
    (Half, "bfloat16 autocast", "or not finite", "float32"),
    (Unused, "every parameter is trained", "spare.weight, spare.bias", "use each parameter"),
]  # fmt: skip


@pytest.mark.parametrize("name", backbones.names())
def test_registered_backbone_passes(name):
    """At a small size; `check` itself takes the defaults."""
    for setting, value in SMALL[name][1].items():
        gin.bind_parameter(f"{name}.{setting}", value)
    assert not described(by_claim(backbones, name))


@pytest.mark.parametrize("cls", [ByHand, Kinked, Decoupled, Declared])
def test_right_backbone_passes(cls):
    assert not described(checked(backbones, cls))


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG)
def test_wrong_backbone_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(backbones, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason
    assert hint in failure.hint


def test_every_claim_rejects_a_wrong_backbone_first():
    assert {claim for _, claim, *_ in WRONG} == set(backbone.CLAIMS)


class Twin(nn.Module):
    """Right: two outputs, of the data's shape and of one number a row, that follow r."""

    keys = ("twin", "energy")
    needs_r: ClassVar = True

    def __init__(self, trunk):
        super().__init__()
        self.readout, self.linear = trunk.readout(), nn.Linear(trunk.dim, 1)
        zero_(self.linear)

    def forward(self, features, c, *at):
        return {"twin": self.readout(features, c), "energy": self.linear(c)[:, 0]}


class VectorsAlone(AverageVelocity):
    """Right: it says which trunks it takes."""

    def __init__(self, trunk):
        if len(trunk.fields["shape"]) != 1:
            raise ValueError("it takes vectors alone")
        super().__init__(trunk)


class Column(LogVariance):
    def forward(self, features, c, *at):
        return {"logvar": self.linear(c)}


class Missing(Readouts):
    keys = ("u", "v")
    needs_r: ClassVar = True

    def forward(self, features, c, *at):
        return {"u": self.readouts["u"](features, c)}


class Awake(LogVariance):
    def __init__(self, trunk):
        super().__init__(trunk)
        nn.init.ones_(self.linear.bias)


class OfVectors(LogVariance):
    """It takes features for vectors."""

    needs_r: ClassVar = False

    def __init__(self, trunk):
        super().__init__(trunk)
        trunk.size + 0

    def forward(self, features, c, *at):
        return {"logvar": self.linear(features)[:, 0]}


class Exponential(AverageVelocity):
    def forward(self, features, c, *at):
        return super().forward(torch.exp(10 * features), c, *at)


class Timeless(LogVariance):
    needs_r: ClassVar = True

    def forward(self, features, c, *at):
        return {"logvar": self.linear(torch.ones_like(c))[:, 0]}


class Shared(AverageVelocity):
    def forward(self, features, c, *at):
        return super().forward(features - 0.1 * features.mean(0), c, *at)


class Lossy(AverageVelocity):
    def forward(self, features, c, *at):
        return super().forward(nn.functional.dropout(features, 0.1), c, *at)


class Cutting(AverageVelocity):
    def forward(self, features, c, *at):
        return super().forward(features.detach(), c, *at)


class Rounding(AverageVelocity):
    """The mean of the features is rounded, beside the features as they are."""

    def forward(self, features, c, *at):
        mean = features.mean(-1, keepdim=True)
        return super().forward(features + 3e-3 * (mean / 3e-4).round(), c, *at)


class Overflowing(AverageVelocity):
    def forward(self, features, c, *at):
        factor = 1e30 if torch.is_autocast_enabled("cpu") else 1.0
        return super().forward(features * factor * factor, c, *at)


class Idle(AverageVelocity):
    def __init__(self, trunk):
        super().__init__(trunk)
        self.scale = nn.Parameter(torch.ones(1))


WRONG_HEADS = [
    (Column, OUTPUTS, "'logvar' is [5, 1]", "[5]"),
    (Missing, OUTPUTS, "the output 'v' is missing", "each of its `keys`"),
    (Awake, "starts at zero", "does not start at zero: 'logvar'", "zero"),
    (OfVectors, "works on every trunk", "cannot be built on dit: AttributeError", "ValueError"),
    (Exponential, "finite", "x of size 30", "epsilon"),
    (Timeless, "needs_r as declared", "needs_r is True", "function of r"),
    (Shared, "rows are independent", "other rows", "within each row"),
    (Lossy, "deterministic in evaluation", "evaluation mode differ", "self.training"),
    (Cutting, "derivative backends agree", "the derivative by dual is off by", ".detach()"),
    (Rounding, "smooth in x, t and r", "the derivatives miss", "rounding"),
    (Overflowing, "bfloat16 autocast", "or not finite", "float32"),
    (Idle, "every parameter is trained", "mine.scale", "use each parameter"),
]  # fmt: skip


@pytest.mark.parametrize("name", heads.names())
def test_registered_head_passes(name):
    assert not described(by_claim(heads, name))


@pytest.mark.parametrize("cls", [Twin, VectorsAlone])
def test_right_head_passes(cls):
    results = checked(heads, cls)
    assert not described(results)
    assert ("refuses dit" in results["works on every trunk"].figure) == (cls is VectorsAlone)


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG_HEADS)
def test_wrong_head_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(heads, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason
    assert hint in failure.hint


def test_every_claim_rejects_a_wrong_head_first():
    assert {claim for _, claim, *_ in WRONG_HEADS} == set(head.CLAIMS)
