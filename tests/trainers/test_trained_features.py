"""Training through features: placed with the networks, left alone, and known again at a resume."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from feature_toys import Matching
from trainer_toys import Losses, StopAt
from zero_toys import Pictures

import registry
from backbones.network import build_network
from backbones.pretrained.tensors import digest_of
from backbones.unet import UNet
from benchmarks.data.digits import Digits
from benchmarks.experiments import build
from benchmarks.records.recorders import Jsonl, Null
from benchmarks.runs.execute import Texts, execute
from trainers import AdamW, Budget, CheckpointCallback, fit
from trainers.checkpoints.whole_folders import BrokenCheckpoint
from trainers.engines import TrainStep, feature_sha256
from zoo.features import RandomConvolutions, RawValues


def network():
    torch.manual_seed(0)
    trunk = partial(UNet, channels=8, multipliers=(1, 1), num_heads=2)
    return build_network(trunk, Pictures().shape, 3, ("u",))


def train(folder=None, *callbacks, features=None, steps=8, **more):
    features = features or RandomConvolutions(channels=1, widths=(8, 8))
    losses, net = Losses(), network()
    state = fit(
        net=net, objective=Matching(features=features), dataset=Pictures(), batch_size=16,
        budget=Budget(steps=steps), optimizer=AdamW(lr=1e-2), folder=folder,
        callbacks=[*callbacks, losses], **more,
    )  # fmt: skip
    return state, losses.rows


def test_loss_falls_and_features_stay():
    features = RandomConvolutions(channels=1, widths=(8, 8))
    before = digest_of(features.feature_net.state_dict())
    state, rows = train(features=features, steps=40)
    assert float(rows[-1].mean()) < 0.7 * float(rows[0].mean())
    assert digest_of(features.feature_net.state_dict()) == before
    assert state.features == {"features": before}


def test_features_are_placed_with_the_module_and_kept_out_of_the_optimizer():
    features = RandomConvolutions(channels=1, widths=(8,))
    step = TrainStep(network(), Matching(features=features)).train()
    assert step.features["features"] is features.feature_net
    assert not features.feature_net.training
    step.to(torch.float64)
    assert {p.dtype for p in features.feature_net.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in step.features.parameters())


def test_objectives_without_weights_in_features_have_nothing_to_place():
    step = TrainStep(network(), Matching(features=RawValues()))
    assert not feature_sha256(step.objective)
    assert not [key for key in step.state_dict() if key.startswith("features")]


def test_resume_is_bit_equal_and_no_checkpoint_has_the_weights(tmp_path):
    _, whole = train()
    train(tmp_path, CheckpointCallback(every=3, keep=9), StopAt(5))
    state, rest = train(tmp_path, resume=True)
    assert state.resumed is not None
    assert 0 < len(rest) < len(whole)
    assert all(a.equal(b) for a, b in zip(rest, whole[-len(rest) :], strict=True))
    files = {file.name for file in state.resumed.iterdir()}
    assert files == {"net.safetensors", "optimizer.pt", "state.json", "manifest.json"}
    assert json.loads((state.resumed / "state.json").read_text())["features"] == state.features


@pytest.mark.parametrize(
    "other", [RandomConvolutions(channels=1, widths=(8, 8), seed=1), RawValues()], ids=repr
)
def test_resume_with_other_features_is_refused_by_name(tmp_path, other):
    train(tmp_path, CheckpointCallback(every=3), StopAt(5))
    with pytest.raises(BrokenCheckpoint, match="other weights of the objective's features, .*"):
        train(tmp_path, features=other, resume=True)


def test_hash_sees_every_value_and_name():
    one = RandomConvolutions(channels=1, widths=(8,)).feature_net
    before = digest_of(one.state_dict())
    with torch.no_grad():
        one.layers[0].bias[3] += 1e-6
    assert digest_of(one.state_dict()) != before
    with torch.no_grad():
        one.layers[0].bias[3] -= 1e-6
    assert digest_of(one.state_dict()) == before
    half = torch.nn.BatchNorm1d(3).bfloat16()  # a buffer of no dimension, a dtype without numpy
    assert len(digest_of(half.state_dict())) == 64


def test_a_real_run_trains_through_features_and_records_their_hash(tmp_path):
    with registry.objectives.temporary("matching", Matching):
        experiment = build.run(
            objective=Matching(),
            backbone=partial(UNet, channels=8, multipliers=(1, 1), num_heads=2),
            dataset=Digits(),
            recorder=Null(),
            steps=3,
            batch_size=8,
            num_samples=16,
            nfe=(1,),
            log_every=1,
            metric=registry.metrics.get("mmd")(),
            device="cpu",
        )
        with Jsonl().start(name="run", folder=tmp_path) as record:
            result = execute(
                experiment, Texts(config="", operative="", params={}), record, tmp_path
            )
    assert result.steps == 3
    sha = digest_of(experiment.objective.features.feature_net.state_dict())
    assert sha in (tmp_path / "record.jsonl").read_text()
