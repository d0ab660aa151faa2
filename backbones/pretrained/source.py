"""The tensors of a public checkpoint: each is used once, or left out for a stated reason."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from registry.core import did_you_mean


class Source:
    """The tensors of a file, each of which is taken once."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: str):
        self.left = dict(tensors)
        self.layout = layout
        self.unused: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """Take a tensor out of the rest, in float32; ValueError if the file does not have it."""
        if name not in self.left:
            raise ValueError(
                f"the checkpoint has no {name!r}, which layout {self.layout!r} needs."
                f"{did_you_mean(name, self.left)}"
            )
        return self.left.pop(name).float()

    def linear(self, theirs: str, ours: str) -> dict[str, Tensor]:
        """Weight and bias under our name."""
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}") for part in ("weight", "bias")}

    def check_equal(self, name: str, expected: Tensor, what: str) -> None:
        """Leave out a table that is computed here; ValueError if the file's table differs."""
        found = self.take(name).reshape(-1)
        if found.shape != expected.reshape(-1).shape or not torch.allclose(
            found, expected.reshape(-1), atol=1e-4
        ):
            raise ValueError(
                f"{name!r} of the checkpoint differs from {what}; a network with trained or other "
                "tables cannot be read"
            )
        self.unused[name] = what

    def count(self, pattern: str) -> int:
        """How many different numbers the pattern's one group matches in the names."""
        found = {m[1] for name in self.left if (m := re.match(pattern, name))}
        return len(found)

    def check_empty(self) -> None:
        """ValueError if a tensor of the file is left."""
        if self.left:
            names = sorted(self.left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"layout {self.layout!r} has no place for {len(names)} tensors of the checkpoint: "
                f"{', '.join(names[:5])}{more}"
            )
