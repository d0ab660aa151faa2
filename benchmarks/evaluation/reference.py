"""The real side of an evaluation: a data set, a folder, an .npz of statistics, clean-fid's names.

    (nothing)                    the data set that the run was trained on
    FOLDER                       every picture in it, at the size of the samples
    FILE.npz                     `mu` and `sigma`, images uint8 [n h w 3] in `arr_0`, or both, as in
                                 the reference batches of OpenAI's guided-diffusion (ADM)
    cleanfid:NAME_SPLIT_SIZE     statistics under clean-fid's names, from a file that is here

Statistics are used where their dimension is that of the features, images for everything else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cleanfid
import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from benchmarks.data.derived.scaled import Scaled
from benchmarks.data.image_files import find_pictures
from benchmarks.data.image_pixels import check_pictures, read_pictures
from benchmarks.data.streams import StoredSet
from benchmarks.metrics import evaluate
from benchmarks.metrics.features import WEIGHTS_VARIABLE
from registry.protocols import Coded, Dataset
from trainers.checkpoints.whole_files import file_sha256, remembered_sha256

CLEANFID = "cleanfid:"
CLEANFID_URL = "https://www.cs.cmu.edu/~clean-fid/stats/"
Images = Callable[[int, int], Tensor]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Real:
    """Real images, statistics of their features, or both; `about` identifies them by content.

    `images(first, count)` gives rows as uint8 or in [-1, 1]; `mean` [d] and `covariance` [d d] are
    float64; `features` [n d] come with some of clean-fid's statistics. `resize` is that of the
    features behind the statistics, "clean" or "tensorflow", where it is known.
    """

    about: str
    num: int = 0
    images: Images | None = None
    mean: Tensor | None = None
    covariance: Tensor | None = None
    features: Tensor | None = None
    resize: str = ""


def find_real(
    reference: str | None, dataset: Callable[[], Dataset], shape: tuple[int, ...], num: int
) -> Real:
    """The real side for samples of this shape; ValueError if `reference` names none.

    `dataset` gives the run's own data, and is called only where these are the reference; `num` is
    how many are drawn of a data set without end.
    """
    if reference is None:
        try:
            return _of_dataset(dataset(), num)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"without --reference the run's own data are the reference, and they cannot be "
                f"taken: {error}"
            ) from error
    if reference.startswith(CLEANFID):
        return _of_cleanfid(reference.removeprefix(CLEANFID))
    path = Path(reference).expanduser()
    if path.is_dir():
        return _of_folder(path, shape)
    if path.is_file() and path.suffix == ".npz":
        return _of_size(_of_npz(path), shape)
    raise ValueError(
        f"the reference {reference!r} is no folder of pictures and no .npz file. Statistics under "
        f"clean-fid's names are {CLEANFID}NAME_SPLIT_SIZE, such as {CLEANFID}cifar10_train_32"
    )


def _of_dataset(dataset: Dataset, num: int) -> Real:
    if isinstance(dataset, Scaled):
        return _of_dataset(dataset.dataset, num)  # samples are given in its scale
    if isinstance(dataset, Coded):
        raise ValueError(
            f"{dataset.name} holds codes, and the pictures that they decode to are no reference. "
            "Give --reference: the folder of the pictures that were encoded, or an .npz of "
            "statistics"
        )
    about = dataset.identity()
    if isinstance(dataset, StoredSet):
        return Real(
            about=about,
            num=dataset.size,
            images=lambda first, count: dataset.rows(torch.arange(first, first + count)),
        )
    drawn = evaluate.decoded(dataset, dataset.reference(dataset.size or num, 0)[0])
    about += "" if dataset.size else f", {num} drawn with seed 0"
    return Real(
        about=about, num=len(drawn), images=lambda first, count: drawn[first : first + count]
    )


def _of_folder(folder: Path, shape: tuple[int, ...]) -> Real:
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"samples of shape {shape} cannot be compared with a folder of pictures")
    files = find_pictures(folder, labelled=False).files
    check_pictures(files, shape[1])
    with ThreadPoolExecutor() as pool:
        digests = "\n".join(pool.map(file_sha256, files))
    content = hashlib.sha256(digests.encode()).hexdigest()
    return Real(
        about=(
            f"{len(files)} pictures, largest centred square to {shape[1]}x{shape[2]} by Pillow's "
            f"antialiased bicubic filter, files' sha256 {content}"
        ),
        num=len(files),
        images=lambda first, count: read_pictures(files[first : first + count], shape[1], shape[0]),
    )


def _of_npz(path: Path) -> Real:
    about = f"{path.name}, sha256 {file_sha256(path)}"
    content, names = _arrays(path, ("mu", "sigma", "arr_0"))
    if not ({"mu", "sigma"} <= content.keys() or "arr_0" in content):
        raise ValueError(
            f"{path} holds {', '.join(names) or 'nothing'}; a reference holds mu [d] and sigma "
            "[d d], images arr_0 uint8 [n h w 3], or both"
        )
    resize = "tensorflow" if "mu_s" in names else ""  # ADM's have spatial statistics beside them
    return Real(
        about=about, resize=resize, **_images_in(content, path), **_moments_in(content, path)
    )


def _arrays(path: Path, wanted: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of these names that an .npz file holds, and the names of all."""
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in wanted if name in file.files}, sorted(file.files)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as arrays of numbers: {error}") from error


