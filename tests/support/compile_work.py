"""A compiler to count with, and what the processes of tests/trainers/test_compile.py do with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from zero_work import found, main, train

from trainers.zero.engine import ZeroEngine

COMPILED_STAGES = (0, 1, 2)
EACH = ("mean_flow", "shortcut")


class Compiler:
    """A backend of torch.compile that needs no C++, and counts the calls of what it was given."""

    def __init__(self, lower: Callable[..., Any] = lambda graph, inputs: graph) -> None:
        self.calls, self._lower = 0, lower

    def __call__(self, graph: Any, inputs: Any) -> Any:
        made = self._lower(graph, inputs)

        def counted(*args: Any) -> Any:
            self.calls += 1
            return made(*args)

        return counted

    def takes_the_place(self) -> Any:
        """A patch of what compiles networks."""
        plain = nn.Module.compile
        return patch.object(
            nn.Module, "compile", lambda net, **_: plain(net, dynamic=False, backend=self)
        )


def compiled(folder: Path) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for stage in COMPILED_STAGES:
        for name in EACH:
            torch.compiler.reset()
            with (compiler := Compiler(aot_eager)).takes_the_place():
                engine = ZeroEngine(stage=stage, max_grad_norm=1.0)
                results[stage, name] = found(*train(name, engine, compile=True))
            results[stage, name]["calls"] = compiler.calls
    return results


if __name__ == "__main__":
    main(globals())
