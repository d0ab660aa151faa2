"""What a person asks for: a gin file, more bindings on the command line, perhaps one arm.

A file with `Grid.arms` is a comparison of arms, and a grid where it also has axes. A file (or
--set) that binds run.objective outside every arm is a single run, and `--arm` picks one arm.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gin

from benchmarks.grids import axes
from benchmarks.grids.axes import Declared
from registry import gin_setup
from registry.core import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for: a gin file, more bindings, and perhaps one of its arms."""

    file: Path
    bindings: tuple[str, ...] = ()
    arm: str = ""

    def parse(
        self, more: Sequence[str] = (), troubles: list[str] | None = None
    ) -> tuple[Path, ...]:
        return gin_setup.parse([self.file], [*self.bindings, *more], troubles)

    def arms(self) -> tuple[str, ...]:
        """The arms to run; ('',) is one run outside every arm. Wrong bindings are for `plan`."""
        self.parse(troubles=[])
        declared = _declared_arms()
        if self.arm:
            return (self.arm,)
        if (only := gin_setup.query("Grid.only")) is not None:
            return (only,)
        if not declared or gin_setup.query("run.objective") is not None:
            return ("",)
        return declared

    def declared(self) -> Declared:
        """The axes of the file."""
        self.parse(troubles=[])
        return axes.declared(gin_setup.resolve(self.file).parent)

    def axes(self) -> Declared:
        """The axes to run along; ValueError if the request binds what they bind in every cell."""
        found = self.declared()
        asked = {gin_setup.own_key(key.split("/", 1)[-1]): key for key in self.asked}
        for key in found.keys:
            if own := asked.get(gin_setup.own_key(key)):
                raise ValueError(
                    f"--set {own} has no effect: the file's axis {key} binds it in every "
                    f"cell. Change the axis: --set \"Grid.axes = {{'{key}': [...]}}\""
                )
        return found

    @property
    def asked(self) -> set[str]:
        return set(gin_setup.bindings_of("\n".join(self.bindings)))

    def own_keys(self, arms: Sequence[str]) -> set[str]:
        """The keys bound on the command line or by the file itself, not by an include.

        Where only some of the file's arms run, its plain bindings may serve the others. The text
        that a run keeps has those of its includes. A part (or None) put in on the command line may
        replace one that the file puts in, and leave its bindings.
        """
        asked = gin_setup.bindings_of("\n".join(self.bindings))
        own = gin_setup.bindings_of(gin_setup.resolve(self.file).read_text())
        keys = set(own)
        if any("@" in value or value == "None" for value in asked.values()):
            parts = set(re.findall(r"@(?:\w+/)*(\w+)", " ".join(own.values())))
            keys = {key for key in keys if key.split("/")[-1].split(".")[0] not in parts}
        if "Grid.folders" in keys:
            keys = set()
        elif self.arm or (tuple(arms) == ("",) and "Grid.arms" in keys):
            keys = {key for key in keys if self.arm and key.startswith(f"{self.arm}/")}
        return keys | set(asked)

    def command(self, verb: str, arm: str = "", more: Sequence[str] = ()) -> str:
        """The line that asks for the same, in any folder; where it is recorded is left out."""
        where = [b for b in self.bindings if not b.startswith("mlflow.")]
        words = ["objective-zoo", verb, gin_setup.portable(self.file)]
        words += ["--arm", arm] if arm else []
        return shlex.join([*words, *(w for b in (*where, *more) for w in ("--set", b))])

    def text(self, opened: Sequence[Path], command: str, arm: str | None = None) -> str:
        """All that was parsed, as one gin file that does the same again; arm None is all arms."""
        gin.bind_parameter("Grid.folders", gin_setup.import_folders(opened))
        if arm is not None:
            gin.bind_parameter("Grid.only", arm)
        made, again = command.replace("\n", "\n#   "), command.split()[1]
        return (
            f"# Made by: {made}\n# The same again: objective-zoo {again} THIS_FILE\n\n"
            f"{gin_setup.full_text()}\n"
        )


def _declared_arms() -> tuple[str, ...]:
    """Grid.arms, checked: each a scope with bindings of its own."""
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
