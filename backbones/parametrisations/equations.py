"""What a readout means: the equations that make a velocity of the raw readout of a head.

    raw_velocity         u = raw
    data                 u = (x - raw) / max(t, t_min)                   raw is the data x0
    edm                  u = ((t - (1 - t) s^2) x / n - s raw) / n       raw is EDM's F
    trig                 X = cos(phi_t - phi_r) x - sin(phi_t - phi_r) raw     raw is sCM's F
    scaled_by_guidance   u = w raw

A network has one parametrisation for all its velocities. `v` is u at r = t. On the linear path a
step with fixed data and noise is straight, so that a prediction of data, or of EDM's F, gives the
same u for every r. Its equation for v is therefore that for u. Only `trig` tells them apart.

Readouts start at zero, so raw is zero at first and the velocity need not be: x / max(t, t_min) for
`data`, and for `edm` the exact velocity of Gaussian data of mean 0 and standard deviation s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from registry import parametrisations
from registry.protocols import Call, Reference
from registry.ranges import Positive, Range


@parametrisations.register("raw_velocity")
@dataclass(frozen=True, kw_only=True)
class RawVelocity:
    """The readout is the velocity itself (v-prediction)."""

    def __call__(self, raw: Tensor, key: str, at: Call) -> Tensor:
        return raw


@parametrisations.register("data")
@dataclass(frozen=True, kw_only=True)
class Data:
    """The readout is the clean data (x-prediction): u = (x - raw) / max(t, t_min).

    The paper has the prediction, t_min = 0.05 and the same bound in the conditional velocity that
    it trains against, (x_t - x0) / max(t, 0.05). So its u is biased below t_min by design. Our
    objectives train against x1 - x0 at every t. Below t_min the readout then is not the data, but
    x - t_min u, and the network can still be exact.
    """

    on_path: ClassVar = "linear"
    reference: ClassVar = Reference(
        title="One-step Latent-free Image Generation with Pixel Mean Flows",
        authors="Lu et al.",
        year=2026,
        arxiv="2601.22158",
    )

    t_min: Annotated[float, Range(0, 1, open_below=True)] = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.t_min <= 1:
            raise ValueError(f"data.t_min = {self.t_min!r} must be above 0, and 1 at most")

    def __call__(self, raw: Tensor, key: str, at: Call) -> Tensor:
        return per_row(1 / at.t.clamp(min=self.t_min), at.x) * (at.x - raw)


@parametrisations.register("edm")
@dataclass(frozen=True, kw_only=True)
class EDM:
    """The readout is EDM's F, and the trunk sees x and the times as EDM's network does.

    The paper's denoiser at noise level sigma, with x' = x0 + sigma x1 and s = sigma_data, is

        D = c_skip x' + c_out F(c_in x', c_noise)
        c_skip = s^2 / (sigma^2 + s^2),           c_out = sigma s / sqrt(sigma^2 + s^2),
        c_in = 1 / sqrt(sigma^2 + s^2),           c_noise = log(sigma) / 4

    On our path sigma = t / (1 - t), x = (1 - t) x' and u = (x - D) / t. With n^2 = t^2 + (1 - t)^2
    s^2 this is u = ((t - (1 - t) s^2) x / n - s F) / n, which is finite at t = 0 and at t = 1. The
    trunk is called with c_in x' = x / n and with the time c_noise.

    Our reading: the end r goes through c_noise too, so that r = t stays so. The paper's sigma lies
    in [sigma_min, sigma_max] when it samples; c_noise is taken at the nearer end outside. It is
    steep near the data: its slope is 125 at sigma_min = 0.002.
    """

    on_path: ClassVar = "linear"
    reference: ClassVar = Reference(
        title="Elucidating the Design Space of Diffusion-Based Generative Models",
        authors="Karras et al.",
        year=2022,
        arxiv="2206.00364",
    )

    sigma_data: Positive = 0.5
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0

    def __post_init__(self) -> None:
        _check_sigma_data("edm", self.sigma_data)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"edm.sigma_min = {self.sigma_min!r} must be above 0 and below edm.sigma_max = "
                f"{self.sigma_max!r}"
            )

    def inputs(self, at: Call) -> Call:
        x = per_row(1 / self._norm(at.t), at.x) * at.x
        return Call(x, self._c_noise(at.t), self._c_noise(at.r), at.cond)

    def __call__(self, raw: Tensor, key: str, at: Call) -> Tensor:
        s, t, n = self.sigma_data, at.t, self._norm(at.t)
        skip, out = (t - (1 - t) * s**2) / n**2, -s / n
        return per_row(skip, at.x) * at.x + per_row(out, at.x) * raw

    def _norm(self, t: Tensor) -> Tensor:
        return (t**2 + ((1 - t) * self.sigma_data) ** 2).sqrt()

    def _c_noise(self, t: Tensor) -> Tensor:
        low, high = (sigma / (1 + sigma) for sigma in (self.sigma_min, self.sigma_max))
        return t.clamp(low, high).logit() / 4


@parametrisations.register("trig")
@dataclass(frozen=True, kw_only=True)
class Trig:
    """The readout is sCM's F, for the path `trigflow`: steps are rotations of x and F.

    In the paper, with noise of the standard deviation s = sigma_data of the data, the state at the
    angle phi is y = cos(phi) x0 + s sin(phi) x1, and F gives a step of the angle phi_t - phi_r = d

        y_r = cos(d) y_t - s sin(d) F(y_t / s, phi_t),       dy / dphi = s F at d = 0.

    The case r = 0 is its consistency function f = cos(phi) y - s sin(phi) F.

    Our noise has unit variance: x = alpha x0 + sigma x1 with alpha = cos(pi t / 2) and sigma =
    sin(pi t / 2). With n^2 = s^2 alpha^2 + sigma^2, y = (s / n) x and tan(phi) = sigma / (s alpha).
    So F stands for one pair of data and noise,

        x0 = s (s alpha x / n - sigma F) / n,       x1 = (sigma x / n + s alpha F) / n,

    and u = (x_t - x_r) / (t - r) of the path through this pair, v = its velocity at t. At s = 1 and
    r = 0, t u = (1 - cos phi) x + sin(phi) F. We write u with sin(a) / a of a = pi (t - r) / 4, so
    that nothing is divided by t or by t - r: there is no limit to take at t = 0 nor at r = t.

    Our readings: the trunk sees y / s = x / n as in the paper, and our times t and r, of which phi
    is a smooth function. The step to other r than 0 is that of the paper's DDIM step. On the linear
    path the same F is `edm`'s with the other sign.
    """

    on_path: ClassVar = "trigflow"
    reference: ClassVar = Reference(
        title="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        authors="Lu and Song",
        year=2024,
        arxiv="2410.11081",
    )

    sigma_data: Positive = 0.5

    def __post_init__(self) -> None:
        _check_sigma_data("trig", self.sigma_data)

    def inputs(self, at: Call) -> Call:
        alpha, sigma = _trigflow(at.t)
        return Call(per_row(1 / self._norm(alpha, sigma), at.x) * at.x, at.t, at.r, at.cond)

    def __call__(self, raw: Tensor, key: str, at: Call) -> Tensor:
        s, r = self.sigma_data, at.r if key == "u" else at.t
        alpha, sigma = _trigflow(at.t)
        n = self._norm(alpha, sigma)
        # (alpha_t - alpha_r) / (t - r) and (sigma_t - sigma_r) / (t - r)
        middle, gap = math.pi / 4 * (at.t + r), math.pi / 4 * (at.t - r)
        slope = math.pi / 2 * _sin_over(gap)
        d_alpha, d_sigma = -slope * middle.sin(), slope * middle.cos()
        skip = (d_alpha * s**2 * alpha + d_sigma * sigma) / n**2
        out = s * (d_sigma * alpha - d_alpha * sigma) / n
        return per_row(skip, at.x) * at.x + per_row(out, at.x) * raw

    def _norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return ((self.sigma_data * alpha) ** 2 + sigma**2).sqrt()


@parametrisations.register("scaled_by_guidance")
@dataclass(frozen=True, kw_only=True)
class ScaledByGuidance:
    """The readout is the velocity divided by the guidance scale: u = w raw.

    A guided velocity grows with the scale w; the readout need not. w is the first column of
    cond["guidance"], and 1 where a call has no guidance. As in the paper's code, w counts at every
    t: the interval of times in cond["guidance"], which the paper does not have, would make u jump.
    That rows without a label have w = 1 is for the objective to see to.
    """

    reference: ClassVar = Reference(
        title="Terminal Velocity Matching",
        authors="Zhou et al.",
        year=2025,
        arxiv="2511.19797",
    )

    def __call__(self, raw: Tensor, key: str, at: Call) -> Tensor:
        given = None if at.cond is None else at.cond.get("guidance")
        return raw if given is None else per_row(given[:, 0], raw) * raw


def per_row(s: Tensor, x: Tensor) -> Tensor:
    """s [b] as [b 1 ... 1] in the dtype of x, to multiply x [b *d]."""
    return s.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _check_sigma_data(name: str, sigma_data: float) -> None:
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"{name}.sigma_data = {sigma_data!r} must be a number above 0")


def _trigflow(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)  # exactly 0 at the ends


def _sin_over(a: Tensor) -> Tensor:
    """sin(a) / a for |a| < 1 by its series, to 1e-13: smooth at a = 0, unlike a quotient."""
    out = torch.ones_like(a)
    for k in (12, 10, 8, 6, 4, 2):
        out = 1 - a**2 / (k * (k + 1)) * out
    return out
