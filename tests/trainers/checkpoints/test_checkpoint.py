"""Checkpoints: whole or refused, and nothing lost when a disk or a process fails."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from faults import full_disk
from torch import nn
from trainer_toys import StopAt, run, same, trained

import zoo  # noqa: F401  registers the objectives
from registry.protocols import LossOutput
from trainers import (
    AdamW,
    Budget,
    Callback,
    CheckpointCallback,
    NonFiniteLoss,
    TorchEngine,
    TrainState,
)
from trainers.checkpoints.checkpoint import PendingCheckpoint, checkpoints, latest
from trainers.checkpoints.weights import load_module, save_module
from trainers.checkpoints.whole_folders import BrokenCheckpoint, verify

# --- whole or refused


def test_checkpoint_holds_every_file_with_its_hash(tmp_path: Path) -> None:
    folder = trained(tmp_path, 3)
    path = folder / "step_00000003"
    manifest = json.loads((path / "manifest.json").read_text())
    names = {"net.safetensors", "teacher_teacher.safetensors", "optimizer.pt", "state.json"}
    assert set(manifest) == names
    assert {p.name for p in path.iterdir()} == names | {"manifest.json"}
    for name in names:
        content = (path / name).read_bytes()
        assert manifest[name]["size"] == len(content)
        assert manifest[name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]  # nothing left over


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("net.safetensors", truncate, "bytes instead of"),
        ("net.safetensors", flip, "changed after it was written"),
        ("optimizer.pt", flip, "changed after it was written"),
        ("state.json", flip, "changed after it was written"),
        ("teacher_teacher.safetensors", Path.unlink, "is missing"),
        ("manifest.json", Path.unlink, "cannot be read"),
        ("manifest.json", truncate, "cannot be read"),
        ("manifest.json", lambda p: p.write_text("[1]"), "cannot be read"),
    ],
)
def test_latest_refuses_a_broken_checkpoint_by_name_and_takes_the_one_before(
    name: str,
    damage: Callable[[Path], Any],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = trained(tmp_path)
    damage(folder / "step_00000009" / name)
    assert latest(folder) == folder / "step_00000006"
    warning = caplog.records[-1]
    assert warning.levelno == logging.WARNING
    assert f"step_00000009/{name}" in warning.getMessage()
    assert reason in warning.getMessage()
    state, _ = run(folder=folder.parent, resume=True, budget=Budget(steps=9))
    whole, _ = run(budget=Budget(steps=9))
    assert same(state.net.state_dict(), whole.net.state_dict())


def test_latest_raises_when_no_checkpoint_is_whole(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    for path in checkpoints(folder):
        truncate(path / "net.safetensors")
    with pytest.raises(BrokenCheckpoint, match="none of the 3 checkpoints"):
        latest(folder)
    assert latest(tmp_path / "nothing") is None


def test_loading_never_executes_code(tmp_path: Path) -> None:
    """Even where an attacker has adapted the manifest."""
    witness = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(witness),))

    path = trained(tmp_path, 3) / "step_00000003"
    torch.save({"state": Payload()}, path / "optimizer.pt")
    content = (path / "optimizer.pt").read_bytes()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["optimizer.pt"] = {
        "size": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match=r"optimizer\.pt holds no optimizer's state"):
        run(folder=tmp_path, resume=True)
    assert not witness.exists()
    torch.load(path / "optimizer.pt", weights_only=False)
    assert witness.exists()  # the control: the payload is a live one


def test_weights_of_another_network_are_refused_with_the_differences(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_module(path, nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    with pytest.raises(ValueError) as caught:
        load_module(path, nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1), nn.Linear(1, 1)))
    message = str(caught.value)
    assert "0.weight has shape (3, 2), here (4, 2)" in message
    assert "2.weight is missing" in message
    with pytest.raises(ValueError, match=r"1.bias is unknown here; 1.weight is unknown here"):
        load_module(path, nn.Sequential(nn.Linear(2, 3)))
    path.write_bytes(b"no tensors")
    with pytest.raises(BrokenCheckpoint, match="no safetensors file"):
        load_module(path, nn.Linear(2, 3))


def test_weights_tied_or_not_contiguous_come_back(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4), nn.Linear(4, 4))
        net[2].weight = net[1].weight
        return net.to(memory_format=torch.channels_last)

    one, other = build(), build()
    save_module(tmp_path / "net.safetensors", one)
    load_module(tmp_path / "net.safetensors", other)
    assert same(one.state_dict(), other.state_dict())
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert other[2].weight is other[1].weight


# --- keeping


def test_a_step_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, finish = [], PendingCheckpoint.finish

    def counted(self: PendingCheckpoint, keep: int) -> Path:
        saved.append(self.step)
        return finish(self, keep)

    monkeypatch.setattr(PendingCheckpoint, "finish", counted)
    trained(tmp_path, steps=6, every=3)
    run(folder=tmp_path, resume=True, budget=Budget(steps=6), callbacks=[CheckpointCallback()])
    assert saved == [3, 6]


def test_checkpoint_is_of_its_step_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of step 3 are written only when step 5 is over."""
    over, steps = Event(), []
    save = TorchEngine.save

    def slow(self: TorchEngine, folder: Path) -> Callable[[], list[Path]]:
        write = save(self, folder)

        def late() -> list[Path]:
            assert over.wait(60)
            return write()

        return late

    class Watch(Callback):
        def on_step(self, state: TrainState, out: LossOutput) -> None:
            steps.append(len(checkpoints(tmp_path / "slow" / "checkpoints")))
            if state.step == 5:
                over.set()

    more: Any = {"optimizer": AdamW(lr=1e-2), "ema_decays": (0.5,), "budget": Budget(steps=6)}
    run(folder=tmp_path / "whole", callbacks=[CheckpointCallback(every=3, keep=9)], **more)
    monkeypatch.setattr(TorchEngine, "save", slow)
    saving = CheckpointCallback(every=3, keep=9)
    run(folder=tmp_path / "slow", callbacks=[saving, Watch()], **more)
    assert steps[:5] == [0] * 5
    assert marks(tmp_path / "slow") == marks(tmp_path / "whole")


