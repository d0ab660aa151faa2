"""Pixels of pictures: every mode and orientation, and errors that name the file."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import image_pixels
from benchmarks.data.image_pixels import (
    PictureFiles,
    check_pictures,
    read_picture,
    read_pictures,
)
from registry import progress

RNG = np.random.default_rng(0)


def picture(path: Path, size=(8, 8), colour=(200, 100, 50), **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **how)
    return path


def colours(path: Path, channels: int = 3) -> list[int]:
    """The one colour of a uniform picture."""
    pixels = read_picture(path, 4, channels)
    assert pixels.shape == (channels, 4, 4)
    assert pixels.dtype == torch.uint8
    flat = pixels.flatten(1)
    assert (flat == flat[:, :1]).all()
    return flat[:, 0].tolist()


MODES = {
    # name: (picture, file suffix, RGB expected)
    "rgb": (Image.new("RGB", (8, 8), (200, 100, 50)), ".png", (200, 100, 50)),
    "grey": (Image.new("L", (8, 8), 77), ".png", (77, 77, 77)),
    "bilevel": (Image.new("1", (8, 8), 1), ".png", (255, 255, 255)),
    "palette": (Image.new("RGB", (8, 8), (200, 100, 50)).quantize(4), ".png", (200, 100, 50)),
    "gif": (Image.new("RGB", (8, 8), (200, 100, 50)).quantize(4), ".gif", (200, 100, 50)),
    "half_transparent": (Image.new("RGBA", (8, 8), (0, 0, 0, 51)), ".png", (204, 204, 204)),
    "hidden_colour": (Image.new("RGBA", (8, 8), (200, 0, 0, 0)), ".png", (255, 255, 255)),
    "grey_alpha": (Image.new("LA", (8, 8), (0, 51)), ".png", (204, 204, 204)),
    "cmyk": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".tif", (255, 0, 0)),
    "16_bit": (Image.fromarray(np.full((8, 8), 257 * 77, np.uint16)), ".png", (77, 77, 77)),
    "16_bit_rounded": (
        Image.fromarray(np.full((8, 8), 257 * 77 + 129, np.uint16)),
        ".tif",
        (78,) * 3,
    ),
    "32_bit": (Image.fromarray(np.full((8, 8), 257 * 77, np.int32)), ".tif", (77, 77, 77)),
    "webp": (Image.new("RGB", (8, 8), (255, 255, 255)), ".webp", (255, 255, 255)),
    "jpeg_white": (Image.new("RGB", (8, 8), (255, 255, 255)), ".jpg", (255, 255, 255)),
    "jpeg_cmyk": (Image.new("CMYK", (8, 8), (0, 0, 0, 0)), ".jpg", (255, 255, 255)),
    "bmp": (Image.new("RGB", (8, 8), (1, 2, 3)), ".bmp", (1, 2, 3)),
    "ppm": (Image.new("RGB", (8, 8), (1, 2, 3)), ".ppm", (1, 2, 3)),
}


@pytest.mark.parametrize("mode", MODES)
def test_read_picture_converts_mode(tmp_path, mode):
    image, suffix, expected = MODES[mode]
    path = tmp_path / f"x{suffix}"
    image.save(path)
    assert tuple(colours(path)) == expected
    red, green, blue = expected
    assert abs(colours(path, 1)[0] - (0.299 * red + 0.587 * green + 0.114 * blue)) <= 0.51


def test_read_picture_lays_a_transparent_palette_colour_on_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "x.png", transparency=0)
    assert colours(tmp_path / "x.png") == [255, 255, 255]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("F", (8, 8), 0.5), "floating-point"),
        (Image.fromarray(np.full((8, 8), 70000, np.int32)), "from 70000 to 70000"),
    ],
)
def test_read_picture_rejects_values_of_unknown_range(tmp_path, image, expected):
    image.save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=expected):
        read_picture(tmp_path / "x.tif", 8, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_picture_applies_exif_orientation(tmp_path, orientation):
    upright = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    # How a camera held that way stores the scene (Exif 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    found = read_picture(tmp_path / "x.png", 8, 3).permute(1, 2, 0).numpy()
    assert (found == upright).all()


@pytest.mark.parametrize("wide", [True, False])
def test_read_picture_crops_the_centre(tmp_path, wide):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 10:38] = 255  # the square and what the filter sees around it
    Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2).copy()).save(tmp_path / "x.png")
    assert colours(tmp_path / "x.png") == [255, 255, 255]


def test_read_picture_antialiases(tmp_path):
    fine = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(fine.astype(np.uint8)).save(tmp_path / "x.png")
    grey = read_picture(tmp_path / "x.png", 8, 1).float()
    assert (grey - 127.5).abs().max() <= 4  # picking pixels instead would give 0 or 255


@pytest.mark.parametrize("side", [120, 1000])
def test_read_picture_keeps_the_detail_of_jpegs_of_any_size(tmp_path, side):
    scene = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    scene = scene.resize((side, side), Image.Resampling.BICUBIC)
    scene.save(tmp_path / "x.jpg", quality=95, subsampling=0)
    scene.save(tmp_path / "x.png")
    apart = read_picture(tmp_path / "x.jpg", 24, 3).int() - read_picture(tmp_path / "x.png", 24, 3)
    assert apart.abs().max() <= 4  # JPEG's own loss; decoded at an eighth of 120 it is over 50


def test_read_pictures_keeps_order(tmp_path):
    files = tuple(picture(tmp_path / f"{i}.png", colour=(i, i, i)) for i in range(30))
    assert read_pictures(files, 2, 1)[:, 0, 0, 0].tolist() == list(range(30))


def test_read_pictures_names_every_broken_file(tmp_path):
    good = picture(tmp_path / "good.png")
    noise = Image.fromarray(RNG.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.jpg")
    noise.save(tmp_path / "noise.png")
    whole = {suffix: (tmp_path / f"noise{suffix}").read_bytes() for suffix in (".jpg", ".png")}
    broken = {
        "empty.png": b"",
        "text.jpg": b"not a picture",
        "half.jpg": whole[".jpg"][: len(whole[".jpg"]) // 2],
        "half.png": whole[".png"][: len(whole[".png"]) // 2],
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    files = (good, *(tmp_path / name for name in broken))
    with pytest.raises(ValueError, match="4 of 5 pictures cannot be read") as raised:
        read_pictures(files, 8, 3)
    assert all(str(tmp_path / name) in str(raised.value) for name in broken)
    assert str(good) not in str(raised.value)


def test_read_pictures_names_ten_broken_files_and_counts_the_rest(tmp_path):
    files = tuple(tmp_path / f"{i:02}.png" for i in range(13))
    for path in files:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="and 3 more") as raised:
        read_pictures(files, 8, 3)
    assert str(raised.value).count(".png (") == 10


def test_read_pictures_reads_again_what_changed(tmp_path):
    path = picture(tmp_path / "x.bmp", colour=(1, 1, 1))  # its size never changes
    assert read_pictures((path,), 2, 1).max() == 1
    picture(path, colour=(2, 2, 2))
    os.utime(path, ns=(0, 0))
    assert read_pictures((path,), 2, 1).max() == 2


def test_read_pictures_refuses_more_than_memory(tmp_path):
    path = picture(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"GiB.*smaller image_folder\.resolution"):
        read_pictures((path,), 10**7, 3)


def test_read_pictures_shows_progress_for_many_files(tmp_path, monkeypatch, capsys):
    files = tuple(picture(tmp_path / f"{i}.png") for i in range(3))
    with progress.show_progress():
        read_pictures(files, 3, 3)
        assert "reading pictures" not in capsys.readouterr().err
        monkeypatch.setattr(image_pixels, "BAR_FROM", 3)
        read_pictures(files, 5, 3)
        assert "reading pictures" in capsys.readouterr().err


def test_check_pictures_names_what_is_none_and_what_is_cut_off(tmp_path):
    whole = [picture(tmp_path / f"whole.{suffix}") for suffix in ("png", "jpg", "gif", "bmp")]
    check_pictures(whole)
    tail = tmp_path / "tail.jpg"
    tail.write_bytes(whole[1].read_bytes() + bytes(200))  # cameras append; decoders do not mind
    check_pictures([tail])
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cut = []
    for suffix in ("png", "jpg"):
        noise.save(tmp_path / f"cut.{suffix}")
        cut.append(tmp_path / f"cut.{suffix}")
        cut[-1].write_bytes(cut[-1].read_bytes()[:-200])
    cut.append(tmp_path / "empty.png")
    cut[-1].write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 7 pictures cannot be read") as caught:
        check_pictures([*whole, *cut])
    assert all(path.name in str(caught.value) for path in cut)


def test_small_pictures_are_counted_whether_they_are_read_or_checked(tmp_path, caplog):
    files = tuple(picture(tmp_path / f"{n}.png", size=(n, 40)) for n in (5, 12, 40))
    told = "2 of 3 pictures are smaller than 13 pixels and are enlarged; the smallest has 5"
    read_pictures(files, 13, 3)
    check_pictures(files, 13)
    check_pictures(files, 5)
    assert caplog.messages == [told, told]


@pytest.mark.parametrize("suffix", ["webp", "gif", "bmp", "tiff"])
def test_check_pictures_decodes_what_has_no_end_to_look_at(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    check_pictures([path])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"1 of 1 pictures cannot be read(.|\n)*x\.{suffix}"):
        check_pictures([path])


def test_a_picture_that_breaks_after_the_check_is_named(tmp_path):
    path = picture(tmp_path / "x.png")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.png cannot be read"):
        PictureFiles((path,), 4, 3)[torch.tensor([0])]


def test_pictures_read_as_they_are_needed_are_those_in_memory(tmp_path):
    files = tuple(picture(tmp_path / f"{i}.png", colour=(i, 2 * i, 3 * i)) for i in range(20))
    rows = torch.tensor([7, 0, 7, 19])
    found = PictureFiles(files, 4, 3)
    assert found.shape == (20, 3, 4, 4)
    assert torch.equal(found[rows], read_pictures(files, 4, 3)[rows])
    listing = found.listing()
    picture(files[3], size=(90, 90))
    assert PictureFiles(files, 4, 3).listing() != listing


@pytest.mark.parametrize(("width", "height", "side"), [(9, 8, 8), (8, 11, 8), (65, 64, 64)])
def test_square_is_cut_at_whole_pixels(tmp_path, width, height, side):
    """A cut at half a pixel would blur; where nothing is resampled, pixels are the file's."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = read_picture(tmp_path / "x.png", side, 3).permute(1, 2, 0).numpy()
    left, top = (width - side) // 2, (height - side) // 2
    assert (found == pixels[top : top + side, left : left + side]).all()


