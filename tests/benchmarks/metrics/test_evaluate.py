"""Evaluation: same noise everywhere, samplers checked first, modes restored, names as promised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.metrics.distances import Frechet
from benchmarks.metrics.evaluate import (
    BLOCK,
    draw,
    evaluate,
    evaluation_mode,
    noise,
    provenance,
    samplers_for,
)
from benchmarks.metrics.feature_metrics import FeatureMetrics
from benchmarks.metrics.features import Pixels


@dataclass(frozen=True, kw_only=True)
class EvenOnly:
    """x1 through the network, plus fresh noise if asked; nfe must be even."""

    heads = ("u",)

    nfe: int = 2
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.nfe % 2:
            raise ValueError(f"nfe {self.nfe} is odd")

    def __call__(self, net, x1: Tensor, cond, rng: torch.Generator) -> Tensor:
        zeros = torch.zeros(len(x1))
        return net(x1, zeros, zeros, cond)["u"] / self.nfe + self.spread * torch.randn(
            x1.shape, generator=rng
        )


@dataclass(frozen=True)
class Toy:
    """Numbers 0 .. size - 1 in the plane, with labels."""

    name: str = "toy"
    shape: tuple[int, ...] = (2,)
    num_classes: int = 3
    size: int = 20

    def identity(self) -> str:
        return "toy 20"

    def batch(self, step: int, n: int, seed: int):
        raise NotImplementedError

    def reference(self, n: int, seed: int):
        rows = torch.arange(min(n, self.size))
        return torch.stack([rows, rows**2], 1).float(), {"label": rows % 3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.seen: list[tuple[int, list[int] | None, bool]] = []

    def forward(self, x, t, r, cond):
        labels = None if cond is None else cond["label"].tolist()
        self.seen.append((len(x), labels, torch.is_grad_enabled()))
        return {"u": self.inner(x)}


def identity(x, t, r, cond):
    return {"u": x}


def mean_of(samples: Tensor, reference: Tensor) -> Iterator[tuple[str, float]]:
    yield "mean", float(samples.mean())
    yield "reference_rows", len(reference)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 3 * BLOCK), more=st.integers(0, BLOCK), seed=st.integers(0, 2**40))
def test_noise_of_a_row_depends_on_seed_and_row_alone(n: int, more: int, seed: int) -> None:
    assert torch.equal(noise((2,), n, seed), noise((2,), n + more, seed)[:n])


def test_noise_is_standard_normal_and_unrelated_between_rows_and_seeds() -> None:
    n = 20 * BLOCK
    x, y = noise((1,), n, 0).flatten(), noise((1,), n, 1).flatten()
    error = 1 / math.sqrt(n)
    assert abs(x.mean()) < 4 * error
    assert abs(x.var() - 1) < 4 * math.sqrt(2) * error
    assert abs((x * y).mean()) < 4 * error
    assert abs((x[BLOCK:] * x[:-BLOCK]).mean()) < 4 * error  # blocks do not repeat
    assert x.unique().numel() == n


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_samples_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    net, x1 = Net(), noise((2,), 10, 0)
    whole = draw(net, EvenOnly(), x1, batch_size=10)
    torch.testing.assert_close(draw(net, EvenOnly(), x1, batch_size=batch_size), whole)


@settings(max_examples=20)
@given(batch_size=st.integers(1, 600), processes=st.integers(1, 4), seed=st.integers(0, 9))
def test_what_a_sampler_draws_depends_on_seed_and_row_alone(batch_size, processes, seed) -> None:
    n, random = 2 * BLOCK + 5, EvenOnly(spread=1.0)
    x1 = noise((1,), n, seed)
    whole = draw(identity, random, x1, seed=seed)
    shared = torch.zeros_like(whole)
    for process in range(processes):
        for first in range(process * BLOCK, n, processes * BLOCK):
            rows = noise((1,), min(BLOCK, n - first), seed, first)
            shared[first : first + BLOCK] = draw(
                identity, random, rows, seed=seed, batch_size=batch_size, first=first
            )
    assert torch.equal(shared, whole)


def test_what_a_sampler_draws_differs_by_block_and_seed_and_from_the_noise_itself() -> None:
    x1, random = torch.zeros(2 * BLOCK, 2), EvenOnly(spread=1.0)
    first, second = draw(identity, random, x1, seed=1).split(BLOCK)
    assert not torch.equal(first, second)
    assert not torch.equal(first, draw(identity, random, x1[:BLOCK], seed=2))
    assert not torch.equal(first, noise((2,), BLOCK, 1))


@dataclass(frozen=True)
class Halves(Toy):
    """Toy whose rows are codes: a picture's grey value is the first number over ten."""

    def decode(self, codes: Tensor) -> Tensor:
        return codes[:, :1, None, None].expand(-1, 3, 2, 2) / 10