def _of_size(real: Real, shape: tuple[int, ...]) -> Real:
    """`real` itself, with a warning where its images have another size than the samples."""
    size = real.images(0, 1).shape[2:] if real.images else shape[1:]
    if tuple(size) != tuple(shape[1:]):
        log.warning(
            "the images of %s have %s pixels and the samples %s, which a distance sees too; a "
            "folder of pictures would be brought to their size",
            *(real.about, " x ".join(map(str, size)), " x ".join(map(str, shape[1:]))),
        )
    return real


def _images_in(content: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    if (images := content.get("arr_0")) is None:
        return {}
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"arr_0 in {path} is {images.dtype} {images.shape}; images are uint8 [n h w 3]"
        )

    def rows(first: int, count: int) -> Tensor:
        return torch.from_numpy(images[first : first + count]).permute(0, 3, 1, 2)

    return {"num": len(images), "images": rows}


def _moments_in(content: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    if not {"mu", "sigma"} <= content.keys():
        return {}
    mean, covariance = (_numbers(content[name], name, path) for name in ("mu", "sigma"))
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"mu and sigma in {path} are {tuple(mean.shape)} and {tuple(covariance.shape)}; a mean "
            "is [d] and a covariance [d d]"
        )
    if not bool((mean.double().square().sum() + covariance.double().norm()).isfinite()):
        raise ValueError(
            f"mu or sigma in {path} have values so large that their squares are not finite; these "
            "are no statistics of features"
        )
    return {"mean": mean.double(), "covariance": _covariance(covariance, path)}


def _numbers(found: np.ndarray, name: str, path: Path) -> Tensor:
    """An array of a file as a tensor; ValueError unless it holds real numbers that are finite."""
    if found.dtype.kind not in "fiu" or found.dtype.itemsize > 8:
        raise ValueError(f"{name} in {path} is {found.dtype}; it must be float16, 32 or 64")
    values = torch.from_numpy(found.astype(found.dtype.newbyteorder("=")))
    if bad := int((~values.isfinite()).sum()):
        raise ValueError(
            f"{name} in {path} has values that are not finite: {bad} of {values.numel()}. "
            "Statistics of a single sample, or of features that overflowed, are so; make them "
            "again from two or more samples whose features are finite"
        )
    return values


def _covariance(found: Tensor, path: Path) -> Tensor:
    """The covariance in float64, without negative eigenvalues that come from rounding."""
    matrix = found.double()
    symmetric = (matrix + matrix.T) / 2
    values, vectors = map(torch.from_numpy, linalg.eigh(symmetric.numpy()))
    epsilon = torch.finfo(found.dtype if found.is_floating_point() else torch.float64).eps
    allowed = len(found) * epsilon * float(values.abs().max())
    if float(values.min()) < -allowed or float((matrix - symmetric).abs().max()) > allowed:
        raise ValueError(
            f"sigma in {path} is no covariance: it must be symmetric with no negative eigenvalue, "
            f"and its lowest is {float(values.min()):.3g}"
        )
    return (vectors * values.clamp_min(0)) @ vectors.T


def _of_cleanfid(name: str) -> Real:
    parts = name.rsplit("_", 2)
    if len(parts) != 3:
        raise ValueError(
            f"{CLEANFID}{name} has no split or size; write {CLEANFID}NAME_SPLIT_SIZE, such as "
            f"{CLEANFID}cifar10_train_32, {CLEANFID}ffhq_trainval_256 or, of your own statistics, "
            f"{CLEANFID}mine_custom_na"
        )
    stem = "{}_clean_{}_{}".format(*parts).lower()
    path, with_features = _statistics_file(f"{stem}.npz"), _statistics_file(f"{stem}_kid.npz")
    if path is None:
        places = "\n  ".join(map(str, _statistics_folders()))
        raise FileNotFoundError(
            f"{stem}.npz is in none of\n  {places}\nNothing is downloaded: get it from "
            f"{CLEANFID_URL}{stem}.npz (and {stem}_kid.npz for KID, precision and recall) and put "
            f"it there, or name its folder in ${WEIGHTS_VARIABLE}"
        )
    real = replace(_of_npz(path), resize="clean")
    if with_features is None:
        return real
    features = _features_in(with_features)
    if real.mean is not None and features.shape[1] != len(real.mean):
        raise ValueError(
            f"feats in {with_features} have {features.shape[1]} features and the mean in {path} "
            f"has {len(real.mean)}: the two files belong to different features"
        )
    about = f"{real.about}; {with_features.name}, sha256 {remembered_sha256(with_features)}"
    return replace(real, about=about, features=features)


def _features_in(path: Path) -> Tensor:
    """The features [n d] in clean-fid's file for KID, in float32."""
    found = _arrays(path, ("feats",))[0].get("feats")
    if found is None or found.ndim != 2:
        what = "holds no feats" if found is None else f"has feats of shape {found.shape}"
        raise ValueError(f"{path} {what}; clean-fid's file for KID holds features feats [n d]")
    return _numbers(found, "feats", path).float()


def _statistics_file(name: str) -> Path | None:
    files = (folder / name for folder in _statistics_folders())
    return next((file for file in files if file.is_file()), None)


def _statistics_folders() -> list[Path]:
    usual = [os.environ.get(WEIGHTS_VARIABLE), "~/.cache/objective-zoo"]
    return [Path(place).expanduser() for place in usual if place] + [
        Path(cleanfid.__file__).parent / "stats"
    ]
