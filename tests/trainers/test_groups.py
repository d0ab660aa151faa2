"""Objectives whose rows belong together: their groups are whole, and of one label, everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from trainer_toys import GroupedData, Sgd, StopAt, ToyData, ToyNet, run, same

from registry.protocols import Batch, LossOutput, Network, Share, check_batch, group_of
from trainers import Budget, CheckpointCallback, TorchEngine
from trainers.finite import NonFiniteLoss
from zoo.ops import mean_flat, normal_like


@dataclass(frozen=True, kw_only=True)
class InGroups:
    """The mean of a group's predictions is pulled to the mean of its data."""

    heads: ClassVar = ("u",)
    group: int = 4
    bad_row: int = -1
    seen: list[Tensor] = field(default_factory=list, compare=False)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        self.seen.append(batch.x0.clone())
        x1, t = normal_like(batch.x0, rng), torch.rand(len(batch), generator=rng)
        place = torch.arange(len(batch))
        x0, x1, t, cond, place = batch.share.rows(batch.x0, x1, t, batch.cond, place)
        labels = cond["label"].view(-1, self.group)
        assert (labels == labels[:, :1]).all()
        assert (place.view(-1, self.group)[:, 0] % self.group == 0).all()
        error = net(x1, t, t * 0, cond)["u"] - x0
        error = error + error.view(-1, self.group, 2).mean(1).repeat_interleave(self.group, 0)
        loss = mean_flat(error**2)
        loss = torch.where(place == self.bad_row, torch.nan, loss)
        return LossOutput(per_sample=loss, terms={"u": loss.detach()}, t=place / 100, r=t * 0)


def grouped(**changes: Any) -> Any:
    given = {"objective": InGroups(), "dataset": GroupedData(), "net": ToyNet(dropout=0.0)}
    return run(**(given | {"batch_size": 16, "budget": Budget(steps=4)} | changes))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_have_the_losses_and_updates_of_the_whole_batch(parts) -> None:
    whole, losses = grouped(optimizer=Sgd(lr=0.1))
    engine = TorchEngine(gradient_accumulation_steps=parts)
    cut, of_parts = grouped(engine=engine, optimizer=Sgd(lr=0.1))
    torch.testing.assert_close(torch.stack(of_parts), torch.stack(losses), rtol=1e-5, atol=1e-6)
    for one, other in zip(whole.net.parameters(), cut.net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_rows_that_are_shared_out_one_by_one_would_mix_groups() -> None:
    """The control: without its declaration the same objective is given parts of groups."""
    objective = InGroups()
    batch = Batch(*GroupedData().batch(0, 16, 0, same_label=4), share=Share(0, 2))
    with pytest.raises(AssertionError):
        objective.loss(ToyNet(), batch, torch.Generator().manual_seed(0))
    fine = replace(batch, share=Share(0, 2, group=4))
    objective.loss(ToyNet(), fine, torch.Generator().manual_seed(0))


def test_resumed_run_of_groups_continues_bit_equal(tmp_path: Path) -> None:
    whole, losses = grouped(budget=Budget(steps=6))
    saving = CheckpointCallback(every=3)
    grouped(budget=Budget(steps=6), folder=tmp_path, callbacks=[saving, StopAt(3)])
    rest, later = grouped(
        budget=Budget(steps=6), folder=tmp_path, resume=True, net=ToyNet(seed=1, dropout=0.0),
        callbacks=[CheckpointCallback(every=3)],
    )  # fmt: skip
    assert same(whole.net.state_dict(), rest.net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(losses[3:], later, strict=True))


@dataclass(kw_only=True, eq=False)
class OneOfTwo(TorchEngine):
    """Process 1 of 2, in two micro-batches; it knows nothing of groups."""

    def shares(self, batch: Batch) -> Iterator[Batch]:
        for number in (1, 3):
            yield replace(batch, share=Share(number, 4))


def test_process_reads_its_groups_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.loop.ranks", SimpleNamespace(number=lambda: 1, count=lambda: 2))
    objective = InGroups()
    grouped(objective=objective, engine=OneOfTwo(), budget=Budget(steps=2))
    x0 = GroupedData().batch(1, 16, 0, same_label=4)[0]
    seen = objective.seen[-1]
    mine = [4, 5, 6, 7, 12, 13, 14, 15]
    assert torch.equal(seen[mine], x0[mine])
    assert seen.isnan().any(1).nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_row_that_is_not_finite_is_named_by_its_place_in_the_batch() -> None:
    engine = TorchEngine(gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteLoss, match=r"in 1 of 16 rows\n.*\n  row 9: t=0\.09 "):
        grouped(objective=InGroups(bad_row=9), engine=engine)


def test_batch_that_is_not_made_of_whole_groups_is_refused_before_training() -> None:
    with pytest.raises(
        ValueError, match="groups of 4 rows, and a batch of 18 is not made of whole"
    ):
        grouped(batch_size=18)
    for_two = TorchEngine(gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"batch of 12 has 3 parts.*accumulation_steps = 2 equal"):
        grouped(batch_size=12, engine=for_two)
    check_batch(for_two, 12)
    check_batch(for_two, 16, 4)
    check_batch(object(), 12, 4)  # type: ignore[arg-type]  an engine that declares nothing
    with pytest.raises(ValueError, match="choose a multiple of 5"):
        check_batch(object(), 12, 5)  # type: ignore[arg-type]


def test_data_that_cannot_give_groups_are_refused_by_name_before_training() -> None:
    with pytest.raises(ValueError, match="groups of 4 rows of one label, and the data set 'toy'"):
        grouped(dataset=ToyData())


def test_data_whose_groups_are_mixed_are_refused_when_read() -> None:
    class Mixed(GroupedData):
        def batch(self, step: int, n: int, seed: int, same_label: int = 1) -> Any:
            return super().batch(step, n, seed)

    with pytest.raises(ValueError, match=r"'toy', batch\(0, 16, 0, same_label=4\): .* a group"):
        grouped(dataset=Mixed())


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """A part that looks at a group."""

    group: int = 8


def test_group_is_declared_by_the_objective_or_by_a_part() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Composed:
        velocity: Any
        other: Any = None

    assert group_of(InGroups(group=3)) == 3
    assert group_of(Composed(velocity=None)) == 1
    assert group_of(Composed(velocity=Estimator())) == 8
    assert group_of(Composed(velocity=Estimator(), other=Estimator(group=1))) == 8
    with pytest.raises(ValueError, match=r"different sizes \(velocity: 8, other: 4\)"):
        group_of(Composed(velocity=Estimator(), other=Estimator(group=4)))
    for wrong in (0, -1, 2.0, True, "4"):
        with pytest.raises(ValueError, match=r"Composed.velocity declares group = .* 1 or more"):
            group_of(Composed(velocity=Estimator(group=wrong)))


def test_training_without_groups_is_as_it_was() -> None:
    """A group of one row asks nothing of the data, and changes no number."""
    one, losses = run()
    other, again = run(dataset=GroupedData())
    assert all(torch.equal(a, b) for a, b in zip(losses, again, strict=True))
    assert same(one.net.state_dict(), other.net.state_dict())
