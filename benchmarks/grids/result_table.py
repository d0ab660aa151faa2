"""The table of a comparison, as aligned Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.markdown import markdown
from benchmarks.runs.result import Result

if TYPE_CHECKING:
    import pandas as pd


def result_table(results: Sequence[Result], counts: Sequence[int] = ()) -> str:
    """Arm x NFE of the first metric with cost and budget, fidelity and diversity, exact errors.

    `counts` says of how many runs each row is the mean.
    """
    first = results[0].values
    keys = list(dict.fromkeys(key for result in results for key in result.values))
    nfes = sorted({int(key[3:].split("/")[0]) for key in keys if key.startswith("nfe")})
    metric = next(key.split("/", 1)[1] for key in keys if key.startswith("nfe"))
    title = f"{metric} by number of network evaluations (NFE), lower is better"
    if (floor := first.get(f"{metric}_floor")) is not None:
        title += f"; real data score {floor:.4g}"
    steps = [f"NFE {n}" for n in nfes]
    header = ["arm", "sampler", *steps, "s/step", "steps", "images", "seconds", "parameters"]
    rows = [
        [r.name, r.sampler, *(_number(r.values, f"nfe{n}/{metric}") for n in nfes), *_cost(r)]
        for r in results
    ]
    if max(counts, default=1) > 1:
        title += "; means over n runs"
        header.append("n")
        rows = [[*row, str(count)] for row, count in zip(rows, counts, strict=True)]
    parts = [f"{title}:", markdown(header, rows)]
    pair = [next((k[5:] for k in keys if k.startswith(f"nfe1/{p}_")), "") for p in _QUALITY]
    if all(pair):
        lines = [[r.name, *(_quality(r, n, pair) for n in nfes)] for r in results]
        real = _ceilings(first, pair)
        parts += [f"precision / recall, higher is better{real}:", markdown(["arm", *steps], lines)]
    exact = sorted(key for key in keys if "_error" in key and not key.startswith("nfe"))
    if exact:
        lines = [[r.name, *(_number(r.values, key) for key in exact)] for r in results]
        parts += ["error against the exact flow, relative to the data's scale:"]
        parts += [markdown(["arm", *exact], lines)]
    return "\n\n".join(parts)


def average(name: str, results: Sequence[Result]) -> Result:
    """The mean of runs that differ in their seeds, under one name."""
    keys = [key for key in results[0].values if all(key in r.values for r in results)]
    return replace(
        results[0],
        name=name,
        values={key: fmean(r.values[key] for r in results) for key in keys},
        steps=round(fmean(r.steps for r in results)),
        images=round(fmean(r.images for r in results)),
        seconds=fmean(r.seconds for r in results),
        teacher_steps=round(fmean(r.teacher_steps for r in results)),
        teacher_seconds=fmean(r.teacher_seconds for r in results),
    )


def wide(results: Mapping[Any, Sequence[Result]]) -> pd.DataFrame:
    """Means over seeds: rows x (metric, NFE); what real data score is under the NFE "real"."""
    import pandas as pd

    rows = {}
    for name, found in results.items():
        mean = average(str(name), found)
        row: dict[tuple[str, Any], Any] = {}
        for key, value in mean.values.items():
            row[_column(key)] = value
        row["cost", "seeds"] = len(found)
        row["cost", "seconds_per_step"] = mean.seconds_per_step
        row |= {("cost", n): getattr(mean, n) for n in ("steps", "images", "seconds")}
        row["cost", "parameters"] = mean.num_params
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.columns = pd.MultiIndex.from_tuples(table.columns, names=["metric", "nfe"])
    return table


def _column(key: str) -> tuple[str, Any]:
    if key.startswith("nfe"):
        nfe, metric = key[3:].split("/", 1)
        return metric, int(nfe)
    for end in ("_floor", "_ceiling"):
        if key.endswith(end):
            return key.removesuffix(end), "real"
    return key, ""


_QUALITY = ("precision", "recall")


def _cost(result: Result) -> list[str]:
    teacher = f" ({result.teacher_steps:,} teacher)" if result.teacher_steps else ""
    return [
        f"{result.seconds_per_step:.4f}",
        f"{result.steps:,}{teacher}",
        f"{result.images:,}",
        f"{result.seconds:.0f}",
        f"{result.num_params:,}",
    ]


def _quality(result: Result, nfe: int, names: Sequence[str]) -> str:
    values = [result.values.get(f"nfe{nfe}/{name}") for name in names]
    return " / ".join("-" if value is None else f"{value:.2f}" for value in values)


def _ceilings(values: dict[str, float], names: Sequence[str]) -> str:
    real = [values[f"{name}_ceiling"] for name in names if f"{name}_ceiling" in values]
    return f"; real data score {' / '.join(f'{v:.2f}' for v in real)}" if real else ""


def _number(values: dict[str, float], key: str) -> str:
    return f"{values[key]:.4g}" if key in values else "-"
