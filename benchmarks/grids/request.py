"""What a person asks for: a gin file, more bindings on the command line, perhaps some arms.

A file with `Grid.arms` is a comparison of arms, and a grid where it also has axes. A file (or
--set) that binds run.objective outside every arm is a single run, and `--arm` picks arms.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import gin

from benchmarks.grids import axes
from benchmarks.grids.axes import Declared
from registry import gin_setup
from registry.configuration.own_code import file_of
from registry.core import did_you_mean

KEPT = ("record.jsonl", "result.json", "cell.json", "grid.json")  # beside a config.gin of ours
PATHS = {"run": ("start_from",)}  # of what is no part; those of parts are their `local_paths`


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for: a gin file, more bindings, and perhaps some of its arms.

    Without a file the bindings say everything.
    """

    file: Path | None
    bindings: tuple[str, ...] = ()
    only: tuple[str, ...] = ()  # of the arms; () is all
    trust_code: bool = False  # also that of a run's folder, where the file may lie
    modules: tuple[str, ...] = ()  # imported beside the file, by --import

    @property
    def name(self) -> str:
        """What folders and records of it are called."""
        return gin_setup.resolve(self.file).stem if self.file else "experiment"

    @property
    def of_a_run(self) -> bool:
        """Whether the file lies in a folder that a run or a comparison has written."""
        return self.file is not None and _is_kept(self.file)

    def parse(
        self,
        more: Sequence[str] = (),
        troubles: list[str] | None = None,
        *,
        recorded: bool = False,
    ) -> tuple[Path, ...]:
        """Read the file and the bindings; as `gin_setup.parse`."""
        files = [self.file] if self.file else []
        trusted = self.trust_code or not self.of_a_run
        imports = (f"import {name}" for name in self.modules)
        bindings = [*imports, *self.bindings, *more]
        return gin_setup.parse(files, bindings, troubles, trusted=trusted, recorded=recorded)

    def arms(self) -> tuple[str, ...]:
        """The arms to run; ('',) stands for one run outside every arm.

        Wrong bindings are passed over here: `plan` reports them all together.
        """
        self.parse(troubles=[])
        declared = _declared_arms()
        if twice := sorted({arm for arm in self.only if self.only.count(arm) > 1}):
            raise ValueError(f"--arm {', '.join(twice)} is given more than once")
        if self.only:
            return self.only
        if (only := gin_setup.query("Grid.only")) is not None:
            return (only,)
        if not declared or gin_setup.query("run.objective") is not None:
            return ("",)
        return declared

    def declared(self) -> Declared:
        """The axes of the file."""
        self.parse(troubles=[])
        return axes.declared(gin_setup.resolve(self.file).parent if self.file else Path.cwd())

    def axes(self) -> Declared:
        """The axes to run along.

        ValueError if the request binds what an axis binds in every cell.
        """
        found = self.declared()
        by_own_key = {gin_setup.own_key(key.split("/", 1)[-1]): key for key in self.bound_keys}
        for key in found.keys:
            if own := by_own_key.get(gin_setup.own_key(key)):
                raise ValueError(
                    f"--set {own} has no effect: the file's axis {key} binds it in every "
                    f"cell. Change the axis: --set \"Grid.axes = {{'{key}': [...]}}\""
                )
        return found

    @property
    def bound_keys(self) -> set[str]:
        """The keys that the request binds beside its file."""
        return set(gin_setup.bindings_of("\n".join(self.bindings)))

    def own_keys(self, arms: Sequence[str]) -> set[str]:
        """The keys that are bound on the command line or by the file itself, not by an include.

        They must have an effect, with three exceptions. If only some of the file's arms run, its
        plain bindings may be meant for the others. The text that a run keeps contains the bindings
        of its includes. And a part (or None) from the command line may replace a part of the file,
        whose bindings are then left without effect.
        """
        bound = gin_setup.bindings_of("\n".join(self.bindings))
        own = (
            gin_setup.bindings_of(gin_setup.read_text(gin_setup.resolve(self.file)))
            if self.file
            else {}
        )
        keys = set(own)
        if any("@" in value or value == "None" for value in bound.values()):
            parts = set(re.findall(r"@(?:\w+/)*(\w+)", " ".join(own.values())))
            keys = {key for key in keys if key.split("/")[-1].split(".")[0] not in parts}
        if "Grid.folders" in keys:
            keys = set()
        elif self.only or (tuple(arms) == ("",) and "Grid.arms" in keys):
            keys = {key for key in keys if key.split("/")[0] in self.only}
        return keys | set(bound)

    def command(
        self,
        verb: str,
        only: Sequence[str] = (),
        more: Sequence[str] = (),
        macros: Container[str] = (),
    ) -> str:
        """The command that asks for the same from any folder, without the place of its records.

        Paths in it are whole ones, and so are the `macros` that paths read.
        """
        if self.file is None:
            return "objective_zoo.experiment(...)"
        where = [
            gin_setup.whole_binding(b, PATHS, macros)
            for b in self.bindings
            if not b.startswith("mlflow.")
        ]
        more = [gin_setup.whole_binding(b, PATHS, macros) for b in more]
        words = ["objective-zoo", verb, gin_setup.portable(self.file)]
        words += [word for name in self.modules for word in ("--import", file_of(name))]
        words += [word for arm in only for word in ("--arm", arm)]
        return shlex.join([*words, *(w for b in (*where, *more) for w in ("--set", b))])

    def text(self, opened: Sequence[Path], verb: str, command: str, arm: str | None = None) -> str:
        """Everything that was parsed, as one gin file that does the same again.

        The file runs this arm alone; all arms where it is None. Paths in it are whole ones, so that
        it does so from every folder.
        """
        gin_setup.anchor_paths(PATHS)
        folders = gin_setup.import_folders(opened, self.modules)
        gin.bind_parameter("Grid.folders", folders)
        if arm is not None:
            gin.bind_parameter("Grid.only", arm)
        made = command.replace("\n", "\n#   ")
        trust = " --trust-code" if folders else ""
        return (
            f"# Made by: {made}\n# The same again: objective-zoo {verb} THIS_FILE{trust}\n\n"
            f"{gin_setup.full_text()}\n"
        )


def _is_kept(file: Path) -> bool:
    """Whether the gin file lies in a folder that a run or a comparison has written.

    Such a file may have come from somebody else, together with code; others are one's own.
    """
    folder = gin_setup.resolve(file).parent
    return any((folder / name).exists() for name in KEPT)


def _declared_arms() -> tuple[str, ...]:
    """Grid.arms; ValueError unless each is a scope with bindings of its own."""
    arms = gin_setup.query("Grid.arms", ())
    if isinstance(arms, str) or not all(isinstance(arm, str) and arm for arm in arms):
        raise ValueError(f"Grid.arms = {arms!r} must be a tuple of names, such as ('dumo', 'decm')")
    if twice := sorted({arm for arm in arms if list(arms).count(arm) > 1}):
        raise ValueError(f"Grid.arms names {', '.join(twice)} more than once; a run has one name")
    scopes = gin_setup.scopes()
    for arm in arms:
        if arm not in scopes:
            raise ValueError(
                f"Grid.arms names {arm!r}, and nothing is bound under it."
                f"{did_you_mean(arm, scopes - set(arms))} "
                f"Add a line such as {arm}/run.objective = @{arm}()"
            )
    return tuple(arms)
