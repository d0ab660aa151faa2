"""The place of a process that srun started, in the variables that torch reads.

    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 objective-zoo run FILE --out DIR

Process 0 is on the first node of the step. Its port is computed from the numbers of job and step,
so that two steps of one job use different ports; MASTER_ADDR and MASTER_PORT, if set, are kept. A
batch script, a shell of salloc and a step with one task are single processes. Under torchrun,
started by srun, the variables are set already and are kept.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping


def take_place(environment: MutableMapping[str, str]) -> bool:
    """Whether srun started this process as one of several; RANK and the like are then set."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "RANK" in environment or "SLURM_PROCID" not in environment:
        return False
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = tasks
    # --gpus-per-task shows each task its own GPU alone
    environment["LOCAL_RANK"] = "0" if len(gpus) == 1 and gpus[0] else environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    step = 31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(20_000 + step % 10_000))
    return True


def first_host(nodes: str) -> str:
    """The first host of a list in Slurm's form: gpu007-a for gpu[007-009,12]-a,login."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST = {nodes!r} names no node; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
