"""The tensors of a public checkpoint: each is used once, or left out for a stated reason."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from registry.core import did_you_mean


class Source:
    """The tensors of a file, each of which is taken once."""

    def __init__(self, tensors: Mapping[str, Tensor], layout: str, num_classes: int | None = None):
        self.left = dict(tensors)
        self.layout = layout
        self.num_classes = num_classes  # as the caller knows it; None: the file decides
        self.unused: dict[str, str] = {}
        self.notes: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, ndim: int | None = None) -> Tensor:
        """Take a tensor out of the rest, in float32, whatever precision the file has.

        ValueError if the file does not have it, if it has another number of dimensions than `ndim`,
        or if its values are no finite floating-point numbers.
        """
        return self._take(name, ndim).float()

    def _take(self, name: str, ndim: int | None = None) -> Tensor:
        if name not in self.left:
            raise ValueError(
                f"the checkpoint has no {name!r}, which layout {self.layout!r} needs."
                f"{did_you_mean(name, self.left)}"
            )
        found = self.left.pop(name)
        if not found.is_floating_point():
            raise ValueError(
                f"{name!r} of the checkpoint is of {found.dtype}, as quantized weights are; get "
                "the weights in floating point"
            )
        if ndim is not None and found.ndim != ndim:
            raise ValueError(
                f"{name!r} of the checkpoint has shape {list(found.shape)}; layout "
                f"{self.layout!r} needs {ndim} dimensions"
            )
        if not found.float().isfinite().all():
            raise ValueError(
                f"{name!r} of the checkpoint holds values that are not finite. The file is "
                "damaged, or its precision is too low for them: get it in another precision"
            )
        return found

    def linear(self, theirs: str, ours: str) -> dict[str, Tensor]:
        """Weight and bias under our name."""
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}") for part in ("weight", "bias")}

    def check_equal(self, name: str, expected: Tensor, what: str) -> None:
        """Leave out a table that is computed here; ValueError if the file's table differs.

        A file in half precision has the table rounded to it.
        """
        stored = self._take(name)
        found = stored.float().reshape(-1)
        near = max(1e-4, torch.finfo(stored.dtype).eps)  # entries are at most 1
        if found.shape != expected.reshape(-1).shape or not torch.allclose(
            found, expected.reshape(-1), atol=near, rtol=0
        ):
            raise ValueError(
                f"{name!r} of the checkpoint differs from {what}; a network with trained or other "
                "tables cannot be read"
            )
        self.unused[name] = what

    def leave_out(self, prefix: str, why: str) -> None:
        """Leave out the tensors whose names begin so, if there are any."""
        for name in [name for name in self.left if name.startswith(prefix)]:
            del self.left[name]
            self.unused[prefix.rstrip(".")] = why

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
