"""Claims about a backbone: what shapes it takes, and the network that it makes with our heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from backbones.network import build_network
from benchmarks.conformance.parts.networks import network, slopes
from benchmarks.conformance.parts.networks.built import Built, Shape
from benchmarks.conformance.parts.part import Claims
from benchmarks.conformance.results import Broken, ClaimResult, held
from registry import backbones

KEYS = ("u", "v", "logvar")
# The first of them that a backbone takes is that of all other claims.
SHAPES: tuple[Shape, ...] = (
    *((3,), (1,), (2, 4), (5, 6)),
    *((3, 4, 4), (3, 8, 8), (1, 8, 4), (3, 5, 7), (4, 16, 16), (3, 32, 32), (3, 64, 64)),
    (2, 4, 4, 4),
)
ENOUGH = 8 * 8  # pixels; larger pictures are tried only where no smaller ones are taken


def subject_of(name: str) -> Built:
    """The backbone with its defaults; ValueError if it takes none of SHAPES."""
    refusals = []
    for shape in SHAPES:
        built = Built(name, shape, KEYS, partial(_make, name, shape), own=_trunk)
        try:
            built.kept["fresh"] = built.fresh()
        except Exception as error:  # which kind is judged by a claim
            refusals.append(f"{list(shape)}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        return built
    raise ValueError(
        f"backbone {name!r} cannot be made for data of any of the shapes "
        f"{', '.join(str(list(shape)) for shape in SHAPES)}, with its defaults: {refusals[0]}"
    )


def shapes(built: Built) -> ClaimResult:
    """It takes data of a shape, or refuses them by a ValueError when it is made.

    Data with as many axes as those that it takes must be refused clearly. For others, such as
    pictures given to a network of vectors, an error of any kind will do.
    """
    taken: list[Shape] = []
    refused: list[Shape] = []
    unclear: list[tuple[Shape, str, Exception]] = []
    for shape in SHAPES:
        large = len(shape) > 1 and torch.Size(shape[1:]).numel() > ENOUGH
        if large and any(len(shape) == len(other) for other in taken):
            continue
        try:
            net = Built(built.name, shape, KEYS, partial(_make, built.name, shape)).fresh(0)
        except ValueError:
            refused.append(shape)
            continue
        except Exception as error:  # foreign code
            unclear.append((shape, "when it is made", error))
            continue
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0.9, 0.4])
        try:
            with torch.no_grad():
                out = net(x, t, t / 2, None)
        except Exception as error:  # foreign code
            unclear.append((shape, "when it is called", error))
            continue
        if any(out[key].shape != x.shape for key in ("u", "v")):
            raise Broken(
                f"data {list(shape)} give an output {list(out['u'].shape[1:])}",
                "outputs have the shape of the data; refuse by ValueError sizes that do not divide",
            )
        taken.append(shape)
    axes = {len(shape) for shape in taken}
    for shape, when, fault in unclear:
        if len(shape) in axes:
            raise Broken(
                f"data {list(shape)} fail {when}: {type(fault).__name__}: "
                f"{str(fault).splitlines()[0]}",
                "raise ValueError in __init__ that says which shapes it takes and which it was "
                "given, as backbones.dit.check_patches does",
            )
    told = ", ".join(str(list(shape)) for shape in taken)
    return held(f"takes {told}; refuses {len(refused) + len(unclear)} others")


def inputs_matter(built: Built) -> ClaimResult:
    """The outputs depend on x and t, and on r exactly if it is built for two times."""
    changes = {name: network.change_with(built, name) for name in ("x", "t", "r")}
    for name, change in changes.items():
        if not change > network.MATTERS:
            raise Broken(
                f"the outputs do not depend on {name}",
                "embed t, and with two_times=True r or t - r as well",
            )
    one_time = network.change_with(built, "r", ("v",))
    if one_time > network.MATTERS:
        raise Broken(
            f"a network of v alone, built with two_times=False, changes with r by {one_time:.2g}",
            "use r with two_times=True alone",
        )
    return held(", ".join(f"{name} {change:.2g}" for name, change in changes.items()))


def pooled(built: Built) -> ClaimResult:
    """`pool(features)` gives `dim` numbers a row, and c has as many."""
    net: Any = built.awake()
    with torch.no_grad():
        features, c = net.trunk(*built.inputs(3))
        found = {"c": c, "pool(features)": net.trunk.pool(features)}
    for name, value in found.items():
        if tuple(value.shape) != (3, net.trunk.dim):
            raise Broken(
                f"{name} is {list(value.shape)} for 3 rows, and dim is {net.trunk.dim}",
                "forward gives (features, c) with c [b dim]; pool(features) gives [b dim]",
            )
    return held(f"{net.trunk.dim} numbers")


CLAIMS: Claims = {
    "outputs of a network": network.outputs,
    "deterministic in evaluation": network.deterministic,
    "shapes of data": shapes,
    "starts at zero": network.starts_at_zero,
    "finite": network.finite,
    "x, t and r reach the outputs": inputs_matter,
    "labels reach the outputs": network.labels,
    "c and pooled features": pooled,
    "rows are independent": network.rows,
    "derivative backends agree": slopes.backends_agree,
    "smooth in x, t and r": slopes.smooth,
    "bfloat16 autocast": network.autocast,
    "every parameter is trained": network.parameters_are_trained,
}


def _make(name: str, shape: Shape, num_classes: int, keys: tuple[str, ...]) -> nn.Module:
    return build_network(partial(backbones.build, name), shape, num_classes, keys)


def _trunk(net: Any) -> nn.Module:
    trunk: nn.Module = net.trunk
    return trunk
