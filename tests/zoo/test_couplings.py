"""Couplings: what is paired with what, and that samples of each label land on its data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.experiments.checks import _warn_of_coupling
from registry.protocols import NULL_LABEL, Batch
from zoo.couplings import Independent, MinibatchOT, coupled_noise
from zoo.objectives.flow_matching import FlowMatching
from zoo.samplers import Euler

F64 = torch.float64
MEANS, STD = torch.tensor([-2.0, 2.0], dtype=F64), 0.4


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def two_classes(n=600):
    """(data, noise, conditions) on a line."""
    label = torch.arange(n) % 2
    x0 = MEANS[label][:, None] + STD * torch.randn(n, 1, generator=rng(1), dtype=F64)
    return x0, torch.randn(n, 1, generator=rng(2), dtype=F64), {"label": label}


def test_rows_are_paired_among_those_of_their_label():
    x0, x1, cond = two_classes(40)
    cond["label"][::5] = NULL_LABEL  # rows without a label are a group of their own
    paired = coupled_noise(MinibatchOT(), x0, x1, cond)
    for label in (NULL_LABEL, 0, 1):
        rows = cond["label"] == label
        assert torch.equal(paired[rows].sort(0).values, x1[rows].sort(0).values)
        # On a line the plan of least squares pairs the smallest with the smallest, and so on.
        assert torch.equal(paired[rows].argsort(0), x0[rows].argsort(0))


def test_every_condition_counts():
    """Noise must not tell how a picture was augmented, since samples are told another value."""
    x0, x1, cond = two_classes(40)
    cond["augment"] = (torch.arange(40) % 4 < 2).float()[:, None].expand(40, 3)
    paired = coupled_noise(MinibatchOT(), x0, x1, cond)
    for i in range(4):
        rows = torch.arange(40) % 4 == i
        assert torch.equal(paired[rows].sort(0).values, x1[rows].sort(0).values)


@pytest.mark.parametrize("cond", [None, {}])
def test_without_conditions_the_whole_batch_is_one_plan(cond):
    x0, x1, _ = two_classes(40)
    paired = coupled_noise(MinibatchOT(), x0, x1, cond)
    assert torch.equal(paired, MinibatchOT()(x0, x1))
    assert torch.equal(paired.argsort(0), x0.argsort(0))


def test_independent_noise_keeps_its_order():
    x0, x1, cond = two_classes(40)
    assert coupled_noise(Independent(), x0, x1, cond) is x1


def oracle(x, t, r, cond):
    """In the limit of many rows, x0 = mean + std x1 within a label, and paths are straight."""
    mean, t = MEANS[cond["label"]][:, None], t[:, None]
    x1 = (x - (1 - t) * mean) / ((1 - t) * STD + t)
    return {"v": (1 - STD) * x1 - mean}


def loss_of_the_oracle():
    x0, _, cond = two_classes()
    objective = FlowMatching(coupling=MinibatchOT(), label_dropout=0.0)
    return float(objective.loss(oracle, Batch(x0=x0, cond=cond), rng()).per_sample.mean())


def across_labels(coupling, x0, x1, cond):
    return coupling(x0, x1)


def test_map_of_each_label_is_the_fixed_point(monkeypatch):
    """The only error is that 300 rows are not a law; a plan across labels has another velocity."""
    assert loss_of_the_oracle() < 0.02
    monkeypatch.setattr("zoo.points.draws.coupled_noise", across_labels)
    assert loss_of_the_oracle() > 0.3


@pytest.mark.parametrize(("couple", "right"), [(coupled_noise, True), (across_labels, False)])
def test_samples_of_a_label_land_on_its_data(couple, right):
    """The velocity is the least-squares fit, line by line in t, to the coupled pairs of a label."""
    x0, x1, cond = two_classes()
    x1, label = couple(MinibatchOT(), x0, x1, cond), cond["label"]
    noise = torch.randn(2000, 1, generator=rng(3), dtype=F64)

    def fitted(x, t, r, cond):
        v = torch.empty_like(x)
        for one in (0, 1):
            ours, theirs = label == one, cond["label"] == one
            x_t = (1 - t[0]) * x0[ours] + t[0] * x1[ours]
            line = torch.linalg.lstsq(columns(x_t), x1[ours] - x0[ours]).solution
            v[theirs] = columns(x[theirs]) @ line
        return {"v": v}

    def columns(x):
        return torch.cat([torch.ones_like(x), x], dim=1)

    wanted = torch.arange(2000) % 2
    samples = Euler(nfe=20)(fitted, noise, {"label": wanted}, rng())
    off = [abs(float(samples[wanted == one].std() / STD - 1)) for one in (0, 1)]
    off += [abs(float(samples[wanted == one].mean() - MEANS[one]) / STD) for one in (0, 1)]
    assert (max(off) < 0.3) == right  # means of 300 rows are off by up to 0.2
    assert right or max(off) > 0.6


@pytest.mark.parametrize(
    ("coupling", "num_classes", "said"),
    [(MinibatchOT(), 1000, True), (MinibatchOT(), 10, False), (Independent(), 1000, False)],
)
def test_batch_with_few_rows_a_label_is_warned_of(coupling, num_classes, said, caplog):
    experiment = SimpleNamespace(
        objective=FlowMatching(coupling=coupling),
        objective_name="flow_matching",
        dataset=SimpleNamespace(num_classes=num_classes),
        batch_size=256,
    )
    _warn_of_coupling(experiment)
    assert ("flow_matching.coupling = @minibatch_ot()" in caplog.text) == said
    assert ("0.26 rows a label of 1000" in caplog.text) == said
