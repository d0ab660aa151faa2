"""Relative paths are recorded as whole ones, and nothing else is changed."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from cifar10_files import write_cifar10

from registry import gin_setup, metrics

RUN = {"run": ("start_from",)}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds `pictures` and `weights.pt`."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "weights.pt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def anchored(*bindings: str) -> dict[str, str]:
    """What is bound afterwards, by key."""
    gin_setup.parse([], bindings)
    gin_setup.anchor_paths(RUN)
    return gin_setup.bindings_of(gin_setup.full_text())


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("image_folder.folder", "pictures"),
        ("image_folder.folder", "./pictures/../pictures"),
        ("arm/image_folder.folder", "pictures"),
        ("hf_images.path", "pictures"),
        ("latents.folder", "pictures"),
        ("frozen.checkpoint", "pictures"),
        ("autoencoder_kl.path", "pictures"),
        ("timm_features.weights", "weights.pt"),
        ("run.start_from", "weights.pt"),
    ],
)
def test_a_relative_path_that_is_here_becomes_a_whole_one(here, key, name):
    assert anchored(f"{key} = {name!r}") == {key: repr(str(here / Path(name).name))}


@pytest.mark.parametrize("value", ["ylecun/mnist", "/nowhere/pictures", "~/pictures", ""])
def test_what_is_no_relative_path_of_anything_here_stays(here, value):
    assert anchored(f"hf_images.path = {value!r}") == {"hf_images.path": repr(value)}


def test_a_text_that_is_no_path_stays_even_where_a_folder_has_its_name(here):
    found = anchored("hf_images.split = 'pictures'", "run.device = 'pictures'")
    assert set(found.values()) == {"'pictures'"}


def test_a_path_behind_a_macro_becomes_whole(here):
    found = anchored("image_folder.folder = %PLACE", "PLACE = 'pictures'")
    assert found["image_folder.folder"] == repr(str(here / "pictures"))


@dataclass(frozen=True, kw_only=True)
class Files:
    """A metric that reads a file."""

    local_paths: ClassVar = ("file",)
    file: str
    word: str

    def __call__(self, samples, reference):
        yield "mine", 0.0


def test_what_was_used_has_whole_paths_and_the_macros_that_are_still_read(here):
    bindings = (
        *("PLACE = %WHERE", "WHERE = 'pictures'", "WORD = 'pictures'"),
        *("a/files.file = %PLACE", "b/files.file = %WORD", "files.word = %WORD"),
    )
    with metrics.temporary("files", Files):
        gin_setup.parse([], bindings)
        for scope in ("a", "b"):
            with gin_setup.arm(scope):
                metrics.build("files")
        assert gin_setup.read_macros() == {"PLACE", "WHERE", "WORD"}
        gin_setup.anchor_paths(RUN)
        assert gin_setup.read_macros() == {"WORD"}
        whole = repr(str(here / "pictures"))
        assert gin_setup.bindings_of(gin_setup.operative_text()) == {
            "WORD": "'pictures'",
            **{"a/files.file": whole, "a/files.word": "%WORD"},
            **{"b/files.file": whole, "b/files.word": "%WORD"},
        }


def test_a_default_that_was_used_becomes_whole(here):
    (here / "data").mkdir()
    write_cifar10(here / "data")
    gin_setup.parse([], ["run.dataset = @cifar10()"])
    gin_setup.anchor_paths(RUN)
    assert "cifar10.folder" not in gin_setup.full_text()  # nothing was built yet
    gin_setup.build("run.dataset")
    gin_setup.anchor_paths(RUN)
    found = gin_setup.bindings_of(gin_setup.full_text())
    assert found["cifar10.folder"] == repr(str(here / "data"))


@pytest.mark.parametrize(
    ("binding", "whole"),
    [
        ("image_folder.folder = 'pictures'", True),
        ("arm/image_folder.folder = 'pictures'", True),
        ("run.start_from = 'weights.pt'", True),
        ("PLACE = 'pictures'", True),
        ("WORD = 'pictures'", False),  # which no path reads
        ("hf_images.split = 'pictures'", False),
        ("image_folder.folder = %PLACE", False),
        ("hf_images.path = 'ylecun/mnist'", False),
        ("include 'mine.gin'", False),
    ],
)
def test_a_line_of_text_gets_a_whole_path(here, binding, whole):
    more = ["run.device = %WORD", "image_folder.folder = %PLACE", "PLACE = 'x'", "WORD = 'y'"]
    gin_setup.parse([], more)
    found = gin_setup.whole_binding(binding, RUN, gin_setup.path_macros(RUN))
    key, _, value = binding.partition(" = ")
    assert found == (f"{key} = {str(here / ast.literal_eval(value))!r}" if whole else binding)
