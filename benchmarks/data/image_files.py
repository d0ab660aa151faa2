"""Which files of a folder are pictures, and which classes they have.

Every file whose suffix is one of `SUFFIXES` is taken for a picture, also in sub-folders of any
depth. Hidden files and folders are left out. The files are sorted by their paths, so that their
order is the same on every machine.

Folders that are named like the splits of a data set, such as train and val, are not taken for
classes without a word: a model would learn to tell the splits apart.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = tuple(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tif .tiff "
    ".webp".split()
)
SHOWN = 10  # names in an error
_CONTENT = r"(set|split|data|images?|imgs?|pictures?)"
_SPLIT = re.compile(
    rf"({_CONTENT}[ _-]?)?(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval(uation)?|holdout)"
    rf"([ _-]?({_CONTENT}|\d+))*",
    re.IGNORECASE,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundPictures:
    """The pictures of a folder, sorted; without classes, `labels` and `classes` are empty."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] = ()  # for each file an index into `classes`
    classes: tuple[str, ...] = ()


def find_pictures(
    folder: Path,
    *,
    labelled: bool,
    splits_are_classes: bool = False,
    unlabelled: str = "bind image_folder.labelled = False",
    consent: str = "bind image_folder.splits_are_classes = True",
) -> FoundPictures:
    """All pictures below the folder; a warning counts the files that are no pictures.

    `splits_are_classes` takes folders such as train and val for classes. `unlabelled` and `consent`
    tell the user, in an error, how to go on without labels and with such classes. ValueError for a
    folder without pictures, for links that lead nowhere and for classes that are not clear.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        seen_from = "" if folder.is_absolute() else f" (seen from {Path.cwd()})"
        raise FileNotFoundError(f"the picture folder {str(folder)!r}{seen_from} {what}")
    files, others, broken = [], Counter[str](), list[str]()
    for path, is_whole in _visible_files(folder):
        suffix = path.suffix.lower()
        if suffix in SUFFIXES and is_whole:
            files.append(path)
        elif not is_whole and (suffix in SUFFIXES or not suffix):
            broken.append(_no_file(path))
        else:
            others[suffix or "no suffix"] += 1
    if broken:
        raise ValueError(
            f"{len(broken)} entries of the picture folder {str(folder)!r} are no files: "
            f"{_listed(sorted(broken))}. Repair or remove them"
        )
    kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common())
    if not files:
        raise ValueError(
            f"no picture in the folder {str(folder)!r}, sub-folders included; files of other "
            f"kinds: {kinds or 'none'}. Pictures are recognised by {' '.join(SUFFIXES)}"
        )
    if others:
        log.warning(
            "%s: %d files are no pictures and are ignored (%s)", folder, others.total(), kinds
        )
    files.sort(key=lambda path: path.parts)
    if not splits_are_classes:
        _judge_splits(folder, files, labelled, consent)
    classes = _classes(folder, files, unlabelled) if labelled else ()
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[path.relative_to(folder).parts[0]] for path in files if classes]
    return FoundPictures(tuple(files), tuple(labels), classes)


def _judge_splits(folder: Path, files: Iterable[Path], labelled: bool, consent: str) -> None:
    """ValueError where the sub-folders are splits and would become classes; else a warning."""
    places = {path.relative_to(folder).parts[:-1] for path in files} - {()}
    tops = {place[0] for place in places}
    splits = sorted(name for name in tops if _SPLIT.fullmatch(name))
    if not splits:
        return
    inside = [{place[1] for place in places if place[0] == name and place[1:]} for name in splits]
    alone = len(tops) == 1
    named, path = ", ".join(splits), folder / _preferred(splits)
    if not labelled:
        if len(splits) > 1:
            log.warning(
                "%s holds %s, which are named like splits of a data set: the pictures of all of "
                "them are taken. For those of one split give its folder, such as %s",
                *(folder, named, path),
            )
    elif len(splits) > 1 or any(len(names) > 1 for names in inside):
        raise ValueError(
            f"{folder} holds {named}, named like splits of a data set and not like classes. Give "
            f"the folder of one split, such as {path}; or, to take these folders as they are, "
            f"{consent}"
        )
    elif not alone:
        log.warning(
            "the sub-folder %s of %s is named like a split of a data set and is taken for a class, "
            "as its other sub-folders are. If it is a split, give the folder of the classes alone",
            *(named, folder),
        )


def _preferred(splits: Sequence[str]) -> str:
    """The split that is most likely meant for training."""
    return next((name for name in splits if "train" in name.lower()), splits[0])


def _classes(folder: Path, files: list[Path], unlabelled: str) -> tuple[str, ...]:
    """The names of the sub-folders that are the classes.

    A single sub-folder tells no picture from another, so it gives no classes, as none does.
    """
    beside = [path.name for path in files if path.parent == folder]
    used = {path.relative_to(folder).parts[0] for path in files if path.parent != folder}
    if beside and used:
        raise ValueError(
            f"{folder} has pictures beside its sub-folders ({_listed(beside)}) and in them "
            f"({_listed(sorted(used))}), so the sub-folders cannot be the classes. Move the "
            f"pictures into sub-folders, or {unlabelled}"
        )
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path.name)}
    if used and folders - used:
        raise ValueError(
            f"no picture in these class folders of {folder}: {_listed(sorted(folders - used))}. "
            f"Fill or remove them, or {unlabelled}"
        )
    return tuple(sorted(used)) if len(used) > 1 else ()


def _visible_files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Every entry that is no folder, and whether it is a file; links to folders are followed."""
    seen, waiting = set(), [folder]
    while waiting:
        top = waiting.pop()
        real = os.path.realpath(top)
        if real in seen:  # a link leads back to a folder that was seen
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(top), key=lambda entry: entry.name)
        except PermissionError:
            raise ValueError(
                f"the folder {str(top)!r} may not be read by this user. Change its permissions, or "
                "remove it from the pictures"
            ) from None
        for entry in entries:
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                waiting.append(Path(entry.path))
            else:
                yield Path(entry.path), entry.is_file()


def _no_file(path: Path) -> str:
    """What an entry is that is neither a file nor a folder."""
    if path.is_symlink():
        return f"{path} (a link to {os.readlink(path)}, which leads nowhere)"
    return f"{path} (a pipe, socket or device)"


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
