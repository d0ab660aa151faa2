"""Data sets: pictures in [-1, 1] (digits, IDX files, a folder) and laws with closed forms.

How batches are cut from a set is in benchmarks/streams.py; how files are read, in
benchmarks/idx_files.py and benchmarks/image_files.py. Everything is read and checked when the data
set is made, so that no run starts on data that it cannot finish.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.idx_files import find_idx, read_idx
from benchmarks.image_files import (
    PictureFiles,
    check_pictures,
    find_pictures,
    read_pictures,
)
from benchmarks.streams import EndlessSet, Pictures, StoredSet, content_hash
from registry import datasets

Row = tuple[float, ...]


@datasets.register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits(StoredSet):
    """The 1797 handwritten 8x8 digits that ship with scikit-learn."""

    name: ClassVar = "digits"
    top: ClassVar = 16

    def load(self) -> Pictures:
        from sklearn.datasets import load_digits  # takes a second to import

        images, labels = load_digits().images, load_digits().target
        return Pictures(
            torch.from_numpy(images).to(torch.uint8)[:, None],
            torch.from_numpy(labels).long(),
            tuple("0123456789"),
        )


@datasets.register("fashion_mnist")
@dataclass(frozen=True, kw_only=True)
class FashionMnist(StoredSet):
    """Fashion-MNIST, 28x28 grey pictures of ten kinds of clothes, from its IDX files."""

    name: ClassVar = "fashion_mnist"
    folder: str = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
    split: Literal["train", "test", "all"] = "train"  # 60,000, 10,000 or both

    def load(self) -> Pictures:
        prefixes = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
        if self.split not in prefixes:
            raise ValueError(
                f"fashion_mnist.split is {self.split!r}; it must be one of {', '.join(prefixes)}"
            )
        parts = [self._load_part(prefix) for prefix in prefixes[self.split]]
        classes = "T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
        return Pictures(
            torch.cat([pixels for pixels, _ in parts])[:, None],
            torch.cat([labels for _, labels in parts]).long(),
            tuple(classes.split(", ")),
        )

    def _load_part(self, prefix: str) -> tuple[Tensor, Tensor]:
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        images, labels = (find_idx(Path(self.folder).expanduser(), name) for name in names)
        if images is None or labels is None:
            raise FileNotFoundError(self._how_to_get(names))
        pixels, classes = read_idx(images, ndim=3), read_idx(labels, ndim=1)
        if pixels.shape[1:] != (28, 28) or len(pixels) != len(classes) or not len(pixels):
            raise ValueError(
                f"{images} holds {tuple(pixels.shape)} pixels and {labels} {len(classes)} labels; "
                "expected n pictures of 28 x 28 and n labels"
            )
        if int(classes.max()) > 9:
            raise ValueError(f"{labels} holds the label {int(classes.max())}; expected 0 to 9")
        return pixels, classes

    def _how_to_get(self, names: tuple[str, ...]) -> str:
        return (
            f"Fashion-MNIST is not in {self.folder!r}: it needs {' and '.join(names)}, each plain "
            "or with .gz. Install it (apt-get install dataset-fashion-mnist), or point "
            "fashion_mnist.folder at a folder with the four IDX files train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
        )


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


class ComponentSet(EndlessSet):
    """A Gaussian mixture, coordinates independent in each mode: what the exact networks take."""

    def __post_init__(self) -> None:
        self.components()  # so that what is wrong shows up here

    def components(self) -> dict[str, Tensor]:
        """`means` and `stds` [k d], `weights` [k] of sum 1, float64."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.components()["means"].shape[1:])

    def identity(self) -> str:
        content = content_hash(*self.components().values())
        return f"{self.name}: endless x {self.shape}, sha256 {content}"

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        law = self.components()
        component = torch.multinomial(law["weights"], n, replacement=True, generator=rng)
        noise = torch.randn(n, *self.shape, generator=rng, dtype=torch.float64)
        return (law["means"][component] + law["stds"][component] * noise).float()


@datasets.register("gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian(ComponentSet):
    """One Gaussian in the plane, drawn without end; velocity and flow map in closed form."""

    name: ClassVar = "gaussian"
    mean: Row = (0.6, -0.8)
    std: Row = (0.6, 0.3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # gin's lists are not hashable
        object.__setattr__(self, "std", tuple(self.std))
        super().__post_init__()

    def components(self) -> dict[str, Tensor]:
        return _components("gaussian", (self.mean,), (self.std,), (1.0,))


@datasets.register("mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture(ComponentSet):
    """Four unequal Gaussian modes in the plane, drawn without end; velocity in closed form.

    The default has mean 0 and standard deviation 1 in both coordinates, but neither equal weights
    nor a mirror axis, so that a wrong sign or a lost weight shows.
    """

    name: ClassVar = "mixture"
    means: tuple[Row, ...] = ((-1.16, -0.52), (0.81, -1.17), (0.45, 1.35), (1.26, 0.69))
    stds: tuple[Row, ...] = ((0.18, 0.38), (0.27, 0.16), (0.13, 0.27), (0.18, 0.22))
    weights: Row = (0.4, 0.2, 0.25, 0.15)  # relative

    def __post_init__(self) -> None:
        object.__setattr__(self, "means", tuple(map(tuple, self.means)))
        object.__setattr__(self, "stds", tuple(map(tuple, self.stds)))
        object.__setattr__(self, "weights", tuple(self.weights))
        super().__post_init__()

    def components(self) -> dict[str, Tensor]:
        return _components("mixture", self.means, self.stds, self.weights)


def _components(
    name: str, means: tuple[Row, ...], stds: tuple[Row, ...], weights: Row
) -> dict[str, Tensor]:
    lengths = {len(row) for row in (*means, *stds)}
    if len(lengths) != 1 or 0 in lengths or not len(means) == len(stds) == len(weights):
        raise ValueError(
            f"{name}: means {means}, stds {stds} and weights {weights} do not fit together; give "
            "each component a mean and a std of the same length, and one weight"
        )
    law = [torch.tensor(values, dtype=torch.float64) for values in (means, stds, weights)]
    if not all(bool(values.isfinite().all()) for values in law):
        raise ValueError(f"{name}: means {means}, stds {stds}, weights {weights} must be finite")
    if bool((law[1] <= 0).any()) or bool((law[2] <= 0).any()):
        raise ValueError(f"{name}: stds {stds} and weights {weights} must be positive")
    return {"means": law[0], "stds": law[1], "weights": law[2] / law[2].sum()}
