"""What no claim reaches is said, and the report is strict JSON whatever was measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.conformance.reached import not_reached
from benchmarks.conformance.report import ConformanceReport
from benchmarks.conformance.results import ClaimResult, run_claim
from benchmarks.conformance.subject import Subject, random_batch
from registry.protocols import LossOutput, Weight
from zoo.ops import like, mean_flat, normal_like
from zoo.weighting import Unweighted


@dataclass(frozen=True, kw_only=True)
class Branching:
    """Flow matching with a branch that its defaults do not take, and one at later steps alone."""

    heads: ClassVar = ("v",)
    exact_with: ClassVar = {"scale": 1.0}

    weight: Weight = field(default_factory=Unweighted)
    scale: float = 2.0
    squared: bool = True

    def loss(self, net, batch, rng):
        x1 = normal_like(batch.x0, rng)
        t = torch.rand(len(x1), generator=rng)
        x_t = batch.x0 + like(t, x1) * (x1 - batch.x0)
        error = net(x_t, t, t, batch.cond)["v"] - x1 + batch.x0
        if batch.step > 20_000:
            error = error * 1.0
        if self.squared:
            return LossOutput(per_sample=self.weight(self.scale * mean_flat(error**2), {}))
        return self.otherwise(error)  # the line that is not run

    def otherwise(self, error):
        return LossOutput(per_sample=mean_flat(error.abs()))


def test_fields_of_one_value_and_idle_lines_are_named():
    subject = Subject("branching", Branching)
    text = not_reached(subject).figure
    lines = Path(__file__).read_text().splitlines()
    idle = 1 + lines.index("        return self.otherwise(error)  # the line that is not run")
    name = Path(__file__).name
    assert text == f"no other value of weight, squared; no run of {name} {idle}, {idle + 3}"


def test_a_value_that_any_claim_tries_counts():
    subject = Subject("branching", Branching)
    toy = subject.on_toy()
    subject.loss(Branching(squared=False), toy.net, random_batch())
    assert "squared" not in not_reached(subject).figure
    assert "weight" in not_reached(subject).figure


def test_tracing_ends_with_the_claim_even_if_the_loss_fails():
    import sys

    @dataclass(frozen=True)
    class Failing:
        heads: ClassVar = ("v",)

        def loss(self, net, batch, rng):
            raise ValueError("no loss")

    before = sys.gettrace()
    assert run_claim("not reached", not_reached, Subject("failing", Failing)).status == "FAIL"
    assert sys.gettrace() is before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_string_in_json(value):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    results = (ClaimResult(status="FAIL", value=value, limit=4.0), ClaimResult(status="ok"))
    text = ConformanceReport("mine", results=results).json()
    first, second = json.loads(text, parse_constant=refuse)["results"]
    assert first["value"] == str(value)
    assert float(first["value"]) == value or math.isnan(value)
    assert first["limit"] == 4.0
    assert second["value"] is None
