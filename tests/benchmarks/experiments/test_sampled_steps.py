"""Samples take steps that were trained, and the record says what guides them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

import registry
from benchmarks.experiments.sampled_steps import (
    check_steps,
    guidance_in_words,
    warn_of_unguided,
)
from zoo.objectives.decm import DECM
from zoo.objectives.dumo import DuMo
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.shortcut import Shortcut
from zoo.samplers import ClassifierFree, Euler, FlowMap, Mix, Restart
from zoo.times import BetaPair, UniformPair


def experiment(objective: Any, sampler: Any, nfe: tuple[int, ...] = (1, 2, 4)) -> Any:
    return SimpleNamespace(
        objective=objective,
        objective_name=registry.objectives.name_of(objective),
        sampler=sampler,
        sampler_name=registry.samplers.name_of(sampler),
        dataset=SimpleNamespace(shape=(1, 2, 2)),
        nfe=nfe,
    )


GUIDED = ClassifierFree(sampler=FlowMap(), scale=1.5, least_nfe=8)


@pytest.mark.parametrize("sampler", [FlowMap(), GUIDED])
def test_shortcut_is_sampled_in_its_own_steps_alone(sampler):
    made = experiment(Shortcut(num_steps=16), sampler)
    check_steps(made, (1, 2, 4, 8, 16))
    for refused in (3, 5, 6, 12, 15, 17, 32, 100):
        with pytest.raises(
            ValueError, match=rf"at {refused} NFE .* Allowed are 1, 2, 4, 8, 16 NFE"
        ):
            check_steps(made, (1, refused))


def test_every_refused_nfe_is_named_at_once():
    made = experiment(Shortcut(), FlowMap())
    with pytest.raises(ValueError, match=r"at 3, 256 NFE .*'shortcut'.* t = 1 to r = 0\.666667"):
        check_steps(made, (1, 3, 128, 256))


def test_shortcut_without_bootstrap_has_the_smallest_step_alone():
    made = experiment(Shortcut(num_steps=8, bootstrap_fraction=0.0), FlowMap())
    check_steps(made, (8,))
    with pytest.raises(ValueError, match=r"Allowed are 8 NFE"):
        check_steps(made, (1,))


def test_steps_off_the_grid_are_no_trained_steps():
    """A step of 1/2 from t = 0.75 has a trained size, and is no multiple of it."""
    trains_step = Shortcut(num_steps=8).trains_step
    assert trains_step(1.0, 0.5)
    assert trains_step(0.5, 0.0)
    assert not trains_step(0.75, 0.25)
    assert not trains_step(0.5, 0.5)


def test_trained_steps_are_those_that_are_drawn():
    objective = Shortcut(num_steps=32, bootstrap_fraction=0.5)
    t, r = objective.draw_times(256, 128, torch.Generator().manual_seed(0))
    assert all(objective.trains_step(*map(float, step)) for step in zip(t, r, strict=True))
    assert not any(
        objective.guides(*map(float, step)) for step in zip(t[128:], r[128:], strict=True)
    )


def test_jump_from_the_noise_needs_its_cluster():
    """Without it, mix would jump by a map that DE-CM never trains."""
    check_steps(experiment(DECM(), Mix()), (1, 2, 4))
    without = DECM(n2n_every=0)
    for sampler in (Restart(), Euler()):
        check_steps(experiment(without, sampler), (1, 2, 4))
    with pytest.raises(
        ValueError, match=r"@mix\(\) at 2, 4 NFE .* Allowed are 1 NFE.*@restart\(\)"
    ):
        check_steps(experiment(without, Mix()), (1, 2, 4))


def test_sampler_of_one_s_own_is_seen_by_what_it_asks():
    @dataclass(frozen=True, kw_only=True)
    class Odd:
        """One long step, then one short one."""

        heads: ClassVar = ("u",)
        nfe: int = 2

        def __call__(self, net, x1, cond, rng):
            t, r = torch.ones(len(x1)), torch.full((len(x1),), 0.25)
            return x1 - 0.75 * net(x1, t, r, cond)["u"]

    made = experiment(Shortcut(), FlowMap())
    made.sampler, made.sampler_name = Odd(), "odd"
    with pytest.raises(ValueError, match=r"@odd\(\) at 2 NFE .* r = 0\.25\. No NFE is allowed"):
        check_steps(made, (2,))


@pytest.mark.parametrize(
    ("objective", "sampler", "allowed", "refused"),
    [
        (MeanFlow(), FlowMap(), (1, 3, 100), ()),
        (MeanFlow(times=UniformPair(off_diagonal_fraction=0.0)), FlowMap(), (), (1, 2)),
        (MeanFlow(times=UniformPair(off_diagonal_fraction=0.0)), Euler(), (1, 2), ()),
        (DuMo(times=BetaPair(r_law="mix")), FlowMap(), (1, 3), ()),
        (DuMo(times=BetaPair(r_law="zero")), FlowMap(), (1,), (2, 3)),
        (DuMo(times=BetaPair(r_law="zero")), Restart(), (1, 2, 4), ()),
    ],
)
def test_steps_are_those_of_the_time_law(objective, sampler, allowed, refused):
    made = experiment(objective, sampler)
    if allowed:
        check_steps(made, allowed)
    for nfe in refused:
        with pytest.raises(ValueError, match=f"at {nfe} NFE"):
            check_steps(made, (nfe,))


def test_objective_without_a_declaration_takes_every_step():
    made = experiment(FlowMatching(), Euler())
    check_steps(made, (1, 3, 100))


WITH = Shortcut(num_steps=8, guidance_scale=1.5)


@pytest.mark.parametrize(
    ("objective", "sampler", "words"),
    [
        (Shortcut(num_steps=8), FlowMap(), "none"),
        (WITH, FlowMap(), "at 1, 4 NFE: scale 1.5, by training | at 8 NFE: none"),
        (
            WITH,
            GUIDED,
            "at 1, 4 NFE: scale 1.5, by training | "
            "at 8 NFE: scale 1.5 inside (0.0, 1.0), by sampling",
        ),
        (MeanFlow(omega=2.0), FlowMap(), "scale 2 inside (0.0, 1.0), by training"),
        (DECM(guidance_scale=1.75), Restart(), "scale 1.75, by training"),
    ],
)
def test_recorded_guidance_is_that_of_each_nfe(objective, sampler, words):
    assert guidance_in_words(experiment(objective, sampler, (1, 4, 8))) == words


@pytest.mark.parametrize(("sampler", "said"), [(FlowMap(), True), (GUIDED, False)])
def test_unguided_samples_beside_guided_ones_are_warned_of(sampler, said, caplog):
    warn_of_unguided(experiment(WITH, sampler, (1, 4, 8)))
    assert ("samples at 8 NFE are not guided" in caplog.text) == said
    assert ("cfg.scale = 1.5 and cfg.least_nfe = 8" in caplog.text) == said


def test_samples_below_the_least_nfe_are_those_of_the_inner_sampler():
    def net(x, t, r, cond):
        return {"u": x + cond["label"][:, None]}

    x1, cond = torch.randn(4, 2), {"label": torch.arange(4)}
    rng = torch.Generator()
    for nfe, guided in ((4, False), (8, True)):
        sampler = ClassifierFree(nfe=nfe, sampler=FlowMap(), scale=1.5, least_nfe=8)
        plain = FlowMap(nfe=nfe)(net, x1, cond, rng)
        assert torch.equal(sampler(net, x1, cond, rng), plain) == (not guided)
    with pytest.raises(ValueError, match=r"cfg\.least_nfe = 0"):
        ClassifierFree(least_nfe=0)


def test_run_at_an_untrained_step_is_refused_before_training(tmp_path):
    words = (*FILE_ONLY, "run.nfe = (1, 3)")
    done = zoo("run", DIGITS, "--arm", "shortcut", "--out", tmp_path / "out", *sets(*words))
    assert done.status == 2
    assert "@flow_map() at 3 NFE" in done.err
    assert "Allowed are 1, 2, 4, 8, 16, 32, 64, 128 NFE" in done.err
