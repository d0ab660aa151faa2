"""What an engine, a data set, a recorder, a launcher or a metric may declare beside its contract.

A declaration is a class attribute, a property or a method of the name that is given here. It must
be no field of a configured part: fields are settings, and a cell's id is made from them. Each
function reads one declaration; the first line says what holds for a part that does not declare it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from registry.protocols.data import Dataset
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


def check_batch(engine: Engine, batch_size: int, group: int = 1) -> None:
    """`engine.check_batch(batch_size)`, else nothing: ValueError for a batch that it cannot cut.

    A batch of groups of rows must consist of whole groups, and the engine must be able to cut it
    between them: as it would cut a batch that has so many rows as there are groups.
    """
    declared = getattr(engine, "check_batch", None)
    if declared is not None:
        declared(batch_size)
    if group == 1:
        return
    if batch_size % group:
        raise ValueError(
            f"the objective takes groups of {group} rows, and a batch of {batch_size} is not made "
            f"of whole groups; choose a multiple of {group} as the batch size"
        )
    try:
        if declared is not None:
            declared(batch_size // group)
    except ValueError as error:
        raise ValueError(
            f"the objective takes groups of {group} rows, which are not cut, so that a batch of "
            f"{batch_size} has {batch_size // group} parts to share out: {error}"
        ) from error


def groups_by_label(dataset: Dataset) -> bool:
    """`dataset.groups_by_label`, else False: whether `batch` can give groups of one label.

    It then takes `batch(step, n, seed, same_label=k)`: rows 0 to k - 1 have one label, rows k to
    2 k - 1 one, and so on. Data without labels need no declaration.
    """
    return getattr(dataset, "groups_by_label", False)


def scaled_by(dataset: Dataset) -> float:
    """`dataset.scaled_by`, else 1: its rows are those that people and metrics see, times this."""
    return getattr(dataset, "scaled_by", 1.0)


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
