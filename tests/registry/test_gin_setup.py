"""gin files: where they are found, what a mistake in them says, what took effect."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import gin
import pytest

from registry import gin_setup, objectives, weights
from registry.configuration import gin_files
from registry.configuration.gin_errors import message_of
from registry.plugins import import_file, load_plugins


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    power: float = 1.0
    floor: float = 0.1


@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    heads: ClassVar = ("u",)

    weight: Adaptive = field(default_factory=Adaptive)
    ratio: float = 0.25

    def loss(self, net, batch, rng):
        return None


def job(objective=None, seed=0, steps=10, shape=None):
    return objective, seed, steps


class Grid:
    def __init__(self, arms=(), axes=None):
        raise AssertionError("a grid is read, not built")


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """gin's registry holds what the tests need, and is left as it was."""
    load_plugins()  # into the lasting registry: modules that are imported register but once
    fresh = type(gin.config._REGISTRY)()  # its copy() would share the tree of names
    for selector, found in gin.config._REGISTRY.items():
        if selector.split(".")[-1] not in ("job", "Grid"):  # the real Grid is not tested here
            fresh[selector] = found
    monkeypatch.setattr(gin.config, "_REGISTRY", fresh)
    gin.register("job", module="test")(job)
    gin.register("Grid", module="test")(Grid)
    with (
        weights.temporary("test_adaptive", Adaptive),
        objectives.temporary("test_mean_flow", MeanFlow),
    ):
        yield


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def shipped(tmp_path, monkeypatch, write):
    """Stands for the checkout's gin/ and for the share folder, in this order."""
    folders = (tmp_path / "checkout" / "gin", tmp_path / "share" / "gin")
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.setattr(gin_files, "roots", lambda: folders)
    monkeypatch.chdir(tmp_path / "share")
    return folders


def run(name: str = ""):
    """Build and call `job` as a run does."""
    with gin_setup.arm(name):
        return gin.get_configurable(job)()


# Finding files


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
    checkout = Path(__file__).parents[2]
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


# Parsing


def test_bindings_win_over_files_and_later_files_over_earlier(write):
    one, two = write("1.gin", "job.seed = 1\njob.steps = 1"), write("2.gin", "job.seed = 2")
    gin_setup.parse([one, two])
    assert run()[1:] == (2, 1)
    gin_setup.parse([one, two], ["job.seed = 3"])
    assert run()[1:] == (3, 1)


def test_parse_starts_afresh(write):
    gin_setup.parse([], ["job.seed = 1", "SEEDS = [0]", "job.shape = %SEEDS"])
    run()
    gin_setup.parse([], ["job.steps = 2"])
    assert run()[1:] == (0, 2)
    assert "seed = 1" not in gin_setup.operative_text()
    assert "SEEDS" not in gin_setup.full_text()


def test_failed_parse_leaves_a_working_gin(write):
    readers = list(gin.config._FILE_READERS)
    with pytest.raises(ValueError):
        gin_setup.parse([write("a.gin", "job.seeed = 1")])
    assert gin.config._FILE_READERS == readers
    gin_setup.parse([], ["job.seed = 5"])
    assert run()[1] == 5


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("test_adaptve.power = 1", "no part named 'test_adaptve'. Did you mean 'test_adaptive'?"),
        ("job.objective = @test_mean()", "no part named 'test_mean'. Did you mean 'test_mean_flow"),
        ("job.objective = @a/test_mean()", "no part named 'test_mean'. Did you mean"),
        ("test_adaptive.powr = 1", "test_adaptive has no parameter 'powr'. Did you mean 'power'?"),
        ("a/test_adaptive.x = 1", "test_adaptive has no parameter 'x'. It has: power, floor."),
        ("job.objective = mean_flow", r"A text needs quotes \('mean_flow'\), a part an @"),
        ("job.seed 3", "this is not gin: .*job.seed 3"),
        ("job.seed = [1, 2", "bracket"),
        ("import no_such_module", "No module named 'no_such_module'.*next to it"),
    ],
)
def test_mistake_is_explained_with_its_place(write, line, complaint):
    file = write("wrong.gin", f"job.seed = 1\n{line}\n")
    with pytest.raises((ValueError, ModuleNotFoundError), match=f"(?s){complaint}") as error:
        gin_setup.parse([file])
    assert str(file) in str(error.value)
    assert type(error.value) in (ValueError, ModuleNotFoundError)


def test_mistake_in_a_binding_shows_the_binding():
    with pytest.raises(ValueError, match=r"(?s)no parameter 'powr'.*test_adaptive.powr = 1"):
        gin_setup.parse([], ["job.seed = 1", "test_adaptive.powr = 1"])
    with pytest.raises(ValueError, match=r"(?s)not gin.*In bindings, line 2: job.seed 3"):
        gin_setup.parse([], ["job.steps = 1", "job.seed 3"])


