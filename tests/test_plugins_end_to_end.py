"""Objectives and samplers of one's own, in files of theirs, through the command line."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path

import gin
import pytest
from tiny_runs import DIGITS, FILE_ONLY, losses, sets, zoo

import objective_zoo
from registry import objectives, samplers

LOSS = '''
from dataclasses import dataclass
from typing import ClassVar

from registry import objectives
from registry.protocols import LossOutput
from zoo.ops import like, mean_flat, normal_like
import torch


@objectives.register("NAME")
@dataclass(frozen=True, kw_only=True)
class Mine:
    """A loss of mine."""

    heads: ClassVar = ("u",)
    scale: float = 1.0

    def loss(self, net, batch, rng):
        x1 = normal_like(batch.x0, rng)
        t = torch.rand(len(batch), generator=rng)
        x_t = like(1 - t, x1) * batch.x0 + like(t, x1) * x1
        error = mean_flat((net(x_t, t, t, batch.cond)["u"] - (x1 - batch.x0)) ** 2)
        return LossOutput(per_sample=self.scale * error, terms={"u": error.detach()})
'''
GIN = f"""
include '{DIGITS}'
import MODULE

run.objective = @NAME()
NAME.scale = 2.0
"""
ARM = f"""
include '{DIGITS}'
import MODULE

