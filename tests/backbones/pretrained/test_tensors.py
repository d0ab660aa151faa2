"""Safetensors files of ours: who may read them, and who writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from backbones.pretrained.tensors import digest_of, fitting, save_tensors
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_file_with_a_digest_is_checked_when_it_is_read(tmp_path, dtype):
    module = nn.Module()
    for name, value in (("one", torch.tensor(3)), ("none", torch.zeros(0, 2))):
        module.register_buffer(name, value.to(dtype))
    module.register_buffer("rows", torch.arange(6).reshape(2, 3).to(dtype))
    path = tmp_path / "weights.safetensors"
    save_tensors(path, module.state_dict(), {"width": "0.1"}, digest=True)
    assert fitting(path, module)["rows"].equal(module.rows)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.safetensors was changed after it was written"):
        fitting(path, module)
    save_file({name: value + 1 for name, value in module.state_dict().items()}, path)
    assert not fitting(path, module)["rows"].equal(module.rows)  # written by others, without one


def test_digest_is_of_names_types_shapes_and_values():
    rows = torch.zeros(2, 3)
    same_bytes = [{"b": rows}, {"a": rows.T}, {"a": rows.int()}, {"a": rows[:1], "b": rows[1:]}]
    files = [{"a": rows}, {"a": rows + 1}, *same_bytes]
    assert len({digest_of(tensors) for tensors in files}) == len(files)