def test_waiting_for_the_disk_is_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, finish, clocks = [], PendingCheckpoint.finish, []

    def watched(self: PendingCheckpoint, keep: int) -> Path:
        running.append(clocks[0].running)
        return finish(self, keep)

    class Clock(Callback):
        def on_start(self, state: TrainState) -> None:
            clocks.append(state.clock)

    monkeypatch.setattr(PendingCheckpoint, "finish", watched)
    saving = CheckpointCallback(every=2)
    state, _ = run(folder=tmp_path, callbacks=[Clock(), saving], budget=Budget(steps=6))
    assert running == [False] * 3
    assert state.seconds > 0


def marks(folder: Path) -> dict[str, Any]:
    """Sizes and hashes of all files but the clock's."""
    manifests = {
        p.name: json.loads((p / "manifest.json").read_text())
        for p in checkpoints(folder / "checkpoints")
    }
    return {
        f"{step}/{file}": mark
        for step, manifest in manifests.items()
        for file, mark in manifest.items()
        if file != "state.json"
    }


def test_keep_leaves_the_last_ones(tmp_path: Path) -> None:
    folder = trained(tmp_path, steps=11, every=2, keep=2)
    assert [p.name for p in checkpoints(folder)] == ["step_00000010", "step_00000011"]
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000010", "step_00000011"]


def test_keep_does_not_count_a_broken_newer_one(tmp_path: Path) -> None:
    folder = trained(tmp_path, steps=9, every=3)
    truncate(folder / "step_00000009" / "net.safetensors")
    run(
        folder=tmp_path, resume=True, budget=Budget(steps=9),
        callbacks=[CheckpointCallback(every=1, keep=1), StopAt(7)],
    )  # fmt: skip
    assert latest(folder) == folder / "step_00000007"
    run(folder=tmp_path, resume=True, budget=Budget(steps=9), callbacks=[CheckpointCallback()])
    assert latest(folder) == folder / "step_00000009"  # written anew


def test_checkpoints_come_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(Callback):
        now = 0.0

        def on_step(self, state: TrainState, out: LossOutput) -> None:
            self.now += 30.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr("trainers.checkpoints.callback.time", clock)
    saving = CheckpointCallback(every_seconds=90.0, keep=100)
    run(folder=tmp_path, callbacks=[clock, saving], budget=Budget(steps=8))
    assert [int(p.name[-2:]) for p in checkpoints(tmp_path / "checkpoints")] == [3, 6, 8]


