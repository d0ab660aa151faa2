"""Progress of long work: bars and lines on stderr, shown only to a caller who asked for them.

The library is silent. The command line and its workers open `show_progress()`; so does
`progress=True` of the Python door. Code with long work makes its bars here and need not know who
asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_SHOWN = ContextVar("objective_zoo_progress_shown", default=False)


def is_shown() -> bool:
    """Whether the caller asked for progress."""
    return _SHOWN.get()


@contextmanager
def show_progress(yes: bool = True) -> Iterator[None]:
    """Show progress, or hide it, inside the `with` block."""
    before = _SHOWN.set(yes)
    try:
        yield
    finally:
        _SHOWN.reset(before)


def bar(items: Iterable[Any] | None, label: str, *, worth: bool = True, **options: Any) -> tqdm:
    """A bar over the items, with tqdm's options; where they are None, the caller moves the bar.

    A caller whose work is too short for a bar gives `worth=False`.
    """
    if not (worth and is_shown()):
        options["disable"] = True
    return tqdm(items, label, **options)
