"""What a file is, told by its content: its name may say anything.

Downloads often end in a file that only looks like weights: a pointer of Git LFS, a web page, the
answer of a server, a half of the file. Here such a file gets a name, and a way to the real one.
"""

from __future__ import annotations

import json
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Literal

Readable = Literal["safetensors", "torch", "torch (old)", "index"]

_HEAD = 1024  # bytes that are looked at
_OLD_TORCH = bytes.fromhex("80028a0a6cfc9c46f920")  # pickle of torch.save's magic number
_LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!": "RAR",
}  # fmt: skip
_OTHERS = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF\r\n": "an HDF5 file, as Keras and TensorFlow write it",
    b"GGUF": "a GGUF file of llama.cpp",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"TFL3": "a TensorFlow Lite model",
}
_UNPACK = "Unpack it, and give the file of weights that is in it"
_CONVERT = (
    "Only weights of PyTorch are read. Get the PyTorch file of this model, or load it where it was "
    "made and write its tensors with safetensors.torch.save_file"
)


def kind_of(path: Path) -> Readable:
    """How the file can be read; ValueError says what it is if it is no file of weights."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not size:
        raise ValueError("the file is empty. Download it again")
    if head.startswith(_LFS):
        raise ValueError(_pointer(head))
    if head.startswith(b"PK"):
        return _zip(path)
    if head.startswith(_OLD_TORCH):
        return "torch (old)"
    if _is_safetensors(head, size):
        _check_length(head, size, path)
        return "safetensors"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_PAGES):
        raise ValueError(
            "it is a web page, not weights: the server has answered with a page, as for an address "
            "that is wrong or needs a log-in. Download the file itself (on the Hugging Face hub "
            "its address has /resolve/, not /blob/)"
        )
    if text.startswith((b"{", b"[")):
        return _json(path)
    raise ValueError(_described(path, head, size))


def _pointer(head: bytes) -> str:
    fields = dict(line.split(" ", 1) for line in head.decode("utf-8", "replace").splitlines()
                  if " " in line)  # fmt: skip
    size = fields.get("size", "")
    stands = f" of {int(size):,} bytes" if size.isdigit() else ""
    return (
        f"it is a pointer of Git LFS, which stands for a file{stands}. Get that file: run "
        "`git lfs pull` in its repository, or download the file itself"
    )


def _zip(path: Path) -> Readable:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"it begins as a file of torch.save or another zip archive does, and it stops after "
            f"{path.stat().st_size:,} bytes without an end: the download is not complete. "
            "Download it again"
        )
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inside = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        raise ValueError(
            "it is a TorchScript program, which is code. Get the weights: where the program is "
            "trusted, torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if "data.pkl" in inside:
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError(f"it is a NumPy archive (.npz) of {len(names)} arrays. {_CONVERT}")
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise ValueError(f"it is a zip archive of {shown or 'nothing'}. {_UNPACK}")


def _is_safetensors(head: bytes, size: int) -> bool:
    if len(head) < 9:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return bool(head[8:9] == b"{" and 2 <= length <= max(100_000_000, size))


def _check_length(head: bytes, size: int, path: Path) -> None:
    """ValueError if a safetensors file is shorter than its own header says."""
    (length,) = struct.unpack("<Q", head[:8])
    needed = 8 + length
    if size >= needed:
        with path.open("rb") as file:
            file.seek(8)
            needed += _data_bytes(file.read(length))
    if size < needed:
        raise ValueError(
            f"it is a safetensors file that ends after {size:,} of {needed:,} bytes: the download "
            "is not complete. Download it again"
        )


def _data_bytes(header: bytes) -> int:
    try:
        entries = json.loads(header)
        found = (e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
        return max((int(end) for end in found), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(
            "it begins as a safetensors file, and its header cannot be read: the file is damaged. "
            "Download it again"
        ) from None


def _json(path: Path) -> Readable:
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        return "index"
    shown = " ".join(path.read_text("utf-8", "replace")[:150].split())
    raise ValueError(
        f"it is a text in JSON, not weights; it begins with {shown!r}. If that is the error of a "
        "server, or settings of a model, get the file of weights itself"
    )


def _described(path: Path, head: bytes, size: int) -> str:
    for start, name in _COMPRESSED.items():
        if head.startswith(start):
            return f"it is compressed by {name}. {_UNPACK}"
    if tarfile.is_tarfile(path):
        return f"it is a tar archive. {_UNPACK}"
    for start, name in _OTHERS.items():
        if head.startswith(start):
            return f"it is {name}. {_CONVERT}"
    if path.suffix == ".msgpack" or head[:1] in {b"\xde", b"\xdf"}:
        return f"it is a file of MessagePack, as Flax (JAX) writes weights. {_CONVERT}"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return (
            "it is a pickle of Python objects, which may execute code, and not a file of "
            "torch.save. Where it is trusted, load it and write its weights with "
            "torch.save(weights, 'weights.pt')"
        )
    if 0x81 <= head[0] <= 0x8F:
        return f"it is a file of MessagePack, as Flax (JAX) writes weights. {_CONVERT}"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        shown = " ".join(head.decode("utf-8", "replace")[:100].split())
        return f"it is a text, not weights; it begins with {shown!r}. Get the file of weights"
    return (
        f"it is no file of torch.save or safetensors: its {size:,} bytes begin with "
        f"{head[:8].hex(' ')}. Download it again, or get the PyTorch file of this model"
    )
