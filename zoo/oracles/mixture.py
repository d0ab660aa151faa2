"""Gaussian mixture data sum_k w_k N(mu_k, diag(s_k^2)): v* in closed form, X integrated.

    m_k = (1 - t) mu_k,   S_k^2 = (1 - t)^2 s_k^2 + t^2,   c_k = (t - (1 - t) s_k^2) / S_k^2
    g_k(x, t) propto w_k N(x; m_k, diag(S_k^2)),           a_k = -mu_k + c_k (x - m_k)
    v* = sum_k g_k a_k
    Var(x1 - x0 | x_t) = sum_k g_k (s_k^2 / S_k^2 + a_k^2) - v*^2
    grad v* = sum_k g_k (diag(c_k) + a_k (l_k - l)^T),     l_k = -(x - m_k) / S_k^2, l = sum g_k l_k

Given its component, a point is Gaussian: a_k and s_k^2 / S_k^2 are mean and variance as in
zoo/oracles/gaussian.py, g_k is the posterior of the component, and the laws of total expectation
and variance give the rest; l is the score.

The average velocity solves an ODE of its own. With s from 0 (at time t) to 1 (at time r),

    w(0) = 0,   w'(s) = v*(x - (t - r) w, t - s (t - r)),   u* = w(1),   X = x - (t - r) u*

which holds for every r including r = t, where u* = v*, without dividing by t - r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.protocols import NULL_LABEL, Cond
from zoo.ops import like
from zoo.oracles.exact import Oracle, parameter
from zoo.oracles.solver import integrate


@dataclass(frozen=True)
class _Components:
    """The components as seen from x_t, [b k D] unless noted."""

    logits: Tensor  # log w_k N(x; m_k, S_k^2), [b k]
    weight: Tensor  # g_k, [b k]
    score: Tensor  # l_k
    variance: Tensor  # S_k^2
    covariance: Tensor  # of x1 - x0 with x_t, t - (1 - t) s_k^2
    means: Tensor  # mu_k, [k D]

    def velocity(self) -> Tensor:
        """a_k."""
        return -self.covariance * self.score - self.means

    def average(self, values: Tensor) -> Tensor:
        """sum_k g_k values_k."""
        return (self.weight.unsqueeze(2) * values).sum(1)


class MixtureOracle(Oracle):
    """Diagonal Gaussian mixture: `means`, `stds` [k *d], `weights` [k] (relative).

    `labels` [k] puts each component into a class. cond["label"] then restricts a row to its class,
    and NULL_LABEL does not restrict it, so that v*(., y) and v*(., null) are both exact. Without
    `labels`, conditions are ignored. `rtol` is the flow map's error per step.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor
    labels: Tensor | None
    table: Tensor

    def __init__(
        self,
        means: object,
        stds: object,
        weights: object,
        labels: object = None,
        rtol: float = 1e-10,
    ) -> None:
        super().__init__()
        self.rtol = rtol
        means, stds, weights = parameter(means), parameter(stds), parameter(weights)
        _check_components(means, stds, weights)
        if not 1e-13 <= rtol < 1:
            raise ValueError(f"rtol = {rtol!r} must lie in [1e-13, 1); float64 resolves no less")
        self.shape = tuple(means.shape[1:])
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("stds", stds.flatten(1))
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("table", _moment_table(self.means, self.stds), persistent=False)
        self.register_buffer("labels", None if labels is None else _labels(labels, len(means)))

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        v = self._velocity(self._flat(x), self._time(t), self._prior(len(x), cond))
        return v.reshape(x.shape).to(x.dtype)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None) -> Tensor:
        start, prior = self._flat(x), self._prior(len(x), cond)
        time, gap = self._time(t), self._time(t) - self._time(r)

        def slope(s: float, w: Tensor) -> Tensor:
            position = start - like(gap, w) * w
            return self._velocity(position, torch.sub(time, gap, alpha=s), prior)

        u = integrate(slope, torch.zeros_like(start), self.rtol)
        return u.reshape(x.shape).to(x.dtype)

    def velocity_jacobian(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        parts = self._components(self._flat(x), self._time(t), self._prior(len(x), cond))
        centred = parts.score - parts.average(parts.score).unsqueeze(1)
        weighted = parts.weight.unsqueeze(2) * parts.velocity()
        diagonal = parts.average(parts.covariance / parts.variance)
        return (diagonal.diag_embed() + weighted.mT @ centred).to(x.dtype)

    def log_density(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        parts = self._components(self._flat(x), self._time(t), self._prior(len(x), cond))
        return parts.logits.logsumexp(1).to(x.dtype)

    def score(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        parts = self._components(self._flat(x), self._time(t), self._prior(len(x), cond))
        return parts.average(parts.score).reshape(x.shape).to(x.dtype)

    def posterior_variance(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        parts = self._components(self._flat(x), self._time(t), self._prior(len(x), cond))
        velocity = parts.velocity()
        between = (velocity - parts.average(velocity).unsqueeze(1)) ** 2
        variance = parts.average(self.stds**2 / parts.variance + between)
        return variance.reshape(x.shape).to(x.dtype)

    def marginal_mean(self, t: Tensor, cond: Cond | None = None) -> Tensor:
        mean = self._prior(len(t), cond).exp() @ self.means
        return (like(1 - self._time(t), mean) * mean).reshape(-1, *self.shape)

    def marginal_variance(self, t: Tensor, cond: Cond | None = None) -> Tensor:
        prior = self._prior(len(t), cond).exp().unsqueeze(2)
        means, variances, _ = self._moments(self._time(t))
        centre = (prior * means).sum(1, keepdim=True)
        total = (prior * (variances + (means - centre) ** 2)).sum(1)
        return total.reshape(-1, *self.shape)

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Cond | None]:
        chosen = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=rng)
        noise = torch.randn(n, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        x0 = (self.means[chosen] + self.stds[chosen] * noise).reshape(n, *self.shape)
        return x0, None if self.labels is None else {"label": self.labels[chosen]}

    def _flat(self, x: Tensor) -> Tensor:
        return x.to(self.means.dtype).flatten(1)

    def _time(self, t: Tensor) -> Tensor:
        return t.to(self.means.dtype)

    def _prior(self, n: int, cond: Cond | None) -> Tensor:
        """log w_k of each row's class, normalised over it, [b k]."""
        if self.labels is None or cond is None or "label" not in cond:
            return self.log_weights.expand(n, -1)
        label = cond["label"].unsqueeze(1)
        allowed = (label == self.labels) | (label == NULL_LABEL)
        if not allowed.any(1).all():
            raise ValueError(
                f"label(s) {label[~allowed.any(1)].unique().tolist()} have no component; the "
                f"mixture's classes are {self.labels.unique().tolist()}, {NULL_LABEL} is no label"
            )
        return self.log_weights.masked_fill(~allowed, -math.inf).log_softmax(1)

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """m_k, S_k^2 and the covariance of x1 - x0 with x_t, [b k D] each.

        One matrix product, since forward mode is slow wherever a dual number meets a constant.
        """
        alpha = 1 - t
        moments = torch.stack([alpha, t, alpha**2, t**2], 1) @ self.table
        means, variances, covariances = moments.reshape(-1, 3, *self.means.shape).unbind(1)
        return means, variances, covariances

    def _components(self, x: Tensor, t: Tensor, prior: Tensor) -> _Components:
        means, variance, covariance = self._moments(t)
        centred = x.unsqueeze(1) - means
        score = -centred / variance
        terms = (centred * score - variance.log()).sum(2)
        prior = prior - self.means.shape[1] / 2 * math.log(2 * math.pi)
        logits = torch.add(prior, terms, alpha=0.5)
        return _Components(logits, logits.softmax(1), score, variance, covariance, self.means)

    def _velocity(self, x: Tensor, t: Tensor, prior: Tensor) -> Tensor:
        parts = self._components(x, t, prior)
        moving = parts.average(parts.covariance * parts.score)
        return -moving - parts.weight @ self.means


def _moment_table(means: Tensor, stds: Tensor) -> Tensor:
    """m_k, S_k^2 and t - (1 - t) s_k^2 as linear functions of 1 - t, t, (1 - t)^2, t^2."""
    one, none = torch.ones_like(means), torch.zeros_like(means)
    rows = ((means, none, none, none), (none, none, stds**2, one), (-(stds**2), one, none, none))
    return torch.stack([torch.stack(row) for row in rows], 1).flatten(1)  # [4 3kD]


def _check_components(means: Tensor, stds: Tensor, weights: Tensor) -> None:
    if means.ndim < 2 or means.shape != stds.shape or weights.shape != means.shape[:1]:
        raise ValueError(
            f"means {tuple(means.shape)}, stds {tuple(stds.shape)}, weights {tuple(weights.shape)}:"
            " means and stds must both be [k *d], such as (3, 2), and weights [k]"
        )
    if not ((stds > 0).all() and (weights > 0).all()):
        raise ValueError(f"every std and weight must be positive; the weights are {weights}")


def _labels(labels: object, num_components: int) -> Tensor:
    values = torch.as_tensor(labels)
    if values.shape != (num_components,) or values.is_floating_point() or (values < 0).any():
        raise ValueError(
            f"labels {labels} must be one class index >= 0 for each of the {num_components} "
            f"components ({NULL_LABEL} means no label)"
        )
    return values.long().clone()
