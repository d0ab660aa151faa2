"""Which sampler is valid for which objective: by what the one needs and the other trains."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.conformance.networks import Tapped, Toy
from benchmarks.experiments import defaults
from registry import objectives, samplers
from registry.sampling import (
    EVEN_STEPS,
    FROM_NOISE,
    LAW,
    MAP,
    TO_DATA,
    VELOCITY,
    WORDS,
    map_is_exact_at,
    needed_by,
)
from zoo.objectives.decm import DECM
from zoo.objectives.dumo import DuMo
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.shortcut import Shortcut
from zoo.paths import Linear, TrigFlow
from zoo.samplers import (
    ClassifierFree,
    Euler,
    FlowMap,
    Mix,
    Restart,
    check_sampler,
    default_sampler,
    euler_step,
    on_path_of,
    valid_samplers,
)
from zoo.times import UniformPair

DIRECT = [name for name in samplers.names() if needed_by(samplers.get(name))]
INSIDE = {  # whether a call (t, r) of a sampler with this many calls is one that the word allows
    VELOCITY: lambda t, r, n: r == t,
    MAP: lambda t, r, n: r < t,
    TO_DATA: lambda t, r, n: r == 0 < t,
    FROM_NOISE: lambda t, r, n: t == 1 and r < 1,
    EVEN_STEPS: lambda t, r, n: abs(t - r - 1 / n) < 1e-6 and abs(t * n - round(t * n)) < 1e-5,
    LAW: lambda t, r, n: (t, r) == (1, 0),
}


@dataclass(frozen=True, kw_only=True)
class Squared:
    """Euler steps that grow towards the noise."""

    needs: ClassVar[tuple[str, ...]] = ("velocity",)

    nfe: int = 2

    def __call__(self, net: Any, x1: Any, cond: Any, rng: Any) -> Any:
        x, times = x1, [(1 - i / self.nfe) ** 2 for i in range(self.nfe + 1)]
        for t, r in pairwise(times):
            x = euler_step(net, x, t, r, cond)
        return x


class Loss:
    """An objective of somebody's own."""

    heads: ClassVar[tuple[str, ...]] = ("u",)

    def loss(self, net: Any, batch: Any, rng: Any) -> Any:
        raise NotImplementedError


def objective(**members: Any) -> Any:
    return type("Own", (Loss,), members)()


def sampler(**members: Any) -> type:
    return dataclass(frozen=True, kw_only=True)(
        type("Ours", (Squared,), {"__annotations__": {"nfe": int}, "nfe": 1, **members})
    )


@pytest.mark.parametrize(
    ("name", "nfe"), [(n, k) for n in DIRECT for k in (1, 2, 3, 4, 6) if n != "one_step" or k == 1]
)
def test_shipped_sampler_calls_where_it_says_that_it_needs_to(name, nfe):
    net = Tapped(Toy((2,), ("u", "v")), 16)
    x1 = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        samplers.get(name)(nfe=nfe)(net, x1, None, torch.Generator().manual_seed(1))
    assert len(net.calls) == nfe
    for call in net.calls:
        t, r = float(call.t[0]), float(call.r[0])
        assert any(INSIDE[need](t, r, nfe) for need in needed_by(samplers.get(name))), (t, r)


def test_call_that_is_not_declared_would_be_noticed():
    assert not INSIDE[EVEN_STEPS](0.7, 0.2, 2)
    assert not INSIDE[TO_DATA](1.0, 0.5, 2)


def test_samplers_of_the_shipped_objectives_and_their_order():
    everywhere = ("flow_map", "mix", "one_step", "restart", "euler", "heun")
    assert valid_samplers(FlowMatching()) == ("euler", "heun")
    assert valid_samplers(MeanFlow()) == valid_samplers(DuMo()) == everywhere
    assert valid_samplers(Shortcut()) == ("flow_map", "one_step")
    assert valid_samplers(DECM()) == ("restart", "one_step", "mix", "euler", "heun")


