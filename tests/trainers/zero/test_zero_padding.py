"""DeepSpeed pads the pieces that it cuts and never writes the padding: nothing of ours reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import padding_work
import pytest
import torch
import zero_work
from padding_work import STEPS
from safetensors.torch import load_file
from torch import nn
from zero_work import STAGES

from trainers import Budget, CheckpointCallback, NonFiniteLoss, TorchEngine, TrainState
from trainers.sharding import shards, weight_pieces
from zoo.teachers import Average


class Sharded(nn.Module):
    """Five weights as process 1 of two holds them in stage 3: two of its own, and padding."""

    def __init__(self, own: tuple[float, float]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))
        piece: Any = torch.tensor([*own, float("nan")])
        self.weight.ds_tensor = piece  # type: ignore[assignment]
        self.weight.ds_shape, self.weight.ds_numel = (5,), 5  # type: ignore[assignment]


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.ranks.number", lambda: 1)


def test_piece_and_shard_end_where_the_parameter_ends(second_of_two: None) -> None:
    net = Sharded((1.0, 2.0))
    (piece,) = weight_pieces(net)
    assert (piece.start, piece.view.tolist()) == (3, [1.0, 2.0])
    with shards(net):
        assert net.weight.tolist() == [1.0, 2.0]


def test_average_of_shards_leaves_the_padding_alone(second_of_two: None) -> None:
    net, average = Sharded((1.0, 2.0)), Sharded((3.0, 4.0))
    average.weight.ds_tensor[-1] = 7.0  # type: ignore[index]
    both = nn.ModuleList([net, average])
    with shards(both):
        Average(average, net).update(0.5)
    assert average.weight.ds_tensor.tolist() == [2.0, 3.0, 7.0]  # type: ignore[operator]


@pytest.mark.parametrize(("own", "saved"), [((1e30, 2.0), True), ((1.0, float("nan")), False)])
def test_checkpoint_asks_only_whether_the_weights_are_finite(
    own: tuple[float, float], saved: bool, second_of_two: None, tmp_path: Path
) -> None:
    """A norm of 1e30 would overflow in float32, and the padding is NaN: neither is a weight."""
    made: list[int] = []

    class Engine(TorchEngine):
        def save(self, folder: Path) -> Any:
            made.append(1)
            return lambda: []

    state = TrainState(
        net=Sharded(own), engine=Engine(), budget=Budget(steps=1), seed=0, batch_size=1,
        device=torch.device("cpu"), folder=tmp_path,
    )  # fmt: skip
    callback = CheckpointCallback(every=1)
    if saved:
        callback._save(state)
    else:
        with pytest.raises(NonFiniteLoss, match="the weights are not finite"):
            callback._save(state)
    assert bool(made) is saved


@pytest.fixture(scope="module", params=[2, 4])
def poisoned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("padding")
    return request.param, zero_work.spawn(request.param, "poisoned", folder, 300.0, FILE), folder


FILE = padding_work.__file__


@pytest.mark.deepspeed
@pytest.mark.faults
@pytest.mark.parametrize("stage", STAGES)
def test_padding_of_nan_reaches_no_weight_average_norm_or_file(stage: int, poisoned: Any) -> None:
    count, results, folder = poisoned
    ours, alone = results[stage], padding_work.go(TorchEngine(max_grad_norm=0.5), None)
    assert ours["filled"] > 0 or stage < 3
    assert ours["saved"] == [f"step_{step:08d}" for step in range(1, STEPS + 1)]
    for key in ("losses", "norms"):  # float32 sums in another order
        torch.testing.assert_close(ours[key], alone[key], rtol=1e-4, atol=1e-6)
    for key, value in alone["module"].items():  # averages and teachers too
        torch.testing.assert_close(ours["module"][key], value, rtol=1e-4, atol=1e-5, msg=key)
    for file in (folder / f"stage{stage}").rglob("*.safetensors"):
        assert all(bool(x.isfinite().all()) for x in load_file(file).values()), file
    assert len(ours["resumed"]["losses"]) == 1
    resumed = ours["resumed"]["module"].values()
    assert all(bool(value.isfinite().all()) for value in resumed), count
