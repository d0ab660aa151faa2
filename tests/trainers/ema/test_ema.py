"""Running averages of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trainer_toys import StopAt, ToyNet, run, same

from registry.protocols import LossOutput
from trainers import Budget, Callback, CheckpointCallback, TrainState
from trainers.ema.averages import Ema


def test_ema_follows_its_formula() -> None:
    """Against the sum written out: sum_j (1 - d_j) prod_{i > j} d_i w_j, plus the start's share."""
    net, decay = nn.Linear(3, 2), 0.7
    ema = Ema(net, decay)
    weights, start = [], net.weight.detach().double().clone()
    for step in range(30):
        with torch.no_grad():
            net.weight.add_(torch.randn_like(net.weight))
        weights.append(net.weight.detach().double().clone())
        ema.update(step)
    decays = [min(decay, (1 + k) / (10 + k)) for k in range(30)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.7  # both sides of the warm-up are met
    expected = start * torch.tensor(decays, dtype=torch.float64).prod()
    for j, weight in enumerate(weights):
        rest = torch.tensor(decays[j + 1 :], dtype=torch.float64).prod()
        expected = expected + (1 - decays[j]) * rest * weight
    # 30 float32 updates of values of order 5
    assert torch.allclose(ema.net.weight.double(), expected, atol=1e-5)


def test_ema_looks_back_over_the_last_tenth_before_its_limit() -> None:
    net = nn.Linear(1, 1, bias=False)
    ema = Ema(net, 0.99999)
    for step in range(2000):
        with torch.no_grad():
            net.weight.fill_(step)
        ema.update(step)
    # density proportional to j^8, whose mean is 0.9; the warm-up's offsets matter at 1 %
    assert ema.net.weight.item() / 2000 == pytest.approx(0.9, abs=0.01)


def test_ema_copy_is_frozen_apart_and_in_eval_mode() -> None:
    net = ToyNet()
    net.train()
    ema = Ema(net, 0.9)
    assert net.training
    assert not ema.net.training
    assert not any(p.requires_grad for p in ema.net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    before = ema.net.inner.weight.clone()
    with torch.no_grad():
        net.inner.weight.add_(1.0)
    assert torch.equal(ema.net.inner.weight, before)
    net.calls += 5
    ema.update(3)
    assert ema.net.calls.item() == 5  # buffers are copied, whole numbers too


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_ema_refuses_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=str(decay)):
        Ema(nn.Linear(1, 1), decay)


def test_fit_keeps_several_decays_after_each_update() -> None:
    class ByHand(Callback):
        def on_start(self, state: TrainState) -> None:
            self.mean = state.net.inner.weight.detach().clone()

        def on_step(self, state: TrainState, out: LossOutput) -> None:
            decay = min(0.5, state.step / (9 + state.step))  # step counts from 1 here
            self.mean += (1 - decay) * (state.net.inner.weight.detach() - self.mean)

    by_hand = ByHand()
    state, losses = run(ema_decays=(0.5, 0.9), callbacks=[by_hand])
    assert list(state.emas) == ["0.5", "0.9"]
    assert state.ema_net is state.emas["0.5"]
    # the same formula in another order of float32 operations
    assert torch.allclose(state.ema_net.inner.weight, by_hand.mean, atol=1e-6)
    assert not torch.equal(state.emas["0.5"].inner.weight, state.emas["0.9"].inner.weight)
    plain, without = run()
    assert plain.ema_net is plain.net
    assert torch.equal(torch.stack(losses), torch.stack(without))  # averaging changes no training


def test_ema_continues_from_a_checkpoint_or_says_what_there_is(tmp_path) -> None:
    whole, _ = run(ema_decays=(0.9,))
    saving = CheckpointCallback(every=4)
    run(ema_decays=(0.9,), callbacks=[saving, StopAt(4)], folder=tmp_path)
    with pytest.raises(ValueError, match=r"ema_0.99.safetensors is missing; there are: ema_0.9.s"):
        run(ema_decays=(0.99,), folder=tmp_path, resume=True)
    state, _ = run(
        net=ToyNet(seed=9), ema_decays=(0.9,), callbacks=[saving], folder=tmp_path, resume=True
    )
    assert same(state.ema_net.state_dict(), whole.ema_net.state_dict())
    assert state.budget == Budget(steps=10)
