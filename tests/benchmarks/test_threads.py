"""How many threads a process has, and how they wait: chosen before torch, unless the user has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import threads
from benchmarks.threads import SPINS, core_numbers, num_cores, threads_of_each

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
SHOW = (
    "import json, os, sys\n"
    f"print(json.dumps({{k: os.environ.get(k) for k in {VARIABLES}}}), file=sys.stderr)"
)
DOORS = {
    "door": "import objective_zoo",
    "command": "from benchmarks.cli import main; main(['check', 'no_such_objective'])",
    "worker": (
        "import sys; from benchmarks import worker\n"
        "worker._end_with_parent = list; sys.argv[1:] = ['.', '', '1', 'os:fspath']\n"
        "try: worker.main()\nexcept TypeError: pass"  # a text is no outcome of a cell
    ),
}


def variables_after(code: str, **given: str) -> dict[str, str | None]:
    """The variables of OpenMP in a process of its own that has run the code."""
    inherited = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    words, env = [sys.executable, "-c", f"{code}\n{SHOW}"], {**inherited, **given}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stderr.splitlines()[-1]))


def test_waiting_threads_sleep_soon_and_nothing_else_is_set_without_a_quota() -> None:
    found = variables_after("from benchmarks.threads import choose_threads; choose_threads()")
    quota = None if num_cores() == len(core_numbers()) else str(num_cores())
    assert found == dict(zip(VARIABLES, (None, SPINS, quota), strict=True))


@pytest.mark.parametrize(
    "given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}], ids=lambda g: next(iter(g))
)
def test_what_the_user_has_set_stays(given: dict[str, str]) -> None:
    code = "from benchmarks.threads import choose_threads; choose_threads()"
    assert {k: v for k, v in variables_after(code, **given).items() if v} == given


def test_nothing_changes_once_torch_is_loaded() -> None:
    code = "import sys; sys.modules['torch'] = sys; from benchmarks.threads import choose_threads"
    assert not any(variables_after(f"{code}; choose_threads()").values())


@pytest.mark.parametrize("door", DOORS)
def test_every_entry_chooses_before_torch_is_loaded(door: str) -> None:
    """A hook on the import of torch shows the variables at that moment, and ends the process."""
    watch = (
        "import builtins, os\nbefore = builtins.__import__\n"
        "def watched(name, *rest):\n"
        "    if name == 'torch':\n"
        f"        {SHOW.replace(chr(10), '; ')}\n"
        "        sys.stderr.flush()\n"
        "        os._exit(0)\n"
        "    return before(name, *rest)\n"
        "builtins.__import__ = watched\n"
    )
    assert variables_after(watch + DOORS[door])["GOMP_SPINCOUNT"] == SPINS


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, [1.5]),
        ("0::/not/seen", {"cpu.max": "200000 100000"}, [2.0]),
        ("0::/", {}, []),
        (
            "3:cpu,cpuacct:/a\n2:memory:/a",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "memory/a/cpu.max": "1 1",
            },
            [4.0],
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
    ],
)
def test_quotas_of_every_group_above_are_found(
    tmp_path: Path, groups: str, files: dict[str, str], expected: list[float]
) -> None:
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text + "\n")
    (tmp_path / "groups").write_text(groups + "\n")
    assert list(threads._quotas(tmp_path / "groups", tmp_path / "mounted")) == expected


def test_where_no_groups_are_known_there_is_no_quota(tmp_path: Path) -> None:
    assert not list(threads._quotas(tmp_path / "none", tmp_path))


def test_a_quota_bounds_the_threads_and_processes_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "core_numbers", lambda: list(range(8)))
    monkeypatch.setattr(threads, "_quotas", lambda: [6.5, 20.0])
    monkeypatch.setattr(threads, "_chosen", {})
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    threads.choose_threads()
    assert os.environ["OMP_NUM_THREADS"] == "6"
    assert threads_of_each(2) == "3"  # our own choice for one process is not the user's
    assert threads_of_each(100) == "1"
    monkeypatch.setattr(threads, "_chosen", {})
    os.environ["OMP_NUM_THREADS"] = "5"
    threads.choose_threads()
    assert os.environ["OMP_NUM_THREADS"] == threads_of_each(2) == "5"
