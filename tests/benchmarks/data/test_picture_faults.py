"""Why a picture cannot be read, in words with a remedy; and what looks like a mistake."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import image_pixels
from benchmarks.data.image_folder import ImageFolder
from benchmarks.data.image_pixels import PictureFiles, check_pictures, read_picture, read_pictures
from benchmarks.data.picture_faults import fault_of

RAW = re.compile(r"\w*Error\b|Errno|Traceback|<_io|0x7f")  # of Python and Pillow
RNG = np.random.default_rng(0)


def noise(path: Path, side: int = 64) -> Path:
    Image.fromarray(RNG.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(path)
    return path


def spoilt(path: Path) -> Path:
    """Whole at both ends and wrong inside."""
    content = bytearray(noise(path).read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    return path


def cut(path: Path, keep: float = 0.5) -> Path:
    content = noise(path).read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BROKEN = {
    "empty": (lambda f: written(f / "x.png", b""), "it is empty, 0 bytes"),
    "pointer": (lambda f: written(f / "x.jpg", b"version https://git-lfs.github.com"), "Git LFS"),
    "page": (lambda f: written(f / "x.jpg", b"\n<!DOCTYPE html>"), "HTML"),
    "heic": (lambda f: written(f / "x.jpg", b"\0\0\0\x18ftypheic\0\0\0\0"), "'heic'"),
    "bytes": (lambda f: written(f / "x.png", b"\1\2\3\4"), "first bytes are 01 02 03 04"),
    "cut_jpeg": (lambda f: cut(f / "x.jpg"), "damaged or cut off"),
    "cut_png": (lambda f: cut(f / "x.png"), "damaged or cut off"),
    "spoilt_png": (lambda f: spoilt(f / "x.png"), "damaged or cut off"),
    "cut_webp": (lambda f: cut(f / "x.webp"), "damaged or cut off"),
    "cut_tiff": (lambda f: cut(f / "x.tif", 0.1), "damaged or cut off"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_named_with_cause_and_remedy(tmp_path, kind):
    make, expected = BROKEN[kind]
    path = make(tmp_path)
    for read in (lambda: read_pictures((path,), 8, 3), lambda: check_pictures([path])):
        with pytest.raises(ValueError, match="1 of 1 pictures cannot be read") as refused:
            read()
        assert str(path) in str(refused.value)
        assert expected in str(refused.value)
        assert not RAW.search(str(refused.value)), refused.value


def test_a_picture_that_goes_while_it_is_needed_is_named(tmp_path):
    files = (noise(tmp_path / "a.png"), tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read: it is no file any more"):
        read_pictures(files, 8, 3)
    with pytest.raises(ValueError, match=r"gone\.png cannot be read: it is no file any more"):
        PictureFiles(files, 8, 3)[torch.tensor([1])]


def test_a_picture_of_too_many_pixels_is_named_with_their_number(tmp_path, monkeypatch):
    noise(tmp_path / "large.png", 64)
    monkeypatch.setattr(image_pixels.Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(ValueError, match=r"large\.png \(it has 4,096 pixels, and at most 3,000"):
        ImageFolder(folder=str(tmp_path), resolution=8)


def test_a_file_that_this_user_may_not_read_is_named(tmp_path):
    assert "may not read it" in fault_of(PermissionError(13, "Permission denied"), tmp_path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\xff\xff"])
def test_a_damaged_exif_block_leaves_the_picture_as_it_is(tmp_path, block):
    pixels = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    Image.fromarray(pixels).save(tmp_path / "odd.png", exif=block)
    assert read_picture(tmp_path / "odd.png", 8, 3).equal(read_picture(tmp_path / "x.png", 8, 3))


DARK = {
    "10 bits in 16": (np.uint16, 1023),
    "12 bits in 16": (np.uint16, 4095),
    "14 bits in 16": (np.uint16, 16383),
    "8 bits in 32": (np.int32, 255),
    "classes in 8": (np.uint8, 20),
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", DARK)
def test_dark_pictures_are_told_with_the_remedy(tmp_path, caplog, kind, in_memory):
    dtype, top = DARK[kind]
    for i in range(3):
        values = RNG.integers(0, top + 1, (8, 8)).astype(dtype)
        values[0, 0] = top
        Image.fromarray(values).save(tmp_path / f"{i}.tif")
    ImageFolder(folder=str(tmp_path), resolution=8, channels=1, in_memory=in_memory)
    assert "the pictures are dark" in caplog.text
    assert "multiply the values" in caplog.text


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_bright_picture_makes_dark_ones_plausible(tmp_path, caplog, in_memory):
    for i, top in enumerate((1000, 2000, 65535)):
        Image.fromarray(np.full((8, 8), top, np.uint16)).save(tmp_path / f"{i}.png")
    ImageFolder(folder=str(tmp_path), resolution=8, channels=1, in_memory=in_memory)
    assert caplog.text == ""


def test_pages_that_are_not_taken_are_told(tmp_path, caplog):
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    noise(tmp_path / "b.png")
    read_pictures((tmp_path / "a.tif", tmp_path / "b.png"), 8, 3)
    assert "1 of 2 pictures have several frames or pages" in caplog.text
