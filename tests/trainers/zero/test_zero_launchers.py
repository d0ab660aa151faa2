"""The commands of docs/scaling.md, run: torchrun, srun's variables, DeepSpeed's own launcher.

Two nodes are two agents on this machine, and ssh and pdsh are scripts that stay here.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from tiny_runs import NETWORK, losses, sets
from zero_runs import GIN, PATIENCE

from benchmarks.launchers.ranks import free_port

pytestmark = pytest.mark.deepspeed
BIN = Path(sys.executable).parent
RUN = ("-m", "benchmarks.cli")
STEPS = "run.steps = 3"


def words(folder: Path) -> list[str]:
    (folder / "tiny.gin").write_text(GIN.format(imports=""))
    where = [str(folder / "tiny.gin"), "--out", str(folder / "out")]
    # A binding with quotes, which launchers over ssh have to keep
    return ["run", *where, *sets(*NETWORK, STEPS, "zero_engine.precision = 'bf16'")]


def end(agent: subprocess.Popen[str]) -> None:
    """With the processes that it started, which are in sessions of their own."""
    if agent.poll() is None:
        for process in [*psutil.Process(agent.pid).children(recursive=True), agent]:
            process.kill()


def ends(*commands: Sequence[object], environments: Sequence[Mapping[str, str]] = ()) -> None:
    """Start all, one per node or task, and wait until all have ended well."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    base |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{base['PATH']}"}
    started = [
        subprocess.Popen(
            [str(word) for word in command], env={**base, **more}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )
        for command, more in zip(commands, environments or [{}] * len(commands), strict=True)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            end(process)
    statuses = [process.returncode for process in started]
    assert statuses == [0] * len(started), "\n".join(told)[-6000:]


def is_one_run_of_two(folder: Path) -> None:
    cell = folder / "out" / "dumo"
    assert sorted(losses(cell)) == [1, 2, 3]
    assert (cell / "result.json").exists()
    config = json.loads((cell / "deepspeed.json").read_text())
    assert config["train_micro_batch_size_per_gpu"] == 4  # half of the batch
    assert "precision = 'bf16'" in (cell / "operative.gin").read_text()


@pytest.mark.faults
def test_torchrun_on_two_nodes_makes_one_run(tmp_path: Path) -> None:
    nodes = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d"]
    meet = ["--rdzv_id", "7", "--rdzv_endpoint", f"127.0.0.1:{free_port()}"]
    command = [BIN / "torchrun", *nodes, *meet, *RUN, *words(tmp_path)]
    ends(command, command)
    is_one_run_of_two(tmp_path)


@pytest.mark.faults
def test_torchrun_on_one_node_makes_one_run(tmp_path: Path) -> None:
    ends([BIN / "torchrun", "--standalone", "--nproc_per_node", 2, *RUN, *words(tmp_path)])
    is_one_run_of_two(tmp_path)


@pytest.mark.faults
def test_torchrun_restarts_a_run_that_was_told_to_resume(tmp_path: Path) -> None:
    steps = "run.steps = 40"
    command = ["--standalone", "--nproc_per_node", 2, "--max-restarts", 1, *RUN]
    command += [*words(tmp_path), "--set", steps, "--resume"]
    anew = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # or torch may look for the dead
    agent = subprocess.Popen(
        [str(word) for word in (BIN / "torchrun", *command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **anew}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    record = tmp_path / "out" / "dumo" / "record.jsonl"
    until = time.monotonic() + PATIENCE
    try:
        while not (record.exists() and len(losses(record.parent)) >= 3):
            assert time.monotonic() < until
            assert agent.poll() is None
            time.sleep(0.1)
        psutil.Process(agent.pid).children()[1].kill()
        told = agent.communicate(timeout=PATIENCE)[1]
    finally:
        end(agent)
    assert agent.returncode == 0, told[-6000:]
    assert sorted(losses(record.parent)) == list(range(1, 41))


@pytest.mark.faults
def test_two_tasks_of_srun_make_one_run(tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
    }
    tasks = [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    command = [sys.executable, *RUN, *words(tmp_path)]
    ends(command, command, environments=tasks)
    is_one_run_of_two(tmp_path)


@pytest.mark.faults
def test_deepspeed_launcher_on_one_node_makes_one_run(tmp_path: Path) -> None:
    alone = ["--num_gpus", 2, "--master_port", free_port(), "--no_local_rank", "--module"]
    ends([BIN / "deepspeed", *alone, RUN[1], *words(tmp_path)])
    is_one_run_of_two(tmp_path)


SSH = "#!/bin/sh\necho 127.0.0.1\n"  # ssh HOST hostname -I
PDSH = r"""#!/bin/sh
# pdsh -S -f 1024 -w node0,node1 COMMAND, where ssh starts with an empty environment
shift 5
i=0
for host in $(echo "$FAKE_HOSTS" | tr , ' '); do
  here=$(echo "$*" | sed "s/%n/$i/g")
  env -i HOME="$HOME" PATH=/usr/bin:/bin OMP_NUM_THREADS=1 sh -c "$here" &
  pids="$pids $!"
  i=$((i + 1))
done
status=0
for pid in $pids; do wait "$pid" || status=1; done
exit $status
"""


@pytest.mark.faults
def test_deepspeed_launcher_with_a_hostfile_makes_one_run(tmp_path: Path) -> None:
    for name, script in (("ssh", SSH), ("pdsh", PDSH)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    hosts = tmp_path / "HOSTS"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    options = ["--hostfile", hosts, "--master_port", free_port(), "--no_local_rank", "--module"]
    where = f"{tmp_path / 'bin'}:{BIN}:{os.environ['PATH']}"
    ends(
        [BIN / "deepspeed", *options, RUN[1], *words(tmp_path)],
        environments=[{"PATH": where, "FAKE_HOSTS": "node0,node1"}],
    )
    is_one_run_of_two(tmp_path)


@pytest.mark.faults
def test_deepspeed_launcher_without_ssh_makes_one_run(tmp_path: Path) -> None:
    hosts = tmp_path / "HOSTS"
    hosts.write_text("node0 slots=1\nnode1 slots=1\n")
    meet = ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    options = ["--hostfile", hosts, *meet, "--no_local_rank", "--module"]
    commands = [
        [BIN / "deepspeed", "--node_rank", rank, *options, RUN[1], *words(tmp_path)]
        for rank in range(2)
    ]
    ends(*commands)
    is_one_run_of_two(tmp_path)
