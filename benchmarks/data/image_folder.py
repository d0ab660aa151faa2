"""The pictures of a folder: [channels resolution resolution] in [-1, 1].

image_files.py finds them and their classes, image_pixels.py reads them, streams.py makes batches.
All files are read or checked when the data set is made, so that no run starts with a picture that
it cannot read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.data.image_files import find_pictures
from benchmarks.data.image_pixels import SQUARES, PictureFiles, check_pictures, read_pictures
from benchmarks.data.streams import Pictures, StoredSet
from registry import datasets


@datasets.register("image_folder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder(StoredSet):
    """Your own pictures: every picture in a folder; the sub-folders are the classes.

    Two or more sub-folders of the top level are the classes, in sorted order, and a picture may lie
    at any depth in them. With fewer there are no labels. If pictures lie both beside and inside the
    sub-folders, it is not clear whether these are classes: that is an error. `labelled = False`
    ignores the sub-folders. Sub-folders that are named like splits, such as train and val, are
    refused; `splits_are_classes = True` takes them for classes.
    """

    name: ClassVar = "image_folder"
    rule: ClassVar = SQUARES
    local_paths: ClassVar = ("folder",)
    folder: str
    resolution: int = 32
    channels: int = 3  # 3 RGB, 1 grey
    labelled: bool = True
    splits_are_classes: bool = False  # True takes sub-folders such as train and test for classes
    flip: bool = False  # mirror half of the training samples left to right
    in_memory: bool = True  # False checks the files now and reads each when it is needed

    def load(self) -> Pictures:
        if self.channels not in (1, 3):
            raise ValueError(
                f"image_folder.channels is {self.channels}; it must be 1 (grey) or 3 (RGB)"
            )
        if self.resolution < 1:
            raise ValueError(f"image_folder.resolution is {self.resolution}; it must be positive")
        found = find_pictures(
            Path(self.folder).expanduser(),
            labelled=self.labelled,
            splits_are_classes=self.splits_are_classes,
        )
        pixels: Tensor | PictureFiles
        if self.in_memory:
            pixels = read_pictures(found.files, self.resolution, self.channels)
        else:
            check_pictures(found.files, self.resolution)
            pixels = PictureFiles(found.files, self.resolution, self.channels)
        labels = torch.tensor(found.labels) if found.classes else None
        return Pictures(pixels, labels, found.classes)
