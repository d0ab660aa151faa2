"""Provenance: the commit is that of this code, not of whatever lies around it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.records.provenance import checkout, provenance


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "a.py").write_text("a = 1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_checkout_tells_commit_and_changes(repository: Path) -> None:
    facts = checkout(repository)
    assert len(facts["commit"]) == 40
    assert facts["dirty"] == "false"
    (repository / "notes.txt").write_text("not code")
    assert checkout(repository)["dirty"] == "false"
    (repository / "zoo" / "b.py").write_text("b = 1\n")
    assert checkout(repository)["dirty"] == "true"


def test_installed_copy_inside_a_checkout_is_not_one(repository: Path) -> None:
    assert checkout(repository / "zoo")["commit"] == "not a checkout"


def test_folder_outside_git_is_not_a_checkout(tmp_path: Path) -> None:
    assert checkout(tmp_path) == {"commit": "not a checkout", "dirty": "unknown"}


def test_missing_git_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git is not installed" in checkout(tmp_path)["commit"]


def test_provenance_names_the_versions() -> None:
    facts = provenance()
    # The metadata may leave out the local part of torch.__version__ ("+cu130").
    assert torch.__version__.startswith(facts["version.torch"].split("+")[0])
    assert int(facts["cpus"]) >= 1
    assert all(isinstance(value, str) and value for value in facts.values())
