"""The place of a process under srun, from the variables that srun sets."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.launchers.slurm import first_host, take_place


def srun(**changes: str) -> dict[str, str]:
    """What the tenth of sixteen tasks on two nodes is told."""
    return {
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "gpu[006-009]",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
        "SLURM_STEP_NUM_TASKS": "16",
    } | changes


def test_task_of_srun_takes_its_place() -> None:
    environment = srun()
    assert take_place(environment)
    told = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert told == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007"}
    assert not take_place(environment)  # a command that it starts has its place already


def test_all_tasks_of_a_step_meet_and_those_of_another_step_do_not() -> None:
    here, there, other = srun(), srun(SLURM_PROCID="0", SLURM_LOCALID="0"), srun(SLURM_STEP_ID="1")
    for environment in (here, there, other):
        take_place(environment)
    assert here["MASTER_PORT"] == there["MASTER_PORT"] != other["MASTER_PORT"]
    assert 1024 < int(here["MASTER_PORT"]) < 32768  # below the ports that Linux gives away


@pytest.mark.parametrize(
    "environment",
    [
        {},
        srun(SLURM_STEP_NUM_TASKS="1"),
        srun(RANK="3", WORLD_SIZE="4"),  # torchrun within a task
        {k: v for k, v in srun().items() if "STEP" not in k},  # the batch script itself
    ],
)
def test_single_processes_and_placed_ones_are_left_alone(environment: Any) -> None:
    before = dict(environment)
    assert not take_place(environment)
    assert environment == before


@pytest.mark.parametrize(("gpus", "number"), [("3", "0"), ("0,1,2,3", "1"), ("", "1")])
def test_task_that_sees_one_gpu_takes_it(gpus: str, number: str) -> None:
    environment = srun(CUDA_VISIBLE_DEVICES=gpus)
    take_place(environment)
    assert environment["LOCAL_RANK"] == number


def test_master_may_be_chosen() -> None:
    environment = srun(MASTER_ADDR="10.0.0.7", MASTER_PORT="4000")
    take_place(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.7", "4000")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a1,a2", "a1"),
        ("gpu[007-009,12]", "gpu007"),
        ("gpu[12,007-009]-ib.cluster,login", "gpu12-ib.cluster"),
        ("r[1-2]n[03-04]", "r1n03"),
    ],
)
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
