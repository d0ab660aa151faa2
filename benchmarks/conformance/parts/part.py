"""A part under test, and what the claims of several kinds use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.conformance.isolation import drawn_from
from benchmarks.conformance.results import Broken, ClaimResult
from registry.core import Registry

SHAPES = ((2,), (1,), (3, 4), (1, 8, 8))
F32, F64 = torch.float32, torch.float64
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A registered part; `make` makes a new one, with these fields besides its defaults."""

    name: str
    make: Callable[..., Any]


Claims = Mapping[str, Callable[[Any], ClaimResult]]


def part_of(kind: Registry, name: str) -> Part:
    """The part of this name; ValueError if it cannot be made with its defaults."""
    return first_of(kind, name)[0]


def first_of(kind: Registry, name: str) -> tuple[Part, Any]:
    """The part of this name, and the first one that was made."""
    part = Part(name, partial(kind.build, name))
    try:
        return part, part.make()
    except TypeError as error:
        raise ValueError(
            f"{kind.kind} {name!r} cannot be made without arguments: {str(error).splitlines()[0]}. "
            "Give every field a default, which gin may then override"
        ) from error


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64).to(dtype)


BROADCAST = "multiply [b] with [b *d] by zoo.ops.like(t, x); keep one number or sample a row"


def tried(case: str, hint: str, run: Callable[[], T]) -> T:
    """run(); an error in it is reported with the case."""
    try:
        return run()
    except Broken:
        raise
    except Exception as error:  # foreign code may raise anything
        raise Broken(f"{case}: {type(error).__name__}: {error}", hint) from error


def check_tensor(what: str, found: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Broken unless it is a tensor of this shape and dtype; `what` says what it is and when."""
    if not isinstance(found, Tensor):
        raise Broken(f"{what} is a {type(found).__name__}", "give a torch.Tensor")
    if tuple(found.shape) != tuple(shape):
        raise Broken(
            f"{what} has the shape {list(found.shape)}, not {list(shape)}",
            BROADCAST,
        )
    if found.dtype != dtype:
        raise Broken(
            f"{what} is {found.dtype}, not {dtype}",
            "keep the dtype of what is given; no .float(), .double() or numpy",
        )


def check_untouched(what: str, run: Callable[[], object]) -> None:
    """Broken if run() draws from a global generator."""
    if moved := drawn_from(run):
        raise Broken(
            f"{what} draws from the global generator of {', '.join(moved)}",
            "draw with generator=rng, or not at all where no rng is given",
        )


def check_unchanged(what: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Broken if a tensor that was given has other values now."""
    changed = [name for name, old in before.items() if not torch.equal(old, after[name])]
    if changed:
        raise Broken(
            f"{what} changes {' and '.join(changed)} in place",
            "write x = x * a instead of x *= a or x.mul_(a)",
        )


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference; inf where one of them is not finite."""
    if not (found.isfinite().all() and wanted.isfinite().all()):
        return math.inf
    return float((found.double() - wanted.double()).abs().max()) if found.numel() else 0.0


class OtherDevice(TorchFunctionMode):
    """Puts tensors that are made without being told a device on the meta device.

    So does a run on a GPU put them on the CPU. A tensor of one number stays, since it may meet
    tensors of any device.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        if isinstance(out, Tensor) and out.ndim and (kwargs or {}).get("device") is None:
            nested = (
                x for item in given for x in (item if isinstance(item, list | tuple) else [item])
            )
            if not any(isinstance(item, Tensor) for item in nested):
                return out.to("meta")
        return out
