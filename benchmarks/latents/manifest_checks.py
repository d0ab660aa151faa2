"""What a folder of latents must say of itself, so that damage and other constants are told by name.

A manifest may come from other people: files that it names must lie in its own folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.latents.shards import DTYPES, MANIFEST, Manifest, channel_statistics

CONSTANTS, CHANNEL = "constants", "channel"  # what plan["normalise"] says of scale and shift
TOLERANCE = 1e-4  # of constants, against those that they are made from


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, checked; ValueError that says what is wrong with it."""
    manifest = Manifest.load(folder)
    where, plan = folder / MANIFEST, manifest.plan
    _check_plan(plan, where)
    _check_shards(manifest, folder)
    channels = manifest.shape[0]
    for name, values in (("scale", manifest.scale), ("shift", manifest.shift)):
        good = len(values) == channels and all(map(_is_finite, values))
        if not good or (name == "scale" and 0 in values):
            raise ValueError(
                f"{where}: {name} is {_shown(values)}; it must be {channels} finite numbers, one "
                f"for each channel{', none of them 0' if name == 'scale' else ''}"
            )
    if plan.get("normalise") == CHANNEL:
        mean, std = channel_statistics(manifest.shards)
        check_constants(manifest, [1 / s for s in std], mean, "the statistics of its shards")
    return manifest


def check_constants(
    manifest: Manifest, scale: Sequence[float], shift: Sequence[float], source: str
) -> None:
    """ValueError unless the manifest's constants are these, which come from `source`."""
    for name, ours, theirs in (("scale", manifest.scale, scale), ("shift", manifest.shift, shift)):
        if not all(
            math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            for a, b in zip(ours, theirs, strict=True)
        ):
            raise ValueError(
                f"the latents' {MANIFEST} has the {name} {_shown(ours)}, and {source} give "
                f"{_shown(theirs)}: a network would train on latents of another scale. Run the "
                "encode command again: it writes the manifest anew"
            )


def _check_plan(plan: Mapping[str, Any], where: Path) -> None:
    vae = plan.get("vae")
    about = ("kind", "path", "subfolder", "sha256")
    good = {
        "latent_shape": _is_shape(plan.get("latent_shape")),
        "classes": isinstance(plan.get("classes"), list),
        "flips": isinstance(plan.get("flips"), bool),
        "logvar": isinstance(plan.get("logvar"), bool),
        "dtype": plan.get("dtype") in DTYPES,
        "vae": isinstance(vae, dict) and all(isinstance(vae.get(key), str) for key in about),
    }
    if wrong := [name for name, fits in good.items() if not fits]:
        raise ValueError(
            f"{where}: {', '.join(f'{name} is {plan.get(name)!r}'[:80] for name in wrong)}, which "
            "no encoding writes. Run the encode command again, or take the folder from its source"
        )


def _check_shards(manifest: Manifest, folder: Path) -> None:
    inside = folder.resolve()
    for shard in manifest.shards:
        path = folder / shard.file
        if Path(shard.file).name != shard.file or path.resolve().parent != inside:
            raise ValueError(
                f"{folder / MANIFEST} names the shard {shard.file!r}, which leads to "
                f"{path.resolve()} and out of the folder. Put the shards into the folder itself"
            )
    rows = [shard.rows for shard in manifest.shards]
    # A row is found by the length of the first shard, so that all but the last have its length.
    if not rows or min(rows) < 1 or set(rows[:-1]) - {rows[0]} or rows[-1] > rows[0]:
        raise ValueError(
            f"{folder / MANIFEST} has shards of {_shown(rows)} rows; all but the last have the "
            "same number, and the last has no more. Run the encode command again"
        )


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(side) is int and side > 0 for side in value)
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _shown(values: Sequence[Any]) -> str:
    more = ", ..." if len(values) > 4 else ""
    return ", ".join(f"{v:.6g}" if _is_finite(v) else repr(v)[:20] for v in values[:4]) + more