def test_metrics_see_what_codes_decode_to() -> None:
    rows = {}

    def metric(samples: Tensor, reference: Tensor) -> Iterator[tuple[str, float]]:
        rows["samples"], rows["reference"] = samples, reference
        yield "n", len(samples)

    list(evaluate(identity, EvenOnly(), [2], metric, Halves(), 3, 0))
    assert rows["reference"].dtype == torch.uint8
    assert rows["reference"][:, 0, 0, 0].tolist() == [128, 140, 153, 166, 178, 191]
    codes = noise((2,), 3, 0)[:, 0] / 2
    expected = (127.5 * (codes / 10 + 1)).round().to(torch.uint8)
    assert torch.equal(rows["samples"], expected[:, None, None, None].expand(-1, 3, 2, 2))


def test_drawing_is_in_evaluation_mode_without_gradient_and_restores_modes() -> None:
    net = Net()
    net.inner[0].eval()  # a frozen part stays frozen
    samples = draw(net, EvenOnly(), noise((2,), 6, 0), batch_size=4)
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert [n for n, _, _ in net.seen] == [4, 2]
    assert not any(grad for _, _, grad in net.seen)
    assert not samples.requires_grad
    assert not (samples == 0).any()  # dropout would zero half of them


def test_modes_are_restored_after_an_error() -> None:
    net = Net()
    with pytest.raises(ZeroDivisionError), evaluation_mode(net):
        1 / net.inner[1].training  # False while it lasts
    assert all(module.training for module in net.modules())


def test_samples_that_are_not_finite_are_named() -> None:
    x1 = noise((2,), 6, 0)
    x1[4, 1] = math.inf
    with pytest.raises(FloatingPointError, match=r"EvenOnly at nfe 2 gave 1 of 6.*row 4"):
        draw(identity, EvenOnly(), x1)


def test_impossible_nfes_are_refused_all_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)nfe 1: nfe 1 is odd.*nfe 3"):
        samplers_for(EvenOnly(), [1, 2, 3])
    assert {nfe: run.nfe for nfe, run in samplers_for(EvenOnly(), [2, 4]).items()} == {2: 2, 4: 4}


def test_replacing_nfe_keeps_the_samplers_other_fields() -> None:
    assert samplers_for(EvenOnly(spread=3.0), [4])[4] == EvenOnly(nfe=4, spread=3.0)


@pytest.mark.parametrize("nfe_list", [[], [2, 2]])
def test_nfe_lists_that_say_nothing_are_refused(nfe_list: list[int]) -> None:
    with pytest.raises(ValueError, match="give each NFE once"):
        samplers_for(EvenOnly(), nfe_list)


def test_nfes_are_checked_before_anything_is_sampled() -> None:
    net = Net()
    with pytest.raises(ValueError, match="odd"):
        list(evaluate(net, EvenOnly(), [2, 3], mean_of, Toy(), 4, 0))
    assert net.seen == []


def test_values_are_named_by_nfe_and_start_from_the_same_noise() -> None:
    found = dict(evaluate(identity, EvenOnly(), [2, 4], mean_of, Toy(), 5, 0))
    assert list(found) == ["nfe2/mean", "nfe2/reference_rows", "nfe4/mean", "nfe4/reference_rows"]
    assert found["nfe2/mean"] == pytest.approx(float(noise((2,), 5, 0).mean()) / 2)
    assert found["nfe2/mean"] == pytest.approx(2 * found["nfe4/mean"])
    assert found["nfe2/reference_rows"] == 10  # enough for a floor at the same number


def test_labels_are_the_references_row_by_row() -> None:
    net = Net()
    list(evaluate(net, EvenOnly(), [2], mean_of, Toy(), 25, 0, batch_size=10))
    assert [len(labels) for _, labels, _ in net.seen] == [10, 10, 5]
    labels = [label for _, part, _ in net.seen for label in part]
    assert labels == [i % 20 % 3 for i in range(25)]  # 20 rows of data, then from the start


def test_floors_follow_the_values_without_nfe() -> None:
    metric = FeatureMetrics(extractor=Pixels(), metrics=(Frechet(),))
    found = dict(evaluate(identity, EvenOnly(), [2], metric, Toy(), 8, 0))
    assert list(found) == ["nfe2/fd_pixels", "fd_pixels_floor"]


def test_provenance_names_data_seed_and_the_metrics_own() -> None:
    plain = provenance(mean_of, Toy(), 8, 3)
    assert plain == {"data": "toy 20", "samples": "8", "seed": "3"}
    metric = FeatureMetrics(extractor=Pixels(), metrics=(Frechet(),))
    about = provenance(metric, Toy(), 8, 3)
    assert about["data"] == "toy 20"
    assert about["reference"].startswith("8 rows")
