"""A network is a trunk and its heads: (x, t, r, cond) -> {"u": ..., "v": ..., "logvar": ...}.

The heads decide which outputs there are and whether the trunk embeds a second time. The
parametrisation says what the readouts of velocities mean. Whatever two networks have in common
starts from the same weights under one `torch.manual_seed`, since a trunk makes its second time
embedder last and the heads follow the trunk. Every readout starts at zero, and so does every
velocity whose parametrisation is `raw_velocity`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from torch import Tensor, nn

import registry
from backbones.heads import AverageVelocity, DeepDual, DualHead, LogVariance, Readouts, Velocity
from backbones.parametrisations.equations import RawVelocity
from backbones.trunk import TrunkModule
from registry.protocols import Call, Cond, Parametrisation, Preconditioning

FREE_FIELDS = frozenset({"two_times", "dropout", "checkpointing"})  # which a student chooses
SECOND_TIME_FIELDS = frozenset({"second_time", "decoder_from"})  # without effect on one time
ADDED = (".second_time.", ".guidance.")  # parts of a trunk that start by adding nothing
VELOCITIES = ("u", "v")  # of a head that does not say which of its keys are velocities

log = logging.getLogger(__name__)


class FlowNetwork(nn.Module):
    """A trunk, its heads and what their readouts mean; the outputs have the dtype of x.

    `keys` names the outputs, and `velocities` those that the parametrisation makes.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Sequence[Any],
        parametrisation: Parametrisation | None = None,
    ):
        super().__init__()
        _check_distinct([type(head) for head in heads])
        self.keys: tuple[str, ...] = tuple(key for head in heads for key in head.keys)
        self.velocities = frozenset(key for head in heads for key in velocities_of(head))
        self.trunk = trunk
        self.heads = nn.ModuleDict({registry.heads.name_of(head): head for head in heads})
        self.parametrisation = parametrisation or RawVelocity()
        self._inputs = (
            self.parametrisation.inputs
            if isinstance(self.parametrisation, Preconditioning)
            else None
        )
        self._see_call = frozenset(
            name for name, head in self.heads.items() if registry.sees_call(head)
        )
        for name in self.heads.keys() - self._see_call:
            _say_call(name)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Cond | None = None,
        asked: tuple[str, ...] | None = None,
    ) -> dict[str, Tensor]:
        """All outputs; `asked` names those that are wanted, and others may be left out."""
        at = Call(x, t, r, cond, asked)
        seen = at if self._inputs is None else self._inputs(at)
        features, c = self.trunk(seen.x, seen.t, seen.r, seen.cond)
        outputs = {}
        for name, head in self.heads.items():
            made = head(features, c, at) if name in self._see_call else head(features, c)
            for key, value in made.items():
                value = value.to(x.dtype)
                if key in self.velocities:
                    value = self.parametrisation(value, key, at)
                outputs[key] = value
        return outputs


def build_network(
    backbone: Callable[..., nn.Module],
    shape: tuple[int, ...],
    num_classes: int,
    keys: Iterable[str],
    heads: Sequence[type[Any]] | None = None,
    parametrisation: Parametrisation | None = None,
) -> FlowNetwork:
    """A network that makes the outputs `keys`, with these head classes or the default ones.

    Without a parametrisation the readouts are velocities. ValueError if the heads do not make every
    key, or if two of them make the same one.
    """
    keys = tuple(dict.fromkeys(keys))
    chosen = default_heads(keys) if heads is None else tuple(heads)
    _check_cover(keys, chosen)
    _check_distinct(chosen)
    two_times = any(head.needs_r for head in chosen)
    trunk = backbone(shape=shape, num_classes=num_classes, two_times=two_times)
    if heads is None:  # by name, so that gin fills the fields of a plug-in's head
        names = [registry.heads.name_of(head) for head in chosen]
        built = [registry.heads.build(name, trunk=trunk) for name in names]
    else:
        built = [head(trunk) for head in chosen]
    return FlowNetwork(trunk, built, parametrisation)


def velocities_of(head: Any) -> tuple[str, ...]:
    """Those of a head's keys that are velocities: as it declares, else u and v."""
    declared: tuple[str, ...] | None = getattr(head, "velocities", None)
    return tuple(key for key in head.keys if key in VELOCITIES) if declared is None else declared


def default_heads(keys: Iterable[str]) -> tuple[type[Any], ...]:
    """Registered heads that make `keys`: `dual_head` for u with v, else one for each key.

    A head of a plug-in serves only for keys that no head of this package makes.
    """
    wanted, chosen = set(keys), []
    own: list[type[Any]] = [DualHead, Velocity, AverageVelocity, LogVariance]
    for head in own + [registry.heads.get(name) for name in registry.heads.names()]:
        if wanted.issuperset(head.keys):
            chosen.append(head)
            wanted.difference_update(head.keys)
    return tuple(chosen)