@pytest.mark.parametrize("without", [{"n2n_every": 0}, {"n2n_weight": 0.0}])
def test_decm_without_its_map_from_noise_cannot_be_sampled_by_mix(without):
    assert valid_samplers(DECM(**without)) == ("restart", "one_step", "euler", "heun")
    with pytest.raises(ValueError, match="needs the map from the noise to every r, and"):
        check_sampler("decm", DECM(**without), Mix())


WITHOUT_VELOCITY = {"shortcut", "consistency", "trig_consistency", "moment_matching", "drifting"}


@pytest.mark.parametrize("name", objectives.names())
def test_sampler_of_ones_own_meets_every_objective_that_trains_what_it_needs(name):
    made = objectives.get(name)()
    with samplers.temporary("a_squared", Squared):
        fits = name not in WITHOUT_VELOCITY
        assert ("a_squared" in valid_samplers(made)) == fits
        assert type(defaults.sampler(made)) is not Squared  # though it is the first by its name
        if fits:
            check_sampler(name, made, Squared())
            check_sampler(name, made, ClassifierFree(sampler=Squared()))
        else:
            with pytest.raises(ValueError, match="'a_squared': it needs the velocity at every t"):
                check_sampler(name, made, ClassifierFree(sampler=Squared()))


def test_sampler_of_ones_own_is_needed_for_an_output_that_no_shipped_one_reads():
    own = objective(heads=("energy",))
    assert valid_samplers(own) == ()
    with pytest.raises(ValueError, match=r"fit: none\. Register a sampler that fits"):
        check_sampler("own", own, FlowMap())
    with pytest.raises(ValueError, match="no registered sampler reads the outputs of"):
        default_sampler("own", own)


def test_map_from_the_noise_has_one_step_to_the_data():
    own = objective(trains=("map_from_noise",))
    with samplers.temporary("a_jump", sampler(needs=("map_from_noise",))):
        assert valid_samplers(own) == ("one_step", "a_jump")


def test_law_is_sampled_in_one_step_alone():
    own = objective(trains=("law",))
    assert valid_samplers(own) == ("one_step",)
    for longer in (FlowMap(), Restart(), Euler(), Mix()):
        with pytest.raises(ValueError, match=r"trains one step .*run\.sampler = @one_step\(\)"):
            check_sampler("own", own, longer)
    everywhere = objective(trains=("map", "law"))  # IMM: laws, at every t and r
    assert valid_samplers(everywhere)[0] == "flow_map"
    assert valid_samplers(objective(trains=("velocity",))) == ("euler", "heun")


def test_name_of_a_sampler_never_decides_the_default():
    """Two that fit and no word that names one: whoever comes first by the alphabet is not taken."""
    own, needs = objective(heads=("energy",)), ("energy",)
    with samplers.temporary("a_descent", sampler(needs=needs)):
        assert default_sampler("own", own) == "a_descent"
        with (
            samplers.temporary("b_descent", sampler(needs=needs)),
            pytest.raises(ValueError, match="several samplers fit objective 'own', a_descent, b_d"),
        ):
            default_sampler("own", own)
    with samplers.temporary("a_squared", Squared):
        assert default_sampler("own", objective(trains=("map", "velocity"))) == "flow_map"


@pytest.mark.parametrize(
    ("trains", "default"),
    [
        (("map", "velocity"), "flow_map"),
        (("velocity", "map"), "euler"),
        (("map_to_data",), "restart"),
        (("even_steps",), "flow_map"),
        (("map_from_noise", "map_to_data"), "restart"),
        (("map_from_noise",), "one_step"),
        (("law",), "one_step"),
        (("law", "velocity"), "one_step"),
        (("map", "law"), "flow_map"),
    ],
)
def test_what_is_trained_first_gives_the_default(trains, default):
    assert valid_samplers(objective(trains=trains))[0] == default


