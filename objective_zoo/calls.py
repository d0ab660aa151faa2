"""What every call of the door happens inside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.console import shown
from registry import gin_setup
from registry import progress as progress_of


@contextmanager
def called(progress: bool = False) -> Iterator[None]:
    """gin to itself, which is put back afterwards; silent unless progress is wanted."""
    with (
        gin_setup.isolated(),
        warnings.catch_warnings(),
        shown() if progress else progress_of.shown(False),
    ):
        # Given by torch itself at the first forward-mode derivative.
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
        yield
