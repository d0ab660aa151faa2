"""A folder is one process's alone, and where nobody can have it the error says why."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.checkpoints.locks import alone


def test_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainers.checkpoints.locks import alone\n"
        "with alone(Path(sys.argv[1]), 'a test'): print('in')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    second = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with alone(tmp_path / "lock", "a test"):
        done = subprocess.run(second, env=environment, capture_output=True, text=True)
        assert f"another process runs a test in {tmp_path}" in done.stderr
    done = subprocess.run(second, env=environment, capture_output=True, text=True)
    assert done.stdout == "in\n"


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(ValueError, match=r"the folder .*/file/run cannot be written"),
        alone(tmp_path / "file" / "run" / "lock", "a test"),
    ):
        pass


def test_file_system_without_locks_is_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(ValueError, match="gives no lock"), alone(tmp_path / "lock", "a test"):
        pass
