"""A plan as text: one arm with its memory at each stage, or several arms with a row each."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.markdown import markdown
from benchmarks.planning.predict import Machine, Prediction, StageFit
from benchmarks.planning.zero_memory import KINDS

SAID = {
    "optimizer": "optimizer state",
    "activations": "activations for backward",
    "workspace": "workspace beside them",
    "buckets": "buckets of gradients",
    "gathered": "gathered weights",
}


def planner_table(found: Sequence[Prediction], machine: Machine) -> str:
    blocks = [_header(prediction, machine) for prediction in found]
    if len(found) == 1:
        blocks.append(_stages(found[0].fits))
    else:
        blocks = [*blocks, _arms(found)]
    return "\n\n".join([*blocks, *_remedies(found)])


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _operations(count: float) -> str:
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""))
    unit, word = next((u, w) for u, w in units if count >= u / 10)
    return f"{count / unit:,.1f} {word}FLOP"


def _header(p: Prediction, machine: Machine) -> str:
    lines = [
        f"{p.arm + ': ' if p.arm else ''}{p.objective} on {p.backbone}, {p.parameters:,} "
        f"parameters, batch {p.batch_size} of {' x '.join(map(str, p.shape))} ({p.shape_from}), "
        f"{p.precision}, {machine.gpus} GPU{'s' * (machine.gpus > 1)} of {size(machine.memory)}",
        f"{_operations(p.flops_per_image)} an image, "
        f"{_operations(p.flops_per_image * p.batch_size)} a step, all passes counted",
    ]
    if p.images_per_second:
        how = f"at {machine.tflops:g} TFLOP/s a GPU " if machine.tflops else ""
        days = f"; the run's {p.images:,} in {p.days:.1f} days" if p.days and p.images else ""
        lines.append(
            f"{how}{p.images_per_second:,.0f} images a second, {p.images_per_day:,.0f} a day{days}"
        )
    return "\n".join(lines)


def _stages(fits: Sequence[StageFit]) -> str:
    kinds = [k for k in KINDS if any(f.memory.kinds.get(k, 0) for f in fits)]
    rows = [[SAID.get(k, k), *(size(f.memory.kinds.get(k, 0)) for f in fits)] for k in kinds]
    rows.append(["total on a GPU", *(size(f.memory.total) for f in fits)])
    if any(f.memory.host for f in fits):
        rows.append(["on the host, a process", *(size(f.memory.host) for f in fits)])
    rows.append(["largest during", *(f.memory.moment for f in fits)])
    rows.append(["micro-batch", *(str(f.micro_batch) if f.fits else "does not fit" for f in fits)])
    rows.append(
        ["gradient_accumulation_steps", *(str(f.accumulate) if f.fits else "-" for f in fits)]
    )
    if any(f.deepspeed for f in fits):
        estimates = [size(f.deepspeed) if f.deepspeed else "-" for f in fits]
        rows.append(["states by DeepSpeed's estimate", *estimates])
    return markdown(["", *(_stage(f) for f in fits)], rows)


def _arms(found: Sequence[Prediction]) -> str:
    def cell(f: StageFit) -> str:
        return f"{size(f.memory.total)}, micro-batch {f.micro_batch}" if f.fits else "does not fit"

    header = ["arm", *(_stage(f) for f in found[0].fits)]
    return markdown(header, [[p.arm or "-", *(cell(f) for f in p.fits)] for p in found])


def _remedies(found: Sequence[Prediction]) -> list[str]:
    return [
        f"{p.arm + ', ' if p.arm else ''}{_stage(f)} does not fit with one row a GPU; what fits: "
        f"{f.remedy}"
        for p in found
        for f in p.fits
        if not f.fits
    ]


def _stage(fit: StageFit) -> str:
    return "torch_engine" if fit.stage is None else f"stage {fit.stage}"
