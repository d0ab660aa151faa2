"""The result of a run decides whether it is finished: it is whole, or it counts as absent."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import DIGITS, FILE_ONLY, entries, losses, sets, zoo

from benchmarks.grids.cell import Cell
from benchmarks.grids.cell_status import state_in
from benchmarks.runs import execute
from benchmarks.runs.pretraining import _found
from benchmarks.runs.result import MODEL, RESULT, Result, finished_run, has_result
from registry.folders import file_sha256

WORDS = ["run", DIGITS, "--arm", "mean_flow"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    done = zoo(*WORDS, "--out", out, *sets(*FILE_ONLY))
    assert done.status == 0, done.err
    return out


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xff", b'{"values": 3}', b'{"a":' + 9000 * b"["]
)
def test_result_that_cannot_be_read_counts_as_absent_aloud(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / RESULT).write_bytes(content)
    assert not has_result(tmp_path)
    assert state_in(tmp_path).status == "new"
    assert f"{tmp_path / RESULT} cannot be read" in caplog.text
    assert "So this run is not finished" in caplog.text
    with pytest.raises(ValueError, match="holds no finished run"):
        finished_run(tmp_path)


def test_run_whose_result_is_empty_is_resumed_to_a_whole_one(finished: Path) -> None:
    """As after a power cut in an earlier version, which wrote results in place."""
    folder = finished / "mean_flow"
    before = Result.load(folder)
    (folder / RESULT).write_bytes(b"")
    done = zoo(*WORDS, "--out", finished, "--resume", *sets(*FILE_ONLY))
    assert done.status == 0, done.err
    assert f"{RESULT} cannot be read: it is empty" in done.err
    assert Result.load(folder).values == before.values
    assert state_in(folder).status == "finished"


@pytest.mark.parametrize("refused", [RESULT, MODEL])
def test_disk_that_is_full_at_the_end_fails_the_run_and_says_its_figures(
    refused: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose weights were not saved has no result either, or it would count as finished."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), refused)

    with monkeypatch.context() as patch:
        if refused == RESULT:
            patch.setattr(Result, "save", full)
        else:
            patch.setattr(execute, "save_module", full)
        done = zoo(*WORDS, "--out", tmp_path / "out", *sets(*FILE_ONLY))
    folder = tmp_path / "out" / "mean_flow"
    assert done.status == 1
    assert "came to its end at step 4, and its result cannot be saved" in done.err
    for name, value in Result.load(finished / "mean_flow").values.items():
        assert f"{name} = {value:.6g}" in done.err
    assert not (folder / RESULT).exists()
    done = zoo(*WORDS, "--out", tmp_path / "out", "--resume", *sets(*FILE_ONLY))
    assert done.status == 0, done.err
    assert has_result(folder)
    assert losses(folder) == losses(finished / "mean_flow")
    assert [e["status"] for e in entries(folder, "end")] == ["FAILED", "FINISHED"]


@pytest.mark.parametrize("content", ["", "{}", '{"name": 1}', "[1]"])
def test_cell_and_teacher_that_cannot_be_read_are_named(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cell.json").write_text(content)
    with pytest.raises(ValueError, match=r"cell.json cannot be read"):
        Cell.load(tmp_path)
    (tmp_path / "spent.json").write_text(content or "{")
    assert (_found(tmp_path) is None) is (content != "{}")  # every part of it has a default


def test_teacher_whose_weights_were_changed_goes_on_from_its_checkpoint(tmp_path, caplog):
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    digest = file_sha256(tmp_path / "model.safetensors")
    spent = {"steps": 2, "images": 16, "seconds": 1.0}
    for recorded in ({}, {"weights_sha256": digest}):
        (tmp_path / "spent.json").write_text(json.dumps({**spent, **recorded}))
        assert _found(tmp_path).steps == 2
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert _found(tmp_path) is None
    assert f"{tmp_path / 'model.safetensors'} was changed after it was written" in caplog.text
    (tmp_path / "spent.json").write_text(json.dumps(spent))  # of an earlier version
    assert _found(tmp_path).steps == 2
