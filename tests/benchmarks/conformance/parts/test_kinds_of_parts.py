"""`objective-zoo check NAME` finds the kind of a name, also in a file of one's own."""

from __future__ import annotations

import json
import sys

import pytest

import registry
from benchmarks.cli import main
from benchmarks.conformance import check
from benchmarks.conformance.parts.kinds import CHECKED, kind_of
from benchmarks.conformance.parts.path import CLAIMS
from zoo.paths import Linear

MINE = '''
from dataclasses import dataclass

from registry import paths
from zoo.paths import Linear


@paths.register("NAME")
@dataclass(frozen=True, kw_only=True)
class Mine(Linear):
    """A path of mine."""

    speed: float = SPEED

    def d_alpha(self, t):
        return self.speed * super().d_alpha(t)
'''


@pytest.fixture
def written(tmp_path):
    names = []

    def write(name, speed):
        file = tmp_path / f"{name}_file.py"
        file.write_text(MINE.replace("NAME", name).replace("SPEED", speed))
        names.append(name)
        return file

    yield write
    for name in names:
        if name in registry.paths:
            registry.paths._remove(name)
        sys.modules.pop(f"{name}_file", None)


def command(*arguments):
    return main(["check", *map(str, arguments)])


def test_path_of_ones_own_is_told_apart_by_its_derivative(written, capsys):
    assert command("right_path", "--import", written("right_path", "1.0")) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line[10:].startswith(c) for line, c in zip(lines, CLAIMS, strict=True))
    assert all(line.startswith("ok") for line in lines)
    assert last.startswith(f"right_path meets {len(CLAIMS)} claims, in ")

    assert command("slow_path", "--import", written("slow_path", "0.9")) == 1
    printed = capsys.readouterr()
    assert "reason: d_alpha is -0.9 at t = " in printed.out
    assert "hint:   differentiate alpha(t)" in printed.out
    assert "slow_path fails: derivatives of alpha and sigma" in printed.err


def test_part_is_reported_in_json_as_an_objective_is(written, capsys):
    assert command("trigflow", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [*report] == ["passed", "objective", "results", "verdicts"]
    assert (report["objective"], report["passed"]) == ("trigflow", True)
    assert [result["claim"] for result in report["results"]] == [*CLAIMS]
    measured = {r["claim"]: (r["value"], r["limit"]) for r in report["results"]}
    value, limit = measured["derivatives of alpha and sigma"]
    assert 0 <= value < limit == 1e-5


def test_every_name_has_the_kind_that_it_is_registered_as():
    for checked in CHECKED:
        for name in checked.kind.names():
            assert kind_of(name) is checked.kind
    assert kind_of("mean_flow") is registry.objectives


def test_name_of_several_kinds_is_refused_until_the_kind_is_said(monkeypatch):
    monkeypatch.setitem(registry.time_laws._classes, "linear", Linear)
    with pytest.raises(ValueError, match="several parts.* --kind path or --kind time_law"):
        kind_of("linear")
    assert kind_of("linear", "path") is registry.paths
    assert kind_of("linear", "time_law") is registry.time_laws
    with pytest.raises(KeyError, match="no weight named 'linear'"):
        kind_of("linear", "weight")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trigflo"], "no part named 'trigflo'. Did you mean 'trigflow'?"),
        (["ema"], "'ema' is a teacher, and there are claims for objective, path, time_law"),
        (["ema", "--kind", "teacher"], "no claims about a teacher; there are for objective"),
        (["linear", "--kind", "pathos"], "no kind of part is called 'pathos'"),
        (["linear", "--mutations"], "'linear' is a path; leave out --mutations"),
        (["image_folder"], "data set 'image_folder' cannot be made without arguments"),
        (["image_folder"], "missing 1 required keyword-only argument: 'folder'"),
        (["cifar10"], "CIFAR-10 is not in 'data'"),
    ],
)
def test_what_cannot_be_checked_is_said_before_anything_runs(words, told, capsys):
    assert command(*words) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert not printed.out


def test_kind_may_be_said_in_python():
    assert check("linear", kind="path").problems() == ()


def test_part_is_checked_as_it_is_bound(capsys):
    assert command("beta_pair", "--set", "beta_pair.a = 2.4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["objective"] == "beta_pair with beta_pair.a = 2.4"
    assert command("edm_augment", "--set", "edm_augment.data = @digits()") == 0
    assert command("beta_pair", "--set", "uniform_pair.off_diagonal_fraction = 0.5") == 2
    told = "uniform_pair.off_diagonal_fraction changes nothing of the time law 'beta_pair'"
    assert told in capsys.readouterr().err


def test_objective_on_a_wrong_path_is_rejected_by_the_command(written, capsys):
    file, path = written("off_path", "0.9"), "flow_matching.path = @off_path()"
    assert command("flow_matching", "--import", file, "--set", path) == 1
    assert "fails: fixed point at a Gaussian" in capsys.readouterr().err
