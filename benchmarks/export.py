"""`objective-zoo export`: a finished run, or a public checkpoint, as an exported folder."""

from __future__ import annotations

from pathlib import Path

from benchmarks.exported import save_exported
from benchmarks.pretrained import import_file
from benchmarks.sampling import open_run


def export_run(
    run: Path, out: Path, weights: Path | None = None, bindings: tuple[str, ...] = ()
) -> Path:
    """Write the weights of a finished run, and what they belong to, into `out`.

    They are those that were measured, unless a file of others is given.
    """
    experiment, net = open_run(run, bindings, weights=weights)
    return save_exported(
        net,
        out,
        objective=experiment.objective_name,
        sampler=experiment.sampler_name,
        data=experiment.dataset.identity(),
    )


def export_file(file: Path, out: Path, layout: str = "", num_heads: int | None = None) -> Path:
    """Convert a public checkpoint; says which of its tensors were not needed."""
    imported = import_file(file, layout, num_heads)
    save_exported(imported.network(), out, layout=imported.layout, source=file.name)
    for name, reason in imported.unused.items():
        print(f"not needed: {name} ({reason})")
    return out
