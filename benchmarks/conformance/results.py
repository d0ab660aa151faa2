"""The result of a claim, and how a claim is run: a figure; a reason and a hint if it fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from benchmarks.conformance.subject import Subject

HEADS = "read only the outputs named in `heads`, or name this one there"

Status = Literal["ok", "FAIL", "declared", "note"]


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """The outcome of one claim; "declared" if the objective says that it does not apply.

    `value` is what was measured and `limit` what it may be, in the figure's unit.
    """

    status: Status
    claim: str = ""
    figure: str = ""
    value: float | None = None
    limit: float | None = None
    reason: str = ""
    hint: str = ""
    seconds: float = 0.0


Claim = Callable[[Subject], ClaimResult]
T = TypeVar("T")


class Broken(Exception):
    """A claim that does not hold: what was seen, and what to do about it."""

    def __init__(self, reason: str, hint: str):
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def held(figure: str, value: float | None = None, limit: float | None = None) -> ClaimResult:
    return ClaimResult(status="ok", figure=figure, value=value, limit=limit)


def note(figure: str, value: float | None = None) -> ClaimResult:
    return ClaimResult(status="note", figure=figure, value=value)


def declared(reason: str) -> ClaimResult:
    return ClaimResult(status="declared", reason=reason)


def compared(unit: str, value: float, limit: float, reason: str, hint: str) -> ClaimResult:
    """A result that is ok if value < limit, and fails otherwise, also where the value is nan."""
    figure = f"{unit} {value:.2g} < {limit:.2g}"
    if value < limit:
        return held(figure, value, limit)
    figure = f"{unit} {value:.2g} >= {limit:.2g}"
    return ClaimResult(
        status="FAIL", figure=figure, value=value, limit=limit, reason=reason, hint=hint
    )


def run_claim(
    name: str,
    claim: Callable[[T], ClaimResult],
    subject: T,
    hint: Callable[[Exception], str] | None = None,
) -> ClaimResult:
    """The result with its name and time; a part that raises has failed the claim.

    `hint` says what to do about an error that the claim does not foresee.
    """
    start = time.perf_counter()
    try:
        result = claim(subject)
    except Broken as broken:
        result = ClaimResult(status="FAIL", reason=broken.reason, hint=broken.hint)
    except Exception as error:  # whatever foreign code may raise is a result here
        result = ClaimResult(status="FAIL", reason=_text(error), hint=(hint or _hint)(error))
    return replace(result, claim=name, seconds=time.perf_counter() - start)


def _text(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return f"it raised {type(error).__name__}: {text}{where}"


def _hint(error: Exception) -> str:
    if isinstance(error, KeyError):
        return HEADS
    return "run the objective on such a batch: benchmarks/conformance says which"
