"""What a run records of its data: samples are the same without the data, and changes are told."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import FILE_ONLY, Done, sets, zoo

from benchmarks.data.edm_augment import EdmAugment
from benchmarks.data.mixtures import Mixture
from benchmarks.data.streams import Pictures, StoredSet
from benchmarks.experiments.recorded_data import DATA, record_data, recorded_data
from benchmarks.grids.cell import run_cell

COUNTS = (5, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Unequal(StoredSet):
    """Classes of unequal size."""

    name = "unequal"

    def load(self) -> Pictures:
        labels = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
        pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]
        return Pictures(pixels.expand(-1, 1, 2, 2), labels, ("a", "b", "c"))


class OwnLabels(Unequal):
    """Chooses the labels of samples by a rule of its own."""

    def sample_labels(self, n: int):
        return {"label": torch.arange(n) % 3}


def never():
    raise AssertionError("the data are not needed")


@pytest.mark.parametrize("made", [Unequal, lambda: EdmAugment(data=Unequal()), Mixture])
def test_what_is_recorded_stands_for_the_data_set(tmp_path, made):
    dataset = made()
    record_data(dataset, tmp_path)
    found = recorded_data(tmp_path, never)
    facts = ("name", "shape", "num_classes", "size")
    assert [getattr(found, f) for f in facts] == [getattr(dataset, f) for f in facts]
    assert found.identity() == dataset.identity()
    for n in (1, 4, 11, 30):
        own, recorded = dataset.sample_labels(n), found.sample_labels(n)
        assert own is recorded is None or own["label"].equal(recorded["label"])


def test_rows_are_those_of_the_data_set_which_is_built_then(tmp_path):
    dataset = Unequal()
    record_data(dataset, tmp_path)
    built = []
    found = recorded_data(tmp_path, lambda: built.append(1) or dataset)
    assert built == []
    assert found.reference(4, 0)[0].equal(dataset.reference(4, 0)[0])
    assert found.batch(3, 4, 0)[0].equal(dataset.batch(3, 4, 0)[0])
    assert built == [1]


def test_labels_by_a_rule_of_its_own_are_asked_of_the_data_set(tmp_path):
    dataset = OwnLabels()
    record_data(dataset, tmp_path)
    assert json.loads((tmp_path / DATA).read_text())["label_counts"] is None
    assert recorded_data(tmp_path, lambda: dataset).sample_labels(5)["label"].tolist() == [
        *(0, 1, 2, 0, 1)
    ]


def test_rows_of_other_data_are_told(tmp_path, caplog):
    record_data(Unequal(), tmp_path)
    other = Mixture()
    recorded_data(tmp_path, lambda: other).reference(2, 0)
    assert Unequal().identity() in caplog.text
    assert other.identity() in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shape": null}', "[" * 100_000])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / DATA).write_text(content)
    with pytest.raises(ValueError, match=r"data\.json cannot be read"):
        recorded_data(tmp_path, never)


# Commands on a finished run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on pictures of two classes, given by a path that is relative; `pictures` beside it."""
    folder = tmp_path_factory.mktemp("run")
    for i in range(12):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 255 - 20 * i, 99)).save(path)
    how = ("run.dataset = @image_folder()", "image_folder.folder = 'pictures'",
           "image_folder.resolution = 8", "run.nfe = (1,)", "run.steps = 2")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("--arm", "mean_flow", *sets(*FILE_ONLY, *how), "--out", "out", "--no-rehearsal")
        done = zoo("run", "experiments/digits.gin", *words)
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def elsewhere(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the run without its pictures; the current folder is another one."""
    run = Path(shutil.copytree(trained / "out" / "mean_flow", tmp_path / "copy"))
    config = run / "config.gin"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path / "gone")))
    monkeypatch.chdir(tmp_path)
    return run


def sampled(run: Path, out: Path) -> Done:
    return zoo("sample", run, "--nfe", 1, "--num", 6, "--out", out)


def test_samples_and_exports_need_no_data_and_are_the_same(trained, elsewhere, tmp_path):
    assert sampled(elsewhere, tmp_path / "without.png").status == 0
    assert sampled(trained / "out" / "mean_flow", tmp_path / "with.png").status == 0
    assert (tmp_path / "without.png").read_bytes() == (tmp_path / "with.png").read_bytes()
    done = zoo("export", elsewhere, "--out", tmp_path / "exported")
    assert done.status == 0, done.err
    weights = load_file(elsewhere / "model.safetensors")
    assert load_file(tmp_path / "exported" / "model.safetensors").keys() == weights.keys()


def evaluated(run: Path, *words) -> Done:
    options = ("--num", 12, "--nfe", 1, "--features", "pixels", "--metrics", "frechet")
    return zoo("evaluate", run, *options, "--cache", run / "cache", *words)


def test_an_evaluation_needs_the_data_only_as_its_reference(trained, elsewhere):
    done = evaluated(elsewhere, "--reference", trained / "pictures")
    assert done.status == 0, done.err
    done = evaluated(elsewhere)
    assert done.status == 2
    assert "without --reference the run's own data are the reference" in done.err


def test_an_evaluation_against_data_that_have_changed_says_so(trained, tmp_path, monkeypatch):
    run = Path(shutil.copytree(trained / "out" / "mean_flow", tmp_path / "copy"))
    monkeypatch.chdir(tmp_path)  # the run's path of the data was relative to another folder
    done = evaluated(run)
    assert done.status == 0, done.err
    assert "not those that the run was trained on" not in done.err
    moved = Path(shutil.copytree(trained / "pictures", tmp_path / "changed"))
    Image.new("RGB", (8, 8), "red").save(moved / "a" / "0.png")
    config = run / "config.gin"
    config.write_text(config.read_text().replace(str(trained / "pictures"), str(moved)))
    done = evaluated(run)
    assert done.status == 0, done.err
    assert "not those that the run was trained on" in done.err


def test_a_run_that_recorded_less_needs_its_data_as_before(elsewhere, tmp_path):
    (elsewhere / DATA).unlink()
    done = sampled(elsewhere, tmp_path / "grid.png")
    assert done.status == 2
    assert "does not exist" in done.err


def test_a_run_that_goes_on_with_other_data_says_so(trained, tmp_path, caplog):
    run = Path(shutil.copytree(trained / "out" / "mean_flow", tmp_path / "copy"))
    moved = Path(shutil.copytree(trained / "pictures", tmp_path / "changed"))
    Image.new("RGB", (8, 8), "red").save(moved / "a" / "0.png")
    (run / "result.json").unlink()
    config = run / "config.gin"
    config.write_text(config.read_text().replace(str(trained / "pictures"), str(moved)))
    assert run_cell(run).status == "finished"
    assert "not those that the run was trained on" in caplog.text
