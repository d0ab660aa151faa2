"""What the command line refuses, before any training, and how it says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

from registry import objectives
from zoo.objectives.flow_matching import FlowMatching

MEAN_FLOW = ["run", DIGITS, "--arm", "mean_flow"]


def refused(*bindings: str, file: str = DIGITS, arm: str = "mean_flow") -> str:
    words = ["--arm", arm] if arm else []
    done = zoo("run", file, "--out", "never_made", *words, *sets(*FILE_ONLY, *bindings))
    assert done.status == 2, done.out
    assert "Traceback" not in done.err
    assert not Path("never_made").exists()
    return done.err


@pytest.mark.parametrize(
    ("binding", "says"),
    [
        ("run.objective = @mean_flwo()", "Did you mean 'mean_flow'?"),
        ("run.stepz = 3", "Did you mean 'steps'?"),
        ("dit.deptth = 3", "Did you mean 'depth'?"),
        ("dit.depth = ", "not gin"),
        ("mean_flow/run.objective = 'mean_flow'", "run.objective = 'mean_flow' is no objective"),
        (
            "mean_flow/run.objective = @digits()",
            "@digits is of the kind 'data set', not 'objective'",
        ),
        ("mean_flow/run.objective = @dit()", "dit"),
        ("run.backbone = @dit()", "Write @dit without brackets"),
        ("run.backbone = 'dit'", "registered: "),
        ("run.nfe = (1, 0)", "positive whole numbers"),
        ("run.nfe = (1, 1)", "each NFE once"),
        ("run.nfe = 1", "run.nfe = (1,)"),
        ("run.steps = 0", "must be a positive whole number"),
        ("run.steps = None", "run.seconds"),
        ("run.images = 100", "run.steps = None"),
        ("run.seconds = 1.0", "run.steps = None"),
        ("run.batch_size = 0", "run.batch_size"),
        ("run.num_samples = 0", "run.num_samples"),
        ("run.log_every = 0", "run.log_every"),
        ("run.heads = [@velocity]", "needs the output 'u'"),
        ("run.backbone = @mlp", "mlp"),
        ("run.dataset = @image_folder()", "image_folder"),
        ("run.dataset = None", "run.dataset is not bound"),
        ("dit.patch = 3", "patch"),
        ("dit.depth = 'deep'", "dit"),
        ("flow_matching.label_dropout = 0.0", "nothing uses flow_matching.label_dropout"),
        ("pseudo_huber.c = 0.1", "nothing uses pseudo_huber.c"),
        ("SPETS = 3", "nothing reads the macro 'SPETS'"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_hint(binding, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(binding)


def test_troubles_of_all_arms_are_told_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused("shortcut/run.sampler = @euler()", "decm/run.sampler = @flow_map()", arm="")
    assert "shortcut: objective 'shortcut' cannot use sampler 'euler'" in said
    assert "decm: objective 'decm' cannot use sampler 'flow_map'" in said


def test_unknown_files_and_arms_are_named_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'experiments/digits.gin'" in refused(file="experiments/digit.gin")
    assert "Did you mean 'mean_flow'?" in refused(arm="mean_flwo")
    declared = "('mean_flwo', 'decm')"
    assert "names 'mean_flwo'" in refused(f"Grid.arms = {declared}", arm="")
    assert "more than once" in refused("Grid.arms = ('dumo', 'dumo')", arm="")
    assert "must be a tuple" in refused("Grid.arms = 'dumo'", arm="")


def test_a_binding_of_ones_own_file_that_nothing_uses_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.gin").write_text(
        f"include '{DIGITS}'\nrun.objective = @mean_flow()\n"
        "mean_flow.weight = @unweighted()\nadaptive.power = 0.0\n"
    )
    said = refused(file="mine.gin", arm="")
    assert "nothing uses adaptive.power" in said
    assert "by reference" in said


def test_a_part_put_in_on_the_command_line_may_leave_bindings_of_the_one_in_the_file(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = f"include '{DIGITS}'\nrun.objective = @mean_flow()\nmean_flow.weight = @adaptive()\n"
    Path("mine.gin").write_text(text + "adaptive.power = 0.5\n")
    words = sets(*FILE_ONLY, "mean_flow.weight = @unweighted()")
    assert zoo("run", "mine.gin", "--out", "out", *words).status == 0


def test_an_error_in_an_objective_is_said_before_any_training(tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Broken(FlowMatching):
        """Flow matching that reads an output that is not there."""

        def loss(self, net, batch, rng):
            return net(batch.x0, batch.x0, batch.x0, None)["nothing"]

    monkeypatch.chdir(tmp_path)
    with objectives.temporary("broken", Broken):
        said = refused("mean_flow/run.objective = @broken()")
    assert "mean_flow: objective 'broken' on 4 rows of digits" in said


def test_resume_needs_a_folder():
    done = zoo(*MEAN_FLOW, "--resume")
    assert (done.status, "--out" in done.err) == (2, True)
