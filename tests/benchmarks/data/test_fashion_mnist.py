"""The IDX files of Fashion-MNIST: whole ones are read; errors say what damaged ones should hold."""

from __future__ import annotations

import gzip
import struct

import pytest
import torch

from benchmarks.data.fashion_mnist import find_idx, read_idx

HEADER = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 4)
WHOLE = HEADER + bytes(range(24))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_read_idx_gives_values_in_row_major_order(tmp_path, pack):
    path = tmp_path / "x"
    path.write_bytes(pack(WHOLE))
    values = read_idx(path, ndim=3)
    assert values.dtype == torch.uint8
    assert torch.equal(values, torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
    values += 1  # a copy of its own, not a view of read-only bytes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (WHOLE[:-1], r"announces \(2, 3, 4\), so 24 bytes of values, but 23 follow"),
        (WHOLE + b"\0", "but 25 follow"),
        (gzip.compress(WHOLE, mtime=0)[:-9], "expected a whole gzip file"),
        (gzip.compress(WHOLE, mtime=0)[:20] + b"damage" * 5, "expected a whole gzip file"),
        (b"<html>not found</html>", "starts with 00 00 08 03, found 22 bytes that start with 3c"),
        (b"", "found 0 bytes that start with nothing"),
        (WHOLE[:9], "expected a header of 16 bytes"),
        (b"\0\0\x08\x01" + WHOLE[4:], "with 3 dimensions"),
        (b"\0\0\x0d\x03" + WHOLE[4:], "not an IDX file of bytes"),
    ],
)
def test_read_idx_names_a_damaged_file(tmp_path, content, expected):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as raised:
        read_idx(path, ndim=3)
    assert str(path) in str(raised.value)


def test_find_idx_takes_plain_before_gz_and_says_none(tmp_path):
    assert find_idx(tmp_path, "x") is None
    (tmp_path / "x.gz").touch()
    assert find_idx(tmp_path, "x") == tmp_path / "x.gz"
    (tmp_path / "x").touch()
    assert find_idx(tmp_path, "x") == tmp_path / "x"