def test_objective_that_declares_nothing_trains_its_outputs_everywhere():
    assert valid_samplers(objective(heads=("v",))) == ("euler", "heun")
    assert valid_samplers(objective(heads=("u",))) == valid_samplers(MeanFlow())
    with objectives.temporary("mine", type(objective(heads=("u", "v")))):
        assert isinstance(defaults.sampler(objectives.get("mine")()), FlowMap)


def test_output_of_another_name_is_met_by_its_name():
    with samplers.temporary("energy_descent", sampler(needs=("energy",))):
        own = objective(heads=("energy",))
        assert valid_samplers(own) == ("energy_descent",)
        with pytest.raises(ValueError, match="needs the velocity at every t, and .* 'energy'"):
            check_sampler("own", own, Euler())
        with pytest.raises(ValueError, match="needs the output 'energy', and"):
            check_sampler("mean_flow", MeanFlow(), samplers.get("energy_descent")())


def test_sampler_that_reads_the_output_v_does_not_meet_u_alone():
    with samplers.temporary("reads_v", sampler(needs=("velocity", "v"))):
        assert "reads_v" in valid_samplers(DuMo())
        assert "reads_v" not in valid_samplers(MeanFlow())


def test_error_names_both_what_is_missing_and_what_fits():
    with pytest.raises(ValueError) as error:
        check_sampler("shortcut", Shortcut(), Euler())
    assert str(error.value) == (
        "objective 'shortcut' cannot use sampler 'euler': it needs the velocity at every t, and "
        "the objective trains the map on even grids. Registered samplers that fit: flow_map, "
        "one_step. Bind run.sampler = @flow_map()"
    )


# Earlier versions


def test_objective_that_lists_its_samplers_has_these_and_is_told_once(caplog):
    caplog.set_level(logging.WARNING)
    own = objective(samplers=("restart", "heun"))
    for _ in range(3):
        assert valid_samplers(own) == ("restart", "heun")
        check_sampler("own", own, Restart())
    [said] = [r.getMessage() for r in caplog.records]
    assert "trains = ('map_to_data', 'velocity')" in said
    with pytest.raises(ValueError, match="declare trains = .*even_steps.* instead of `samplers`"):
        check_sampler("own", own, FlowMap())


def test_list_of_a_subclass_takes_the_place_of_what_its_base_declares():
    listing = type("Listing", (MeanFlow,), {"samplers": ("euler",)})
    assert valid_samplers(listing()) == ("euler",)
    declaring = type("Declaring", (listing,), {"trains": ("map_to_data",)})
    assert valid_samplers(declaring()) == ("restart", "one_step")
    assert valid_samplers(objective(samplers=None)) == valid_samplers(MeanFlow())


@pytest.mark.parametrize(
    ("heads", "needs"),
    [(("u",), ("map",)), (("v", "u"), ("velocity",)), (("v",), ("velocity", "v"))],
)
def test_heads_of_a_sampler_are_read_as_what_it_needs(heads, needs, caplog):
    caplog.set_level(logging.WARNING)
    cls = sampler(heads=heads)
    with samplers.temporary("earlier", cls):
        assert needed_by(cls) == needed_by(cls()) == needs
        assert "earlier" in valid_samplers(DuMo())
        assert ("earlier" in valid_samplers(FlowMatching())) == ("v" in heads)
        assert ("earlier" in valid_samplers(MeanFlow())) == ("u" in heads)
    [said] = [r.getMessage() for r in caplog.records]
    assert "'earlier' declares heads, which goes on working in this release alone" in said


