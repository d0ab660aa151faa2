"""Where gin files are found, and the reader through which gin opens them.

A gin file is looked for as given, then among ours: in the checkout's gin/, or in an installation's
share folder. An include is looked for next to the file that includes it, then among ours: never in
the current folder, which is where gin itself would look first.
"""

from __future__ import annotations

import codecs
import importlib.util
import io
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

from gin import config, config_parser

from registry.configuration import own_code
from registry.core import did_you_mean
from registry.plugins import make_importable


def roots() -> tuple[Path, ...]:
    """The folder of our gin files: the checkout's, else all those where pip puts shared data."""
    packages = Path(__file__).parents[2]
    checkout = packages / "gin"
    # Next to installed packages, gin/ is gin-config itself.
    if checkout.is_dir() and not (checkout / "__init__.py").exists():
        return (checkout,)
    user = sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))
    data = (sysconfig.get_path("data"), user, packages)  # the last is pip install --target
    shared = [Path(folder) / "share" / "objective-zoo" / "gin" for folder in data]
    return tuple(folder for folder in dict.fromkeys(shared) if folder.is_dir())


def settings_of(objective: str) -> list[Path]:
    """The files of gin/objective that bind this objective, its own first, then by name."""
    files = (path for root in roots() for path in (root / "objective").glob("*.gin"))
    binds = re.compile(rf"^{re.escape(objective)}\.", re.MULTILINE)
    found = [path for path in files if binds.search(path.read_text())]
    return sorted(found, key=lambda path: (path.stem != objective, path.name))


def resolve(name: str | Path, folder: Path | None = None) -> Path:
    """The gin file meant by `name`, seen from `folder` (default: the current one).

    `experiments/digits.gin` and `gin/experiments/digits.gin` name the same shipped file.
    """
    given = Path(name)
    inside = given.relative_to("gin") if given.is_relative_to("gin") else given
    candidates = list(
        dict.fromkeys([(folder or Path.cwd()) / given, *(r / inside for r in roots())])
    )
    for path in candidates:
        if path.is_file():
            return path.resolve()
    if folders := [path for path in candidates if path.is_dir()]:
        raise IsADirectoryError(f"{folders[0]} is a folder; give a gin file, such as one in it")
    shipped = {f.relative_to(root).as_posix() for root in roots() for f in root.rglob("*.gin")}
    raise FileNotFoundError(
        f"no gin file {str(name)!r}.{did_you_mean(inside.as_posix(), shipped)} Looked at:"
        + "".join(f"\n  {path}" for path in candidates)
    )


def portable(name: str | Path) -> str:
    """A name by which the file is found from every folder.

    A shipped file has a name of its own; for others it is the whole path.
    """
    path = resolve(name)
    shipped = [path.relative_to(root) for root in roots() if path.is_relative_to(root)]
    return shipped[0].as_posix() if shipped else str(path)


@dataclass
class Reading:
    """The files that gin has opened so far, and those that are still open.

    Each open file is included by the one before it.
    """

    opened: list[Path] = field(default_factory=list)
    open: list[Path] = field(default_factory=list)

    @property
    def place(self) -> str:
        """The text that is being read."""
        return (
            str(self.open[-1]) if self.open else "the bindings beside the files (--set, Grid.axes)"
        )


@contextmanager
def reader(*, trusted: bool = True) -> Iterator[Reading]:
    """While it is open, gin opens its files through `resolve`; yields the `Reading`.

    Files that are not `trusted` may import nothing that is not imported already, and include only
    files of their own folder and ours; see own_code.py.

    gin's own second reader logs an error at the root for every name that it does not know.
    """
    reading = Reading()

    @contextmanager
    def read(name: str) -> Iterator[IO[str]]:
        path = resolve(name, reading.open[-1].parent if reading.open else None)
        if path in reading.open:
            raise ValueError(f"{path} includes itself")
        if reading.open and not trusted:
            _check_include(path, reading.open[0])
        reading.opened.append(path)
        reading.open.append(path)
        if trusted:
            _make_imports_work(path)
        else:
            own_code.check(path, *_imports_of(path))
        yield _stream(path, read_text(path))
        reading.open.pop()

    before = list(config._FILE_READERS)
    config._FILE_READERS[:] = [(read, lambda name: True)]
    try:
        yield reading
    finally:
        config._FILE_READERS[:] = before


def _stream(path: Path, text: str) -> IO[str]:
    stream = io.StringIO(text)
    stream.name = str(path)  # for the place of a syntax error
    return stream


