"""A checkpoint that fits its manifest and cannot be used: refused by name, nothing is applied."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_work
from safetensors.torch import load_file, save_file
from trainer_toys import ToyNet, run, same, trained

from trainers import Budget, Callback, CheckpointCallback, TrainState, ranks
from trainers.checkpoints.whole_folders import MANIFEST, BrokenCheckpoint, fingerprint

Damage = Callable[[Path], Any]


def signed(folder: Path) -> None:
    """Write the manifest of what is there, as one who damages a checkpoint on purpose."""
    marks = {p.name: fingerprint(p) for p in folder.iterdir() if p.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(marks))


def counters(**changes: Any) -> Damage:
    """state.json with other values; a value of `...` is left out."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text()) | changes
        kept = {name: value for name, value in content.items() if value is not ...}
        (folder / "state.json").write_text(json.dumps(kept))

    return damage


def tensors(change: Callable[[dict[str, Any]], Any], name: str = "net.safetensors") -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / name)
        change(content)
        save_file(content, folder / name)

    return damage


def optimizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = torch.load(folder / "optimizer.pt", weights_only=True)
        torch.save(change(content) or content, folder / "optimizer.pt")

    return damage


def content(name: str, bytes: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(bytes)


def truncated(name: str, keep: int) -> Damage:
    return lambda folder: os.truncate(folder / name, keep)


DEEP = b'{"step": ' + 5000 * b"[" + 5000 * b"]" + b"}"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no seed": (counters(seed=...), "state.json has seed = None"),
    "text for a step": (counters(step="nine"), "state.json has step = 'nine'"),
    "true for a step": (counters(step=True), "state.json has step = True"),
    "negative images": (counters(images=-8), "state.json has images = -8"),
    "seconds not finite": (counters(seconds=float("nan")), "state.json has seconds = nan"),
    "another step": (counters(step=8), "state.json is of step 8, not of step_00000009"),
    "newer version": (counters(version=2), "state.json has the version 2, and this"),
    "empty state": (content("state.json", b""), "state.json cannot be read: it is empty"),
    "a list": (content("state.json", b"[1]"), "state.json cannot be read: it holds no JSON object"),
    "no text": (content("state.json", b"\xff\xfe"), "state.json cannot be read: it is no UTF-8"),
    "deep state": (content("state.json", DEEP), "state.json cannot be read: it is no plain JSON"),
    "pickle": (content("optimizer.pt", pickle.dumps({"a": 1})), "optimizer.pt holds no optimizer"),
    "pickle of code": (
        content("optimizer.pt", pickle.dumps(os.getcwd)),
        "optimizer.pt holds no optimizer's state, or more than numbers",
    ),
    "no pickle": (content("optimizer.pt", b"PK"), "optimizer.pt holds no optimizer's state"),
    "truncated": (truncated("optimizer.pt", 700), "optimizer.pt holds no optimizer's state"),
    "a list of numbers": (optimizer(lambda c: [1]), "optimizer.pt holds no optimizer's state"),
    "no state": (optimizer(lambda c: c.pop("state") and None), "optimizer.pt has no state of"),
    "other shape": (
        optimizer(lambda c: c["state"][0].update(exp_avg=torch.zeros(3))),
        r"optimizer.pt has exp_avg of shape (3,) for weight 0, which has shape (16, 4)",
    ),
    "other names": (
        optimizer(lambda c: c["state"][1].pop("exp_avg_sq") is None),
        "optimizer.pt keeps exp_avg, step of weight 1; AdamW keeps exp_avg, exp_avg_sq, step",
    ),
    "one weight more": (
        optimizer(lambda c: c["state"].update({9: c["state"][0]})),
        "optimizer.pt has a state of weight 9; the network has 4 weights",
    ),
    "truncated tensor": (truncated("net.safetensors", 300), "net.safetensors is no safetensors"),
    "no tensors": (content("net.safetensors", b"x"), "net.safetensors is no safetensors file"),
    "other weights": (
        tensors(lambda c: c.update({"inner.bias": torch.zeros(5)})),
        "inner.bias has shape (5,), here (16,)",
    ),
    "renamed weights": (
        tensors(lambda c: c.update(strange=c.pop("inner.bias"))),
        "inner.bias is missing; strange is unknown here",
    ),
    "average is gone": (
        lambda folder: (folder / "ema_0.5.safetensors").unlink(),
        "ema_0.5.safetensors is missing",
    ),
    "made elsewhere": (content("zero.json", b"{}"), "was made by zero_engine"),
    "sizes in words": (
        lambda folder: (folder / MANIFEST).write_text('{"state.json": {"size": "much"}}'),
        MANIFEST,
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Checkpoints of steps 3, 6 and 9, and the state that they lead to."""
    folder = tmp_path_factory.mktemp("made")
    saving = CheckpointCallback(every=3, keep=10)
    budget = Budget(steps=9)
    return folder, run(folder=folder, ema_decays=(0.5,), budget=budget, callbacks=[saving])[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    damage: str, made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000009"
    act, told = DAMAGES[damage]
    act(newest)
    if damage != "sizes in words":
        signed(newest)
    begun: list[str] = []

    class Begin(Callback):
        def on_start(self, state: TrainState) -> None:
            assert state.resumed is not None
            begun.append(state.resumed.name)

    state, _ = run(
        folder=tmp_path / "run", resume=True, net=ToyNet(seed=3), ema_decays=(0.5,),
        budget=Budget(steps=9), callbacks=[Begin()],
    )  # fmt: skip
    assert begun == ["step_00000006"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("checkpoint refused, trying the one before it: ")
    assert told in warning
    assert str(newest) in warning
    assert "Error:" not in warning
    assert same(state.engine.module.state_dict(), made[1].engine.module.state_dict())


def test_undamaged_copy_is_used(
    made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The control of the test above: to sign a checkpoint anew is no damage."""
    shutil.copytree(made[0], tmp_path / "run")
    signed(tmp_path / "run" / "checkpoints" / "step_00000009")
    settings: Any = {"ema_decays": (0.5,), "budget": Budget(steps=9)}
    state, losses = run(folder=tmp_path / "run", resume=True, **settings)
    assert not losses
    assert not caplog.records
    assert same(state.engine.module.state_dict(), made[1].engine.module.state_dict())


@pytest.mark.parametrize("damage", ["other names", "average is gone", "pickle of code"])
def test_nothing_is_applied_of_a_checkpoint_that_is_refused(
    damage: str, made: Any, tmp_path: Path
) -> None:
    """Its network could be read, and the optimizer or a later network could not."""
    shutil.copytree(made[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.iterdir():
        DAMAGES[damage][0](path)
        signed(path)
    net = ToyNet(seed=3)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(BrokenCheckpoint) as caught:
        run(folder=tmp_path / "run", resume=True, net=net, ema_decays=(0.5,))
    assert f"none of the 3 checkpoints in {folder} can be used" in str(caught.value)
    assert "step_00000009" in str(caught.value)  # the newest one's reason
    assert DAMAGES[damage][1] in str(caught.value)
    assert same(net.state_dict(), before)


def test_options_of_the_optimizer_are_the_runs_own(made: Any, tmp_path: Path) -> None:
    """A checkpoint holds what the optimizer has seen, not how it is set."""
    shutil.copytree(made[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000009"
    optimizer(lambda c: c["param_groups"][0].update(eps="large", betas=None))(newest)
    signed(newest)
    state, losses = run(
        folder=tmp_path / "run", resume=True, ema_decays=(0.5,), budget=Budget(steps=11)
    )
    whole, expected = run(ema_decays=(0.5,), budget=Budget(steps=11))
    assert torch.equal(torch.stack(losses), torch.stack(expected[9:]))
    assert same(state.net.state_dict(), whole.net.state_dict())


def test_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = trained(tmp_path)

    def failing(path: Path) -> str:
        if "step_00000009" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return digest(path)

    from trainers.checkpoints import whole_folders

    digest = whole_folders.file_sha256
    monkeypatch.setattr(whole_folders, "file_sha256", failing)
    state, _ = run(folder=tmp_path, resume=True, budget=Budget(steps=6))
    assert state.resumed == folder / "step_00000006"
    assert "cannot be read: Input/output error" in caplog.text


# --- the pieces of zero_engine, in one process

ZERO: dict[str, tuple[Damage, str]] = {
    "index is empty": (content("zero.json", b""), "zero.json cannot be read: it is empty"),
    "index lacks shapes": (content("zero.json", b"{}"), "zero.json lacks shapes or numbers"),
    "index of another net": (
        content("zero.json", b'{"shapes": {"a": [2]}, "numbers": {}}'),
        "a is unknown here",
    ),
    "no pieces": (content("rank_00000.safetensors", b"x"), "is no safetensors file"),
    "no starts": (
        lambda folder: save_file({"a": torch.zeros(2)}, folder / "rank_00000.safetensors"),
        "does not say where its pieces start",
    ),
    "a piece is short": (
        lambda folder: _repieced(folder, lambda c: c.update(FIRST=c.pop("FIRST")[:3])),
        "elements of weight/",
    ),
    "a kind is gone": (
        lambda folder: _repieced(folder, lambda c: [c.pop(k) for k in [*c] if "exp_avg/" in k]),
        "keeps exp_avg_sq, step of each weight; the optimizer of this run keeps exp_avg, exp_avg_",
    ),
}


def _repieced(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors import safe_open

    path = folder / "rank_00000.safetensors"
    with safe_open(path, framework="pt") as file:
        starts = json.loads(file.metadata()["starts"])
    found = load_file(path)
    first = next(name for name in found if name.startswith("weight/") and found[name].numel() > 3)
    found["FIRST"] = found.pop(first)
    change(found)
    if "FIRST" in found:
        found[first] = found.pop("FIRST")
    kept = {name: start for name, start in starts.items() if name in found}
    save_file(found, path, metadata={"starts": json.dumps(kept)})


@pytest.mark.deepspeed
@pytest.mark.slow
def test_damaged_pieces_are_refused_and_the_ones_before_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving = CheckpointCallback(every=1, keep=10)
    whole, _ = zero_work.go("mean_flow", 2, tmp_path / "made", saving)
    expected = zero_work.gathered_state(whole.engine.module)  # type: ignore[attr-defined]
    for name, (act, told) in ZERO.items():
        shutil.copytree(tmp_path / "made", tmp_path / name)
        newest = tmp_path / name / "checkpoints" / f"step_{zero_work.STEPS:08d}"
        act(newest)
        signed(newest)
        caplog.clear()
        state, watch = zero_work.go("mean_flow", 2, tmp_path / name, resume=True)
        assert len(watch.losses) == 1, name
        assert told in caplog.text, name
        assert "checkpoint refused, trying the one before it" in caplog.text
        found = zero_work.gathered_state(state.engine.module)  # type: ignore[attr-defined]
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


def test_error_of_one_process_is_raised_in_all_whatever_its_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A JSONDecodeError cannot be made of a text alone; the nearest type above it can."""
    monkeypatch.setattr(ranks, "gathered", lambda mine: [mine, (json.JSONDecodeError, "broken")])
    with pytest.raises(ValueError, match="process 1: broken"):
        ranks.together(lambda: None, ValueError)