Grid.arms = ('mean_flow', 'NAME')
NAME/run.objective = @NAME()
NAME.scale = 2.0
"""
_numbers = itertools.count()


class Plugin:
    """Files in a folder of its own, under names that no other test has used."""

    def __init__(self, folder: Path, text: str = GIN):
        number = next(_numbers)
        self.name, self.module = f"mine_{number}", f"my_loss_{number}"
        self.code, self.gin = folder / f"{self.module}.py", folder / "my.gin"
        self.code.write_text(LOSS.replace("NAME", self.name))
        self.gin.write_text(text.replace("NAME", self.name).replace("MODULE", self.module))

    def forget(self) -> None:
        """As a new process would start; registered once, under a name that is not used again."""
        sys.modules.pop(self.module, None)
        sys.path[:] = [p for p in sys.path if p != str(self.code.parent)]
        if self.name in objectives:
            objectives._remove(self.name)
        gin.clear_config()


@pytest.fixture
def plugin(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    made = Plugin(folder)
    yield made
    made.forget()


def test_objective_of_ones_own_runs_alone_and_is_sampled_later(plugin, tmp_path):
    done = zoo("run", plugin.gin, "--out", tmp_path / "out", *sets(*FILE_ONLY))
    assert done.status == 0, done.err
    run = tmp_path / "out" / plugin.name
    assert [f.parent.name for f in run.parent.glob("*/result.json")] == [plugin.name]
    assert "scale=2.0" in (run / "objective.txt").read_text()

    plugin.forget()
    done = zoo("sample", run, "--num", "2", "--out", tmp_path / "grid.png", "--trust-code")
    assert done.status == 0, done.err
    assert (tmp_path / "grid.png").exists()

    plugin.forget()
    assert "run THIS_FILE --trust-code" in (run / "config.gin").read_text()
    done = zoo("run", run / "config.gin", "--out", tmp_path / "again", "--trust-code")
    assert done.status == 0, done.err
    assert losses(tmp_path / "again" / plugin.name) == losses(run)


def test_run_whose_objective_is_gone_says_where_it_was(plugin, tmp_path):
    assert zoo("run", plugin.gin, "--out", tmp_path / "out", *sets(*FILE_ONLY)).status == 0
    plugin.forget()
    plugin.code.rename(tmp_path / "elsewhere.py")
    words = ("sample", tmp_path / "out" / plugin.name, "--out", tmp_path / "grid.png")
    assert f"{plugin.module}: there is no such file here" in zoo(*words).err
    done = zoo(*words, "--trust-code")
    assert done.status == 2
    assert f"imports '{plugin.module}', which lay in {plugin.code.parent}" in done.err
    assert "Traceback" not in done.err


def test_objective_of_ones_own_is_an_arm_beside_ours(tmp_path):
    plugin = Plugin(tmp_path, ARM)
    done = zoo("run", plugin.gin, "--out", tmp_path / "out", *sets(*FILE_ONLY))
    assert done.status == 0, done.err
    assert f"| {plugin.name}" in done.out
    assert len(list((tmp_path / "out").glob("*/result.json"))) == 2
    plugin.forget()
    run = tmp_path / "out" / "mean_flow"  # its text imports the plug-in too
    words = ("sample", run, "--num", "2", "--out", tmp_path / "grid.png")
    assert zoo(*words).status == 2
    assert zoo(*words, "--import", plugin.code).status == 0
    plugin.forget()


def test_objective_of_ones_own_is_listed(plugin):
    done = zoo("list", "--import", plugin.code, "--kind", "objective")
    assert re.search(rf"^  {plugin.name} +A loss of mine", done.out, re.MULTILINE)


def test_binding_of_ones_own_objective_is_checked(plugin, tmp_path):
    wrong = sets(*FILE_ONLY, f"{plugin.name}.skale = 1.0")
    done = zoo("run", plugin.gin, "--out", tmp_path / "out", *wrong)
    assert (done.status, "Did you mean 'scale'?" in done.err) == (2, True)


def test_missing_module_is_named(plugin, tmp_path):
    plugin.code.unlink()
    done = zoo("run", plugin.gin, "--out", tmp_path / "out", *sets(*FILE_ONLY))
    assert done.status == 2
    assert f"No module named '{plugin.module}'" in done.err


@pytest.mark.parametrize("break_it", ["    def loss(", "heads: ClassVar"])
def test_incomplete_objective_is_refused_by_name(plugin, tmp_path, break_it):
    kept = [line for line in plugin.code.read_text().splitlines() if break_it not in line]
    if "loss" in break_it:
        kept = kept[: kept.index("    scale: float = 1.0") + 1]
    plugin.code.write_text("\n".join(kept))
    done = zoo("run", plugin.gin, "--out", tmp_path / "out", *sets(*FILE_ONLY))
    assert done.status == 2
    assert repr(plugin.name) in done.err
    assert "Traceback" not in done.err


def test_distribution_with_an_entry_point_is_a_plugin(tmp_path, monkeypatch):
    plugin = Plugin(tmp_path)
    info = tmp_path / "my_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[objective_zoo.plugins]\nmine = {plugin.module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"{plugin.name} " in zoo("list", "--kind", "objective").out
    words = ["--set", f"run.objective = @{plugin.name}()", *sets(*FILE_ONLY)]
    done = zoo("run", DIGITS, "--out", tmp_path / "out", *words)
    assert done.status == 0, done.err
    assert (tmp_path / "out" / plugin.name / "result.json").exists()
    plugin.forget()


def test_run_folder_executes_nothing_without_consent(plugin, tmp_path):
    """Every command that reads the configuration of a run asks first."""
    assert zoo("run", plugin.gin, "--out", tmp_path / "out", *sets(*FILE_ONLY)).status == 0
    run = tmp_path / "out" / plugin.name
    recorded = json.loads((run / "code.json").read_text())
    assert list(recorded) == [plugin.code.name]
    digest = recorded[plugin.code.name]
    plugin.forget()
    mark = tmp_path / "EXECUTED"
    plugin.code.write_text(f"open({str(mark)!r}, 'w').close()\n" + plugin.code.read_text())
    plan = ("--gpus", 1, "--memory", "8GB", "--cpu")
    config = run / "config.gin"
    for words in (
        ("sample", run, "--num", 2, "--out", tmp_path / "a.png"),
        ("evaluate", run, "--num", 4),
        ("export", run, "--out", tmp_path / "exported"),
        ("plan", config, *plan),
        ("run", config, "--out", tmp_path / "b"),
        ("grid", config, "--out", tmp_path / "c", "--dry-run"),
        ("bench", config),
    ):
        done = zoo(*words)
        assert done.status == 2, words
        assert "imports code that came with it" in done.err
        assert f"IT HAS CHANGED since the run was made, when it was {digest}" in done.err
        assert "--trust-code" in done.err
    with pytest.raises(ValueError, match="imports code that came with it"):
        objective_zoo.load(run).net  # noqa: B018
    assert not mark.exists()
    plugin.forget()
    assert objective_zoo.load(run, trust_code=True).net.keys == ("u",)
    assert mark.exists()
    plugin.forget()
    done = zoo("export", run, "--out", tmp_path / "exported", "--trust-code")
    assert done.status == 0, done.err
    assert f"{plugin.code} has changed since the run" in done.err


SAMPLER = '''
from dataclasses import dataclass
from typing import ClassVar

from registry import samplers
from zoo.samplers import euler_step


@samplers.register("NAME")
@dataclass(frozen=True, kw_only=True)
class Mine:
    """Euler steps that shrink towards the data."""

    needs: ClassVar = ("velocity",)
    nfe: int = 2

    def __call__(self, net, x1, cond, rng):
        times = [(1 - i / self.nfe) ** 2 for i in range(self.nfe + 1)]
        for t, r in zip(times, times[1:]):
            x1 = euler_step(net, x1, t, r, cond)
        return x1
'''


def test_sampler_of_ones_own_samples_a_shipped_objective_and_is_listed(tmp_path):
    number = next(_numbers)
    name, code = f"sampler_{number}", tmp_path / f"my_sampler_{number}.py"
    code.write_text(SAMPLER.replace("NAME", name))
    mine = tmp_path / "mine.gin"
    bind = f"include '{DIGITS}'\nimport {code.stem}\nrun.sampler = @{name}()\n"
    try:
        assert "needs: velocity" in zoo("list", "--import", code, "--kind", "sampler").out
        mine.write_text(f"{bind}run.objective = @flow_matching()\n")
        done = zoo("run", mine, "--out", tmp_path / "out", *sets(*FILE_ONLY))
        assert done.status == 0, done.err
        (result,) = (tmp_path / "out").glob("*/result.json")
        assert f'"sampler": "{name}"' in result.read_text()
        mine.write_text(f"{bind}run.objective = @shortcut()\n")
        done = zoo("run", mine, "--out", tmp_path / "no", *sets(*FILE_ONLY))
        assert done.status == 2
        assert f"cannot use sampler '{name}': it needs the velocity at every t" in done.err
    finally:
        sys.modules.pop(code.stem, None)
        sys.path[:] = [p for p in sys.path if p != str(tmp_path)]
        samplers._remove(name)
        gin.clear_config()
