"""Claims about a path: its ends, its derivatives and its conversions.

Nothing that a path says of its derivatives is believed: alpha and sigma are differentiated here
(`slope`), and everything else is compared with that.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.networks import slope
from benchmarks.conformance.parts.part import (
    BROADCAST,
    F32,
    F64,
    SHAPES,
    Claims,
    Part,
    check_tensor,
    check_unchanged,
    check_untouched,
    distance,
    generator,
    normal,
    tried,
)
from benchmarks.conformance.results import Broken, ClaimResult, compared, held
from registry.protocols import PathSample
from zoo.ops import like

COEFFICIENTS = ("alpha", "sigma")
GRID = torch.linspace(0, 1, 101, dtype=F64)
INNER = GRID[1:-1]
ROUNDING = {F32: 1e-5, F64: 1e-11}  # some tens of roundings of numbers of size 1 to 4
# Differences are right to 1e-11, and to 1e-3 beside an end where a second derivative is infinite.
SLOPE, SLOPE_AT_ENDS = 1e-5, 1e-2
STANDS_STILL = 3e-2  # a determinant below which no velocity tells the two ends apart


def shapes_and_dtypes(part: Part) -> ClaimResult:
    """[b] times with [b *d] data, in single and double precision; times may be the less precise."""
    path, cases = part.make(), 0
    for shape in SHAPES:
        for dtype, of_time in ((F32, F32), (F64, F32), (F64, F64)):
            x0, x1, t = _draw(shape, dtype, of_time)
            case = f"for data {list(x0.shape)} of {dtype} and times of {of_time}"
            for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
                check_tensor(f"{name}(t) {case}", getattr(path, name)(t), t.shape, of_time)
            sample = tried(f"sample {case}", BROADCAST, partial(path.sample, x0, x1, t))
            if not isinstance(sample, PathSample):
                raise Broken(
                    f"sample gives a {type(sample).__name__}",
                    "give PathSample(x_t, velocity) of registry.protocols",
                )
            at = (sample.x_t, sample.velocity, t)
            results = {"sample(...).x_t": sample.x_t, "sample(...).velocity": sample.velocity}
            for name, given in (("to_velocity", (x0, x1, t)), ("to_x0", at), ("to_x1", at)):
                convert = partial(getattr(path, name), *given)
                results[name] = tried(f"{name} {case}", BROADCAST, convert)
            for name, found in results.items():
                check_tensor(f"{name} {case}", found, x0.shape, dtype)
            cases += 1
    return held(f"{cases} cases")


def ends(part: Part) -> ClaimResult:
    """x_0 = x0 and x_1 = x1."""
    path, worst = part.make(), 0.0
    for dtype in (F32, F64):
        x0, x1, t = _draw((3, 4), dtype, dtype)
        for time, end, name in ((0 * t, x0, "x_0"), (0 * t + 1, x1, "x_1")):
            error = distance(path.sample(x0, x1, time).x_t, end)
            worst = max(worst, error)
            if not error < 1e-6:
                alpha, sigma = (float(getattr(path, c)(time)[0]) for c in COEFFICIENTS)
                raise Broken(
                    f"{name} is off by {error:.2g} in {dtype}: there alpha is {alpha:.6g} and "
                    f"sigma is {sigma:.6g}",
                    "alpha(0) = 1, sigma(0) = 0 (data); alpha(1) = 0, sigma(1) = 1 (noise)",
                )
    return held(f"off by {worst:.2g} < 1e-06", worst, 1e-6)


def monotone(part: Part) -> ClaimResult:
    """From data to noise alpha falls and sigma rises, and both are finite."""
    path, least = part.make(), float("inf")
    for name, sign in zip(COEFFICIENTS, (-1, 1), strict=True):
        values = getattr(path, name)(GRID)
        if not values.isfinite().all():
            at = float(GRID[~values.isfinite()][0])
            raise Broken(f"{name} is not finite at t = {at:.2g}", f"{name} is in [0, 1]")
        steps = sign * values.diff()
        if not (steps > 0).all():
            at = float(GRID[int(steps.argmin())])
            raise Broken(
                f"{name} does not {'fall' if sign < 0 else 'rise'} after t = {at:.2g}",
                "alpha falls from 1 to 0 and sigma rises from 0 to 1, so that noise is told from "
                "data at every time",
            )
        least = min(least, float(steps.min()))
    return held(f"by {least:.2g} and more in steps of 0.01")


def point(part: Part) -> ClaimResult:
    """x_t = alpha x0 + sigma x1."""
    path, worst = part.make(), 0.0
    for shape in SHAPES:
        x0, x1, t = _draw(shape, F64, F64)
        wanted = like(path.alpha(t), x0) * x0 + like(path.sigma(t), x0) * x1
        worst = max(worst, distance(path.sample(x0, x1, t).x_t, wanted))
    return compared(
        "off by",
        worst,
        ROUNDING[F64],
        "sample does not give alpha x0 + sigma x1",
        "x_t = like(alpha(t), x0) * x0 + like(sigma(t), x0) * x1",
    )


def derivatives(part: Part) -> ClaimResult:
    """d_alpha and d_sigma are the derivatives of alpha and sigma, and finite."""
    path, worst = part.make(), 0.0
    for name in COEFFICIENTS:
        given, measured = getattr(path, f"d_{name}")(GRID), slope(getattr(path, name), GRID)
        if not given.isfinite().all():
            at = float(GRID[~given.isfinite()][0])
            raise Broken(
                f"d_{name} is not finite at t = {at:.2g}",
                "samplers start at t = 1 and end at t = 0, and a velocity must exist there",
            )
        errors = (given - measured).abs() / measured.abs().max().clamp_min(1)
        at = int(errors.argmax())
        if not float(errors[1:-1].max()) < SLOPE or not float(errors.max()) < SLOPE_AT_ENDS:
            raise Broken(
                f"d_{name} is {float(given[at]):.6g} at t = {float(GRID[at]):.2g}, where {name} "
                f"has the derivative {float(measured[at]):.6g}",
                f"differentiate {name}(t) by hand or by torch.func.jvp; mind signs and factors",
            )
        worst = max(worst, float(errors[1:-1].max()))
    return held(f"off by {worst:.2g} < {SLOPE:.0e}", worst, SLOPE)


def velocity(part: Part) -> ClaimResult:
    """sample(...).velocity and to_velocity are the derivative of x_t at fixed x0 and x1."""
    path, t = part.make(), INNER
    x0, x1 = normal(len(t), 3), normal(len(t), 3, seed=1)
    wanted = like(slope(path.alpha, t), x0) * x0 + like(slope(path.sigma, t), x0) * x1
    found = {
        "sample(...).velocity": path.sample(x0, x1, t).velocity,
        "to_velocity(x0, x1, t)": path.to_velocity(x0, x1, t),
    }
    errors = {name: distance(v, wanted) / float(wanted.abs().max()) for name, v in found.items()}
    worst = max(errors, key=lambda name: errors[name])
    return compared(
        "off by",
        errors[worst],
        SLOPE,
        f"{worst} is not d x_t / dt",
        "velocity = d_alpha(t) x0 + d_sigma(t) x1",
    )


def conversions(part: Part) -> ClaimResult:
    """to_x0 and to_x1 lead from x_t and its velocity back to the ends.

    Where a path stands still at an end, as 3 t^2 - 2 t^3 does, that end is left out: no velocity
    tells data and noise apart there.
    """
    path, worst, left_out = part.make(), 0.0, ""
    for dtype in (F32, F64):
        t = GRID.to(dtype)
        x0, x1 = normal(len(t), 3, dtype=dtype), normal(len(t), 3, seed=1, dtype=dtype)
        sample = path.sample(x0, x1, t)
        determinant = _determinant(path)
        moving = determinant.abs() > STANDS_STILL
        left_out = "" if moving.all() else f"; {int((~moving).sum())} of 101 times stand still"
        size = determinant.abs().clamp_max(1)[moving]
        for name, end in (("to_x0", x0), ("to_x1", x1)):
            found = getattr(path, name)(sample.x_t, sample.velocity, t)[moving]
            errors = (found - end[moving]).abs().amax(1).double() * size / ROUNDING[dtype]
            if not errors.max() < 1:
                at = float(GRID[moving][int(errors.argmax())])
                raise Broken(
                    f"{name} does not give back the {'data' if name == 'to_x0' else 'noise'} at "
                    f"t = {at:.2g} in {dtype}: it is off by "
                    f"{distance(found, end[moving]):.2g}",
                    "solve x_t = alpha x0 + sigma x1, velocity = d_alpha x0 + d_sigma x1; "
                    "zoo.paths.AffinePath does it for every path",
                )
            worst = max(worst, float(errors.max()))
    return held(f"off by {worst:.2g} of what rounding allows{left_out}", worst, 1.0)


def rows(part: Part) -> ClaimResult:
    """A row depends on its own data, noise and time alone."""
    path = part.make()
    x0, x1, t = _draw((3,), F64, F64)
    whole = path.sample(x0, x1, t)
    alone = path.sample(x0[1:2], x1[1:2], t[1:2])
    back = path.to_x0(whole.x_t, whole.velocity, t)[1:2]
    pairs = (
        (whole.x_t[1:2], alone.x_t),
        (whole.velocity[1:2], alone.velocity),
        (back, path.to_x0(alone.x_t, alone.velocity, t[1:2])),
    )
    change = max(distance(found, wanted) for found, wanted in pairs)
    return compared(
        "change",
        change,
        ROUNDING[F64],
        "a row changes with the other rows of the batch",
        "compute with the row's own time: no t.mean() and no reduction over rows",
    )


def draws_nothing(part: Part) -> ClaimResult:
    """The same call gives the same point; nothing is drawn and nothing is changed in place."""
    path = part.make()
    x0, x1, t = _draw((3,), F64, F64)
    given = {"x0": x0, "x1": x1, "t": t}
    before = {name: value.clone() for name, value in given.items()}

    def use() -> Tensor:
        sample = path.sample(x0, x1, t)
        return torch.cat([sample.x_t, path.to_x0(sample.x_t, sample.velocity, t)])

    check_untouched("the path", use)
    check_unchanged("the path", before, given)
    if not torch.equal(use(), use()):
        raise Broken("two calls differ", "a path is a function of x0, x1 and t alone")
    return held("bit-equal")


CLAIMS: Claims = {
    "shapes and dtypes": shapes_and_dtypes,
    "x_0 is the data and x_1 the noise": ends,
    "alpha falls and sigma rises": monotone,
    "x_t is alpha x0 + sigma x1": point,
    "derivatives of alpha and sigma": derivatives,
    "velocity is that of x_t": velocity,
    "conversions give back the ends": conversions,
    "rows are independent": rows,
    "draws and changes nothing": draws_nothing,
}


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, of_time: torch.dtype, n: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise and n times inside (0, 1)."""
    t = 0.05 + 0.9 * torch.rand(n, generator=generator(2), dtype=F64)
    x0, x1 = normal(n, *shape, dtype=dtype), normal(n, *shape, seed=1, dtype=dtype)
    return x0, x1, t.to(of_time)


def _determinant(path: Any) -> Tensor:
    """alpha sigma' - sigma alpha' at the times of GRID."""
    alpha, sigma = path.alpha(GRID), path.sigma(GRID)
    return alpha * slope(path.sigma, GRID) - sigma * slope(path.alpha, GRID)
