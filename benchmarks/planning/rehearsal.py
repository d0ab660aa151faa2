"""Rehearses what is planned, as far as this machine can: where the data are here.

A plan is mostly for another machine. So the run's device is not asked for, and a network that is
too large to be trained for two steps here is not rehearsed; a note says so.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.grids.axes import Declared
from benchmarks.grids.cells import plan
from benchmarks.grids.rehearsal import rehearse
from benchmarks.grids.request import Request
from benchmarks.planning.outline import outline

MOST_PARAMETERS = 100_000_000

log = logging.getLogger(__name__)


def rehearse_here(request: Request) -> None:
    """ValueError lists what would end any of the arms; a note says why nothing was rehearsed.

    What a run has trained with may be refused today: of a file in its folder that is a warning.
    """
    arms = request.arms()
    only = arms if arms != ("",) else ()  # what the file binds for its other arms is not asked for
    here = replace(request, bindings=(*request.bindings, "run.device = 'auto'"), only=only)
    for arm in arms:
        made = outline(request, arm)
        why = ""
        if made.shape_from != "of the data":
            why = "its data are not here"
        elif made.num_params > MOST_PARAMETERS:
            why = f"its network has {made.num_params:,} parameters"
        if why:
            log.info("%s is not rehearsed: %s", arm or request.name, why)
            return
    try:
        planned = plan(here, Declared())
        with tempfile.TemporaryDirectory() as folder:
            rehearse(planned.cells, Path(folder), planned.launcher)
    except ValueError as error:
        if not request.of_a_run:
            raise
        log.warning("a new run of %s is refused today: %s", request.file, error)
