"""The context in which every call of the door runs, and how the calls read their lists."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.console import show_output
from registry import gin_setup
from registry.progress import show_progress


@contextmanager
def isolated_call(progress: bool = False) -> Iterator[None]:
    """Give a call its own gin, let it train as in a new process, and put the state back afterwards.

    Nothing is shown unless `progress`.
    """
    dtype = torch.get_default_dtype()
    with (
        gin_setup.isolated(),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
        show_output() if progress else show_progress(False),
    ):
        # Given by torch itself at the first forward-mode derivative.
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def listed(name: str, given: Iterable[Any]) -> tuple[Any, ...]:
    """The items of a list; ValueError for a single item, such as a text, which is no list."""
    if isinstance(given, str | Path) or not isinstance(given, Iterable):
        raise ValueError(f"{name} = {given!r} must be a list, such as {name}=[{given!r}]")
    return tuple(given)
