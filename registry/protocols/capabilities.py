"""What an engine, a recorder, a launcher or a metric may declare beside its contract.

A declaration is a class attribute, a property or a method of the name that is given here. It must
be no field of a configured part: fields are settings, and a cell's id is made from them. Each
function reads one declaration; the first line says what holds for a part that does not declare it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from registry.protocols.runs import Engine, Launcher, Metric, Recorder, RecordStore


def has_whole_weights(engine: Engine) -> bool:
    """`engine.whole_weights`, else True: whether all weights are there while the network runs.

    Where they are not, networks cannot be compiled, and derivatives take passes of their own.
    """
    return getattr(engine, "whole_weights", True)


def runs_in_several_processes(engine: Engine) -> bool:
    """`engine.several_processes`, else False: whether processes can share a run."""
    return getattr(engine, "several_processes", False)


def provider_files(engine: Engine, batch_size: int) -> Mapping[str, str]:
    """`engine.provider_files(batch_size)`, else none: texts to record with the run, by file name.

    They are the settings that the engine hands to the library behind it.
    """
    declared = getattr(engine, "provider_files", None)
    return {} if declared is None else declared(batch_size)


def check_batch(engine: Engine, batch_size: int) -> None:
    """`engine.check_batch(batch_size)`, else nothing: ValueError for a batch that it cannot cut."""
    if (declared := getattr(engine, "check_batch", None)) is not None:
        declared(batch_size)


def keeps_records(recorder: Recorder) -> bool:
    """`recorder.keeps_records`, else True: whether a run's folder holds a record.jsonl to read."""
    return getattr(recorder, "keeps_records", True)


def store_of(recorder: Recorder, folder: Path) -> RecordStore | None:
    """`recorder.store_for(folder)`, else `recorder.store`, else None: where records are copied to.

    The folder is that of the comparison. A store is for others to read.
    """
    if (declared := getattr(recorder, "store_for", None)) is not None:
        return declared(folder)
    return getattr(recorder, "store", None)


def better_of(metric: Metric) -> str:
    """`metric.better`, else "": which of its values are better, "lower" or "higher".

    "" says nothing, for values of which some are better low and others high. ValueError for another
    word.
    """
    declared: str = getattr(metric, "better", "")
    if declared not in ("lower", "higher", ""):
        raise ValueError(
            f"metric {type(metric).__name__} declares better = {declared!r}; it must be 'lower' or "
            "'higher'"
        )
    return declared


def is_serial(launcher: Launcher) -> bool:
    """`launcher.serial`, else False: whether it runs one cell after the other in this process."""
    return getattr(launcher, "serial", False)
