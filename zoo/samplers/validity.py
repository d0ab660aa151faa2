"""Which samplers are valid for an objective."""

from __future__ import annotations

from typing import Any

from registry import paths, samplers
from zoo.samplers.guided import GuidedSampler


def valid_samplers(objective: Any) -> tuple[str, ...]:
    """The samplers that the objective names, else all that read an output which it trains."""
    declared = getattr(objective, "samplers", None)
    if declared is not None:
        return tuple(declared)
    return tuple(
        name for name in samplers.names() if set(samplers.get(name).heads) & set(objective.heads)
    )


def check_sampler(name: str, objective: Any, sampler: Any) -> None:
    """ValueError unless the sampler is valid for the objective `name` and uses the same path."""
    if isinstance(sampler, GuidedSampler):
        return check_sampler(name, objective, sampler.sampler)
    valid = valid_samplers(objective)
    chosen = samplers.name_of(sampler)
    if chosen not in valid:
        raise ValueError(
            f"objective {name!r} cannot use sampler {chosen!r}: it trains the outputs "
            f"{', '.join(objective.heads)} and is valid for {', '.join(valid) or 'no sampler'}. "
            f"Bind run.sampler = @{valid[0] if valid else 'SAMPLER'}()"
        )
    path = getattr(objective, "path", None)
    if path is not None and getattr(sampler, "path", path) != path:
        raise ValueError(
            f"sampler {chosen!r} adds noise along {sampler.path}, but objective {name!r} trains on "
            f"{path}. Bind {chosen}.path = @{paths.name_of(path)}()"
        )
