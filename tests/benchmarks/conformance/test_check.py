"""`objective-zoo check` on objectives from outside, right ones and wrong ones.

A wrong objective is a right one with one line replaced; the table says which claim must notice and
what the user must be told.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.conformance.report import (
    CLAIMS,
    LAST,
    SLOW,
    check,
    claims_for,
    run,
    subject_of,
)
from registry import objectives
from registry.plugins import import_file

HEADER = """
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from registry import objectives
from registry.protocols import LossOutput, Teacher, Weight
from zoo.ops import like, mean_flat, normal_like
from zoo.teachers import EmaTeacher
from zoo.weighting import Adaptive


@objectives.register("NAME")
@dataclass(frozen=True, kw_only=True)
"""
# Nothing of the zoo but two reductions: as somebody would write it who has read one page.
MEAN_FLOW = '''class Mine:
    """MeanFlow by hand."""

    heads: ClassVar = ("u",)

    def loss(self, net, batch, rng):
        x0 = batch.x0
        x1 = torch.randn(x0.shape, generator=rng, dtype=x0.dtype)
        t, r = torch.rand(2, len(x0), generator=rng).sort(0, descending=True).values
        x_t = (1 - like(t, x0)) * x0 + like(t, x0) * x1
        v = x1 - x0

        def u(x, t, r):
            return net(x, t, r, batch.cond)["u"]

        u_t, du_dt = torch.func.jvp(u, (x_t, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
        target = (v - like(t - r, x0) * du_dt).detach()
        error = mean_flat((u_t - target) ** 2)
        return LossOutput(per_sample=error, terms={"u": error.detach()})
'''
ALPHA_FLOW = '''class Mine:
    """alpha-Flow: a teacher, two evaluations, an adaptive weight."""

    heads: ClassVar = ("u",)
    trains: ClassVar = ("map",)

    weight: Weight = field(default_factory=Adaptive)
    teacher: Teacher = field(default_factory=EmaTeacher)
    alpha: float = 0.1
    exact_with: ClassVar = {"alpha": 1e-3}

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t, r = torch.rand(2, len(x0), generator=rng).sort(0, descending=True).values
        s = t - self.alpha * (t - r)
        x_t = x0 + like(t, x0) * (x1 - x0)
        v = x1 - x0
        u = net(x_t, t, r, batch.cond)["u"]
        z = x_t - like(t - s, x0) * v
        after = self.teacher(net)(z, s, r, batch.cond)["u"]
        target = (self.alpha * v + (1 - self.alpha) * after).detach()
        error = mean_flat((u - target) ** 2) / self.alpha
        out = {}
        return LossOutput(per_sample=self.weight(error, out))
'''
LAGRANGIAN = '''class Mine:
    """Flow-map matching at the lower end, differentiated through its derivative."""

    heads: ClassVar = ("u",)
    trains: ClassVar = ("map",)
    differentiates: ClassVar = ("derivative",)

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t, r = torch.rand(2, len(x0), generator=rng).sort(0, descending=True).values
        x_t = x0 + like(t, x0) * (x1 - x0)

        def flow_map(r):
            return x_t - like(t - r, x0) * net(x_t, t, r, batch.cond)["u"]

        end, dx_dr = torch.func.jvp(flow_map, (r,), (torch.ones_like(r),))
        with torch.no_grad():
            v_end = net(end, r, r, batch.cond)["u"]
        v = net(x_t, t, t, batch.cond)["u"]
        error = mean_flat((dx_dr - v_end) ** 2) + mean_flat((v - (x1 - x0)) ** 2)
        return LossOutput(per_sample=error)
'''
MOMENTS = '''class Mine:
    """One-step samples with the batch's mean: a law's fixed point, and coupled rows."""

    heads: ClassVar = ("u",)
    trains: ClassVar = ("map",)
    fixed_point: ClassVar = "distribution"
    couples_rows: ClassVar = True

    def loss(self, net, batch, rng):
        x1, n = normal_like(batch.x0, rng), len(batch.x0)
        one = torch.ones(n)
        sample = x1 - net(x1, one, 0 * one, batch.cond)["u"]
        others = (sample.sum(0) - sample) / max(n - 1, 1)  # a row with itself is left out
        gap = (others - batch.x0.mean(0)).detach()
        return LossOutput(per_sample=mean_flat(sample * gap))
'''

WRONG = {
    # name: (line, what replaces it, claim that must fail, words of the reason, of the hint)
    "flipped_sign": (
        "target = (v - like(t - r, x0) * du_dt).detach()",
        "target = (v + like(t - r, x0) * du_dt).detach()",
        "fixed point at a Gaussian", "no fixed point: 'u'", "sign or tangent",
    ),
    "towards_the_data": (
        "v = x1 - x0", "v = x0 - x1", "fixed point at a Gaussian", "no fixed point", "t=1 noise",
    ),
    "frozen_time": (
        "(v, torch.ones_like(t), torch.zeros_like(r))",
        "(v, torch.zeros_like(t), torch.zeros_like(r))",
        "fixed point at a Gaussian", "no fixed point", "tangent",
    ),
    "no_correction": (
        "target = (v - like(t - r, x0) * du_dt).detach()", "target = v",
        "fixed point at a Gaussian", "no fixed point", "tangent",
    ),
    "gap_for_r": (
        "return net(x, t, r, batch.cond)", "return net(x, t, t - r, batch.cond)",
        "fixed point at a Gaussian", "no fixed point", "x_r = x_t",
    ),
    "forgotten_detach": (
        "du_dt).detach()", "du_dt)",
        "no gradient through targets", "through a derivative of the network", ".detach()",
    ),
    "scalar_loss": (
        "per_sample=error,", "per_sample=error.mean(),",
        "one loss per row", r"shape [], not [8]", "mean_flat",
    ),
    "mean_of_the_batch": (
        "per_sample=error,", "per_sample=error.mean().expand(len(x0)),",
        "rows are independent", "data of other rows", "couples_rows",
    ),
    "plain_tensor": (
        'return LossOutput(per_sample=error, terms={"u": error.detach()})', "return error",
        "one loss per row", "a Tensor, not a LossOutput", "LossOutput(per_sample=",
    ),
    "global_noise": (
        "torch.randn(x0.shape, generator=rng, dtype=x0.dtype)", "torch.randn_like(x0)",
        "global generators untouched", "global generator of torch", "generator=rng",
    ),
    "in_place": (
        "x0 = batch.x0\n", "x0 = batch.x0.mul_(0.5)\n",
        "batch left alone", "batch.x0 changed in place", "x = x * a",
    ),
    "single_precision": (
        "per_sample=error,", "per_sample=error.float(),",
        "one loss per row", "float32", "dtype",
    ),
    "vectors_only": (
        "x_t = (1 - like(t, x0)) * x0 + like(t, x0) * x1",
        "x_t = (1 - t[:, None]) * x0 + t[:, None] * x1",
        "shapes and dtypes", "data of shape [3, 4]", "zoo.ops.like",
    ),
    "recorded_with_gradient": (
        '"u": error.detach()', '"u": error',
        "shapes and dtypes", "with its gradient", "detach what is recorded",
    ),
    "undeclared_output": (
        'return net(x, t, r, batch.cond)["u"]', 'return net(x, t, r, batch.cond)["v"]',
        "one loss per row", "KeyError: v", "`heads`",
    ),
    "dead_head": (
        '("u",)', '("u", "v")', "gradient reaches every head", "output 'v'", "`heads`",
    ),
    "no_labels": (
        "return net(x, t, r, batch.cond)", "return net(x, t, r, None)",
        "labels", "no label reaches", "batch.cond",
    ),
    "swapped_times": (
        "return net(x, t, r, batch.cond)", "return net(x, r, t, batch.cond)",
        "calls within 0 <= r <= t <= 1", "outside 0 <= r <= t <= 1", "noisier time",
    ),
    "ascent": (
        "per_sample=error,", "per_sample=-error,",
        "errors are pulled back", "not pushed back", "prediction - sg target",
    ),
    "nan_on_the_diagonal": (
        "error = mean_flat((u_t - target) ** 2)",
        "error = mean_flat((u_t - target) ** 2).sqrt() / mean_flat(x0**2)",
        "finite", "not finite", "0/0",
    ),
    "diagonal_alone": (
        "x_t = (1 -", "r = t\n        x_t = (1 -",
        "errors are pulled back", "u is trained at r = t alone", "trains = (",
    ),
    "constant_noise": (
        "generator=rng, dtype", "generator=torch.Generator().manual_seed(0), dtype",
        "determined by rng", "the same noise", "normal_like",
    ),
    "counter": (
        "error = mean_flat(", "object.__setattr__(self, 'n', getattr(self, 'n', 0) + 1)\n"
        "        error = self.n * mean_flat(",
        "determined by rng", "same rng differ", "batch.step",
    ),
    "ignored_generator": (
        "v = x1 - x0", "x1 = torch.ones_like(x0)\n        t, r = 0 * t + 0.7, 0 * r + 0.2\n"
        "        x_t = 0.3 * x0 + 0.7 * x1\n        v = x1 - x0",
        "determined by rng", "ignores rng", "from the rng",
    ),
    "draws_for_its_share": (
        "def loss(self, net, batch, rng):\n",
        "def loss(self, net, batch, rng):\n"
        "        batch = type(batch)(*batch.share.rows(batch.x0, batch.cond))\n",
        "shares of a batch", "other losses in a share", "for the whole batch, then",
    ),
    "spread_over_the_rows": (
        "per_sample=error,", "per_sample=error / x0.std(0).mean(),",
        "few rows", "1 row", "nan",
    ),
}  # fmt: skip

_number = itertools.count()


@pytest.fixture
def written(tmp_path):
    """Writes an objective into a file of its own; registered until the test ends."""
    names = []

    def write(body: str) -> tuple[str, Path]:
        name = f"mine_{next(_number)}"
        file = tmp_path / f"{name}_file.py"
        file.write_text(HEADER.replace("NAME", name) + body)
        names.append(name)
        return name, file

    yield write
    for name in names:
        if name in objectives:
            objectives._remove(name)
        sys.modules.pop(f"{name}_file", None)


def results_of(name, file, claims=tuple(CLAIMS)):
    import_file(file)
    found = run(subject_of(name), {key: CLAIMS[key] for key in claims})
    return {result.claim: result for result in found}


def failures(results):
    return {name: r.reason for name, r in results.items() if r.status == "FAIL"}


def test_right_objective_passes(written):
    claims = [claim for claim in CLAIMS if claim not in SLOW]
    assert not failures(results_of(*written(ALPHA_FLOW), claims))


def test_objective_that_differentiates_its_derivative_passes(written):
    claims = [claim for claim in CLAIMS if claim not in SLOW]
    results = results_of(*written(LAGRANGIAN), claims)
    assert not failures(results)
    assert results["no gradient through targets"].figure == "3 evaluations, through derivative"
    assert results["fixed point at a Gaussian"].status == "ok"


def test_objective_whose_fixed_point_is_that_of_a_law_passes(written):
    results = results_of(*written(MOMENTS))
    assert not failures(results)
    declared = {name: r.reason for name, r in results.items() if r.status == "declared"}
    assert declared == {
        "rows are independent": "couples_rows",
        "derivatives agree": "no derivative part",
    }


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_objective_is_told_why_and_what_to_do(written, mistake):
    line, other, claim, reason, hint = WRONG[mistake]
    assert MEAN_FLOW.count(line) == 1
    name, file = written(MEAN_FLOW.replace(line, other))
    results = results_of(name, file, {"one loss per row", claim})
    assert results[claim].status == "FAIL", failures(results)
    assert reason in results[claim].reason
    assert hint in results[claim].hint


def test_nothing_else_is_tested_without_one_loss_per_row(written):
    name, file = written(MEAN_FLOW.replace("per_sample=error,", "per_sample=error.mean(),"))
    assert list(results_of(name, file)) == ["one loss per row"]


def command(*arguments):
    return main(["check", *map(str, arguments)])


@pytest.fixture
def some(monkeypatch) -> tuple[str, ...]:
    """`check` does these alone: what all of them say is in the tests of the zoo's objectives."""
    names = ("one loss per row", "labels", "derivatives agree", "fixed point at a Gaussian")
    claims = {name: CLAIMS[name] for name in names} | LAST
    monkeypatch.setattr("benchmarks.conformance.report.claims_for", lambda name: claims)
    return tuple(claims)


