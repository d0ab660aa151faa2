"""What the gradient of an objective runs through beside its predictions, as the objective says.

Nothing here imports torch, so that registering is light.
"""

from __future__ import annotations

import logging
from typing import Any

DIFFERENTIATES = ("derivative", "input", "target")
FULL_GRADIENT = ("derivative", "input")  # what full_gradient of earlier versions stands for

log = logging.getLogger(__name__)


def differentiated_by(objective: Any) -> tuple[str, ...]:
    """`objective.differentiates`, else (): what its gradient runs through beside predictions.

    `full_gradient = True` of earlier versions stands for `FULL_GRADIENT`. `objective` is an object
    or its class.
    """
    if _says_full_gradient(objective):
        return FULL_GRADIENT
    return tuple(getattr(objective, "differentiates", ()))


def trains_derivative(objective: Any) -> bool:
    """Whether the loss sends a gradient through a derivative: `differentiates` says so."""
    return "derivative" in getattr(objective, "differentiates", ())


def check_differentiates(name: str, cls: type) -> None:
    """ValueError where the class of the objective `name` declares `differentiates` in error.

    A warning where it declares the former `full_gradient`.
    """
    found: Any = getattr(cls, "differentiates", ())
    if _says_full_gradient(cls):
        log.warning(
            "objective %r declares full_gradient, which goes on working in this release alone, as "
            "differentiates = %s. Let it declare what its gradient runs through, such as "
            'differentiates: ClassVar = ("derivative",)',
            *(name, FULL_GRADIENT),
        )
    elif not isinstance(found, property) and not (
        isinstance(found, tuple) and {*found} <= {*DIFFERENTIATES}
    ):
        raise ValueError(
            f"objective {name!r} declares differentiates = {found!r}; it needs a tuple of "
            f"{' and '.join(map(repr, DIFFERENTIATES))}, such as differentiates: ClassVar = "
            '("derivative",)'
        )


def _says_full_gradient(objective: Any) -> bool:
    return not hasattr(objective, "differentiates") and getattr(objective, "full_gradient", False)
