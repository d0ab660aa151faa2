"""Parts of one's own: next to a gin file, in a file that is imported, and installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from gin_toys import run

from registry import gin_setup, objectives
from registry.plugins import import_file, load_plugins

pytestmark = pytest.mark.usefixtures("parts")


def own_part(name: str) -> str:
    return f"""
        from dataclasses import dataclass
        from typing import ClassVar
        from registry import objectives

        @objectives.register("{name}")
        @dataclass(frozen=True, kw_only=True)
        class Mine:
            heads: ClassVar = ("u",)
            scale: float = 1.0

            def loss(self, net, batch, rng):
                return None
    """


def test_objective_next_to_the_gin_file_is_imported(write, forget):
    forget("own_loss_a")
    write("own_loss_a.py", own_part("own_loss_a"))
    file = write(
        "my.gin", "import own_loss_a\njob.objective = @own_loss_a()\nown_loss_a.scale = 2."
    )
    for _ in range(2):
        gin_setup.parse([file])
        objective = run()[0]
        assert objective.scale == 2.0
        assert objectives.name_of(objective) == "own_loss_a"
    assert "import own_loss_a" in gin_setup.full_text()
    assert sys.path.count(str(file.parent)) == 1


def test_own_module_hidden_by_another_is_refused(write, forget):
    write("queue.py", "raise AssertionError('must not run')")
    with pytest.raises(ValueError, match=r"(?s)the name 'queue' already means .*lib.*rename the f"):
        gin_setup.parse([write("my.gin", "import queue")])
    write("registry.py", "")
    with pytest.raises(ValueError, match=r"the name 'registry' already means .*__init__.py"):
        gin_setup.parse([write("my.gin", "import registry")])

    forget("own_loss_b")
    write("one/own_loss_b.py", own_part("own_loss_b"))
    write("two/own_loss_b.py", own_part("own_loss_b"))
    gin_setup.parse([write("one/my.gin", "import own_loss_b")])
    with pytest.raises(ValueError, match=r"two/own_loss_b.py .* already means .*one/own_loss_b.py"):
        gin_setup.parse([write("two/my.gin", "import own_loss_b")])


def test_installed_module_of_a_gin_file_is_imported(write):
    gin_setup.parse([write("my.gin", "import json.tool")])


def test_error_in_an_own_module_comes_through(write, forget):
    forget("own_loss_c")
    write("own_loss_c.py", "def broken(:\n")
    file = write("my.gin", "import own_loss_c")
    with pytest.raises(SyntaxError) as error:
        gin_setup.parse([file])
    assert str(error.value.filename).endswith("own_loss_c.py")
    write("own_loss_c.py", "1 / 0 # changed")
    with pytest.raises(ZeroDivisionError, match=r"(?s)line 1\n    import own_loss_c"):
        gin_setup.parse([file])


def test_import_file_registers_what_it_holds(write, forget):
    forget("own_loss_d")
    file = write("own_loss_d.py", own_part("own_loss_d"))
    module = import_file(file)
    assert objectives.get("own_loss_d") is module.Mine
    assert import_file(os.path.relpath(file)) is module


def test_import_file_gives_a_module_of_a_package_its_full_name():
    root = Path(__file__).parents[2]
    assert import_file(root / "registry" / "plugins.py").__name__ == "registry.plugins"


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        ("missing.py", FileNotFoundError, "no Python file"),
        ("notes.txt", FileNotFoundError, "no Python file"),
        ("my-loss.py", ValueError, "is no Python name; rename"),
        ("torch.py", ValueError, "already means"),
        ("sys.py", ValueError, "a built-in module"),
    ],
)
def test_import_file_refuses_what_it_cannot_import(write, tmp_path, name, error, complaint):
    if name != "missing.py":
        write(name, "raise AssertionError")
    with pytest.raises(error, match=complaint):
        import_file(tmp_path / name)


def install_plugin(folder: Path, value: str) -> None:
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[objective_zoo.plugins]\ntheirs = {value}\n")


def test_plugin_is_loaded_by_parse(write, tmp_path, monkeypatch, forget):
    forget("own_loss_e")
    write("own_loss_e.py", own_part("own_loss_e"))
    install_plugin(tmp_path, "own_loss_e")
    monkeypatch.syspath_prepend(tmp_path)
    gin_setup.parse([], ["job.objective = @own_loss_e()"])
    assert objectives.name_of(run()[0]) == "own_loss_e"
    assert "theirs" in load_plugins()


def test_broken_plugin_names_its_package(tmp_path, monkeypatch):
    install_plugin(tmp_path, "own_loss_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"'theirs' of the package 'their-package' \(own_loss_m"):
        load_plugins()
