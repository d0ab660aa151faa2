"""The error against the exact flow: nothing at the oracle, the planted amount beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.data.mixtures import Gaussian, Mixture
from benchmarks.metrics.flow_map_error import map_error
from zoo.objectives import DECM, DuMo, FlowMatching, MeanFlow, Shortcut
from zoo.oracles import MixtureOracle, OnPath
from zoo.paths import Linear, TrigFlow


@pytest.mark.parametrize("dataset", [Gaussian(), Mixture()])
def test_map_error_is_nothing_at_the_exact_network(dataset) -> None:
    found = dict(map_error(MixtureOracle(**dataset.components()), dataset, num=50))
    assert list(found) == ["map_error_1_0", "map_error_1_0.5", "map_error_0.5_0", "velocity_error"]
    assert max(found.values()) < 1e-5  # float32 results of float64 arithmetic


def test_errors_are_the_planted_ones_in_units_of_data_and_velocity() -> None:
    dataset = Mixture()
    exact = MixtureOracle(**dataset.components())

    def off(x, t, r, cond):
        out = exact(x, t, r, cond)
        return {"u": out["u"] + 0.1, "v": 1.1 * out["v"]}

    found = dict(map_error(off, dataset, num=50))
    scale = float(exact.marginal_variance(torch.zeros(1)).mean().sqrt())
    assert found["map_error_1_0"] == pytest.approx(0.1 / scale, rel=1e-4)
    assert found["map_error_0.5_0"] == pytest.approx(0.05 / scale, rel=1e-4)
    assert found["velocity_error"] == pytest.approx(0.1, rel=1e-4)


def test_a_velocity_network_has_no_map_and_a_map_has_its_velocity() -> None:
    dataset = Gaussian()
    exact = MixtureOracle(**dataset.components())
    only_v = dict(map_error(lambda *a: {"v": exact(*a)["v"]}, dataset, num=20))
    assert list(only_v) == ["velocity_error"]
    only_u = dict(map_error(lambda *a: {"u": exact(*a)["u"]}, dataset, num=20))
    assert len(only_u) == 4
    assert only_u["velocity_error"] < 1e-5


def test_data_without_a_closed_form_are_refused() -> None:
    class Drawn:
        name = "drawn"

    with pytest.raises(ValueError, match="'drawn' has no closed form"):
        list(map_error(lambda *a: {}, Drawn()))


# What the objective trains decides which errors there are


def own(trains: tuple[str, ...], path: object = None) -> Any:
    return type("Own", (), {"heads": ("u", "v"), "trains": trains, "path": path})()


ALL = ["map_error_1_0", "map_error_1_0.5", "map_error_0.5_0", "velocity_error"]


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        (MeanFlow(), ALL),
        (DuMo(), ALL),
        (FlowMatching(), ALL[3:]),
        (Shortcut(), ALL[:3]),
        (DECM(), ALL),
        (DECM(n2n_every=0), [ALL[0], *ALL[2:]]),
        (own(("map_to_data",)), [ALL[0], ALL[2]]),
        (own(("map_to_data", "velocity")), [ALL[0], *ALL[2:]]),
        (own(("velocity",)), ALL[3:]),
        (own(("law",)), []),
        (own(("map", "law")), []),
        (own(("law", "velocity")), ALL[3:]),
    ],
)
def test_errors_are_those_of_what_is_trained(objective, names) -> None:
    """The network has both outputs, and answers wherever it is asked."""
    dataset = Gaussian()
    exact = MixtureOracle(**dataset.components())
    assert list(dict(map_error(exact, dataset, num=10, objective=objective))) == names


def test_network_is_asked_for_nothing_that_is_not_trained() -> None:
    exact, asked = MixtureOracle(**Gaussian().components()), []

    def net(x, t, r, cond):
        asked.append((float(t[0]), float(r[0])))
        return exact(x, t, r)

    list(map_error(net, Gaussian(), num=10, objective=own(("map_to_data",))))
    assert asked == [(1.0, 0.0), (0.5, 0.0)]


@pytest.mark.parametrize("dataset", [Gaussian(), Mixture()])
def test_errors_are_those_on_the_path_of_the_objective(dataset) -> None:
    linear = MixtureOracle(**dataset.components())
    circle = OnPath(linear, TrigFlow())
    for net, path in ((linear, Linear()), (circle, TrigFlow())):
        found = dict(map_error(net, dataset, num=50, objective=MeanFlow(path=path)))
        assert list(found) == ALL
        assert max(found.values()) < 1e-5
    for net, path in ((linear, TrigFlow()), (circle, Linear())):
        found = dict(map_error(net, dataset, num=50, objective=MeanFlow(path=path)))
        # From the noise to the data, the map is the same on every path.
        assert found.pop("map_error_1_0") < 1e-5
        assert min(found.values()) > 0.05


def test_path_that_states_wrong_derivatives_is_measured_by_its_own() -> None:
    class WrongSlope(TrigFlow):
        def d_alpha(self, t):
            return 0.9 * super().d_alpha(t)

    circle = OnPath(MixtureOracle(**Gaussian().components()), TrigFlow())
    found = dict(map_error(circle, Gaussian(), num=50, objective=MeanFlow(path=WrongSlope())))
    assert max(found.values()) < 1e-5
