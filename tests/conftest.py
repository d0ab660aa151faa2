"""Shared by all tests: quiet third parties, a clean gin configuration, a store of one's own."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import gin
import pytest
from hypothesis import settings

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "Agg")

# A default run must not depend on luck or on how busy the machine is.
settings.register_profile("objective_zoo", deadline=None, derandomize=True, database=None)
settings.load_profile("objective_zoo")


@pytest.fixture(autouse=True)
def clean_configuration() -> Iterator[None]:
    """Bindings and search paths of one test are not seen by the next."""
    path = list(sys.path)
    yield
    gin.clear_config()
    sys.path[:] = path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an empty MLflow store, to be copied: making its tables takes seconds."""
    from benchmarks.records.mlflow_store import Store

    file = tmp_path_factory.mktemp("empty_store") / "mlflow.db"
    Store.in_file(file, "objective-zoo").client()
    return file


@pytest.fixture
def mlflow_store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty MLflow store (SQLite; mlflow refuses plain folders)."""
    address = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return address


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays to the end: it is not looked through for garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
