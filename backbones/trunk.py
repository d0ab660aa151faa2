"""What every trunk of this package has in common: it knows what it was made with.

An exported network is made again from that record, without gin.
"""

from __future__ import annotations

import inspect
from typing import Any, Self

from torch import nn


class Trunk(nn.Module):
    """An nn.Module whose `fields` are the arguments that it was made with, defaults included."""

    fields: dict[str, Any]

    def __new__(cls, *_: Any, **given: Any) -> Self:
        made = super().__new__(cls)
        parameters = inspect.signature(cls.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        made.__dict__["fields"] = {**defaults, **given}
        return made