def png(path: Path, bits: int, colour: int, row: bytes, transparent: bytes) -> None:
    """A PNG of 8 x 8 pixels, all rows the same, with a transparent value."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 8, 8, bits, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * 8)) + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "value", "row"),
    [
        (1, 0, b"\x00"),
        (2, 1, b"\x55" * 2),
        (4, 3, b"\x33" * 4),
        (8, 7, b"\x07" * 8),
        (16, 1000, struct.pack(">H", 1000) * 8),
    ],
)
def test_transparent_grey_of_any_depth_is_laid_on_white(tmp_path, bits, value, row):
    png(tmp_path / "x.png", bits, 0, row, struct.pack(">H", value))
    assert (read_picture(tmp_path / "x.png", 8, 1) == 255).all()
    png(tmp_path / "y.png", bits, 0, row, struct.pack(">H", value + 1 if bits > 1 else 1))
    assert (read_picture(tmp_path / "y.png", 8, 1) < 255).all()  # another value is not transparent


def test_transparent_colour_of_16_bits_is_laid_on_white(tmp_path):
    colour = struct.pack(">HHH", 1000, 2000, 3000)
    png(tmp_path / "x.png", 16, 2, colour * 8, colour)
    assert (read_picture(tmp_path / "x.png", 8, 3) == 255).all()
