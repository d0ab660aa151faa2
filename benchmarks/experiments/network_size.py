"""Refuses a network that is too large for this machine before any of its memory is allocated.

A setting such as `mlp.dim = 10**9` would end the process in the middle of an allocation, or the
machine. So the network is made on the meta device first, where tensors have shapes and no memory,
and its making stops as soon as it is clearly too large.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from backbones.counting import Made, counted
from trainers.devices import machine_memory

MOST_TENSORS = 20_000  # parameters of one network: each takes Python some kilobytes, and some time
_OVERFLOW = ("overflow", "failed to unpack", "too large")  # how torch says it of a shape
_REPLACED = 4  # a backbone may make a part and then replace it, or register one tensor twice

log = logging.getLogger(__name__)


class TooLarge(ValueError):
    """A network that this machine cannot hold, or cannot train."""


def check_size(make: Callable[[], nn.Module], copies: int, device: torch.device) -> None:
    """TooLarge, a ValueError, unless this many copies of the network fit into the memory.

    The network is made in the memory of the machine, and its copies are on the device.
    """
    limits = [(1, machine_memory(), "this machine has")]
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        limits.append((copies, total, f"{device} has"))
    else:
        limits[0] = copies, limits[0][1], limits[0][2]

    def check(made: Made) -> None:
        _check_count(made.tensors)
        for number, memory, whose in limits:
            if memory is not None and number * made.bytes > _REPLACED * memory:
                _refuse(f"more than {made.elements:,}", number * made.bytes, number, memory, whose)

    try:
        with torch.device("meta"), counted(check):
            outline = make()
    except TooLarge:
        raise
    except Exception as error:
        if any(mark in str(error) for mark in _OVERFLOW):
            raise TooLarge(
                "the network has weights of more elements than any memory can hold. Lower its width"
            ) from error
        # The making in memory, which follows, says what is wrong.
        log.debug("not made without memory, so its size is not checked: %s", error)
        return
    sizes = [(p.numel(), p.numel() * p.element_size()) for p in outline.parameters()]
    elements, size = (sum(one) for one in zip(*sizes, strict=True)) if sizes else (0, 0)
    for number, memory, whose in limits:
        if memory is not None and number * size > memory:
            _refuse(f"{elements:,}", number * size, number, memory, whose)


@contextmanager
def at_most_tensors() -> Iterator[None]:
    """While it is open, TooLarge stops the making of a network of more than `MOST_TENSORS`."""
    with counted(lambda made: _check_count(made.tensors)):
        yield


def _check_count(tensors: int) -> None:
    if tensors > MOST_TENSORS:
        raise TooLarge(
            f"the network has more than {MOST_TENSORS:,} weight tensors: its depth is probably not "
            "what you mean. Lower its depth"
        )


def _refuse(parameters: str, needed: int, copies: int, memory: int, whose: str) -> None:
    what = "they take" if copies == 1 else f"{copies} copies of them (to train them) take"
    raise TooLarge(
        f"the network has {parameters} parameters: {what} {needed / 2**30:,.1f} GiB, and {whose} "
        f"{memory / 2**30:,.1f} GiB. Lower its width or its depth"
    )