def test_files_along_are_on_the_disk_before_the_checkpoint_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that after a power cut a record is never shorter than the checkpoint beside it."""
    from trainers.checkpoints import callback

    record, seen = tmp_path / "record", []
    record.write_text("one line")

    def synced(path: Path) -> None:
        seen.append((path.name, [p.name for p in checkpoints(tmp_path / "checkpoints")]))

    monkeypatch.setattr(callback, "sync", synced)
    saving = CheckpointCallback(every=2, keep=9, along=(record, tmp_path / "not there"))
    run(folder=tmp_path, budget=Budget(steps=4), callbacks=[saving])
    assert seen == [("record", []), ("record", ["step_00000002"])]


# --- failures


def written(saving: CheckpointCallback) -> None:
    """Wait for what is written beside the training."""
    while saving._pending is not None and not saving._pending.written:
        time.sleep(0.01)


@pytest.mark.parametrize(("limit", "file"), [(64, "net.safetensors"), (1500, "optimizer.pt")])
def test_full_disk_is_a_warning_and_leaves_older_checkpoints(
    limit: int, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Callback):
        def on_start(self, state: TrainState) -> None:
            self.context = full_disk(limit)

        def on_step(self, state: TrainState, out: LossOutput) -> None:
            if state.step in (4, 8):
                written(saving)
            if state.step == 5:
                self.context.__enter__()
            if state.step == 8:
                self.context.__exit__(None, None, None)

    saving = CheckpointCallback(every=3, keep=10)
    _, losses = run(folder=tmp_path, callbacks=[Full(), saving], budget=Budget(steps=9))
    folder = tmp_path / "checkpoints"
    assert [p.name for p in checkpoints(folder)] == ["step_00000003", "step_00000009"]
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000003", "step_00000009"]
    (warning,) = caplog.records
    assert warning.getMessage().startswith("NO CHECKPOINT at step 6: ")
    assert f"{file} cannot be written" in warning.getMessage()
    for path in checkpoints(folder):
        verify(path)
    assert torch.equal(torch.stack(losses), torch.stack(run(budget=Budget(steps=9))[1]))


def test_checkpoint_that_cannot_be_begun_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def begin(aside: Path) -> None:
        if "00000006" in aside.name:
            raise OSError(28, "No space left on device")
        aside.mkdir(parents=True)

    monkeypatch.setattr("trainers.checkpoints.checkpoint.begin", begin)
    saving = CheckpointCallback(every=3, keep=10)
    run(folder=tmp_path, callbacks=[saving], budget=Budget(steps=9))
    found = [p.name for p in checkpoints(tmp_path / "checkpoints")]
    assert found == ["step_00000003", "step_00000009"]
    assert "NO CHECKPOINT at step 6: [Errno 28]" in caplog.text


def test_a_save_that_is_interrupted_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if "00000006" in str(target):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path)
    folder = tmp_path / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]
    shutil.copytree(folder / "step_00000003", folder / ".step_00000006.partial")  # as by SIGKILL
    assert latest(folder) == folder / "step_00000003"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_step(self, state: TrainState, out: LossOutput) -> None:
            if state.step == 4:
                state.net.inner.weight.data[0, 0] = float("nan")

    with pytest.raises(NonFiniteLoss, match="step 4: the weights are not finite; not saved"):
        run(folder=tmp_path, callbacks=[Spoil(), CheckpointCallback(every=2)])
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step_00000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_with_a_checkpoint_and_no_error(number: int, tmp_path: Path) -> None:
    class Send(Callback):
        def on_step(self, state: TrainState, out: LossOutput) -> None:
            if state.step == 4:
                os.kill(os.getpid(), number)

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    state, losses = run(folder=tmp_path, callbacks=[Send(), CheckpointCallback()])
    assert (state.stop, state.step, state.finished) == (signal.Signals(number).name, 4, True)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    _, rest = run(folder=tmp_path, resume=True, callbacks=[CheckpointCallback()])
    assert torch.equal(torch.stack(losses + rest), torch.stack(run()[1]))


def test_second_signal_acts_at_once(tmp_path: Path) -> None:
    class Twice(Callback):
        def on_step(self, state: TrainState, out: LossOutput) -> None:
            if state.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    ambient = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(folder=tmp_path, callbacks=[CheckpointCallback(), Twice()])
    finally:
        signal.signal(signal.SIGINT, ambient)
    assert not checkpoints(tmp_path / "checkpoints")


# --- what killed processes leave


def test_leftovers_of_killed_processes_are_removed_by_the_next_start(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    for name in (".step_00000012.partial", ".step_00000003.discarded"):
        shutil.copytree(folder / "step_00000006", folder / name)
    run(folder=tmp_path, resume=True, budget=Budget(steps=9), callbacks=[CheckpointCallback()])
    kept = ["step_00000003", "step_00000006", "step_00000009"]
    assert sorted(p.name for p in folder.iterdir()) == kept


def test_what_a_living_process_writes_is_left_and_a_second_training_refused(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    being_written = folder / ".step_00000012.partial"
    shutil.copytree(folder / "step_00000006", being_written)
    code = (
        "import sys; from pathlib import Path; from trainers.checkpoints.locks import alone\n"
        f"with alone(Path({str(tmp_path)!r}) / 'training.lock', 'a training'):\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        go: Any = {"folder": tmp_path, "resume": True, "budget": Budget(steps=10)}
        with pytest.raises(ValueError, match="another process runs a training"):
            run(**go, callbacks=[CheckpointCallback()])
        assert being_written.exists()
        other.kill()
    run(**go, callbacks=[CheckpointCallback()])
    assert not being_written.exists()
