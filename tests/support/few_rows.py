"""Objectives for batches of a few rows."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any


def for_few_rows(objective: Any) -> Any:
    """The objective, with groups of four rows where its own are larger."""
    if all(field.name != "group" for field in fields(objective)):
        return objective
    return replace(objective, group=min(objective.group, 4))
