"""Parts that are registered for a moment, and which claims reject them."""

from __future__ import annotations

from typing import Any

from benchmarks.conformance.parts.kinds import results_of, subject_of
from benchmarks.conformance.results import ClaimResult
from registry.core import Registry


def checked(kind: Registry, cls: type[Any], name: str = "mine") -> dict[str, ClaimResult]:
    """The results by claim for a class that is registered as long as they are made."""
    with kind.temporary(name, cls):
        return by_claim(kind, name)


def by_claim(kind: Registry, name: str) -> dict[str, ClaimResult]:
    return {result.claim: result for result in results_of(kind, subject_of(kind, name))}


def first_failure(kind: Registry, cls: type[Any], name: str = "mine") -> ClaimResult:
    """The result of the first claim that rejects the class."""
    with kind.temporary(name, cls):
        return next(r for r in results_of(kind, subject_of(kind, name)) if r.status == "FAIL")


def described(results: dict[str, ClaimResult]) -> dict[str, str]:
    return {name: r.reason for name, r in results.items() if r.status == "FAIL"}
