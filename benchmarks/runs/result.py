"""What a finished run leaves in its folder, and how to tell that it is finished."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trainers.checkpoints.whole_files import write_json

MODEL, RESULT = "model.safetensors", "result.json"
REAL_SCORES = {"_floor": "lower", "_ceiling": "higher"}  # endings of the names: which is better
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
    better: str = ""  # "lower" or "higher" where the run's metric declares one for its values

    @property
    def seconds_per_step(self) -> float:
        """Seconds that one step of the run takes; the steps of its teacher are left out."""
        return (self.seconds - self.teacher_seconds) / (self.steps - self.teacher_steps)

    def better_of(self, metric: str) -> str:
        """Which values of this name are better, "lower" or "higher"; "" where nothing says so.

        What real data score is called a floor or a ceiling; errors are better low.
        """
        for ending, better in REAL_SCORES.items():
            if f"{metric}{ending}" in self.values:
                return better
        return "lower" if "_error" in metric else self.better

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
