"""The place of a process that srun started, in the variables that torch reads.

    srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 objective-zoo run FILE --out DIR

Process 0 is on the first node of the step. Its port comes from the numbers of job and step, so that
two steps of a job do not meet; MASTER_ADDR and MASTER_PORT may be set to others. A batch script, a
shell of salloc and a step of one task are single processes, and torchrun under srun has given the
places itself.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping


def take_place(environment: MutableMapping[str, str]) -> bool:
    """Whether srun started this process as one of several; its place is then in RANK and others."""
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
    """Of Slurm's list: in gpu[007-009,12]-a,login it is gpu007-a."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST = {nodes!r} names no node; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
