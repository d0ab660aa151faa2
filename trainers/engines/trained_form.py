"""An objective with the derivatives that its engine can take."""

from __future__ import annotations

from registry import derivatives, engines
from registry.protocols import (
    Derivative,
    Engine,
    Objective,
    has_whole_weights,
    parts,
    trains_derivative,
)
from zoo.derivatives.one_pass import apart, with_graphs


def as_trained(objective: Objective, engine: Engine, compile: bool = False) -> Objective:
    """The objective, or a part of it, as it is trained on this engine, compiled or not.

    A derivative that is taken together with the value follows the network's forward. Where weights
    are not whole meanwhile, or the network is compiled, it takes a pass of its own instead. So it
    does where the objective trains its derivative and the one that is taken with the value has no
    graph. ValueError where no derivative of the objective can be trained.
    """
    whole = has_whole_weights(engine)
    changed: Objective = objective if whole and not compile else apart(objective)
    if trains_derivative(objective):
        changed = with_graphs(changed)
        if not whole:
            _check_in_pieces(changed, engine)
    return changed


def _check_in_pieces(objective: Objective, engine: Engine) -> None:
    """ValueError for a trained derivative in forward mode where weights are not whole.

    Its backward needs each weight for the value and for the tangent. Weights that are gathered
    layer by layer may be released in between, and are never gathered for a layer whose value the
    loss does not use.
    """
    for path, part in parts(objective):
        if isinstance(part, Derivative) and part.needs_forward_ad:
            raise ValueError(
                f"the objective {type(objective).__name__} trains its derivative, and its {path} = "
                f"@{derivatives.name_of(part)}() cannot be trained while run.engine = "
                f"@{engines.name_of(engine)}() keeps weights in pieces: its backward asks for "
                "weights that may be released. Set zero_engine.stage = 2, or bind "
                f"@finite_difference() to its {path}"
            )
