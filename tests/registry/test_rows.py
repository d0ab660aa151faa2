"""Rows that a data set must not give are refused by its name, with what was given and allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from registry.protocols import NULL_LABEL, Share, check_reference, read_share
from trainers.budget import Budget
from trainers.loop import fit
from zoo.objectives.flow_matching import FlowMatching

SHAPE = (3, 4, 4)


def _same(x):
    return x


def _labelled(labels):
    return {"label": labels}


@dataclass
class Own:
    """A data set of one's own; `x0` and `cond` change what it gives."""

    shape: tuple[int, ...] = SHAPE
    num_classes: int = 5
    size: int = 100
    name: str = "own"
    x0: Any = _same
    cond: Any = _labelled
    asked: list[int] = field(default_factory=list)

    def identity(self) -> str:
        return "own"

    def batch(self, step: int, n: int, seed: int):
        self.asked.append(step)
        rng = torch.Generator().manual_seed(step)
        x = 2 * torch.rand(n, *self.shape, generator=rng) - 1
        return self.x0(x), self.cond(torch.randint(5, (n,), generator=rng))

    def reference(self, n: int, seed: int):
        return self.batch(0, min(n, self.size), seed)

    def sample_labels(self, n: int):
        return self.cond(torch.arange(n) % 5)


class OwnCodes(Own):
    def decode(self, codes):
        return codes


WRONG = {
    "fewer rows": ({"x0": lambda x: x[:-1]}, r"\(7, 3, 4, 4\); 8 rows .* which is \(8, 3, 4, 4\)"),
    "other channels": ({"x0": lambda x: x[:, :1]}, r"\(8, 1, 4, 4\)"),
    "double": ({"x0": lambda x: x.double()}, "torch.float64; give a torch.Tensor of float32"),
    "bytes": ({"x0": lambda x: x.to(torch.uint8)}, "torch.uint8"),
    "array": ({"x0": lambda x: x.numpy()}, "a ndarray; give a torch.Tensor"),
    "nan": ({"x0": lambda x: x.index_fill(0, torch.tensor(2), torch.nan)}, "the first in row 2"),
    "infinite": ({"x0": lambda x: x / 0}, "not finite"),
    "0 to 255": ({"x0": lambda x: ((x + 1) * 127.5).round()}, r"/ 127\.5 - 1"),
    "0 to 1": ({"x0": lambda x: ((x + 1) * 127.5).round() / 255}, r"2 x - 1"),
    "standardised": ({"x0": lambda x: 2 * x}, r"are in \[-1, 1\]"),
    "labels as floats": ({"cond": lambda y: {"label": y.float()}}, "torch.float32"),
    "labels as int32": ({"cond": lambda y: {"label": y.int()}}, "torch.int32"),
    "one-hot labels": ({"cond": lambda y: {"label": y[:, None]}}, r"shape \(8, 1\)"),
    "labels from 1": ({"cond": lambda y: {"label": y + 1}}, "from 1 to 5, and num_classes is 5"),
    "fewer labels": ({"cond": lambda y: {"label": y[:-1]}}, r"\(7,\); .* with 8 rows"),
    "a list of labels": ({"cond": lambda y: {"label": y.tolist()}}, "a list"),
    "bare labels": ({"cond": lambda y: y}, "are a Tensor; give None or a dict"),
    "no labels": ({"cond": lambda y: None}, "no labels, and num_classes is 5"),
    "labels without classes": ({"num_classes": 0}, "labels, and num_classes is 0"),
    "another condition": ({"cond": lambda y: {"label": y, "text": y[:2]}}, r"cond\['text'\]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_batch_that_does_not_fit_is_refused_by_name(kind):
    changes, message = WRONG[kind]
    with pytest.raises(ValueError, match=message) as refused:
        read_share(Own(**changes), 0, 8, 1, Share())
    assert "the data set 'own', batch(0, 8, 1)" in str(refused.value)


@pytest.mark.parametrize("kind", WRONG)
def test_a_reference_that_does_not_fit_is_refused_by_name(kind):
    with pytest.raises(ValueError, match="the data set 'own', "):
        check_reference(Own(**WRONG[kind][0]), 8, 1)


def test_what_fits_is_given_as_it_is():
    x0, cond = read_share(Own(), 0, 8, 1, Share())
    assert x0.shape == (8, *SHAPE)
    assert len(cond["label"]) == 8
    half, whole = read_share(Own(), 0, 8, 1, Share(1, 2))
    assert half.equal(x0[1::2])
    assert whole["label"].equal(cond["label"])
    check_reference(Own(size=3), 8, 1)  # no more rows than there are
    without = Own(cond=lambda y: {"label": torch.full_like(y, NULL_LABEL)})
    read_share(without, 0, 8, 1, Share())
    read_share(Own(num_classes=0, cond=lambda y: None), 0, 8, 1, Share())


WIDE = {"x0": lambda x: 9 * x}
NO_PICTURES = [OwnCodes(**WIDE), Own(shape=(4, 2, 2), **WIDE), Own(shape=(2,), **WIDE)]


@pytest.mark.parametrize("dataset", NO_PICTURES, ids=["codes", "four channels", "points"])
def test_only_pictures_have_a_range(dataset):
    read_share(dataset, 0, 8, 1, Share())


def test_a_later_batch_may_have_no_dark_pixel():
    bright = Own(x0=lambda x: x.abs().clamp(0.5 / 255))
    read_share(bright, 3, 8, 1, Share())
    with pytest.raises(ValueError, match=r"are in \[-1, 1\]"):
        read_share(bright, 0, 8, 1, Share())


def test_two_values_are_asked_for():
    class Alone(Own):
        def batch(self, step, n, seed):
            return super().batch(step, n, seed)[0]

    with pytest.raises(ValueError, match="it gives a Tensor; give two values"):
        read_share(Alone(), 0, 8, 1, Share())


def test_the_loop_refuses_the_batch_in_which_it_happens():
    def broken_later(x):
        return x if dataset.asked[-1] < 2 else x[:-1]

    dataset = Own(x0=broken_later)
    net = torch.nn.Linear(1, 1)
    net.forward = lambda x, t, r, cond: {"v": net.weight * x}
    with pytest.raises(ValueError, match=r"'own', batch\(2, 8, 0\)"):
        fit(
            net=net, objective=FlowMatching(), dataset=dataset, batch_size=8, budget=Budget(steps=5)
        )
