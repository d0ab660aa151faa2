"""What a process reads of a batch: its rows alone, the same as in the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_vaes import photos
from trainer_toys import ToyData, ToyNet
from varied_objectives import OBJECTIVES

from benchmarks.conformance.networks import Toy
from benchmarks.conformance.subject import random_batch
from benchmarks.data import image_pixels
from benchmarks.data.digits import Digits
from benchmarks.data.edm_augment import EdmAugment
from benchmarks.data.image_folder import ImageFolder
from benchmarks.data.mixtures import Mixture
from registry.protocols import (
    Batch,
    LossOutput,
    Network,
    Share,
    Shareable,
    couples_rows,
    read_share,
    required_heads,
)
from trainers import Budget, TorchEngine, fit
from zoo.objectives.flow_matching import FlowMatching

SHARES = [Share(), Share(0, 2), Share(1, 2), Share(3, 4), Share(2, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(params=["digits", "memory", "files", "augmented", "mixture"])
def dataset(request: pytest.FixtureRequest, folder: Any) -> Any:
    files = {"folder": str(folder), "resolution": 8, "flip": True}
    return {
        "digits": lambda: Digits(),
        "memory": lambda: ImageFolder(**files),
        "files": lambda: ImageFolder(**files, in_memory=False),
        "augmented": lambda: EdmAugment(data=ImageFolder(**files, in_memory=False)),
        "mixture": lambda: Mixture(),  # draws the whole batch
    }[request.param]()


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_a_share_has_the_rows_of_the_whole_batch_and_all_conditions(dataset, share):
    for step in (0, 3):
        whole, cond = dataset.batch(step, 14, 5)
        rows, also = read_share(dataset, step, 14, 5, share)
        assert torch.equal(rows, share.rows(whole)[0])
        assert (cond or {}).keys() == (also or {}).keys()
        assert all(torch.equal(also[name], cond[name]) for name in cond or {})


def test_files_of_other_processes_are_not_opened(folder, monkeypatch):
    dataset = ImageFolder(folder=str(folder), resolution=8, in_memory=False)
    assert isinstance(dataset, Shareable)
    opened, read = [], image_pixels.read_picture
    monkeypatch.setattr(image_pixels, "read_picture", lambda *a: opened.append(a) or read(*a))
    dataset._read(0, 16, 0, Share(1, 8))  # without what is read ahead
    assert len(opened) == 2


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_look_at_the_data_of_their_share_alone(name):
    objective = OBJECTIVES[name]
    net = Toy((2,), required_heads(objective))
    share = Share(1, 3)
    batch = replace(random_batch((2,), 12, labels="given"), share=share)
    x0 = torch.full_like(batch.x0, torch.nan)
    x0[share.number :: share.count] = share.rows(batch.x0)[0]

    def gradient(of: Batch) -> list[torch.Tensor]:
        fresh = deepcopy(objective)  # its teacher serves one loss without weights of its own
        loss = fresh.loss(net, of, torch.Generator().manual_seed(0)).per_sample.mean()
        weights = list(net.parameters())
        return list(torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True))

    if name == "optimal_transport":
        with pytest.raises(ValueError, match="invalid|NaN|numeric"):
            gradient(replace(batch, x0=x0))
    elif couples_rows(objective):
        found = gradient(replace(batch, x0=x0))
        assert not all(slope.isfinite().all() for slope in found)
    else:
        for one, two in zip(gradient(batch), gradient(replace(batch, x0=x0)), strict=True):
            assert torch.equal(one, two)


# --- the loop, as process 1 of 4


@dataclass(kw_only=True, eq=False)
class OneOfFour(TorchEngine):
    def shares(self, batch: Batch) -> Iterator[Batch]:
        yield replace(batch, share=Share(1, 4))


@dataclass(frozen=True)
class Watched(FlowMatching):
    """Keeps what it was given."""

    heads: ClassVar = ("u",)
    wasteful: bool = False
    couples_rows: bool = False
    seen: list[torch.Tensor] = field(default_factory=list, compare=False)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        self.seen.append(batch.x0.clone())
        share = Share() if self.wasteful else batch.share
        x, t, cond = share.rows(batch.x0, torch.rand(len(batch), generator=rng), batch.cond)
        return LossOutput(per_sample=net(x, t, t, cond)["u"].square().mean(1))


def seen_by_process_1(monkeypatch: pytest.MonkeyPatch, **how: bool) -> list[torch.Tensor]:
    monkeypatch.setattr("trainers.loop.ranks", SimpleNamespace(number=lambda: 1, count=lambda: 4))
    objective = Watched(**how)
    fit(
        net=ToyNet(),
        objective=objective,
        dataset=ToyData(),
        batch_size=8,
        budget=Budget(steps=3),
        engine=OneOfFour(),
    )
    return objective.seen


def test_a_process_reads_its_rows_once_the_objective_keeps_to_its_share(monkeypatch):
    first, *later = seen_by_process_1(monkeypatch)
    assert torch.equal(first, ToyData().batch(0, 8, 0)[0])
    for step, x0 in enumerate(later, start=1):
        assert torch.equal(x0[1::4], ToyData().batch(step, 8, 0)[0][1::4])
        assert x0.isnan().any(1).nonzero().flatten().tolist() == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("how", ["wasteful", "couples_rows"])
def test_a_process_reads_all_rows_for_objectives_that_need_them(monkeypatch, how):
    for step, x0 in enumerate(seen_by_process_1(monkeypatch, **{how: True})):
        assert torch.equal(x0, ToyData().batch(step, 8, 0)[0])
