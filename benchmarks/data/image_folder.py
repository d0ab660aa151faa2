"""Pictures of a folder, in [-1, 1].

How batches are cut from a set is in benchmarks/data/streams.py; how files are read, in
benchmarks/data/image_files.py. Everything is read and checked when the data set is made, so that no
run starts on data that it cannot finish.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.data.image_files import find_pictures
from benchmarks.data.image_pixels import PictureFiles, check_pictures, read_pictures
from benchmarks.data.streams import Pictures, StoredSet
from registry import datasets


@datasets.register("image_folder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder(StoredSet):
    """Your own pictures: every picture in a folder, its sub-folders being the classes.

    Two or more sub-folders of the top level are the classes, in sorted order, however deep the
    pictures lie in them; fewer give no labels. Pictures both beside and inside sub-folders are an
    error, since either reading could be meant; `labelled = False` ignores the sub-folders.
    """

    name: ClassVar = "image_folder"
    folder: str
    resolution: int = 32
    channels: int = 3  # 3 RGB, 1 grey
    labelled: bool = True
    flip: bool = False  # mirror half of the training samples left to right
    in_memory: bool = True  # False: checked now, read as they are needed

    def load(self) -> Pictures:
        if self.channels not in (1, 3):
            raise ValueError(
                f"image_folder.channels is {self.channels}; it must be 1 (grey) or 3 (RGB)"
            )
        if self.resolution < 1:
            raise ValueError(f"image_folder.resolution is {self.resolution}; it must be positive")
        found = find_pictures(Path(self.folder).expanduser(), labelled=self.labelled)
        pixels: Tensor | PictureFiles
        if self.in_memory:
            pixels = read_pictures(found.files, self.resolution, self.channels)
        else:
            check_pictures(found.files, self.resolution)
            pixels = PictureFiles(found.files, self.resolution, self.channels)
        labels = torch.tensor(found.labels) if found.classes else None
        return Pictures(pixels, labels, found.classes)
