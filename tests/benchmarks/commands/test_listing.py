"""objective-zoo list, and commands that need little or end early."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from tiny_runs import zoo

from registry import objectives

ROOT = Path(__file__).parents[3]


def test_list_names_every_part_with_its_paper():
    done = zoo("list")
    assert done.status == 0
    assert all(f"  {name} " in done.out for name in objectives.names())
    assert "arXiv 2505.13447" in done.out
    assert "as explicit_shortcut: include 'objective/explicit_shortcut.gin'" in done.out
    only = zoo("list", "--kind", "time_law").out
    assert "stratified" in only
    assert "mean_flow" not in only
    done = zoo("list", "--kind", "objectiv")
    assert (done.status, "objective" in done.err) == (2, True)


def test_list_gives_the_references_as_bibtex():
    done = zoo("list", "--bibtex")
    keys = re.findall(r"^@misc\{(.*),$", done.out, re.MULTILINE)
    assert "geng2025mean" in keys
    assert len(keys) == len(set(keys)), "BibTeX refuses a key that comes twice"
    assert all(key.isascii() and key.isalnum() for key in keys)
    assert "eprint = {2505.13447}" in done.out
    assert "author = {Lu and Song}" in done.out
    assert "author = {Geng and others}" in done.out
    assert "et al." not in done.out, "BibTeX would take it for a name"


def test_list_shows_the_parts_of_ones_own_file(tmp_path):
    (tmp_path / "listed_paths.py").write_text(
        "from registry import paths\n\n\n@paths.register('own_path')\nclass MyPath:\n"
        '    """A path of mine."""\n'
    )
    done = zoo("list", "--import", tmp_path / "listed_paths.py", "--kind", "path")
    assert "own_path  A path of mine" in done.out
    done = zoo("list", "--import", tmp_path / "gone.py")
    assert (done.status, "gone.py" in done.err) == (2, True)


def test_list_does_without_mlflow_and_what_only_measuring_needs():
    heavy = ("mlflow", "matplotlib", "sklearn", "deepspeed", "scipy.optimize", "torchvision")
    code = (
        "import sys; from benchmarks.cli import main; main(['list'])\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-300:] + done.stderr


def test_help_does_without_torch():
    code = (
        "import sys; from benchmarks.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_reader_that_has_enough_ends_the_command_quietly():
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", "benchmarks.cli", "list"]
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE
