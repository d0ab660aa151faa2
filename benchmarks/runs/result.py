"""What a finished run leaves in its folder, and how to tell that it is finished."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.records.jsonl import read_record, read_start
from registry.folders import file_in
from trainers.checkpoints.whole_files import file_sha256, read_json, write_json

MODEL, RESULT = "model.safetensors", "result.json"
REAL_SCORES = {"_floor": "lower", "_ceiling": "higher"}  # endings of the names: which is better
SAMPLES, REAL = "samples.safetensors", "real.safetensors"  # see benchmarks/runs/samples.py

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a finished run.

    `steps`, `images` and `seconds` include what was trained first, a teacher or the network itself.
    """

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
    pretrain_steps: int = 0
    pretrain_seconds: float = 0.0
    weights_sha256: str = ""  # of the file MODEL; '' in a folder of an earlier version
    better: str = ""  # "lower" or "higher" where the run's metric declares one for its values

    @property
    def seconds_per_step(self) -> float:
        """Seconds that one step of the objective takes; what was trained first is left out."""
        return (self.seconds - self.teacher_seconds - self.pretrain_seconds) / self.own_steps

    @property
    def own_steps(self) -> int:
        """The steps of the objective itself."""
        return self.steps - self.teacher_steps - self.pretrain_steps

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
        """ValueError, which names the file, for one that is no result."""
        content = read_json(folder / RESULT)
        try:
            result = cls(**content)
            numbers = (result.seed, result.num_params, result.steps, result.images, result.seconds)
            if not all(isinstance(n, int | float) for n in (*numbers, *result.values.values())):
                raise TypeError("a figure is no number")
        except (TypeError, AttributeError) as problem:
            raise ValueError(f"{folder / RESULT} cannot be read: it lacks figures") from problem
        return result


def has_result(folder: Path) -> bool:
    """Whether the run in `folder` has its result.

    A file that cannot be read, such as one that a full disk left empty, is no result: a warning
    names it, and the run is resumed to make it again.
    """
    if not (folder / RESULT).exists():
        return False
    try:
        Result.load(folder)
    except ValueError as problem:
        log.warning("%s. So this run is not finished", problem)
        return False
    return True


def finished_run(folder: Path) -> Path:
    """The weights of the finished run in `folder`; ValueError if there is none."""
    if not has_result(folder):
        inside = sorted(p.parent.name for p in folder.glob(f"*/{RESULT}"))
        hint = f" There are runs in it: {', '.join(inside)}" if inside else ""
        why = f"its {RESULT} cannot be read" if (folder / RESULT).exists() else f"no {RESULT}"
        raise ValueError(f"{folder} holds no finished run ({why}).{hint}")
    return folder / MODEL


def measured_weights(folder: Path) -> Path:
    """The weights of the finished run in `folder`, checked to be those that it has measured.

    ValueError if there is no finished run, or if the file was changed or exchanged since. Earlier
    versions recorded no hash, and their weights are taken as they are.
    """
    finished_run(folder)
    path = file_in(folder, MODEL)
    recorded = Result.load(folder).weights_sha256
    if recorded and path.is_file() and (now := file_sha256(path)) != recorded:
        raise ValueError(
            f"{path} is not the file that the run has measured: its sha256 was {recorded} and is "
            f"{now}. It was damaged or exchanged: restore it. To use it all the same, say "
            f"--weights {path}"
        )
    return path


def recorded_identity(folder: Path) -> str:
    """The identity of the data that the run in `folder` recorded; '' if there is no record yet."""
    return read_record(folder).tags.get("data", "") if read_start(folder) else ""
