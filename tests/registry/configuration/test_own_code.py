"""A folder's own code: nothing of it is imported before somebody has consented."""

from __future__ import annotations

import itertools
import json
import sys

import gin
import pytest

from registry import gin_setup
from registry.configuration import own_code

_numbers = itertools.count()


@pytest.fixture
def evil(tmp_path):
    """A gin file, and beside it a module that leaves a mark when it is imported."""
    name = f"evil_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'EXECUTED')!r}, 'w').close()\n")
    (tmp_path / "config.gin").write_text(f"import {name}\nrun.seed = 3\n")
    before = list(sys.path)
    yield name
    sys.modules.pop(name, None)
    sys.path[:] = before
    gin.clear_config()


def executed(tmp_path):
    return (tmp_path / "EXECUTED").exists()


def refused(tmp_path, text, *, name="config.gin"):
    (tmp_path / name).write_text(text)
    before = list(sys.path)
    with pytest.raises(ValueError) as error:
        gin_setup.parse([tmp_path / name], trusted=False)
    assert not executed(tmp_path)
    assert sys.path == before
    return str(error.value)


def test_code_is_imported_where_it_is_trusted_and_not_elsewhere(evil, tmp_path):
    with pytest.raises(ValueError, match=rf"code that came with it(.|\n)*{evil}.py, sha256"):
        gin_setup.parse([tmp_path / "config.gin"], trusted=False)
    assert not executed(tmp_path)
    gin_setup.parse([tmp_path / "config.gin"])
    assert executed(tmp_path)


@pytest.mark.parametrize(
    "statement",
    ["import NAME", "import NAME as json", "from NAME import x", "import NAME.part",
     "run.steps = 3\n\nimport NAME", "from __gin__ import dynamic_registration\nimport NAME"],
)  # fmt: skip
def test_every_spelling_of_an_import_is_refused(statement, evil, tmp_path):
    assert evil in refused(tmp_path, statement.replace("NAME", evil))


def test_package_and_named_folders_are_refused(evil, tmp_path):
    (tmp_path / "far" / "evil_package").mkdir(parents=True)
    code = f"open({str(tmp_path / 'EXECUTED')!r}, 'w')"
    (tmp_path / "far" / "evil_package" / "__init__.py").write_text(code)
    said = refused(tmp_path, f"Grid.folders = ['{tmp_path / 'far'}']\nimport evil_package")
    assert str(tmp_path / "far" / "evil_package" / "__init__.py") in said


@pytest.mark.parametrize("module", ["os", "subprocess"])
def test_functions_of_python_are_out_of_reach(module, evil, tmp_path):
    """With dynamic registration `@os.system()` would be a value like any other."""
    text = f"from __gin__ import dynamic_registration\nimport {module}\nrun.seed = 1"
    assert "may call any function of Python" in refused(tmp_path, text)
    assert "no part named" in refused(tmp_path, f"import {module}\nrun.seed = @{module}.system()")


def test_module_that_is_installed_and_not_imported_is_refused(evil, tmp_path):
    sys.modules.pop("antigravity", None)
    assert "a module of this Python" in refused(tmp_path, "import antigravity")
    assert "antigravity" not in sys.modules


def test_includes_are_read_with_the_same_eyes_and_stay_in_the_folder(evil, tmp_path):
    (tmp_path / "inner.gin").write_text(f"import {evil}")
    assert evil in refused(tmp_path, "include 'inner.gin'")
    inner = tmp_path / "run"
    inner.mkdir()
    for name in ("../inner.gin", tmp_path / "inner.gin"):
        assert "lies outside its folder" in refused(inner, f"include '{name}'")
    (inner / "link.gin").symlink_to(tmp_path / "inner.gin")
    assert "lies outside its folder" in refused(inner, "include 'link.gin'")
    (tmp_path / "config.gin").write_text("include 'data/digits.gin'\nrun.seed = 3")
    gin_setup.parse([tmp_path / "config.gin"], trusted=False)  # one of ours


def test_module_that_is_imported_already_is_used_from_wherever_it_came(evil, tmp_path):
    other = tmp_path / "mine"
    other.mkdir()
    (other / f"{evil}.py").write_text("mine = True\n")
    sys.path.append(str(other))
    __import__(evil)
    opened = gin_setup.parse([tmp_path / "config.gin"], trusted=False)
    assert gin_setup.query("run.seed") == 3
    assert not executed(tmp_path)
    # A worker, which begins without it, is told the folder that was used.
    assert gin_setup.import_folders(opened) == (str(other),)
    assert gin_setup.imported_files(opened) == (other / f"{evil}.py",)


def test_error_compares_with_the_hash_of_the_time_of_the_run(evil, tmp_path):
    def said():
        return refused(tmp_path, f"import {evil}")

    assert "no hash of it was recorded" in said()
    digest = own_code.hashes([tmp_path / f"{evil}.py"], [tmp_path])
    assert list(digest) == [f"{evil}.py"]
    (tmp_path / own_code.CODE).write_text(json.dumps(digest))
    assert "as recorded when the run was made" in said()
    (tmp_path / own_code.CODE).write_text(json.dumps({f"{evil}.py": "0" * 64}))
    assert f"IT HAS CHANGED since the run was made, when it was {'0' * 64}" in said()
    for broken in ("[", "[1]", '{"a": 1}', "[" * 100_000):
        (tmp_path / own_code.CODE).write_text(broken)
        assert "no hash of it was recorded" in said()


def test_changed_module_is_named_after_it_was_imported(evil, tmp_path, caplog):
    opened = gin_setup.parse([tmp_path / "config.gin"])
    recorded = gin_setup.code_hashes(opened)
    (tmp_path / own_code.CODE).write_text(json.dumps(recorded))
    own_code.warn_of_changes(tmp_path)
    assert not caplog.records
    (tmp_path / f"{evil}.py").write_text("changed = True\n")
    own_code.warn_of_changes(tmp_path)
    assert f"{evil}.py has changed since the run" in caplog.text


def test_hashes_cover_what_the_module_imports_beside_it(evil, tmp_path):
    (tmp_path / f"{evil}_part.py").write_text("a = 1\n")
    (tmp_path / f"{evil}.py").write_text(f"import {evil}_part\n")
    (tmp_path / "never_imported.py").write_text("a = 1\n")
    found = gin_setup.code_hashes(gin_setup.parse([tmp_path / "config.gin"]))
    assert list(found) == [f"{evil}.py", f"{evil}_part.py"]
    sys.modules.pop(f"{evil}_part")


def test_folders_that_are_no_list_are_named(evil, tmp_path):
    for value in ("'a'", "3", "[3]"):
        said = refused(tmp_path, f"Grid.folders = {value}\nimport {evil}")
        assert f"Grid.folders = {value} must be a list" in said
