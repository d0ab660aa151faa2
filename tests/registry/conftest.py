"""What tests of gin text share."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import gin
import pytest
from gin_toys import Adaptive, Grid, MeanFlow, job

from registry import objectives, weights
from registry.configuration import gin_files
from registry.plugins import load_plugins


@pytest.fixture
def parts(monkeypatch):
    """gin's registry holds what the tests need, and is left as it was."""
    load_plugins()  # into the lasting registry: modules that are imported register but once
    fresh = type(gin.config._REGISTRY)()  # its copy() would share the tree of names
    for selector, found in gin.config._REGISTRY.items():
        if selector.split(".")[-1] not in ("job", "Grid"):  # the real Grid is not tested here
            fresh[selector] = found
    monkeypatch.setattr(gin.config, "_REGISTRY", fresh)
    gin.register("job", module="test")(job)
    gin.register("Grid", module="test")(Grid)
    with (
        weights.temporary("test_adaptive", Adaptive),
        objectives.temporary("test_mean_flow", MeanFlow),
    ):
        yield


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def shipped(tmp_path, monkeypatch, write):
    """Stands for the checkout's gin/ and for the share folder, in this order."""
    folders = (tmp_path / "checkout" / "gin", tmp_path / "share" / "gin")
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setattr(gin_files, "roots", lambda: folders)
    monkeypatch.chdir(tmp_path / "share")
    return folders


@pytest.fixture
def forget():
    """Registered names and modules to forget at the end."""
    names: list[str] = []
    yield names.append
    for name in names:
        sys.modules.pop(name, None)
        if name in objectives:
            objectives._remove(name)
