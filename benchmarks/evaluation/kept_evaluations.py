"""What a folder's evaluation.json keeps: every evaluation, by what was measured and how.

The newest stands in the file itself, and those before it in its list "others", each in the same
form. Values that were measured in one way (samples, seed, labels, weights, settings, reference,
features, code) join one evaluation, so that another metric or NFE adds to it. Whatever differs
makes another one, and nothing is replaced. A file of an earlier version has one evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OTHERS = "others"
# What joins, and what says where the files lay: it does not tell evaluations apart.
_NOT_HOW = ("values", "metrics", "sampler", "processes", "run", "weights_file", OTHERS)


def kept(path: Path) -> list[dict[str, Any]]:
    """The evaluations in this file, the newest first; ValueError for a file that is none."""
    if not path.exists():
        return []
    try:
        newest = json.loads(path.read_text(encoding="utf-8"))
        others = newest.pop(OTHERS, [])
        found = [newest, *others]
        well_formed = all(isinstance(one["values"], dict) for one in found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise ValueError(
            f"{path} cannot be read as evaluations. Move it away and run evaluate again: features "
            "that are on disk are not drawn again"
        )
    return found


def joined(new: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of the file when an evaluation is added to those that it had."""
    newest: dict[str, Any] = json.loads(json.dumps(new))
    others = []
    for one in before:
        if how(one) != how(newest):
            others.append(one)
            continue
        newest["values"] = {**one["values"], **newest["values"]}
        newest["metrics"] = list(dict.fromkeys([*newest["metrics"], *one["metrics"]]))
        newest["sampler"] = {**one.get("sampler", {}), **newest["sampler"]}
    return {**newest, OTHERS: others}


def how(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """All that the values depend on, beside their own metric and NFE."""
    return {key: value for key, value in evaluation.items() if key not in _NOT_HOW}


def identity(evaluation: Mapping[str, Any]) -> str:
    """Eight digits by which records name what was measured in the same way."""
    text = json.dumps(how(evaluation), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
