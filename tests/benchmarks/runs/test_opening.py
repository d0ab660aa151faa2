"""A finished run opens as it was recorded, also where a new run with its settings is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

MEASURED = ("--num", 12, "--features", "pixels", "--metrics", "frechet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of each of two objectives."""
    out = tmp_path_factory.mktemp("runs") / "out"
    words = ("--arm", "shortcut", "--arm", "decm", "--out", out)
    done = zoo("run", DIGITS, *words, *sets(*FILE_ONLY, "decm.n2n_every = 2"))
    assert done.status == 0, done.err
    return out


@pytest.fixture
def old(finished, tmp_path, monkeypatch):
    """Makes a copy of a run whose config.gin has been changed, as an earlier version wrote it."""
    monkeypatch.setenv("OBJECTIVE_ZOO_CACHE", str(tmp_path / "cache"))

    def made(arm: str, **changed: str):
        run = shutil.copytree(finished / arm, tmp_path / arm)
        config = run / "config.gin"
        lines = config.read_text().splitlines()
        for key, value in changed.items():
            lines = [line for line in lines if not line.startswith(f"run.{key} =")]
            lines.append(f"run.{key} = {value}")
        config.write_text("\n".join(lines) + "\n")
        return run

    return made


def opened(run, tmp_path):
    """What the commands that open a run say; each of them has done its work."""
    said = []
    for words in (
        ("sample", run, "--num", 2, "--out", tmp_path / "a.png"),
        ("export", run, "--out", tmp_path / "exported"),
        ("evaluate", run, *MEASURED),
    ):
        done = zoo(*words)
        assert done.status == 0, done.err
        assert "Traceback" not in done.err
        said.append(done.err)
    return said


def test_steps_that_were_never_trained_are_measured_where_the_run_has_them(old, tmp_path):
    run = old("shortcut", nfe="(1, 3)")
    for said in opened(run, tmp_path):
        assert "WARNING: a new run with these settings is refused: @flow_map() at 3 NFE" in said
    values = json.loads((run / "evaluation" / "evaluation.json").read_text())["values"]
    assert {"nfe1/fd_pixels", "nfe3/fd_pixels"} <= set(values)
    asked = zoo("sample", run, "--num", 2, "--nfe", 5, "--out", tmp_path / "b.png")
    assert asked.status == 2
    assert "@flow_map() at 5 NFE takes steps that objective 'shortcut' never trains" in asked.err
    changed = zoo("evaluate", run, *MEASURED, *sets("run.nfe = (1, 3)"))
    assert changed.status == 2
    assert "at 3 NFE" in changed.err


def test_a_sampler_that_needs_more_than_was_trained_draws_as_it_was_recorded(old, tmp_path):
    run = old("decm", sampler="@mix()", nfe="(1, 2)")
    config = run / "config.gin"
    config.write_text(config.read_text().replace("decm.n2n_every = 2", "decm.n2n_every = 0"))
    for said in opened(run, tmp_path):
        assert "refused: objective 'decm' cannot use sampler 'mix'" in said
    assert "not at 1, 2, 4 NFE: @mix() at 4 NFE takes steps" in opened_samples(run, tmp_path)
    asked = zoo("sample", run, "--num", 2, "--sampler", "mix", "--out", tmp_path / "b.png")
    assert asked.status == 2
    assert "cannot use sampler 'mix'" in asked.err


def opened_samples(run, tmp_path):
    done = zoo("sample", run, "--num", 2, "--out", tmp_path / "c.png")
    assert done.status == 0, done.err
    return done.err


def test_a_float_for_a_whole_number_is_read_as_one(old, tmp_path):
    run = old("shortcut", steps="4.0", batch_size="8.0", seed="-1")
    for said in opened(run, tmp_path):
        assert "run.steps = 4.0 must be a whole number" in said
        assert "This one is read as 4" in said
        assert "run.seed = -1 must be a whole number from 0 to 4294967295" in said
    planned = zoo("plan", run / "config.gin", "--gpus", 1, "--memory", "1GB", "--stage", 0)
    assert planned.status == 0, planned.err
    assert "run.steps = 4.0 must be a whole number" in planned.err
    for words in (
        ("run", run / "config.gin", "--out", tmp_path / "again"),
        ("sample", run, "--out", tmp_path / "b.png", *sets("run.steps = 5.0")),
    ):
        done = zoo(*words)
        assert done.status == 2, words
        assert "must be a whole number" in done.err


def test_a_recorder_that_is_refused_today_is_not_needed(old, tmp_path):
    run = old("shortcut", recorder="@mlflow()")
    with (run / "config.gin").open("a") as config:
        config.write("mlflow.tracking_uri = 'runs/mlflow'\n")
    for said in opened(run, tmp_path):
        assert "run.recorder is refused today: tracking_uri 'runs/mlflow' is not an MLflow" in said


def test_a_binding_without_effect_is_refused_and_says_what_to_bind(old, tmp_path):
    run = old("shortcut")
    for words in (
        ("sample", run, "--num", 2, "--out", tmp_path / "a.png"),
        ("export", run, "--out", tmp_path / "exported"),
        ("evaluate", run, *MEASURED),
    ):
        done = zoo(*words, *sets("mlflow.tracking_uri = 'http://localhost:1'"))
        assert done.status == 2, words
        assert "nothing uses mlflow.tracking_uri" in done.err
        assert "to use it, bind run.recorder = @mlflow()" in done.err
