"""Counts what a network is made of while it is made, so that one that is too large can be stopped.

On the meta device tensors have shapes and no memory, and the making can be stopped at any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)


@dataclass
class Made:
    """What was made so far; a parameter that is put in the place of another one counts again."""

    tensors: int = 0  # parameters
    elements: int = 0  # of them
    bytes: int = 0  # of them
    tables: int = 0  # elements of buffers


@contextmanager
def counted(check: Callable[[Made], None]) -> Iterator[None]:
    """While it is open, `check` sees the count after each tensor, and may stop it by an error."""
    made = Made()

    def count(_module: nn.Module, _name: str, parameter: Tensor | None) -> None:
        if parameter is not None:
            made.tensors += 1
            made.elements += parameter.numel()
            made.bytes += parameter.numel() * parameter.element_size()
        check(made)

    def count_table(_module: nn.Module, _name: str, table: Tensor | None) -> None:
        made.tables += table.numel() if table is not None else 0
        check(made)

    hooks = (
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count_table),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
