"""Devices by name, and how much memory there is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

# Where a container finds the limit of its memory, in version 2 of control groups and in version 1.
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def device_of(name: str, option: str) -> torch.device:
    """The device that torch calls `name`; ValueError if this machine has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"{option} = {name!r} is no device; give 'auto', 'cpu', 'cuda' or 'cuda:1', say"
        ) from error
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(
            f"{option} = {name!r}, and PyTorch finds {found} CUDA devices here; 'auto' takes the "
            "CPU where there is none"
        )
    return device


def check_rows(name: str, rows: int, shape: Sequence[int]) -> None:
    """ValueError if so many float32 rows of this shape are larger than the memory; `name` asks."""
    needed, memory = 4 * rows * math.prod(shape), machine_memory()
    if memory is not None and needed > memory:
        raise ValueError(
            f"{name} = {rows}: rows of shape {tuple(shape)} take {needed / 2**30:,.0f} GiB, and "
            f"this machine has {memory / 2**30:,.0f} GiB of memory. Set {name} to "
            f"{memory // (8 * math.prod(shape))} or less"
        )


def machine_memory(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this machine, or its container, has; None where nothing says it."""
    found = []
    if hasattr(os, "sysconf"):  # Windows does not have it
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _LIMITS:
        with suppress(OSError, ValueError):  # there is no such limit, or it is "max"
            found.append(int((groups / name).read_text()))
    return min(found, default=None)
