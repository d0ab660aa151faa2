"""The table of a comparison, as aligned Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.runner import Result


def result_table(results: Sequence[Result]) -> str:
    """Arm x NFE of the first metric, with cost and budget; then errors against the exact flow."""
    first = results[0].values
    nfes = sorted({int(k[3:].split("/")[0]) for r in results for k in r.values if k[:3] == "nfe"})
    metric = next(key.split("/", 1)[1] for key in first if key.startswith("nfe"))
    header = ["arm", "sampler", *(f"NFE {n}" for n in nfes), "s/step", "steps", "images", "seconds"]
    rows = [
        [
            result.name,
            result.sampler,
            *(_number(result.values.get(f"nfe{n}/{metric}")) for n in nfes),
            f"{result.seconds_per_step:.4f}",
            f"{result.steps:,}"
            + (f" ({result.teacher_steps:,} teacher)" if result.teacher_steps else ""),
            f"{result.images:,}",
            f"{result.seconds:.0f}",
            f"{result.num_params:,}",
        ]
        for result in results
    ]
    title = f"{metric} by number of network evaluations (NFE), lower is better"
    if (floor := first.get(f"{metric}_floor")) is not None:
        title += f"; real data score {floor:.4g}"
    parts = [f"{title}:\n", _markdown([*header, "parameters"], rows)]
    keys = dict.fromkeys(key for result in results for key in result.values)
    exact = sorted(key for key in keys if "_error" in key and not key.startswith("nfe"))
    if exact:
        lines = [[r.name, *(_number(r.values.get(key)) for key in exact)] for r in results]
        parts += ["\nerror against the exact flow, relative to the data's scale:\n"]
        parts += [_markdown(["arm", *exact], lines)]
    return "\n".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|"
        + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
