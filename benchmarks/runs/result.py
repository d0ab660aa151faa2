"""What a finished run leaves in its folder, and how to tell that it is finished."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.records.jsonl import read_record, read_start
from trainers.checkpoints.whole_files import write_json

MODEL, RESULT = "model.safetensors", "result.json"
SAMPLES, REAL = "samples.safetensors", "real.safetensors"  # see benchmarks/runs/samples.py


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a finished run. `steps`, `images` and `seconds` include its teacher's."""

    name: str
    objective: str
    backbone: str
    sampler: str
    seed: int
    values: dict[str, float]  # "nfe1/fd_...", floors by name
    num_params: int
    steps: int
    images: int
    seconds: float
    teacher_steps: int = 0
    teacher_seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float:
        """Seconds that one step of the run takes; the steps of its teacher are left out."""
        return (self.seconds - self.teacher_seconds) / (self.steps - self.teacher_steps)

    def save(self, folder: Path) -> None:
        write_json(folder / RESULT, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Result:
        return cls(**json.loads((folder / RESULT).read_text()))


def finished_run(folder: Path) -> Path:
    """The weights of the finished run in `folder`; ValueError if there is none."""
    if not (folder / RESULT).exists():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{RESULT}"))
        hint = f" There are runs in it: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} holds no finished run (no {RESULT}).{hint}")
    return folder / MODEL


def recorded_identity(folder: Path) -> str:
    """The identity of the data that the run in `folder` recorded; '' if there is no record yet."""
    return read_record(folder).tags.get("data", "") if read_start(folder) else ""
