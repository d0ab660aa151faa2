"""Safetensors files of ours: who may read them, and who writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from backbones.pretrained.tensors import save_tensors
from trainers.checkpoints.weights import save_module
from trainers.checkpoints.whole_files import whole_file

ROOT = Path(__file__).parents[3]
PACKAGES = ("registry", "zoo", "backbones", "trainers", "benchmarks", "objective_zoo")


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_weights_may_be_read_by_whom_the_umask_says(umask, tmp_path):
    save_tensors(tmp_path / "plain", {"a": torch.zeros(2)})
    with whole_file(tmp_path / "whole") as partial:
        save_tensors(partial, {"a": torch.zeros(2)})
    save_module(tmp_path / "module", torch.nn.Linear(1, 1))
    assert {mode(path) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_weights_that_are_written_again_keep_their_mode(tmp_path):
    path = tmp_path / "a"
    save_tensors(path, {"a": torch.zeros(2)})
    path.chmod(0o640)
    save_tensors(path, {"a": torch.ones(2)})
    assert mode(path) == 0o640


def test_one_place_writes_safetensors():
    """The library's own writer gives a file to its owner alone."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    writers = {f.name for f in files if "import save_file" in f.read_text() or
               "load_file, save_file" in f.read_text()}  # fmt: skip
    assert writers == {"tensors.py"}