def test_command_prints_one_line_for_each_claim_and_a_summary(written, some, capsys):
    name, file = written(MEAN_FLOW)
    assert command(name, "--import", file) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"{name} meets ")
    for line, claim in zip(lines, some, strict=True):
        status, rest = line[:10].strip(), line[10:]
        assert status in ("ok", "declared", "note")
        assert rest.startswith(claim)
        assert rest.removeprefix(claim).strip()  # a figure, or why it is declared


def test_special_claims_and_the_note_come_last():
    assert [*claims_for("flow_matching")] == [*CLAIMS, "loss floor", *LAST]


@pytest.mark.slow
def test_whole_check_of_an_objective_by_hand_passes(written, capsys):
    name, file = written(MEAN_FLOW)
    assert command(name, "--import", file) == 0
    *lines, _ = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CLAIMS | LAST)


def test_command_fails_with_reason_and_hint(written, capsys, monkeypatch):
    few = {key: CLAIMS[key] for key in ("one loss per row", "gradient reaches every head")}
    monkeypatch.setattr("benchmarks.conformance.report.claims_for", lambda name: few)
    name, file = written(MEAN_FLOW.replace('("u",)', '("u", "v")'))
    assert command(name, "--import", file) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("FAIL"))
    assert "gradient reaches every head" in lines[at]
    assert "reason: no gradient reaches the output 'v'" in lines[at + 1]
    assert "hint:   train every output in `heads`" in lines[at + 2]
    assert f"{name} fails: gradient reaches every head" in printed.err