def warm_start(student: FlowNetwork, teacher: FlowNetwork) -> None:
    """Copy the teacher's weights, so that the student's u and v equal the teacher's at the start.

    If the teacher makes only one of u and v, the student's other output takes its readout as well.
    The two outputs are then equal, except where a parametrisation tells them apart: u of `trig` is
    the average velocity of the step that the teacher's readout stands for. A second time or an
    input of guidance that only the student has keeps its initial weights, which add nothing. Other
    heads keep theirs too. ValueError if the trunks differ in anything else, or if the readouts mean
    something else.
    """
    _check_same_meaning(student.parametrisation, teacher.parametrisation)
    ours, theirs = student.trunk.state_dict(), teacher.trunk.state_dict()
    more = ours.keys() - theirs.keys()
    added = {name for name in more if any(part in name for part in ADDED)}
    differing = sorted((ours.keys() ^ theirs.keys()) - added)
    if differing:
        raise ValueError(
            f"the student cannot start from the teacher: only one of their trunks has "
            f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}. "
            "Give both the same backbone, and the student a second time and an input of guidance "
            "if the teacher has them"
        )
    _check_same_function(student.trunk, teacher.trunk)
    given = _readouts(teacher)
    if not given:
        raise ValueError(f"the teacher makes {', '.join(teacher.keys)}; it needs u or v")
    _copy_branches(student, teacher)
    student.trunk.load_state_dict({**{name: ours[name] for name in added}, **theirs})
    for key, readout in _readouts(student).items():
        source = key if key in given else next(iter(given))
        readout.load_state_dict(given[source].state_dict())


def _check_same_meaning(ours: Parametrisation, theirs: Parametrisation) -> None:
    if ours != theirs:
        raise ValueError(
            f"the student cannot start from the teacher: its parametrisation is {shown(ours)}, the "
            f"teacher's {shown(theirs)}, so that the same readout would be another velocity. Bind "
            "run.parametrisation to the teacher's"
        )


def shown(parametrisation: Parametrisation) -> str:
    """The parametrisation with its settings, as gin names it: 'data(t_min=0.05)'."""
    settings: Any = parametrisation
    values = [f"{f.name}={getattr(settings, f.name)!r}" for f in fields(settings)]
    return f"{registry.parametrisations.name_of(parametrisation)}({', '.join(values)})"


def _check_same_function(ours: nn.Module, theirs: nn.Module) -> None:
    """ValueError if two trunks differ in a field that no shape shows, such as num_heads."""
    if not (isinstance(ours, TrunkModule) and isinstance(theirs, TrunkModule)):
        return
    free = FREE_FIELDS if theirs.fields["two_times"] else FREE_FIELDS | SECOND_TIME_FIELDS
    if not theirs.fields.get("guidance_input"):
        free |= {"guidance_input"}
    if differing := [
        f"{name} = {value!r}, the teacher's {theirs.fields.get(name)!r}"
        for name, value in ours.fields.items()
        if name not in free and value != theirs.fields.get(name)
    ]:
        raise ValueError(
            f"the student cannot start from the teacher, whose trunk computes something else: "
            f"{'; '.join(differing)}. Bind the teacher's values"
        )


def _copy_branches(student: FlowNetwork, teacher: FlowNetwork) -> None:
    """ValueError unless heads with blocks of their own are the same in both, or none has any."""
    ours, theirs = (
        {name: head for name, head in net.heads.items() if isinstance(head, DeepDual)}
        for net in (student, teacher)
    )
    settings = [{name: head.fields for name, head in heads.items()} for heads in (ours, theirs)]
    if settings[0] != settings[1]:
        raise ValueError(
            "the student cannot start from the teacher: heads with blocks of their own are "
            f"{settings[0] or 'none'} in the student and {settings[1] or 'none'} in the teacher. "
            "Give both the same heads, or bind run.warm_start = False"
        )
    for name, head in ours.items():
        head.load_state_dict(theirs[name].state_dict())


def _readouts(net: FlowNetwork) -> dict[str, nn.Module]:
    return {
        key: readout
        for head in net.heads.values()
        if isinstance(head, Readouts | DeepDual)
        for key, readout in head.readouts.items()
    }


def _check_distinct(heads: Sequence[type[Any]]) -> None:
    makers: dict[str, str] = {}
    for head in heads:
        name = registry.heads.name_of(head)
        for key in head.keys:
            if key in makers:
                raise ValueError(
                    f"the heads {makers[key]!r} and {name!r} both make {key!r}; keep one of them"
                )
            makers[key] = name


def _check_cover(keys: Sequence[str], chosen: Sequence[type[Any]]) -> None:
    made = {key for head in chosen for key in head.keys}
    for key in keys:
        if key not in made:
            names = [n for n in registry.heads.names() if key in registry.heads.get(n).keys]
            raise ValueError(
                f"the objective needs the output {key!r}; {_described(chosen)}. "
                f"Registered heads that make {key!r}: {', '.join(names) or 'none'}. "
                + ("Add one of them to the heads" if names else "Register one, or check the key")
            )


@cache
def _say_call(name: str) -> None:
    log.warning(
        "head %r defines forward(self, features, c), which goes on working in this release alone. "
        "Write forward(self, features, c, at): at.x, at.t, at.r and at.cond are the network's call",
        name,
    )


def _described(chosen: Sequence[type[Any]]) -> str:
    pairs = [f"{registry.heads.name_of(head)} makes {', '.join(head.keys)}" for head in chosen]
    return "of the heads, " + "; ".join(pairs) if pairs else "no head was chosen"