@pytest.mark.parametrize("binding", ["job.steps=/tmp/a b", "job.steps = ~/x", "job.steps = ../x"])
def test_a_path_without_quotes_is_shown_with_them_as_a_shell_takes_it(binding):
    with pytest.raises(ValueError, match="A text needs quotes") as error:
        gin_setup.parse([], [binding])
    (word,) = re.findall(r"--set (.*)", str(error.value))
    gin_setup.parse([], shlex.split(word))
    assert gin_setup.query("job.steps") == binding.split("=")[1].strip()


def test_an_error_of_a_part_has_no_addresses_of_python():
    class Grumpy:
        def __init__(self):
            raise TypeError(f"no good: {test_an_error_of_a_part_has_no_addresses_of_python}")

    with weights.temporary("grumpy", Grumpy):
        gin_setup.parse([], ["a/job.seed = @grumpy()"])
        with pytest.raises(TypeError) as error:
            gin_setup.build("job.seed", "a")
    text = message_of(error.value)
    assert "no good: function test_an_error" in text
    assert "while 'grumpy' was built in a" in text
    assert " at 0x" not in text


def test_a_macro_in_a_list_that_is_not_set_is_named():
    gin_setup.parse([], ["job.steps = [1, %NOPE]"], [])
    with pytest.raises(ValueError, match="macro %NOPE is read, and it is not set"):
        gin_setup.query("job.steps")


# Macros


def test_macro_that_is_not_set_is_named_before_the_run(write):
    file = write("a.gin", "STEPS = 10\njob.steps = %STEPS\njob.seed = %SEDE")
    with pytest.raises(ValueError, match=r"job.seed reads the macro %SEDE, which is not set"):
        gin_setup.parse([file])
    gin_setup.parse([file], ["SEDE = 7"])
    assert run()[1:] == (7, 10)


def test_macro_inside_a_structure_is_checked_too():
    with pytest.raises(ValueError, match="macro %LOST"):
        gin_setup.parse([], ["job.shape = {'a': [1, (%LOST, 2)]}"])


def test_macro_set_by_hand_must_be_read_by_something(write):
    file = write("a.gin", "STEPS = 10\nUNUSED = 1\njob.steps = %STEPS")
    gin_setup.parse([file])
    with pytest.raises(ValueError, match="nothing reads the macro 'STEP'.*Did you mean 'STEPS'"):
        gin_setup.parse([file], ["STEP = 5"])


def test_macro_of_an_arm_is_refused(write):
    file = write("a.gin", "STEPS = 1\na/STEPS = 2\njob.steps = %STEPS")
    with pytest.raises(ValueError, match=r"'a/STEPS'. Macros know no arms; bind the parameter"):
        gin_setup.parse([file])


# Arms


ARMS = """
    test_mean_flow.weight = @test_adaptive()
    job.objective = @test_mean_flow()
    p0/test_adaptive.power = 0.0
    p2/test_adaptive.power = 2.0
    SEEDS = [0, 1]
    Grid:
      arms = ('plain', 'p0', 'p2')
      axes = {'job.seed': %SEEDS, 'test_mean_flow.weight': [@test_adaptive(), None]}
"""