def test_command_speaks_json(written, some, capsys):
    assert command("flow_matching", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["objective"] == "flow_matching"
    assert report["passed"] is True
    results = {result["claim"]: result for result in report["results"]}
    assert [*results] == [*some]
    assert results["not reached by these"]["status"] == "note"
    fixed = results["fixed point at a Gaussian"]
    assert fixed["status"] == "ok"
    assert 0 <= fixed["value"] < fixed["limit"] == 4

    name, file = written(MEAN_FLOW.replace("per_sample=error,", "per_sample=error.mean(),"))
    assert command(name, "--import", file, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    (failed,) = report["results"]
    assert (failed["claim"], failed["status"]) == ("one loss per row", "FAIL")
    assert failed["reason"]
    assert failed["hint"]


def test_command_lists_what_rejects_each_planted_mistake(monkeypatch, capsys):
    killers = ("no gradient through targets", "calls within 0 <= r <= t <= 1")
    few = {name: CLAIMS[name] for name in (*killers, "fixed point at a Gaussian")}
    monkeypatch.setattr("benchmarks.conformance.report.claims_for", lambda name: few)
    assert command("shortcut", "--mutations") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["rejected"] * 4
    assert "no stop-gradient" in lines[1]
    assert "no gradient through targets" in lines[1]
    assert command("flow_matching", "--mutations", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verdicts"] == []
    assert command("flow_matching", "--mutations") == 0
    assert "no part that a mistake could be planted in" in capsys.readouterr().out


def test_surviving_mistake_fails_the_command(monkeypatch, capsys):
    harmless = {"one loss per row": CLAIMS["one loss per row"]}
    monkeypatch.setattr("benchmarks.conformance.report.claims_for", lambda name: harmless)
    assert command("shortcut", "--mutations") == 1
    printed = capsys.readouterr()
    assert "SURVIVED" in printed.out
    assert "shortcut fails: t - r fed where r is expected" in printed.err


def test_unknown_objective_is_answered_with_the_nearest(capsys):
    assert command("mean_flo") == 2
    assert "Did you mean 'mean_flow'?" in capsys.readouterr().err


def test_missing_file_is_named(capsys):
    assert command("mine", "--import", "nowhere/mine.py") == 2
    assert "no Python file 'nowhere/mine.py'" in capsys.readouterr().err


def test_field_without_a_default_is_explained(written, capsys):
    name, file = written(MEAN_FLOW.replace('("u",)\n', '("u",)\n    scale: float\n'))
    assert command(name, "--import", file) == 2
    assert "give every field a default" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ('fixed_point: ClassVar = "pointwize"', "allowed: pointwise, distribution, none"),
        ('exact_with: ClassVar = {"alfa": 1.0}', "names alfa in exact_with"),
        ('exact_with: ClassVar = "alpha"', "it needs a mapping"),
        ('exact_outputs: ClassVar = {"u": "v"}', "there are none"),
        ('differentiates: ClassVar = ("inputs",)', "'derivative' and 'input'"),
    ],
)
def test_declaration_that_means_nothing_is_refused(written, capsys, declaration, message):
    name, file = written(MEAN_FLOW.replace('("u",)\n', f'("u",)\n    {declaration}\n'))
    assert command(name, "--import", file) == 2
    assert message in capsys.readouterr().err


def test_check_returns_the_report(some):
    lines = []
    report = check("flow_matching", tell=lines.append)
    assert report.problems() == ()
    assert tuple(result.claim for result in report.results) == some
    applied = [result for result in report.results if result.status == "ok"]
    assert f"flow_matching meets {len(applied)} claims" in lines[-1]
    assert len(lines) == len(report.results) + 1
    assert all(result.seconds >= 0 for result in report.results)
