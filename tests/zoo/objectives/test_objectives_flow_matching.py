"""Flow matching: its loss computed a second time, its floor, couplings and laws."""

from __future__ import annotations

import math

import pytest
import torch
from objective_cases import noise_of, watch
from scipy import stats

from benchmarks.conformance.subject import GAUSSIAN, law_batch
from registry.protocols import NULL_LABEL
from zoo.couplings import MinibatchOT
from zoo.objectives.flow_matching import FlowMatching
from zoo.ops import like
from zoo.oracles import GaussianOracle, Perturbed
from zoo.paths import Linear, TrigFlow
from zoo.times import LogitNormal, Stratified
from zoo.weighting import LearnedLogvar, PseudoHuber


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_loss_is_the_mean_squared_error_to_the_conditional_velocity(shape):
    seen = watch(FlowMatching(), shape=shape)
    call, x0 = seen.trained(), seen.batch.x0
    assert len(seen.calls) == 1
    assert torch.equal(call.t, call.r)
    v = seen.net(call.x, call.t, call.r, {"label": call.labels})["v"]
    error = ((v - (noise_of(call.x, call.t, x0) - x0)) ** 2).flatten(1).mean(1)
    seen.agrees(error)
    torch.testing.assert_close(seen.out.terms["v"], error.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.out.t, call.t)
    assert torch.equal(seen.out.r, call.r)


def test_loss_on_another_path_has_its_velocity():
    seen = watch(FlowMatching(path=TrigFlow(), times=LogitNormal(std=0.5)))
    call, x0, quarter = seen.trained(), seen.batch.x0, math.pi / 2
    angle = like(call.t.double() * quarter, x0)
    x1 = (call.x - angle.cos() * x0) / angle.sin()
    velocity = quarter * (angle.cos() * x1 - angle.sin() * x0)
    v = seen.net(call.x, call.t, call.r, {"label": call.labels})["v"]
    seen.agrees(((v - velocity) ** 2).mean(1))


def test_noise_is_standard_normal_and_independent_of_the_data():
    seen = watch(FlowMatching(), n=4000, labels="none")
    x1 = noise_of(seen.trained().x, seen.trained().t, seen.batch.x0)
    assert stats.kstest(x1.flatten(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(torch.cat([x1, seen.batch.x0], 1).T)[:2, 2:]
    assert correlation.abs().max() < 4 / 4000**0.5


def test_floor_is_s_pi_over_two_for_uniform_times():
    """The integral of s^2 / S_t^2; 1.5708 for unit variance, whose sample mean is known to 1 %."""
    for s in (0.5, 1.0, 2.0):
        law = GaussianOracle([0.3], [s])
        out = FlowMatching(times=Stratified()).loss(
            law, law_batch(law, 40_000, 0), torch.Generator().manual_seed(0)
        )
        excess = out.per_sample - s * math.pi / 2
        assert float(excess.mean().abs()) < 4 * float(excess.std()) / 200


def test_loss_exceeds_its_floor_by_the_squared_error():
    batch = law_batch(GAUSSIAN, 20_000, 0)
    exact, off = (
        FlowMatching().loss(net, batch, torch.Generator().manual_seed(0)).per_sample
        for net in (GAUSSIAN, Perturbed(GAUSSIAN, 0.5, "v"))
    )
    excess = off - exact
    assert abs(float(excess.mean()) - 0.25) < 4 * float(excess.std()) / 20_000**0.5


def test_optimal_transport_pairs_whole_rows_and_lowers_the_cost():
    def pairs(coupling):
        seen = watch(FlowMatching(coupling=coupling), n=32, seed=3)
        x1 = noise_of(seen.trained().x, seen.trained().t, seen.batch.x0)
        return x1, ((x1 - seen.batch.x0) ** 2).sum()

    plain, cost = pairs(FlowMatching().coupling)
    paired, lower = pairs(MinibatchOT())
    assert lower < 0.9 * cost
    nearest = torch.cdist(plain, paired).argmin(1)
    assert sorted(nearest.tolist()) == list(range(32))
    torch.testing.assert_close(paired[nearest], plain)


def test_labels_are_dropped_at_the_stated_rate():
    for rate in (0.0, 0.1, 1.0):
        seen = watch(FlowMatching(label_dropout=rate), n=4000)
        labels = seen.trained().labels
        dropped = (labels == NULL_LABEL).double().mean()
        assert abs(dropped - rate) <= 4 * (rate * (1 - rate) / 4000) ** 0.5
        kept = labels != NULL_LABEL
        assert torch.equal(labels[kept], seen.batch.cond["label"][kept])


@pytest.mark.parametrize("weight", [PseudoHuber(c=0.5), LearnedLogvar()], ids=["huber", "logvar"])
def test_weight_is_applied_and_reads_the_networks_outputs(weight):
    seen = watch(FlowMatching(weight=weight))
    call = seen.trained()
    out = seen.net(call.x, call.t, call.r, {"label": call.labels})
    v_c = noise_of(call.x, call.t, seen.batch.x0) - seen.batch.x0
    error = ((out["v"] - v_c) ** 2).mean(1)
    if isinstance(weight, PseudoHuber):
        seen.agrees((error + 0.25).sqrt() - 0.5)
    else:
        seen.agrees(torch.exp(-out["logvar"]) * error + out["logvar"])


def test_times_come_from_the_law():
    seen = watch(FlowMatching(times=LogitNormal(mean=1.0, std=0.5)), n=4000)
    logits = torch.logit(seen.out.t.double())
    assert stats.kstest(logits, "norm", (1.0, 0.5)).pvalue > 1e-3


def test_default_parts_are_the_papers():
    objective = FlowMatching()
    assert objective.path == Linear()
    assert objective.label_dropout == 0.1