def test_arm_applies_its_bindings_only(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    assert [run(a)[0].weight.power for a in ("", "plain", "p0", "p2")] == [1.0, 1.0, 0.0, 2.0]


def test_unknown_arm_lists_the_arms(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    with pytest.raises(ValueError, match=r"no arm named 'p'. .*Arms: plain, p0, p2"):
        run("p")
    gin_setup.parse([], ["job.seed = 0", "a/job.seed = 1", "a/job.steps = 1"])
    assert gin_setup.arms() == ("a",)
    gin_setup.parse([], ["job.seed = 1"])
    with pytest.raises(ValueError, match="these files have no arms"):
        run("a")


def test_query_keeps_references_and_replaces_macros(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    axes = gin_setup.query("Grid.axes")
    assert repr(axes) == ("{'job.seed': [0, 1], 'test_mean_flow.weight': [@test_adaptive(), None]}")
    assert gin_setup.query("p0/test_adaptive.power") == 0.0
    assert gin_setup.query("p0/test_adaptive.floor", 3) == 3
    assert gin_setup.query("not_registered.anything") is None


def test_scope_bindings_are_what_the_arm_changes(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    assert gin_setup.scope_bindings("p0") == {"test_adaptive.power": "0.0"}
    assert gin_setup.scope_bindings("plain") == {}


def test_plain_binding_that_an_arm_overrides_is_known():
    gin_setup.parse([], ["job.seed = 1", "job.steps = 1", "a/job.seed = 2", "b/job.steps = 2"])
    assert gin_setup.overridden_bindings("a") == ("job.seed",)
    assert gin_setup.overridden_bindings("") == ()


def test_required_value_may_come_from_the_arm_or_from_above():
    bindings = ["job.steps = %gin.REQUIRED", "a/job.steps = 3"]
    gin_setup.parse([], bindings)
    assert run("a")[2] == 3
    with pytest.raises(ValueError, match="require a value for job.steps; add .* job.steps = "):
        run()
    gin_setup.parse([], [*bindings, "job.steps = 4"])
    assert run()[2] == 4


def test_required_macro_is_named_by_its_name():
    gin_setup.parse([], ["STEPS = %gin.REQUIRED", "job.steps = %STEPS"])
    with pytest.raises(ValueError, match="require a value for STEPS;"):
        run()


# What took effect


def inert(*bindings: str, name: str = "") -> tuple[str, ...]:
    gin_setup.parse([], bindings)
    run(name)
    return gin_setup.inert_bindings(name)


def test_used_bindings_are_not_inert():
    assert inert("job.objective = @test_mean_flow()", "test_mean_flow.ratio = 0.5") == ()


def test_binding_of_a_default_factory_is_inert_until_it_is_bound_by_reference():
    plain = ("job.objective = @test_mean_flow()", "test_adaptive.power = 0.0")
    assert inert(*plain) == ("test_adaptive.power",)
    assert inert(*plain, "test_mean_flow.weight = @test_adaptive()") == ()


def test_binding_that_the_caller_overrides_is_inert():
    gin_setup.parse([], ["job.shape = 3", "job.seed = 1"])
    gin.get_configurable(job)(shape=4)
    assert gin_setup.inert_bindings() == ("job.shape",)


def test_macros_are_not_counted_but_their_readers_are():
    assert inert("POWER = 2.0", "test_adaptive.power = %POWER") == ("test_adaptive.power",)


def test_arm_is_judged_by_its_own_and_the_plain_bindings(write):
    gin_setup.parse([write("grid.gin", ARMS)], ["p0/job.sted = 1".replace("sted", "seed")])
    run("p0")
    assert gin_setup.inert_bindings("p0") == ()
    gin_setup.parse([write("grid.gin", ARMS)], ["p0/job.objective = None"])
    run("p0")
    # The part is not built in this arm; the other arm's binding is not this arm's matter.
    assert gin_setup.inert_bindings("p0") == ("test_mean_flow.weight", "p0/test_adaptive.power")


def test_overridden_binding_is_not_inert():
    assert inert("job.seed = 1", "a/job.seed = 2", name="a") == ()


def test_binding_of_a_scope_that_nothing_enters_is_inert():
    assert inert("job.seed = 1", "a/job.seed = 2") == ("a/job.seed",)


def test_scoped_reference_uses_its_own_scope():
    bindings = ("job.objective = @soft/test_mean_flow()", "soft/test_mean_flow.ratio = 0.5")
    assert inert(*bindings) == ()
    assert inert(*bindings, "test_mean_flow.ratio = 0.75") == ()
    assert inert(*bindings, "a/test_mean_flow.ratio = 1.0", name="a") == ("a/test_mean_flow.ratio",)


# Texts


def test_texts_can_be_parsed_to_the_same_run(write):
    gin_setup.parse([write("grid.gin", ARMS)], ["p0/job.seed = 4"])
    before = run("p0")
    full, operative = gin_setup.full_text(), gin_setup.operative_text()
    for text in (full, operative):
        gin_setup.parse([write("again.gin", text)])
        assert run("p0") == before


def test_operative_text_has_defaults_and_omits_what_is_unused():
    gin_setup.parse([], ["job.objective = @test_mean_flow()", "test_adaptive.floor = 0.5"])
    run()
    assert "test_mean_flow.ratio = 0.25" in gin_setup.operative_text()
    assert "floor" not in gin_setup.operative_text()


def test_bindings_of_a_text_keep_values_as_text():
    text = """
        SEEDS = [0, 1]
        a/job.seed = 2
        job.objective = @test_mean_flow()
        no_such_part:
          shape = (1, {'k': @thing, 'm': %SEEDS})
          name = 'x'
    """
    assert gin_setup.bindings_of(textwrap.dedent(text)) == {
        "SEEDS": "[0, 1]",
        "a/job.seed": "2",
        "job.objective": "@test_mean_flow()",
        "no_such_part.shape": "(1, {'k': @thing, 'm': %SEEDS})",
        "no_such_part.name": "'x'",
    }


# Parts of one's own


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


@pytest.fixture
def forget():
    """Registered names and modules to forget at the end."""
    names: list[str] = []
    yield names.append
    for name in names:
        sys.modules.pop(name, None)
        if name in objectives:
            objectives._remove(name)


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


def test_function_of_gin_is_no_part(tmp_path):
    with pytest.raises(ValueError, match=r"@constant\(\): 'constant' is a function of gin"):
        gin_setup.parse([], ["job.objective = @constant()"])
