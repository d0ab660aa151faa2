"""The context in which every call of the door runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.console import shown
from registry import gin_setup
from registry import progress as progress_of


@contextmanager
def called(progress: bool = False) -> Iterator[None]:
    """Give a call its own gin, and put gin back afterwards; show nothing unless `progress`."""
    with (
        gin_setup.isolated(),
        warnings.catch_warnings(),
        shown() if progress else progress_of.shown(False),
    ):
        # Given by torch itself at the first forward-mode derivative.
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        yield