# What cannot be meant


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"needs": "velocity"}, r"declares needs = 'velocity'; it needs a tuple"),
        ({"needs": ()}, r"declares needs = \(\)"),
        ({"needs": ("velocty",)}, r"'velocty', which is no word for it\. Did you mean 'velocity'"),
    ],
)
def test_sampler_whose_needs_cannot_be_read_is_refused(members, complaint):
    with pytest.raises(ValueError, match=complaint):
        samplers.register("unread")(sampler(**members))
    assert "unread" not in samplers


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"trains": "map"}, r"declares trains = 'map'; it needs a tuple"),
        ({"trains": ("map_to_dat",)}, r"'map_to_dat', .* Did you mean 'map_to_data'\? There are "),
        ({"trains": ("map",), "heads": ("v",)}, "every t to every r is read from u"),
        ({"trains": ("velocity",), "heads": ("energy",)}, "is read from u or v"),
    ],
)
def test_objective_that_trains_what_it_cannot_is_refused(members, complaint):
    with pytest.raises(ValueError, match=complaint):
        objectives.register("unread")(type(objective(**members)))
    assert "unread" not in objectives


def test_declaration_by_fields_is_checked_when_it_is_used():
    own = objective(trains=property(lambda self: ("velocty",)))
    objectives._check("own", type(own))
    with pytest.raises(ValueError, match="Did you mean 'velocity'"):
        check_sampler("own", own, Euler())


@pytest.mark.parametrize("word", WORDS)
def test_error_says_every_need_in_words(word):
    needy = sampler(needs=(word,))
    with samplers.temporary("needy", needy):
        with pytest.raises(ValueError, match="needs (the|one) .* trains the output 'e'"):
            check_sampler("own", objective(heads=("e",)), needy())


# Paths


def test_objective_without_a_path_takes_every_path():
    check_sampler("pathless", objective(), Restart(path=TrigFlow()))


def test_sampler_on_another_path_is_refused():
    made = MeanFlow(path=TrigFlow())
    check_sampler("mean_flow", made, FlowMap())
    check_sampler("mean_flow", made, Restart())
    check_sampler("mean_flow", made, Restart(path=TrigFlow()))
    with pytest.raises(ValueError, match=r"restart.path unbound, or bind .* = @trigflow\(\)"):
        check_sampler("mean_flow", made, Restart(path=Linear()))


def test_sampler_follows_the_path_of_the_objective_where_it_names_none():
    made = MeanFlow(path=TrigFlow())
    assert on_path_of(made, Restart(nfe=3)) == Restart(nfe=3, path=TrigFlow())
    assert on_path_of(made, Restart(path=Linear())).path == Linear()
    guided = on_path_of(made, ClassifierFree(sampler=Restart(t_min=0.2), scale=2.0))
    assert guided == ClassifierFree(sampler=Restart(t_min=0.2, path=TrigFlow()), scale=2.0)
    for same in (FlowMap(), ClassifierFree(sampler=Euler())):
        assert on_path_of(made, same) is same
    assert on_path_of(objective(), Restart()) == Restart()


# Where there is an error against the exact map


TRIANGLE = ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0), (0.75, 0.25))


@pytest.mark.parametrize(
    ("made", "exact"),
    [
        (MeanFlow(), TRIANGLE),
        (MeanFlow(times=UniformPair(off_diagonal_fraction=0.0)), ()),
        (FlowMatching(), ()),
        (Shortcut(), TRIANGLE[:3]),
        (Shortcut(num_steps=2), TRIANGLE[:3]),
        (DECM(), TRIANGLE[:3]),
        (DECM(n2n_every=0), ((1.0, 0.0), (0.5, 0.0))),
        (objective(trains=("map_to_data",)), ((1.0, 0.0), (0.5, 0.0))),
        (objective(trains=("map_from_noise",)), ((1.0, 0.0), (1.0, 0.5))),
        (objective(trains=("even_steps", "velocity")), TRIANGLE[:3]),
        (objective(trains=("law",)), ()),
        (objective(trains=("map", "law")), ()),
        (objective(trains=("map",), fixed_point="distribution"), ()),
        (objective(trains=("map",), fixed_point="none"), TRIANGLE),
    ],
)
def test_map_has_an_error_where_it_is_trained(made, exact):
    assert tuple(step for step in TRIANGLE if map_is_exact_at(made, *step)) == exact
    assert not map_is_exact_at(made, 0.5, 0.5)
