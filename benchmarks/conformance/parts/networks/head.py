"""Claims about a head, in a network around a small backbone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from backbones.dit import DiT
from backbones.mlp import MLP
from backbones.network import build_network
from backbones.unet import UNet
from benchmarks.conformance.parts.networks import network, slopes
from benchmarks.conformance.parts.networks.built import Built, Shape
from benchmarks.conformance.parts.part import Claims
from benchmarks.conformance.results import Broken, ClaimResult, held
from registry import heads

Trunk = Callable[..., nn.Module]
# The first that a head can be built on is that of all other claims.
TRUNKS: dict[str, tuple[Trunk, Shape]] = {
    "mlp": (partial(MLP, dim=16, depth=1), (3,)),
    "dit": (partial(DiT, dim=16, depth=1, num_heads=2), (3, 4, 6)),
    "unet": (partial(UNet, channels=8, num_heads=2), (3, 5, 7)),
}


def subject_of(name: str) -> Built:
    """The head on the first trunk that it can be built on; ValueError if there is none."""
    errors = []
    for trunk in TRUNKS:
        built = _on(name, trunk)
        try:
            built.fresh()
        except Exception as error:  # which kind is judged by a claim
            errors.append(f"{trunk}: {type(error).__name__}: {error}")
            continue
        return built
    raise ValueError(f"head {name!r} cannot be built on any backbone: {'; '.join(errors)}")


def on_every_trunk(built: Built) -> ClaimResult:
    """It works on vectors, tokens and pictures, or refuses a trunk by a ValueError."""
    made, refused = [], []
    for trunk in TRUNKS:
        other = _on(built.name, trunk)
        try:
            other.fresh()
        except ValueError as error:
            refused.append(f"{trunk}: {str(error).splitlines()[0]}")
            continue
        except Exception as error:  # foreign code
            raise Broken(
                f"it cannot be built on {trunk}: {type(error).__name__}: {error}",
                "make readouts by trunk.readout(), read trunk.dim numbers of c, or raise "
                "ValueError that says which trunks it takes",
            ) from error
        network.outputs(other)
        if (start := network.starts_at_zero(other)).status == "FAIL":
            raise Broken(f"on {trunk}, {start.reason}", start.hint)
        made.append(trunk)
    return held(", ".join(made) + (f"; refuses {'; '.join(refused)}" if refused else ""))


def needs_r(built: Built) -> ClaimResult:
    """`needs_r` is True exactly if an output depends on r."""
    says = heads.get(built.name).needs_r
    change = network.change_with(built, "r")
    if (change > network.MATTERS) != bool(says):
        raise Broken(
            f"outputs change with r by {change:.2g}, and needs_r is {says}",
            "needs_r = True makes the trunk embed r as well; declare it exactly if an output is "
            "a function of r",
        )
    return held(f"{says}; {change:.2g}")


CLAIMS: Claims = {
    "outputs of a network": network.outputs,
    "deterministic in evaluation": network.deterministic,
    "starts at zero": network.starts_at_zero,
    "works on every trunk": on_every_trunk,
    "finite": network.finite,
    "needs_r as declared": needs_r,
    "rows are independent": network.rows,
    "derivative backends agree": slopes.backends_agree,
    "smooth in x, t and r": slopes.smooth,
    "bfloat16 autocast": network.autocast,
    "every parameter is trained": network.parameters_are_trained,
}


def _on(name: str, trunk: str) -> Built:
    backbone, shape = TRUNKS[trunk]
    cls = heads.get(name)

    def make(num_classes: int, keys: tuple[str, ...]) -> nn.Module:
        return build_network(backbone, shape, num_classes, keys, [cls])

    return Built(name, shape, cls.keys, make, own=_heads)


def _heads(net: Any) -> nn.Module:
    made: nn.Module = net.heads
    return made
