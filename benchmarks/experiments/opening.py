"""A finished run can be opened although a new run with its settings is refused today.

A later version may refuse settings that an earlier one has trained with. The weights of such a run
are there all the same. So a check that stands inside `for_new_runs` raises for a new run, and warns
while `opening` is open. Nothing is trained there, so that checks of the training are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

_Mode = Literal["new", "changed", "recorded"]
_MODE: ContextVar[_Mode] = ContextVar("mode", default="new")

log = logging.getLogger(__name__)


@contextmanager
def opening(*, changed: bool) -> Iterator[None]:
    """Inside, a finished run is opened; `changed` says that its sampling is not as recorded."""
    before = _MODE.set("changed" if changed else "recorded")
    try:
        yield
    finally:
        _MODE.reset(before)


def is_opened() -> bool:
    """Whether a finished run is being opened, which is not trained."""
    return _MODE.get() != "new"


@contextmanager
def for_new_runs() -> Iterator[None]:
    """A ValueError inside stops a new run; a run that is opened as recorded is warned of."""
    try:
        yield
    except ValueError as error:
        if _MODE.get() != "recorded":
            raise
        log.warning("a new run with these settings is refused: %s. %s", error, AS_RECORDED)


AS_RECORDED = "This run was made with them, and it is opened as it was recorded"
