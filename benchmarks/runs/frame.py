"""The results of runs as a pandas data frame, which tables, files and notebooks share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from benchmarks.runs.result import Result

COST = "cost/"  # begins the names of costs, as in the records


def frame(rows: Mapping[str, Sequence[Result]]) -> pd.DataFrame:
    """One line for each number of each run; `rows` names the runs that one row of a table joins.

    The columns are row, run, objective, sampler, seed, metric, nfe, value and better, "lower" or
    "higher" where it is known. "nfe4/fid" is the
    metric "fid" at nfe 4; a value that belongs to no NFE has <NA> there. What real data score keeps
    its recorded name, such as "fid_floor". Costs are the metrics "cost/steps", "cost/seconds", ...
    """
    lines = [
        {
            **{"row": row, **_about(result), "metric": metric, "nfe": nfe, "value": float(value)},
            "better": "" if metric.startswith(COST) else result.better_of(metric),
        }
        for row, results in rows.items()
        for result in results
        for metric, nfe, value in _numbers(result)
    ]
    columns = ["row", "run", "objective", "sampler", "seed", "metric", "nfe", "value", "better"]
    return pd.DataFrame(lines, columns=columns).astype({"nfe": "Int64"})


def _about(result: Result) -> dict[str, object]:
    return {
        "run": result.name,
        "objective": result.objective,
        "sampler": result.sampler,
        "seed": result.seed,
    }


def _numbers(result: Result) -> Iterator[tuple[str, int | None, float]]:
    for key, value in result.values.items():
        if match := re.fullmatch(r"nfe(\d+)/(.+)", key):
            yield match[2], int(match[1]), value
        else:
            yield key, None, value
    costs = {
        "steps": result.steps,
        "images": result.images,
        "seconds": result.seconds,
        "parameters": result.num_params,
        "teacher_steps": result.teacher_steps,
        "teacher_seconds": result.teacher_seconds,
        "pretrain_steps": result.pretrain_steps,
        "pretrain_seconds": result.pretrain_seconds,
    }
    yield from ((f"{COST}{name}", None, value) for name, value in costs.items())
