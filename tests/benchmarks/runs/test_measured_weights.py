"""The weights of a finished run are those that it has measured."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

from benchmarks.runs.result import measured_weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "out"
    done = zoo("run", DIGITS, "--arm", "flow_matching", "--out", out, *sets(*FILE_ONLY))
    assert done.status == 0, done.err
    return out / "flow_matching"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def result(run):
    return json.loads((run / "result.json").read_text())


def flipped(run):
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)


def exchanged(run):
    tensors = load_file(run / "model.safetensors")
    save_file({name: torch.zeros_like(x) for name, x in tensors.items()}, run / "model.safetensors")


def test_result_has_the_hash_of_the_weights(run):
    content = (run / "model.safetensors").read_bytes()
    assert result(run)["weights_sha256"] == hashlib.sha256(content).hexdigest()
    assert measured_weights(run) == run / "model.safetensors"


@pytest.mark.parametrize("damage", [flipped, exchanged])
def test_other_weights_are_refused_by_every_command(damage, run, tmp_path):
    damage(run)
    for words in (
        ("sample", run, "--num", 2, "--nfe", 1, "--out", tmp_path / "a.png"),
        ("export", run, "--out", tmp_path / "exported"),
        ("evaluate", run, "--num", 4),
    ):
        done = zoo(*words)
        assert done.status == 2, words
        assert "model.safetensors is not the file that the run has measured" in done.err
    assert not (tmp_path / "exported").exists()
    chosen = ("--weights", run / "model.safetensors")
    assert zoo("export", run, "--out", tmp_path / "exported", *chosen).status == 0


def test_run_of_an_earlier_version_has_no_hash_and_is_read(run):
    content = result(run)
    del content["weights_sha256"]
    (run / "result.json").write_text(json.dumps(content))
    flipped(run)
    assert measured_weights(run) == run / "model.safetensors"


def test_link_out_of_the_folder_is_refused(run):
    (run / "model.safetensors").rename(run.parent / "elsewhere")
    (run / "model.safetensors").symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="model.safetensors is a link to .*elsewhere"):
        measured_weights(run)


def test_result_that_cannot_be_read_is_named(run):
    for text in ("", "[1]", "{"):
        (run / "result.json").write_text(text)
        with pytest.raises(ValueError, match="its result.json cannot be read"):
            measured_weights(run)
