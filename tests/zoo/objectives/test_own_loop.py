"""docs/own-loop.md: its examples train, each objective in a plain loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[3] / "docs" / "own-loop.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_examples_train_every_objective():
    """Samples move from noise, whose first coordinate has mean size 0.8, to the points at 2."""
    setup, *loops = blocks()
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(setup, names)
        for loop in loops:
            exec(loop, names)
            if "samples = " not in loop:
                continue  # what the loops after it use
            samples = names["samples"]
            assert samples.isfinite().all(), loop
            assert 1.4 < float(samples[:, 0].abs().mean()) < 2.6, loop


def test_every_objective_of_the_zoo_is_on_the_page():
    from zoo import objectives

    _, *loops = blocks()
    found = re.findall(r"^objective(?:, net)? = (\w+)\(", "\n".join(loops), re.MULTILINE)
    assert sorted(found) == sorted(objectives.__all__)


def test_each_loop_is_about_fifteen_lines():
    assert max(len(loop.strip().splitlines()) for loop in blocks()[1:]) <= 18


def test_loop_without_attach_ends_as_the_page_says():
    setup, *loops = blocks()
    forgetful = next(loop for loop in loops if "DuMo" in loop).replace(
        "objective.teacher.attach(copy.deepcopy(net))\n", ""
    )
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        exec(setup, names)
        with pytest.raises(ValueError, match=r"teacher\.(attach|update)\("):
            exec(forgetful, names)
