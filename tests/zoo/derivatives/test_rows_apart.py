"""Rows that depend on one another are not parted in silence: every such network is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo.derivatives.one_pass as module
from registry.protocols import Batch
from trainers.derivative_probe import probe_derivatives
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import OnePass
from zoo.derivatives.rows import rows_meet, some_rows
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import mean_flat
from zoo.times import LogitNormalPair

EVERY_ROW = LogitNormalPair(off_diagonal_fraction=1.0)


class Within(nn.Module):
    """Two layers and something between them; `h` [b 6] is what is between."""

    def __init__(self, between, part=None, scale=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.last.weight.data *= scale
        self.between, self.part = between, part

    def forward(self, x, t, r, cond=None):
        point = torch.cat([x, t[:, None], r[:, None]], 1).to(self.first.weight)
        h = torch.tanh(self.first(point))
        return {"u": self.last(self.between(self, h))}


COUPLED = {
    # what is between: (it, a module for it, the function where rows meet)
    "batch norm": (lambda net, h: net.part(h), lambda: nn.BatchNorm1d(6), "batch_norm"),
    "batch norm without statistics": (
        lambda net, h: net.part(h),
        lambda: nn.BatchNorm1d(6, track_running_stats=False),
        "batch_norm",
    ),
    "sort": (lambda net, h: h.sort(0).values, None, "sort"),
    "order of rows": (lambda net, h: h[h[:, 0].argsort()], None, "__getitem__"),
    "mean": (lambda net, h: h - h.mean(0), None, "sub"),
    "spread": (lambda net, h: h / (h.std(0) + 0.1), None, "div"),
    "largest": (lambda net, h: h / h.abs().max(0).values, None, "div"),
    "norm": (lambda net, h: h / h.norm(), None, "div"),
    "softmax": (lambda net, h: h.softmax(0), None, "softmax"),
    "sums": (lambda net, h: h.cumsum(0), None, "cumsum"),
    "neighbour": (lambda net, h: h + h.roll(1, 0), None, "roll"),
    "attention": (
        lambda net, h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
        None,
        "",
    ),
}
APART = {
    "batch norm in evaluation": (lambda net, h: net.part.eval()(h), lambda: nn.BatchNorm1d(6)),
    "layer norm": (lambda net, h: net.part(h), lambda: nn.LayerNorm(6)),
    "group norm": (lambda net, h: net.part(h), lambda: nn.GroupNorm(2, 6)),
    "tokens first": (
        lambda net, h: net.part(*3 * [h.unflatten(1, (3, 2)).mT])[0].mT.flatten(1),
        lambda: nn.MultiheadAttention(3, 1, batch_first=True),
    ),
}


def network(case):
    between, part, *_ = case
    return Within(between, part and part())


def loss(net, derivative=None, n=16, **fields):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).to(net.last.weight)
    objective = MeanFlow(derivative=derivative or OnePass(), **fields)
    return objective.loss(net, Batch(x0=x), torch.Generator().manual_seed(2)).per_sample


@pytest.mark.parametrize("name", COUPLED)
def test_one_pass_refuses_rows_that_depend_on_one_another(name):
    net = network(COUPLED[name])
    words = rf"rows depend on one another.*meet in {COUPLED[name][2]}.*within each row"
    with pytest.raises(NotImplementedError, match=words):
        loss(net)


@pytest.mark.parametrize("name", COUPLED)
def test_what_the_refusal_offers_is_right(name):
    net = network(COUPLED[name]).double()
    found = loss(net, times=EVERY_ROW)
    torch.testing.assert_close(found, loss(net, Dual(), times=EVERY_ROW))
    differences = loss(net, FiniteDifference(step=1e-4), times=EVERY_ROW)
    torch.testing.assert_close(found, differences, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", APART)
def test_rows_that_do_not_depend_on_one_another_are_taken_apart(name):
    net = network(APART[name])
    torch.testing.assert_close(loss(net), loss(net, Dual()))


def test_a_network_is_tested_once_in_each_mode_and_called_no_more_often(monkeypatch):
    watched = []

    class Counted(module.WatchedRecord):
        def __init__(self, *given):
            watched.append(given)
            super().__init__(*given)

    monkeypatch.setattr(module, "WatchedRecord", Counted)
    net, calls = network(APART["layer norm"]), []
    net.register_forward_hook(lambda *_: calls.append(1))
    first = loss(net)
    assert (len(watched), len(calls)) == (1, 2)
    assert loss(net).equal(first)
    assert (len(watched), len(calls)) == (1, 4)
    loss(net.eval())
    assert len(watched) == 2


def test_a_network_that_starts_at_zero_is_tested_until_it_moves():
    net = Within(COUPLED["sort"][0], scale=0.0)
    net.last.bias.data.zero_()
    loss(net)
    net.last.weight.data.add_(1.0)
    with pytest.raises(NotImplementedError, match="rows depend"):
        loss(net)


def test_nothing_is_asked_of_the_rows_where_no_batch_is_split():
    net = network(COUPLED["mean"])
    assert loss(net, times=EVERY_ROW).isfinite().all()
    assert loss(net, times=LogitNormalPair(off_diagonal_fraction=0.0)).isfinite().all()


@pytest.mark.parametrize("derivative", [OnePass(), Dual(), Jvp(), FiniteDifference()])
@pytest.mark.parametrize("name", ["batch norm", "sort", "largest"])
def test_the_probe_refuses_them_for_every_derivative(name, derivative):
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
    if (name, derivative) == ("batch norm", Jvp()):
        return  # torch.func refuses its counter of batches
    net = network(COUPLED[name])
    with pytest.raises(ValueError, match="rows of this network depend.*off_diagonal_fraction = 1"):
        probe_derivatives(MeanFlow(derivative=derivative), net, x)
    figures = probe_derivatives(MeanFlow(derivative=derivative, times=EVERY_ROW), net, x)
    assert figures["derivative_error"] < 0.1


def test_the_probe_finds_them_behind_layers_that_start_at_zero_and_beside_dropout():
    x = torch.randn(4, 2)
    hidden = Within(lambda net, h: h + net.part(h), nn.BatchNorm1d(6, affine=True))
    nn.init.zeros_(hidden.part.weight)
    assert loss(hidden).isfinite().all()  # for the time being, the rows do not meet
    noisy = Within(lambda net, h: F.dropout(net.part(h), 0.1, net.training), nn.BatchNorm1d(6))
    for net in (hidden, noisy):
        with pytest.raises(ValueError, match=r"depend on one another \(BatchNorm1d\)"):
            probe_derivatives(MeanFlow(derivative=Dual()), net, x)
        assert net.training


def test_rows_meet_in_what_moves_others_and_in_what_moves_otherwise():
    moved = some_rows(6)
    assert moved.sum() == 3
    whole = torch.arange(1.0, 13.0).reshape(6, 2)
    part = whole * moved[:, None]
    assert not rows_meet(whole, part, moved)
    assert rows_meet(whole, part + 0.1, moved)
    assert rows_meet(whole, 2 * part, moved)
    assert not rows_meet(whole * math.nan, part, moved)
    assert not rows_meet(mean_flat(whole), mean_flat(part), moved)
