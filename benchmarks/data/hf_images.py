"""Pictures in data sets of the Hugging Face hub: [channels resolution resolution] in [-1, 1].

`path` is a name on the hub, a local folder or a local file. A folder is one that
`Dataset.save_to_disk` wrote, or one with data files (parquet, arrow, pictures) that
`datasets.load_dataset` reads. A file is a parquet or arrow file. Pixels are made by
benchmarks/data/image_pixels.py, as for a plain folder of pictures.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.data.image_pixels import (
    BAR_FROM,
    SQUARES,
    as_pixels,
    check_memory,
    has_frames,
)
from benchmarks.data.picture_faults import Seen, fault_of, judge_pictures
from benchmarks.data.streams import Pictures, StoredSet
from registry import datasets, progress
from registry.core import did_you_mean

FILES = {".parquet": "parquet", ".arrow": "arrow"}

log = logging.getLogger(__name__)


@datasets.register("hf_images")
@dataclass(frozen=True, kw_only=True)
class HfImages(StoredSet):
    """A split of a data set with a column of pictures and perhaps one of class labels."""

    name: ClassVar = "hf_images"
    rule: ClassVar = SQUARES
    local_paths: ClassVar = ("path",)

    path: str  # a name on the hub, a local folder or a local file
    config: str | None = None
    split: str = "train"
    image: str = ""  # the column of pictures; "" takes the only one
    label: str = ""  # the column of class labels; "" takes the only one, or goes without
    resolution: int = 32
    channels: int = 3  # 3 RGB, 1 grey
    flip: bool = False  # mirror half of the training samples left to right

    def load(self) -> Pictures:
        if self.channels not in (1, 3) or self.resolution < 1:
            raise ValueError(
                f"hf_images.channels is {self.channels} and must be 1 or 3; hf_images.resolution "
                f"is {self.resolution} and must be positive"
            )
        table = _table(self.path, self.config, self.split)
        if not len(table):
            raise ValueError(f"the split {self.split!r} of {self.path} is empty")
        image = _column(table, "Image", self.image, "image")
        label = _column(table, "ClassLabel", self.label, "label")
        if not image:
            raise ValueError(f"{self.path} has no column of pictures; it has {_described(table)}")
        if not label and (others := [name for name in table.features if name != image]):
            log.warning(
                "%s has no ClassLabel column, so there are no labels; the other columns are %s. "
                "Bind hf_images.label to train with one",
                *(self.path, ", ".join(others)),
            )
        labels, classes = _labels(table, label, self.path) if label else (None, ())
        return Pictures(_pixels(table, image, self.resolution, self.channels), labels, classes)


def _table(path: str, config: str | None, split: str) -> Any:
    try:
        import datasets as hf  # optional, and takes seconds to import
    except ImportError as error:
        raise ImportError("hf_images needs datasets: pip install 'objective-zoo[hf]'") from error
    folder = Path(path).expanduser()
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    try:
        if folder.is_file() and folder.suffix in FILES:
            files = {split.partition("[")[0]: str(folder)}
            return hf.load_dataset(FILES[folder.suffix], data_files=files, split=split)
        if not saved:
            return hf.load_dataset(str(folder) if folder.exists() else path, config, split=split)
        found = hf.load_from_disk(str(folder))
    except Exception as error:  # kinds of the library and of the file systems that it uses
        raise ValueError(
            f"hf_images cannot load split {split!r} of {path!r}: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, hf.DatasetDict) and split not in found:
        raise ValueError(f"{path} has the splits {', '.join(found)}, and no {split!r}")
    if isinstance(found, hf.DatasetDict):
        return found[split]
    own = str(found.split or split).partition("[")[0]
    if own != split:
        raise ValueError(
            f"{path} is one saved split{f', {own!r}' if found.split else ''}, and cannot give "
            f"{split!r}. Bind hf_images.split = {own!r}"
        )
    return found


def _column(table: Any, kind: str, wanted: str, field: str) -> str:
    """The name of the wanted column, or of the only one of its kind; '' if there is none."""
    if wanted:
        if wanted not in table.features:
            raise ValueError(
                f"hf_images.{field} = {wanted!r} is no column."
                f"{did_you_mean(wanted, table.features)} There are {_described(table)}"
            )
        return wanted
    found = [name for name, what in table.features.items() if type(what).__name__ == kind]
    if len(found) > 1:
        raise ValueError(
            f"there are several columns of kind {kind}; bind hf_images.{field} to one of "
            f"{', '.join(found)}"
        )
    return found[0] if found else ""


def _described(table: Any) -> str:
    return ", ".join(f"{name} ({type(what).__name__})" for name, what in table.features.items())


def _labels(table: Any, column: str, path: str) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices int64 [n] and class names; if the labels are texts, these are the names."""
    values, names = list(table[column]), getattr(table.features[column], "names", None)
    if all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        values = [names.index(value) for value in values]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        odd = next(value for value in values if not (isinstance(value, int) and value >= 0))
        raise ValueError(
            f"the labels {column!r} of {path} are no classes: {odd!r} is among them. Labels must "
            "be texts or whole numbers from 0 on; a split without labels often has -1"
        )
    return torch.tensor(values), tuple(map(str, names or range(max(values) + 1)))


def _pixels(table: Any, column: str, resolution: int, channels: int) -> Tensor:
    """All pictures as uint8 [n c h w]; ValueError names the rows that cannot be read."""
    rows = range(len(table))
    instead = "Choose a smaller hf_images.resolution, or save them as files for image_folder"
    check_memory(len(rows), (channels, resolution, resolution), instead)
    pixels = torch.empty(len(rows), channels, resolution, resolution, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        read = partial(_read, table.select_columns([column]), column, pixels)
        made, worth = pool.map(read, rows), len(rows) >= BAR_FROM
        reports = progress.bar(made, "reading pictures", worth=worth, total=len(rows))
        judge_pictures(list(reports), resolution)
    return pixels


def _read(table: Any, column: str, pixels: Tensor, row: int) -> Seen | str:
    """Write one row's pixels; what was seen of the picture, or a text that says what is wrong."""
    try:
        picture = table[row][column]
        if picture is None:
            return f"row {row} (it has no picture)"
        side, frames = min(picture.size), has_frames(picture)
        pixels[row] = as_pixels(picture, pixels.shape[2], pixels.shape[1])
    except Exception as error:  # decoders raise any kind; all are reported
        return f"row {row} ({fault_of(error)})"
    return Seen(side, int(pixels[row].max()), frames)
