"""Checkpoint files of public codes, read without executing what is in them.

A file of torch.save is a pickle: a program that may call any function. torch's reader with
`weights_only` follows the instructions that make tensors, and no other. What training scripts keep
beside their weights, such as arguments and numbers of NumPy, is made of classes that this reader
does not know. An empty object takes the place of each of them; nothing of their classes is
imported, and the weights need none of them. A file that needs any other class is refused.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from backbones.pretrained.file_kinds import kind_of

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Packages whose objects are settings, numbers and dates beside weights.
_BESIDE = {
    "argparse", "numpy", "omegaconf", "pathlib", "datetime", "typing", "easydict", "ml_collections",
    "addict", "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities",
    "collections", "enum", "uuid", "decimal", "fractions",
}  # fmt: skip
_BUILTINS = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
    "range", "set", "slice", "str", "tuple",
)  # fmt: skip
_BESIDE_NAMES = {"types.SimpleNamespace", *(f"builtins.{name}" for name in _BUILTINS)}
_SHARD = re.compile(r".*-\d+-of-(\d+)\.\w+\Z")


class _Nothing:
    """Takes the place of an object that weights do not need; whatever it is given is dropped."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Entries:
    """Takes the place of a class of dictionaries: the reader fills only dictionaries it knows."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


class _Items(list[Any]):
    """Takes the place of a class of lists, for the same reason."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()


def read_state(path: Path) -> Mapping[str, Any]:
    """The contents of a checkpoint file; nothing in it is executed.

    An index of sharded weights (`*.safetensors.index.json`) gives the tensors of all its files.
    FileNotFoundError if there is none, ValueError, which says what the file is, if it holds no
    weights that can be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}")
    kind = kind_of(path)
    if kind == "index":
        return _sharded(path)
    state = _safetensors(path) if kind == "safetensors" else _torch(path, kind)
    if not isinstance(state, Mapping):
        tensor = isinstance(state, torch.Tensor)
        what = f"one tensor of shape {list(state.shape)}" if tensor else "something else"
        raise ValueError(
            f"it holds {what} instead of weights by name. Save those: "
            "torch.save(net.state_dict(), 'weights.pt')"
        )
    return state


def shard_hint(path: Path) -> str:
    """A sentence for the error about a file that is one of several; '' for another file."""
    match = _SHARD.match(path.name)
    if not match:
        return ""
    return (
        f". By its name the file is one of {int(match[1])} that hold the weights together; give "
        "their index (a file such as model.safetensors.index.json beside them)"
    )


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError:
        raise ValueError(
            "it is a safetensors file whose header does not fit its data: it is damaged. Download "
            "it again"
        ) from None


def _sharded(index: Path) -> dict[str, Any]:
    """The tensors of all files of an index, which lie beside it."""
    places = json.loads(index.read_bytes())["weight_map"]
    names = sorted({str(place) for place in places.values()})
    if outside := [name for name in names if Path(name).name != name or name in ("", ".", "..")]:
        raise ValueError(
            f"it is an index that names {outside[0]!r}; the files of an index lie beside it"
        )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(
            f"it is an index of weights in {len(names)} files, and {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it. Download all of them"
        )
    found: dict[str, Any] = {}
    for name in names:
        shard = index.parent / name
        try:
            kind = kind_of(shard)
            if kind == "index":
                raise ValueError("it is an index itself")
            found |= _safetensors(shard) if kind == "safetensors" else _torch(shard, kind)
        except ValueError as problem:
            raise ValueError(f"of its files, {name}: {problem}") from None
    if lost := sorted(set(places) - set(found)):
        raise ValueError(
            f"it is an index that names {len(lost)} tensors which its files lack, such as "
            f"{lost[0]}. Download all files of one version"
        )
    return found


def _torch(path: Path, kind: str) -> Any:
    """What a file of torch.save holds; ValueError names the class that stands in the way."""
    try:
        needed = _classes(path, kind)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        raise ValueError(_damaged(kind)) from None
    unknown = [name for name in needed if not _makes_tensors(name)]
    beside = [n for n in unknown if n.split(".")[0] in _BESIDE or n in _BESIDE_NAMES]
    refused = [name for name in unknown if name not in beside]
    if refused:
        shown = ", ".join(refused[:3]) + (f" and {len(refused) - 3} more" * (len(refused) > 3))
        raise ValueError(
            f"to read it, Python would have to execute {shown}, which may do anything. Only "
            "weights are read. Where the file is trusted, load it with the code that made it and "
            "save the weights alone: torch.save(net.state_dict(), 'weights.pt')"
        )
    stand_ins: list[Any] = [(_stand_in(name), name) for name in beside]
    try:
        with torch.serialization.safe_globals(stand_ins), path.open("rb") as file:
            # By its name torch would take a .safetensors file for one, whatever it holds.
            mapped = kind == "torch" and path.suffix != ".safetensors"
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise ValueError(_damaged(kind)) from None


def _stand_in(name: str) -> type:
    if name.endswith(".deque"):
        return _Items
    return _Entries if "dict" in name.lower() else _Nothing


def _damaged(kind: str) -> str:
    return (
        f"it is a file of torch.save{' in its old format' if kind == 'torch (old)' else ''} that "
        "is damaged or not complete, or that has more in it than tensors, numbers and texts. "
        "Download it again; or, with the code that made it, save the weights alone: "
        "torch.save(net.state_dict(), 'weights.pt')"
    )


def _classes(path: Path, kind: str) -> list[str]:
    """The classes and functions that the file's pickles name, in order; none is imported."""
    found: dict[str, None] = {}

    def read(file: Any, pickles: int) -> None:
        texts: list[str] = []  # the last ones, from which STACK_GLOBAL takes its names
        for _ in range(pickles):
            for opcode, argument, _place in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    found[_present(str(argument).replace(" ", ".", 1))] = None
                elif opcode.name == "STACK_GLOBAL":
                    found[".".join(texts[-2:])] = None
                elif isinstance(argument, str):
                    texts = [*texts[-1:], argument]

    if kind == "torch":
        with zipfile.ZipFile(path) as archive:
            inside = next(n for n in archive.namelist() if n.split("/", 1)[-1] == "data.pkl")
            with archive.open(inside) as file:
                read(file, 1)
    else:
        with path.open("rb") as file:
            read(file, 4)  # magic number, protocol, system, content
    return list(found)


def _present(name: str) -> str:
    """The name of a built-in class today; pickles of protocol 2 have that of Python 2."""
    if not name.startswith("__builtin__."):
        return name
    return name.replace("__builtin__.", "builtins.").replace(".long", ".int")


def _makes_tensors(name: str) -> bool:
    """Whether torch's reader makes weights of it itself."""
    if name in ("collections.OrderedDict", "collections.Counter", "_codecs.encode"):
        return True
    return (
        name.startswith(
            ("torch._utils.", "torch.serialization.", "torch.storage.", "torch._tensor.")
        )
        or name in ("torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter")
        or bool(re.fullmatch(r"torch\.(cuda\.)?\w*(Storage|Tensor)", name))
        or (name.startswith("torch.") and isinstance(getattr(torch, name[6:], None), torch.dtype))
    )
