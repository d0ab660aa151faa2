"""A password in the store's address is in no file and on no terminal, whatever command meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import DIGITS, NETWORK, SIZES, TINY, Done, sets, zoo

from benchmarks.grids.axes import Declared
from benchmarks.grids.cells import plan
from benchmarks.grids.request import Request
from registry import gin_setup
from registry.secrets import forget, kept

SECRET = "Zx9-hush_77"
ADDRESS = f"http://me:{SECRET}@127.0.0.1:9"  # where nobody listens
STORE = (
    f"mlflow.tracking_uri = '{ADDRESS}'",
    "run.recorder = @mlflow()",
    "mlflow.close_seconds = 1.0",
)
ONE, MACHINE = ("--arm", "flow_matching"), ("--gpus", "1", "--memory", "1GB")
FAILING = '''
from dataclasses import dataclass
from registry import metrics

@metrics.register("broken_metric")
@dataclass(frozen=True, kw_only=True)
class Broken:
    """Fails as a client of somebody's service would."""
    better = "lower"
    def __call__(self, samples, reference):
        raise RuntimeError("401 from https://me:{secret}@service/x?token={secret} "
                           "with Authorization: Bearer {secret}")
        yield
'''


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = kept()
    yield
    forget(before)


def assert_hushed(folder: Path, *said: Done) -> None:
    found = [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert found == []
    for done in said:
        assert SECRET not in done.out + done.err


def test_run_whose_store_is_away_and_what_is_made_of_it_show_no_password(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = zoo("run", DIGITS, "--arm", "mean_flow", *sets(*TINY, *STORE), "--out", out)
    assert run.status == 0, run.err
    assert "http://me:***@127.0.0.1:9" in (out / "mean_flow" / "config.gin").read_text()
    sent = zoo("send", out)  # the environment of this process still holds the whole address
    assert sent.status == 2
    told = zoo("report", out, "--out", out / "report")
    assert told.status == 0, told.err
    assert_hushed(out, run, sent, told)


def test_cell_that_fails_shows_no_password(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(FAILING.format(secret="SECRET"))
    text = (tmp_path / "broken.py").read_text().replace("SECRET", SECRET)
    (tmp_path / "broken.py").write_text(text)
    (tmp_path / "x.gin").write_text(f"include '{DIGITS}'\nimport broken\n")
    how = (*SIZES, *NETWORK, *STORE, "run.metric = @broken_metric()", "run.steps = 1")
    out = tmp_path / "out"
    done = zoo("run", tmp_path / "x.gin", "--arm", "mean_flow", *sets(*how), "--out", out)
    assert done.status != 0
    assert "401 from https://me:***@service/x?token=***" in done.err
    assert_hushed(out, done)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "nowhere.gin", "--tracking-uri", ADDRESS),
        ("run", DIGITS, "--address", ADDRESS),
        ("run", DIGITS, *ONE, "--set", f"mlflow.tracking_uri = {ADDRESS}"),
        ("grid", DIGITS, *ONE, *sets(*TINY, f"dit.dim = '{ADDRESS}'")),
        ("plan", DIGITS, *ONE, *MACHINE, *sets(*TINY, f"x.y = '{ADDRESS}'")),
        ("send", "nowhere", "--tracking-uri", ADDRESS),
    ],
)
def test_error_shows_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        done = zoo(*words)
    except SystemExit as end:  # of argparse
        done = Done(int(end.code or 0), "", "")
    assert done.status != 0
    assert SECRET not in done.out + done.err + "".join(capsys.readouterr())
    assert_hushed(tmp_path, done)


def test_cell_is_the_same_whatever_the_password() -> None:
    def cell_id(*store: str) -> str:
        with gin_setup.isolated():
            request = Request(file=Path(DIGITS), bindings=(*TINY, *store), only=("mean_flow",))
            (one,) = plan(request, Declared()).cells
            return one.cell.id

    other = f"mlflow.tracking_uri = '{ADDRESS.replace('hush', 'other')}'"
    assert cell_id(*STORE) == cell_id(other, *STORE[1:]) == cell_id("run.recorder = @jsonl()")


def test_command_line_of_other_processes_holds_no_password(tmp_path: Path) -> None:
    """`--ranks` hands its own words on; the processes find the address in the environment."""
    show = (
        "import sys, benchmarks.launchers.ranks as r, os;"
        "from registry.secrets import revealed;"
        "r.start = lambda words, n, **_: print(words, revealed('http://me:***@127.0.0.1:9', 'X')"
        " == 'http://me:' + 'Zx9-' + 'hush_77@127.0.0.1:9') or 0;"
        "from benchmarks.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["run", DIGITS, "--ranks", "2", "--out", str(tmp_path), "--tracking-uri", ADDRESS]
    done = subprocess.run(
        [sys.executable, "-c", show, *words], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout
    assert "http://me:***@127.0.0.1:9" in done.stdout
    assert done.stdout.strip().endswith("True")