def read_text(path: Path) -> str:
    """The text of a gin file; ValueError, which names the file, unless it is UTF-8.

    A byte order mark at its beginning, as Windows editors write it, is passed over.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is in UTF-16, by its byte order mark. Save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: the byte 0x{content[error.start]:02x} is no UTF-8. Save the "
            "file as UTF-8"
        ) from None
    return text.replace("\r\n", "\n")


def _check_include(path: Path, first: Path) -> None:
    """ValueError if a file that came from elsewhere includes one outside its folder, not ours."""
    if not any(path.is_relative_to(root) for root in (first.parent, *roots())):
        raise ValueError(
            f"{first} includes {path}, which lies outside its folder. If you trust it, say "
            "--trust-code"
        )


def _make_imports_work(path: Path) -> None:
    """Let a gin file import the Python files in the folders that it names, and those next to it.

    ValueError if another module of the same name would be imported instead.
    """
    names, folders = imports_of(path)
    for name in names:
        near = [folder for folder in (*folders, path.parent) if _holds(folder, name)]
        if folders and not near and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"{path} imports {name!r}, which lay in {' or '.join(map(str, folders))} and is "
                "gone; put it back, or name its folder in Grid.folders",
                name=name,
            )
        make_importable(name, (near or [path.parent])[0])


def imports_of(path: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """The packages that a gin file imports, and the folders where it says that they lie."""
    modules, folders = _imports_of(path)
    return tuple(dict.fromkeys(name.split(".")[0] for name in modules)), folders


def _imports_of(path: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """As `imports_of`, with the whole names of the modules."""
    return _imports_in(read_text(path), path)


@lru_cache(maxsize=256)  # a run reads its files several times over
def _imports_in(text: str, path: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    names: list[str] = []
    folders: list[Path] = []
    for statement in config_parser.ConfigParser(_stream(path, text), Verbatim()):
        if isinstance(statement, config_parser.ImportStatement):
            names.append(statement.module)
        elif isinstance(statement, config_parser.BindingStatement):
            if (statement.selector, statement.arg_name) == ("Grid", "folders"):
                folders += _folders(path, statement.value)
    return tuple(dict.fromkeys(names)), tuple(folders)


def _folders(path: Path, value: object) -> list[Path]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{path}: Grid.folders = {value!r} must be a list of folders' names")
    return [Path(name) for name in value]


def code_hashes(opened: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of the Python files, outside the installed packages, that these gin files import.

    Modules beside them, which they have imported in turn, are among them.
    """
    opened = tuple(opened)
    return own_code.hashes(imported_files(opened), map(Path, import_folders(opened)))


def imported_files(opened: Iterable[Path], modules: Iterable[str] = ()) -> tuple[Path, ...]:
    """The Python files, outside the installed packages, that these gin files import.

    `modules` were imported beside them, by --import.
    """
    found = []
    for name, folder in _sources(opened, modules):
        found += [file for file in [folder / f"{name}.py"] if file.is_file()]
        if _holds(folder, name):
            found += sorted((folder / name).rglob("*.py"))
    return tuple(dict.fromkeys(file.resolve() for file in found))


def import_folders(opened: Iterable[Path], modules: Iterable[str] = ()) -> tuple[str, ...]:
    """The folders of the same files."""
    return tuple(dict.fromkeys(str(folder.resolve()) for _, folder in _sources(opened, modules)))


def _sources(opened: Iterable[Path], modules: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """What these gin files import from folders: each name with the folder that it comes from.

    A module that is imported already may have come from elsewhere than the file says, by --import.
    What is passed on to another process is then its own folder, never the one in the file.
    """
    for path in opened:
        names, folders = imports_of(path)
        for name in names:
            near = [folder for folder in (*folders, path.parent) if _holds(folder, name)]
            if folder := own_code.folder_of(name) if near else None:
                yield name, folder
            elif near:
                yield name, near[0]
    for name in dict.fromkeys(module.split(".")[0] for module in modules):
        if folder := own_code.folder_of(name):
            yield name, folder


def _holds(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


class _Text(str):
    """A text whose repr is the text itself."""

    def __repr__(self) -> str:
        return str(self)


class Verbatim(config_parser.ParserDelegate):
    """Reads gin text without knowing any part: a reference or a macro is kept as its own text."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        return _Text(f"@{scoped_configurable_name}{'()' if evaluate else ''}")

    def macro(self, macro_name: str) -> str:
        return _Text(f"%{macro_name}")
