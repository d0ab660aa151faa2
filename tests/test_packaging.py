"""The wheel: what is in it, and that it works installed, from another folder."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"registry", "zoo", "backbones", "trainers", "benchmarks", "objective_zoo"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {
    "PIL": "pillow",
    "cleanfid": "clean-fid",
    "gin": "gin-config",
    "sklearn": "scikit-learn",
}
DATA, INFO = (f"objective_zoo-{PROJECT['version']}.{kind}" for kind in ("data", "dist-info"))
SHARE = f"{DATA}/data/share/objective-zoo/"
DEVELOPMENT = {"dev", "mutants", "browser"}  # extras that the package itself does not import


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def contents(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def files(folder: str, suffix: str) -> set[str]:
    return {f.relative_to(ROOT).as_posix() for f in (ROOT / folder).rglob(f"*{suffix}")}


def test_wheel_holds_every_module_of_the_packages_and_nothing_else(contents):
    code = {name for name in contents if name.endswith(".py")}
    assert code == set().union(*(files(package, ".py") for package in PACKAGES))
    assert {name.split("/")[0] for name in contents} == {*PACKAGES, DATA, INFO}


def test_wheel_holds_every_gin_file_as_shared_data(contents):
    shared = {name.removeprefix(SHARE) for name in contents if name.startswith(SHARE)}
    assert shared == files("gin", ".gin") != set()


def test_wheel_holds_what_the_reports_page_is_made_of(contents):
    folder = "benchmarks/report/rendering/assets"
    assert (
        {name for name in contents if name.startswith(f"{folder}/")}
        == files(folder, "") - {folder}
        != set()
    )


def test_wheel_carries_its_license(contents):
    assert f"{INFO}/licenses/LICENSE" in contents


def test_every_dependency_says_why():
    lines = (ROOT / "pyproject.toml").read_text().split("dependencies = [\n")[1].split("\n]")[0]
    assert [line for line in lines.splitlines() if not line.partition("#")[2].strip()] == []


def test_every_import_is_a_declared_dependency():
    trees = [ast.parse((ROOT / f).read_text()) for p in PACKAGES for f in files(p, ".py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    third = {name.split(".")[0] for name in names} - sys.stdlib_module_names - PACKAGES
    extras = PROJECT["optional-dependencies"]
    optional = [line for name in extras.keys() - DEVELOPMENT for line in extras[name]]
    lines = [*PROJECT["dependencies"], *optional]
    declared = {re.match(r"[\w-]+", line)[0] for line in lines}
    assert "torch" in third
    assert {IMPORTED_AS.get(name, name.replace("_", "-")) for name in third} <= declared


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a command of a fresh environment with the wheel, from an empty folder.

    The dependencies are those of this environment: a path file lends them without the checkout.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-compile"]
    command += ["--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "venv")}))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    empty = folder / "elsewhere"
    empty.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(command: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(python.with_name(command)), *arguments],
            cwd=empty,
            env=clean,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.venv, run.folder = folder / "venv", empty
    return run


def test_installed_packages_and_gin_config_are_the_ones_meant(installed):
    code = "import gin, registry; print(registry.__file__); print(gin.register)"
    where, register = installed("python", "-c", code).splitlines()
    assert Path(where).is_relative_to(installed.venv)
    assert "function register" in register


def test_installed_gin_files_are_found_and_parsed_from_another_folder(installed):
    some = sorted(files("gin", ".gin"))[0]
    code = "from registry.configuration import gin_files; print(*gin_files.roots(), sep='\\n')"
    share = installed.venv / "share" / "objective-zoo" / "gin"
    assert installed("python", "-c", code).split() == [str(share)]  # and not gin-config's folder
    code = f"from registry import gin_setup; print(gin_setup.resolve({some!r}))"
    found = Path(installed("python", "-c", code).strip())
    assert found.is_relative_to(share)
    assert found.read_text() == (ROOT / some).read_text()


def test_help_and_list_work_from_another_folder(installed):
    assert "COMMAND" in installed("objective-zoo", "--help")
    listing = installed("objective-zoo", "list")
    assert "mean_flow" in listing
    assert "2505.13447" in listing


@pytest.mark.slow  # a whole process
def test_run_of_a_shipped_gin_file_works_from_another_folder(installed):
    small = ["run.steps = 2", "run.batch_size = 8", "run.num_samples = 16", "run.nfe = (1,)"]
    small += ["unet.channels = 8", "run.metric = @mmd()", "run.recorder = @jsonl()"]
    sets = [word for binding in small for word in ("--set", binding)]
    arm = ["--arm", "mean_flow", "--out", "out"]
    table = installed("objective-zoo", "run", "gin/experiments/digits.gin", *arm, *sets)
    assert "mean_flow" in table
    assert (installed.folder / "out" / "mean_flow" / "result.json").is_file()
