"""gin files: where they are found, and what is read in them."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gin_toys import run

from registry import gin_setup
from registry.configuration import gin_files

pytestmark = pytest.mark.usefixtures("parts")


def test_file_is_found_as_given_then_in_the_checkout_then_in_the_share(
    shipped, write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    places = [
        write("share/gin/base.gin", ""),
        write("checkout/gin/base.gin", ""),
        write("base.gin", ""),
    ]
    found = []
    for place in reversed(places):
        found.insert(0, gin_setup.resolve("base.gin"))
        place.unlink()
    assert found == places


def test_shipped_file_is_found_with_and_without_the_word_gin(shipped, write):
    file = write("checkout/gin/experiments/digits.gin", "")
    assert gin_setup.resolve("experiments/digits.gin") == file
    assert gin_setup.resolve("gin/experiments/digits.gin") == file


def test_missing_file_lists_the_nearest_and_where_it_looked(shipped, write):
    write("checkout/gin/experiments/digits.gin", "")
    with pytest.raises(FileNotFoundError) as error:
        gin_setup.resolve("experiments/digit.gin")
    assert "Did you mean 'experiments/digits.gin'?" in str(error.value)
    for folder in (Path.cwd(), *shipped):
        assert f"\n  {folder}/experiments/digit.gin" in str(error.value)


def test_include_prefers_the_folder_of_the_including_file(shipped, write, tmp_path, monkeypatch):
    write("cwd/base.gin", "job.seed = 1")
    monkeypatch.chdir(tmp_path / "cwd")
    shipped_base = write("checkout/gin/base.gin", "job.seed = 2")
    digits = write("checkout/gin/experiments/digits.gin", "include 'base.gin'")
    mine = write("mine/my.gin", "include 'experiments/digits.gin'")
    write("mine/base.gin", "job.seed = 3")

    assert gin_setup.parse([mine]) == (mine, digits, shipped_base)
    assert run()[1] == 2

    beside = write("checkout/gin/experiments/base.gin", "job.seed = 4")
    assert gin_setup.parse([mine]) == (mine, digits, beside)
    assert run()[1] == 4


def test_second_include_is_seen_from_the_file_again(write):
    file = write("my.gin", "include 'deep/one.gin'\ninclude 'two.gin'")
    files = (file, write("deep/one.gin", ""), write("two.gin", "job.seed = 2"))
    write("deep/two.gin", "job.seed = 3")
    assert gin_setup.parse([file]) == files
    assert run()[1] == 2


def test_file_that_includes_itself_is_refused(write):
    file = write("a.gin", "include 'b.gin'")
    write("b.gin", "include 'a.gin'")
    with pytest.raises(ValueError, match="a.gin includes itself"):
        gin_setup.parse([file])


def test_missing_include_names_the_including_line(shipped, write):
    file = write("a.gin", "\ninclude 'b.gin'")
    with pytest.raises(FileNotFoundError) as error:
        gin_setup.parse([file])
    assert "no gin file 'b.gin'" in str(error.value)
    assert f'In file "{file}", line 2' in str(error.value)


def test_parsing_logs_nothing(shipped, write, caplog):
    file = write("mine/my.gin", "include 'base.gin'")
    write("checkout/gin/base.gin", "job.seed = 1")
    with caplog.at_level(logging.DEBUG):
        gin_setup.parse([file])
    assert caplog.records == []


def test_roots_are_folders_of_gin_files_and_never_gin_config():
    for root in gin_files.roots():
        assert not list(root.rglob("*.py"))
    checkout = Path(__file__).parents[3]
    assert gin_files.roots() == (checkout / "gin",)  # no stale copy of an installation beside it


def test_share_folder_of_a_user_install_is_found(tmp_path):
    shutil.copytree(Path(gin_files.__file__).parents[1], tmp_path / "site" / "registry")
    shared = tmp_path / "share" / "objective-zoo" / "gin"
    shared.mkdir(parents=True)
    code = "from registry.configuration import gin_files; print(*gin_files.roots(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONUSERBASE": str(tmp_path), "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(shared) in done.stdout.splitlines()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_files_of_other_systems_are_read(tmp_path, mark):
    """Line ends of Windows, and the byte order mark that its editors write."""
    file = tmp_path / "a.gin"
    file.write_bytes(mark + b"# a\r\njob.seed = 4\r\n")
    gin_setup.parse([file])
    assert gin_setup.query("job.seed") == 4


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("run.seed = 4".encode("utf-16"), "UTF-16"),
        ("run.seed = 4\n# gr\u00f6\u00dfe".encode("latin-1"), "line 2: the byte 0xf6 is no UTF-8"),
    ],
)
def test_file_that_is_not_utf_8_is_named_with_the_remedy(tmp_path, content, what):
    (tmp_path / "own.gin").write_bytes(content)
    (tmp_path / "a.gin").write_text("include 'own.gin'\n")
    with pytest.raises(ValueError, match=f"own.gin.*{what}.*UTF-8"):
        gin_setup.parse([tmp_path / "a.gin"])
