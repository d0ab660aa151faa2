"""Files that are whole or not there, whatever happens to the process that writes them."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainers.checkpoints import whole_files
from trainers.checkpoints.whole_files import (
    PARTIAL,
    file_sha256,
    remembered_sha256,
    whole_file,
    write_json,
    write_text,
)

ROOT = Path(__file__).parents[3]


def test_whole_file_shows_the_old_content_until_the_block_ends(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert list(tmp_path.glob(PARTIAL)) == [partial]
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["result.json"]


def test_whole_file_that_fails_leaves_the_old_content_alone(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        _half_then_stop(partial)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def _half_then_stop(partial):
    partial.write_text("half")
    raise KeyboardInterrupt


def test_whole_file_that_was_not_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_whole_file_has_the_permissions_of_a_file_that_is_opened(tmp_path):
    (tmp_path / "opened").write_text("")
    write_text(tmp_path / "whole", "")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "opened").stat().st_mode


def test_several_writers_of_one_file_leave_one_of_their_contents(tmp_path):
    texts = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(tmp_path / "a", text), texts))
    assert (tmp_path / "a").read_text() in texts
    assert os.listdir(tmp_path) == ["a"]


def test_killed_writer_leaves_the_old_content_and_no_visible_file(tmp_path):
    code = """
import os, sys
from pathlib import Path
from trainers.checkpoints.whole_files import whole_file
with whole_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), 9)
"""
    path = tmp_path / "result.json"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == -9
    assert path.read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["result.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_durable_file_waits_for_its_content_and_its_folder(tmp_path, monkeypatch, durable):
    synced = []
    monkeypatch.setattr(whole_files, "sync", lambda path: synced.append((path, path.exists())))
    with whole_file(tmp_path / "a", durable=durable) as partial:
        partial.write_text("content")
    assert synced == ([(partial, True), (tmp_path, True)] if durable else [])


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"b": (1, 2)})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": [1, 2]}
    assert text == '{\n  "b": [\n    1,\n    2\n  ]\n}\n'


def test_file_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_remembered_sha256_reads_a_file_again_only_if_it_changed(tmp_path, monkeypatch):
    path, read = tmp_path / "a", []
    monkeypatch.setattr(
        whole_files, "file_sha256", lambda file: read.append(file) or file_sha256(file)
    )
    path.write_bytes(b"one")
    assert remembered_sha256(path) == remembered_sha256(path) == file_sha256(path)
    assert len(read) == 1
    path.write_bytes(b"three")
    assert remembered_sha256(path) == file_sha256(path)
    assert len(read) == 2


def test_files_are_hashed_and_moved_into_place_in_one_module_only():
    """The rules for whole files have no second copy."""
    found = set()
    for package in ("registry", "zoo", "backbones", "trainers", "benchmarks"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(attr="file_digest" | "fsync" | "mkstemp" as name)
                    ):
                        pass
                    case ast.Call(
                        func=ast.Attribute(value=ast.Name("os"), attr="replace" | "rename" as name)
                    ):
                        pass
                    case ast.Call(  # of a path; a text's takes two arguments, a table's keywords
                        func=ast.Attribute(attr="replace" | "rename" as name),
                        args=[_],
                        keywords=[],
                    ):
                        pass
                    case _:
                        continue
                found.add((file.relative_to(ROOT).as_posix(), name))
    assert found == {
        ("benchmarks/grids/rehearsal.py", "rename"),  # of an empty file that is locked
        ("benchmarks/records/jsonl.py", "fsync"),  # of lines that are added to a file in its place
        ("registry/folders.py", "file_digest"),
        ("trainers/checkpoints/whole_files.py", "fsync"),
        ("trainers/checkpoints/whole_files.py", "replace"),
        ("trainers/checkpoints/whole_folders.py", "rename"),  # of folders
    }
