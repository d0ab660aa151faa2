"""Data sets of the Hugging Face hub from local files: columns, classes, pictures, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

hf = pytest.importorskip("datasets")

from benchmarks.data.hf_images import HfImages  # noqa: E402  after the optional library

RNG = np.random.default_rng(0)


def table(n: int = 9, **columns):
    pixels = RNG.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    content = {"img": [Image.fromarray(p) for p in pixels], "kind": [i % 3 for i in range(n)]}
    features = {"img": hf.Image(), "kind": hf.ClassLabel(names=["a", "b", "c"])}
    content |= {name: values for name, (values, _) in columns.items()}
    features |= {name: what for name, (_, what) in columns.items()}
    return hf.Dataset.from_dict(content, hf.Features(features)), pixels


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("hf") / "saved"
    found, pixels = table()
    hf.DatasetDict({"train": found, "test": found.select(range(3))}).save_to_disk(folder)
    return folder, pixels


def test_pictures_and_classes_are_those_of_the_only_such_columns(saved) -> None:
    folder, pixels = saved
    dataset = HfImages(path=str(folder), resolution=8)
    assert np.array_equal(dataset.stored.pixels.permute(0, 2, 3, 1).numpy(), pixels)
    assert dataset.stored.labels.tolist() == [0, 1, 2] * 3
    assert dataset.stored.classes == ("a", "b", "c")
    assert HfImages(path=str(folder), split="test", resolution=4, channels=1).shape == (1, 4, 4)


def test_parquet_files_in_a_folder_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found, pixels = table()
    (tmp_path / "data").mkdir()
    found.to_parquet(tmp_path / "data" / "train.parquet")
    dataset = HfImages(path=str(tmp_path / "data"), resolution=8)
    assert np.array_equal(dataset.stored.pixels.permute(0, 2, 3, 1).numpy(), pixels)
    assert dataset.num_classes == 3


def test_columns_are_named_where_several_could_be_meant(tmp_path) -> None:
    pixels = [Image.fromarray(np.zeros((8, 8, 3), np.uint8))] * 4
    found, _ = table(4, mask=(pixels, hf.Image()), other=([5, 6, 7, 5], hf.Value("int64")))
    found.save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"bind hf_images\.image to one of img, mask"):
        HfImages(path=str(tmp_path))
    dataset = HfImages(path=str(tmp_path), image="mask", label="other", resolution=8)
    assert not dataset.stored.pixels.any()
    assert dataset.stored.labels.tolist() == [5, 6, 7, 5]
    assert dataset.num_classes == 8
    texts = tmp_path / "texts"
    table(3, word=(["b", "a", "b"], hf.Value("string")))[0].save_to_disk(texts)
    words = HfImages(path=str(texts), label="word", resolution=8).stored
    assert (words.labels.tolist(), words.classes) == ([1, 0, 1], ("a", "b"))
    with pytest.raises(ValueError, match=r"'kinds' is no column. Did you mean 'kind'"):
        HfImages(path=str(tmp_path), image="img", label="kinds")


def test_what_cannot_be_used_is_refused_with_its_reason(saved, tmp_path) -> None:
    with pytest.raises(ValueError, match="has the splits train, test, and no 'val'"):
        HfImages(path=str(saved[0]), split="val")
    with pytest.raises(ValueError, match=r"cannot load split 'train' of '.*nowhere'"):
        HfImages(path=str(tmp_path / "nowhere"))
    unlabelled, _ = table(3)
    unlabelled = unlabelled.map(lambda row: {"kind": -1})
    unlabelled.save_to_disk(tmp_path / "a")
    with pytest.raises(ValueError, match="a split without labels often has -1"):
        HfImages(path=str(tmp_path / "a"))
    hf.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match=r"no column of pictures; it has text \(Value\)"):
        HfImages(path=str(tmp_path / "b"))


def test_a_row_that_cannot_be_read_is_named(tmp_path) -> None:
    pictures = [{"bytes": b"no picture", "path": None}, {"bytes": b"", "path": None}]
    rows = hf.Dataset.from_dict({"img": pictures}, hf.Features({"img": hf.Image(decode=False)}))
    rows.cast_column("img", hf.Image()).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"2 of 2 pictures cannot be read(.|\n)*row 0"):
        HfImages(path=str(tmp_path))


def test_pictures_that_are_enlarged_are_counted(saved, caplog) -> None:
    HfImages(path=str(saved[0]), resolution=9)
    assert "9 of 9 pictures are smaller than 9 pixels" in caplog.text


def test_classes_drive_the_labels_of_samples(saved) -> None:
    labels = HfImages(path=str(saved[0]), resolution=8).sample_labels(6)["label"]
    assert torch.bincount(labels).tolist() == [2, 2, 2]


def test_a_saved_split_is_not_taken_for_another(tmp_path) -> None:
    found, _ = table()
    found.save_to_disk(tmp_path / "unnamed")
    assert HfImages(path=str(tmp_path / "unnamed"), resolution=8).size == 9
    with pytest.raises(ValueError, match=r"cannot give 'train\[:50%\]'"):
        HfImages(path=str(tmp_path / "unnamed"), split="train[:50%]")
    found.to_parquet(tmp_path / "a.parquet")
    files = {"test": str(tmp_path / "a.parquet")}
    test = hf.load_dataset("parquet", data_files=files, split="test", cache_dir=tmp_path / "c")
    test.save_to_disk(tmp_path / "named")
    assert HfImages(path=str(tmp_path / "named"), split="test", resolution=8).size == 9
    half = hf.load_dataset("parquet", data_files=files, split="test[:3]", cache_dir=tmp_path / "c")
    half.save_to_disk(tmp_path / "half")
    assert HfImages(path=str(tmp_path / "half"), split="test", resolution=8).size == 3
    with pytest.raises(ValueError, match=r"'test', and cannot.*hf_images\.split = 'test'"):
        HfImages(path=str(tmp_path / "named"))


def test_one_file_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found, pixels = table()
    found.to_parquet(tmp_path / "pictures.parquet")
    dataset = HfImages(path=str(tmp_path / "pictures.parquet"), resolution=8)
    assert np.array_equal(dataset.stored.pixels.permute(0, 2, 3, 1).numpy(), pixels)
    half = HfImages(path=str(tmp_path / "pictures.parquet"), split="train[:3]", resolution=8)
    assert half.size == 3


def test_columns_that_could_be_labels_are_not_passed_over_in_silence(tmp_path, caplog) -> None:
    found, _ = table(4, animal=(["cat", "dog", "cat", "emu"], hf.Value("string")))
    found.remove_columns("kind").save_to_disk(tmp_path)
    assert HfImages(path=str(tmp_path), resolution=8).num_classes == 0
    assert "no labels; the other columns are animal. Bind hf_images.label" in caplog.text
    assert HfImages(path=str(tmp_path), resolution=8, label="animal").num_classes == 3


def test_pictures_that_do_not_fit_into_memory_are_refused(tmp_path) -> None:
    table(4)[0].save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"more than half of this.*hf_images\.resolution"):
        HfImages(path=str(tmp_path), resolution=10**6)
