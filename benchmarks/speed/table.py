"""The result of a benchmark: as a table, as JSON, and compared with a stored one."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import markdown
from benchmarks.speed.overheads import Overheads

TOLERANCE = 0.1  # a ratio may grow by this share; between runs on a busy machine it moves by 0.05


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step of a case costs; ratios are to flow matching of its group."""

    case: str
    group: str  # backbone/precision
    seconds: float
    ratio: float
    passes: float  # in forwards of the batch
    theory: float  # the ratio by passes
    images_per_second: float
    outside: float  # share of the step outside the network
    memory_mib: float | None = None
    memory_ratio: float | None = None

    @property
    def gap(self) -> float:
        return self.ratio / self.theory - 1


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Everything that one benchmark measured."""

    machine: str
    costs: Sequence[StepCost]
    overheads: Sequence[Overheads]

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Speed:
        try:
            return cls.of(json.loads(path.read_text()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no result of `objective-zoo bench`: {error}") from None

    @classmethod
    def of(cls, read: Mapping[str, Any]) -> Speed:
        """From what its JSON text holds."""
        costs = [StepCost(**cost) for cost in read["costs"]]
        overheads = [Overheads(**own) for own in read["overheads"]]
        return cls(machine=read["machine"], costs=costs, overheads=overheads)

    def metrics(self) -> dict[str, float]:
        """By "GROUP/CASE/WHAT", for a record."""
        found = {
            f"{cost.group}/{cost.case}/{name}": value
            for cost in self.costs
            for name, value in asdict(cost).items()
            if isinstance(value, float)
        }
        for own in self.overheads:
            for name in ("loop", "sampling", "logging"):
                found[f"{own.group}/overhead/{name}"] = getattr(own, name)
        return found


def speed_table(speed: Speed) -> str:
    """Markdown, one table per group."""
    sections = []
    for own in speed.overheads:
        costs = [cost for cost in speed.costs if cost.group == own.group]
        sections.append(
            f"{own.group.replace('/', ', ')} on {speed.machine}; flow matching takes "
            f"{costs[0].seconds:.3f} s a step"
        )
        sections.append(markdown(HEADER, [row_of(cost) for cost in costs]))
        sections.append(
            f"The loop adds {own.loop:+.1%} to a bare one, sampling {own.sampling:+.1%} to bare "
            f"network calls; logging takes {own.logging:.2%} of a step."
        )
    return "\n\n".join(sections)


HEADER = ["case", "time", "passes", "gap", "images/s", "outside network", "peak memory"]


def row_of(cost: StepCost) -> list[str]:
    memory = "-" if cost.memory_ratio is None else f"{cost.memory_ratio:.2f}"
    if cost.memory_mib is not None:
        memory += f" ({cost.memory_mib:,.0f} MiB)"
    return [
        cost.case,
        f"{cost.ratio:.2f}",
        f"{cost.theory:.2f}",
        f"{cost.gap:+.0%}",
        f"{cost.images_per_second:.1f}",
        f"{cost.outside:.1%}",
        memory,
    ]


def compare(new: Speed, old: Speed, tolerance: float = TOLERANCE) -> tuple[list[str], list[str]]:
    """Ratios of both results as lines, and those that grew by more than the tolerance."""
    before = {(cost.group, cost.case): cost for cost in old.costs}
    lines, grown = [], []
    for cost in new.costs:
        stored = before.get((cost.group, cost.case))
        if stored is None:
            lines.append(f"{cost.group} {cost.case}: not in the stored result")
            continue
        for what, now, was in _pairs(cost, stored):
            change = f"{what} {was:.2f}, now {now:.2f} ({now / was - 1:+.0%})"
            lines.append(line := f"{cost.group} {cost.case}: {change}")
            if now > was * (1 + tolerance):
                grown.append(line)
    if not any((cost.group, cost.case) in before for cost in new.costs):
        raise ValueError("the stored result has none of the cases that were measured")
    return lines, grown


def _pairs(new: StepCost, old: StepCost) -> Iterator[tuple[str, float, float]]:
    yield "time", new.ratio, old.ratio
    if new.memory_ratio is not None and old.memory_ratio is not None:
        yield "memory", new.memory_ratio, old.memory_ratio


def machine() -> str:
    """The processor, the threads or the GPU, and torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    threads = torch.get_num_threads()
    return (
        f"{model or platform.processor() or platform.machine()}, {threads} "
        f"thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
    )
