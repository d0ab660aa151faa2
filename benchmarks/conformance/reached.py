"""What of an objective no claim reaches: fields with one value, and lines that never run."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

from benchmarks.conformance.results import ClaimResult, note
from benchmarks.conformance.subject import STEPS, Subject


def not_reached(subject: Subject) -> ClaimResult:
    """For the record: what of the objective no claim reaches, so that nobody takes it for checked.

    A field is reached if the claims took losses with two values of it, or with two kinds of part.
    A line of the objective's own methods is reached if it ran while its loss was taken, with its
    defaults and with each mapping of `exact_with`, for every kind of labels and at every one of
    STEPS.
    """
    codes = _own_code(subject.make())
    ran: set[tuple[CodeType, int]] = set()

    def in_own_code(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            ran.add((frame.f_code, frame.f_lineno))
        return in_own_code

    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: in_own_code if frame.f_code in codes else None)
    try:
        for form, exact in subject.variants():
            toy = form.on_toy(exact=exact)
            for kind, step in itertools.product(("none", "null", "given"), STEPS):
                toy(subject.batch(n=16, labels=kind, step=step))
    finally:
        sys.settrace(before)
    idle = [
        (Path(code.co_filename).name, line)
        for code in codes
        for line in {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}
        if (code, line) not in ran
    ]
    fixed = [name for name, values in subject.tried.items() if len(values) < 2]
    parts_of_note = []
    if fixed:
        parts_of_note.append(f"no other value of {', '.join(fixed)}")
    if idle:
        parts_of_note.append(f"no run of {_ranges(sorted(set(idle)))}")
    return note("; ".join(parts_of_note) or "all fields and lines are reached")


def _own_code(objective: Any) -> set[CodeType]:
    """The code of the objective's methods, and of functions inside them."""
    home = type(objective).__module__
    methods = [
        member.__code__
        for cls in type(objective).__mro__
        if cls.__module__ == home
        for name, member in vars(cls).items()
        if isinstance(member, FunctionType) and not name.startswith("__")
    ]
    found: set[CodeType] = set()
    while methods:
        found.add(code := methods.pop())
        methods += [part for part in code.co_consts if isinstance(part, CodeType)]
    return found


def _ranges(lines: list[tuple[str, int]]) -> str:
    """Lines of a file as text, such as "mine.py 3-5, 9"."""
    texts = []
    for name, group in itertools.groupby(lines, key=lambda pair: pair[0]):
        numbers = [line for _, line in group]
        runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
        ends = [[line for _, line in run] for _, run in runs]
        spans = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends]
        texts.append(f"{name} {', '.join(spans)}")
    return ", ".join(texts)
