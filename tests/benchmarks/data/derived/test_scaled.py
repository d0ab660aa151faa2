"""`scaled` is another noise scale: to the bit in training and sampling, and undone for people."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import FILE_ONLY, sets, zoo
from torch import Tensor

from benchmarks.conformance.networks import Toy
from benchmarks.data.derived.scaled import Scaled
from benchmarks.data.digits import Digits
from benchmarks.data.edm_augment import EdmAugment
from benchmarks.data.mixtures import ClosedForm, Mixture
from benchmarks.data.pictures import to_uint8
from benchmarks.evaluation.reference import _of_dataset
from benchmarks.experiments.recorded_data import DATA, record_data, recorded_data
from benchmarks.latents.codes import Codes, KnowsCodes
from benchmarks.metrics import evaluate
from benchmarks.metrics.flow_map_error import map_error
from benchmarks.runs.finished import open_run
from registry.protocols import Batch, Coded, Share, read_share, scaled_by
from zoo.objectives import FlowMatching, MeanFlow
from zoo.oracles import MixtureOracle
from zoo.paths import Linear, TrigFlow
from zoo.samplers import Euler, FlowMap, Restart

HALF = Scaled(dataset=Digits(), factor=0.5)  # a power of two scales without rounding


# The same as a noise scale


@dataclass(frozen=True)
class Louder:
    """A coupling that multiplies the noise: the other way to say the same."""

    scale: float

    def __call__(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self.scale * x1


class Rescaled(torch.nn.Module):
    """The network f net(x / f): the same field in coordinates that are f times as large."""

    def __init__(self, net: Any, factor: float):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Any) -> dict[str, Tensor]:
        out = self.net(x / self.factor, t, r, cond)
        return {key: self.factor * value for key, value in out.items()}


def loss_and_gradient(objective: Any, net: Any, dataset: Any) -> tuple[Tensor, list[Tensor]]:
    x0, _ = read_share(dataset, 3, 16, 0, Share())
    rng = torch.Generator().manual_seed(0)
    loss = objective.loss(net, Batch(x0=x0), rng).per_sample
    weights = [*net.parameters()]
    gradient = torch.autograd.grad(loss.mean(), weights, allow_unused=True, materialize_grads=True)
    return loss.detach(), list(gradient)


@pytest.mark.parametrize("path", [Linear(), TrigFlow()])
def test_training_on_scaled_data_is_training_with_another_noise_scale(path) -> None:
    net = Toy((1, 8, 8), ("v",))
    objective = FlowMatching(path=path, label_dropout=0.0)
    louder = replace(objective, coupling=Louder(2.0))
    loss, gradient = loss_and_gradient(louder, net, HALF.dataset)
    scaled, of_scaled = loss_and_gradient(objective, Rescaled(net, 0.5), HALF)
    assert torch.equal(scaled, loss / 4)  # a squared error, in halves of the units
    assert all(torch.equal(a, b / 4) for a, b in zip(of_scaled, gradient, strict=True))
    assert sum(float(g.abs().sum()) for g in gradient) > 0

    other = Scaled(dataset=Digits(), factor=0.25)
    assert not torch.equal(loss_and_gradient(objective, Rescaled(net, 0.5), other)[0], scaled)
    assert not torch.equal(loss_and_gradient(objective, Rescaled(net, 0.5), Digits())[0], scaled)


@pytest.mark.parametrize("sampler", [Euler(nfe=3), FlowMap(nfe=2), Restart(nfe=3)])
def test_samples_are_those_of_the_other_noise_scale(sampler) -> None:
    """Restart draws noise on its way, which the louder one multiplies, too."""

    def louder(net: Any, x1: Tensor, cond: Any, rng: torch.Generator) -> Tensor:
        path = Linear()

        class Loud(Linear):
            def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> Any:
                return path.sample(x0, 2 * x1, t)

        loud = replace(sampler, path=Loud()) if isinstance(sampler, Restart) else sampler
        return loud(net, 2 * x1, cond, rng)

    net, x1 = Toy((1, 8, 8), ("u", "v")), evaluate.noise((1, 8, 8), 4, 0)
    with torch.no_grad():
        wanted = louder(net, x1, None, torch.Generator().manual_seed(0))
        found = sampler(Rescaled(net, 0.5), x1, None, torch.Generator().manual_seed(0))
    assert not torch.equal(found, wanted)
    assert torch.equal(evaluate.decoded(HALF, found), wanted)
    assert not torch.equal(evaluate.decoded(replace(HALF, factor=0.25), found), wanted)


@dataclass(frozen=True, kw_only=True)
class Moments:
    def __call__(self, samples: Tensor, reference: Tensor) -> Iterator[tuple[str, float]]:
        yield "gap", float((samples.mean() - reference.mean()).abs())
        yield "spread", float(samples.std() / reference.std())


def test_metrics_and_their_reference_are_in_the_original_scale() -> None:
    def samples(dataset: Any, net: Any) -> dict[str, float]:
        return dict(evaluate.evaluate(net, Euler(), (2,), Moments(), dataset, 32, 0))

    def still(x: Tensor, t: Tensor, r: Tensor, cond: Any) -> dict[str, Tensor]:
        return {"v": x}

    found = samples(HALF, still)
    assert found["nfe2/spread"] == pytest.approx(2 * samples(Digits(), still)["nfe2/spread"])
    ours, theirs = (evaluate.reference_of(d, 20, 0) for d in (HALF, Digits()))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1]["label"], theirs[1]["label"])
    assert HALF.identity() == Digits().identity()
    real, of_digits = _of_dataset(HALF, 10), _of_dataset(Digits(), 10)
    assert (real.about, real.num) == (of_digits.about, of_digits.num)
    assert torch.equal(real.images(5, 7), of_digits.images(5, 7))


# The rows


def test_rows_are_the_other_ones_times_the_factor() -> None:
    digits = Digits()
    for ours, theirs in (
        (HALF.batch(2, 6, 1), digits.batch(2, 6, 1)),
        (HALF.batch(2, 6, 1, same_label=3), digits.batch(2, 6, 1, same_label=3)),
        (HALF.reference(6, 1), digits.reference(6, 1)),
        (HALF.batch_share(0, 8, 0, Share(1, 2)), digits.batch_share(0, 8, 0, Share(1, 2))),
    ):
        assert torch.equal(ours[0], 0.5 * theirs[0])
        assert torch.equal(ours[1]["label"], theirs[1]["label"])
    facts = ("name", "shape", "num_classes", "size", "groups_by_label")
    assert [getattr(HALF, f) for f in facts] == [getattr(digits, f) for f in facts]
    assert torch.equal(HALF.sample_labels(7)["label"], digits.sample_labels(7)["label"])
    copy = pickle.loads(pickle.dumps(HALF))
    assert copy == HALF
    assert torch.equal(copy.batch(0, 2, 0)[0], HALF.batch(0, 2, 0)[0])


def test_range_of_pictures_is_that_of_the_original_scale() -> None:
    read_share(Scaled(dataset=Digits(), factor=4.0), 0, 8, 0, Share())

    class Wide(Digits):
        def rows(self, rows: Tensor) -> Tensor:
            return 3 * super().rows(rows)

    with pytest.raises(ValueError, match=r"values from -3 to 3; pictures"):
        read_share(Scaled(dataset=Wide(), factor=0.25), 0, 8, 0, Share())


def test_scales_of_scales_multiply_and_pass_through_augmentation() -> None:
    twice = Scaled(dataset=HALF, factor=0.25)
    assert scaled_by(twice) == 0.125
    assert scaled_by(EdmAugment(data=HALF)) == 0.5
    assert scaled_by(Digits()) == 1
    assert torch.equal(evaluate.reference_of(twice, 5, 0)[0], Digits().reference(10, 0)[0])


@pytest.mark.parametrize("factor", [0, 0.0, -0.5, math.inf, math.nan, True, "0.5", None])
def test_factor_that_is_no_positive_number_is_refused(factor) -> None:
    with pytest.raises(ValueError, match=r"^scaled\.factor = .* must be a positive number"):
        Scaled(dataset=Digits(), factor=factor)


# What the other data set can do beside the contract


@dataclass(frozen=True)
class Identity:
    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def provenance(self) -> dict[str, str]:
        return {"kind": "none"}


class CodedDigits(Digits):
    codes = Codes(scale=(2.0,), shift=(0.1,), vae=Identity(), decode_batch=4)  # type: ignore[arg-type]

    def decode(self, codes: Tensor) -> Tensor:
        return self.codes.decode(codes)


def test_codes_are_decoded_from_their_original_scale() -> None:
    inner = CodedDigits()
    scaled = Scaled(dataset=inner, factor=0.5)
    assert isinstance(scaled, Coded)
    assert isinstance(scaled, KnowsCodes)
    assert not isinstance(HALF, Coded)
    assert not isinstance(HALF, KnowsCodes)
    codes = inner.batch(0, 3, 0)[0]
    assert torch.equal(scaled.decode(0.5 * codes), inner.decode(codes))
    torch.testing.assert_close(scaled.codes.decode(0.5 * codes), inner.decode(codes))
    shown = evaluate.decoded(scaled, 0.5 * codes)
    assert shown.dtype == torch.uint8
    assert torch.equal(shown, evaluate.decoded(inner, codes))


def test_closed_form_is_that_of_the_scaled_law() -> None:
    scaled = Scaled(dataset=Mixture(), factor=0.5)
    assert isinstance(scaled, ClosedForm)
    assert not isinstance(HALF, ClosedForm)
    exact = MixtureOracle(**scaled.components())
    assert max(dict(map_error(exact, scaled, num=20, objective=MeanFlow())).values()) < 1e-5
    unscaled = MixtureOracle(**Mixture().components())
    assert max(dict(map_error(unscaled, scaled, num=20, objective=MeanFlow())).values()) > 0.1


# Finished runs


def test_scale_is_recorded_with_the_run(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError("the data are not needed")

    record_data(HALF, tmp_path)
    found = recorded_data(tmp_path, never)
    x = torch.ones(2, 1, 8, 8)
    assert torch.equal(evaluate.decoded(found, x), 2 * x)
    facts = json.loads((tmp_path / DATA).read_text())
    del facts["scaled_by"]  # as earlier versions wrote it
    (tmp_path / DATA).write_text(json.dumps(facts))
    assert torch.equal(evaluate.decoded(recorded_data(tmp_path, never), x), x)


def test_run_on_scaled_pictures_shows_and_measures_them_unscaled(tmp_path: Path) -> None:
    how = (
        *FILE_ONLY,
        "run.dataset = @scaled()",
        "scaled.dataset = @digits()",
        "scaled.factor = 0.25",
    )
    out = tmp_path / "out"
    done = zoo("run", "experiments/digits.gin", "--arm", "mean_flow", "--out", out, *sets(*how))
    assert done.status == 0, done.err
    folder = out / "mean_flow"
    real = load_file(folder / "real.safetensors")
    kept = load_file(folder / "samples.safetensors")["nfe1"]
    levels = to_uint8(torch.arange(17) / 8 - 1)  # of the digits as they are
    assert {*real["nearest_nfe1"].unique().tolist()} <= {*levels.tolist()}
    assert int(real["nearest_nfe1"].max()) > 200
    # After four steps the network is about zero, and a sample is about its noise: unscaled, 4 x1.
    assert 3 < float(kept.std()) < 5
    experiment, net = open_run(folder)
    x1 = evaluate.noise((1, 8, 8), 12, experiment.seed)
    labels = experiment.dataset.sample_labels(12)
    drawn = evaluate.draw(net, experiment.sampler, x1, labels, experiment.seed)
    assert torch.equal(evaluate.decoded(experiment.dataset, drawn), kept)
