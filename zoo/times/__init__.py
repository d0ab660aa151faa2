"""Time laws draw (t, r) with 0 <= r <= t <= 1; the rows with r < t come first.

How many rows have r < t is a fixed function of n, so that objectives slice rows instead of masking
them and every rank has the same control flow.

`logit_normal_pair` is MeanFlow's law (Geng et al., arXiv 2505.13447): t is the maximum and r the
minimum of two draws of sigmoid(N(mean, std^2)). On the diagonal rows r is then set to t, so their t
is a maximum of two draws too. `beta_pair` is the law of RCGM and TwinFlow as read from their code:
t ~ Beta(a, b), r ~ U[0, t].

`progressive` changes over the run. At step i the share (2 / pi) arccos(i / steps) of another law's
rows with r < t have r = 0 instead: all of them at first, none from `steps` on. From ESC (arXiv
2512.11831) and its released code: the share. The commands of the code have 20,000 steps. The code
draws which rows these are, here they are the first.

`quarters` is TwinFlow's law, as its released code has it: a quarter of the rows each for steps from
noise to data, steps of at most a twentieth of t, any steps, and none (r = t).

`arctan_normal` is FACM's law (Peng et al., arXiv 2507.03738, its released code): t is the angle of
a noise level exp(N(mean, std^2)) over a data level of 1, in quarters of a circle.

    draws            what laws are made of, and what objectives ask them
    diagonal         r = t in every row
    pairs            r < t in a share of the rows, by two draws
    mixed            laws that change over the run, and of several kinds of rows
    step_and_end     a length, and where it ends
    noise_levels     the second time of a consistency step, in noise levels
    trained_steps    what a law decides of its objective beside the draws
    sources          papers from which several parts come

People import from here; modules of zoo/times import each other directly.
"""

from __future__ import annotations

from zoo.times.diagonal import ArctanNormal, LogitNormal, Stratified, Uniform
from zoo.times.draws import (
    check_every_row,
    check_fraction,
    check_positive,
    law_at,
    logit_normal_cdf,
    logit_normal_draws,
    quota,
    reaches,
    uniform_draws,
)
from zoo.times.mixed import Progressive, Quarters
from zoo.times.pairs import BetaPair, LogitNormalPair, TwoLogitNormals, UniformPair
from zoo.times.sources import FLOW_ANCHORED, MEAN_FLOW, SOFLOW, TWINFLOW
from zoo.times.step_and_end import StepAndEnd
from zoo.times.trained_steps import DrawsSteps, SplitsSteps

__all__ = [
    "FLOW_ANCHORED",
    "MEAN_FLOW",
    "SOFLOW",
    "TWINFLOW",
    "ArctanNormal",
    "BetaPair",
    "DrawsSteps",
    "LogitNormal",
    "LogitNormalPair",
    "Progressive",
    "Quarters",
    "SplitsSteps",
    "StepAndEnd",
    "Stratified",
    "TwoLogitNormals",
    "Uniform",
    "UniformPair",
    "check_every_row",
    "check_fraction",
    "check_positive",
    "law_at",
    "logit_normal_cdf",
    "logit_normal_draws",
    "quota",
    "reaches",
    "uniform_draws",
]
