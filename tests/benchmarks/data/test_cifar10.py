"""CIFAR-10's batches: as torchvision reads them, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar10_files import write, write_cifar10

from benchmarks.data.cifar10 import FILES, FOLDER, Cifar10


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cifar10(tmp_path)


def read(root: Path, name: str) -> dict:
    return pickle.loads((root / FOLDER / name).read_bytes())


def test_pictures_and_labels_are_those_of_the_batches_in_order(root: Path) -> None:
    dataset = Cifar10(folder=str(root))
    batches = [read(root, name) for name in FILES["train"]]
    pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    assert np.array_equal(dataset.stored.pixels.numpy(), pixels)
    assert dataset.stored.labels.tolist() == [i for batch in batches for i in batch[b"labels"]]
    assert (dataset.shape, dataset.size, dataset.num_classes) == ((3, 32, 32), 100, 10)
    assert dataset.stored.classes[:2] == ("airplane", "automobile")


def test_the_splits_and_the_folder_itself(root: Path) -> None:
    assert Cifar10(folder=str(root / FOLDER), split="test").size == 20
    assert Cifar10(folder=str(root), split="all").size == 120
    with pytest.raises(ValueError, match="cifar10.split is 'val'"):
        Cifar10(folder=str(root), split="val")


@pytest.mark.parametrize("protocol", range(6))
def test_batches_of_every_pickle_protocol_are_read(root: Path, protocol: int) -> None:
    expected = Cifar10(folder=str(root), split="test").stored
    write(root, "test_batch", read(root, "test_batch"), protocol)
    found = Cifar10(folder=str(root), split="test").stored
    assert torch.equal(found.pixels, expected.pixels)
    assert torch.equal(found.labels, expected.labels)


def test_half_of_the_samples_are_mirrored_on_request(root: Path) -> None:
    plain, mirrored = Cifar10(folder=str(root)), Cifar10(folder=str(root), flip=True)
    x0, reference = mirrored.batch(0, 1000, 0)[0], plain.batch(0, 1000, 0)[0]
    changed = (x0 != reference).flatten(1).any(1)
    assert torch.equal(x0[changed], reference[changed].flip(-1))
    assert abs(float(changed.float().mean()) - 0.5) < 4 * 0.5 / 1000**0.5
    assert torch.equal(mirrored.reference(50, 0)[0], plain.reference(50, 0)[0])


class Malice:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_batch_that_would_run_code_is_refused_and_runs_none(root: Path) -> None:
    write(root, "test_batch", {b"data": Malice(str(root / "made")), b"labels": []})
    with pytest.raises(ValueError, match=r"test_batch .*asks for posix\.mkdir"):
        Cifar10(folder=str(root), split="test")
    assert not (root / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "2, 3072.* and 1 labels"),
        ({b"data": np.zeros((2, 100), np.uint8), b"labels": [1, 2]}, "expected uint8"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]}, "labels from 0 to 9"),
        ({b"labels": [1, 2]}, "no batch file of CIFAR-10: KeyError"),
        ([1, 2, 3], "no batch file of CIFAR-10"),
    ],
)
def test_a_batch_of_something_else_is_named(root: Path, content, message: str) -> None:
    write(root, "test_batch", content)
    with pytest.raises(ValueError, match=rf"test_batch.*{message}"):
        Cifar10(folder=str(root), split="test")


def test_a_cut_or_missing_batch_is_named(root: Path) -> None:
    path = root / FOLDER / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="data_batch_3 is no batch file of CIFAR-10 or is damaged"):
        Cifar10(folder=str(root))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3 missing. Unpack https"):
        Cifar10(folder=str(root))
