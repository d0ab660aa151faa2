"""ZeRO checkpoints: every process writes what it holds.

    zero.json                  shapes by name, numbers of optimizer and engine, how many processes
    rank_00000.safetensors     pieces of weights, averages, teachers and optimizer state

A piece is a range of a flattened tensor. It is called "weight/NAME", "buffer/NAME", or "KEY/NAME"
for the optimizer's KEY; the file's metadata says where each starts. A tensor that every process
holds whole is cut into equal pieces, so that nothing is written twice and nothing is gathered. A
process that reads a checkpoint fills its own pieces from all files that overlap them, so the number
of processes and the stage may have changed since.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backbones.pretrained.tensors import check_fit, save_tensors
from trainers import ranks
from trainers.checkpoints.weights import copied, kept_by
from trainers.checkpoints.whole_files import read_json, whole_file, write_json
from trainers.checkpoints.whole_folders import BrokenCheckpoint, verify
from trainers.sharding import (
    Piece,
    refresh_masters,
    shape_of,
    state_pieces,
    torch_optimizer,
    weight_pieces,
)

INDEX = "zero.json"


def save(
    module: nn.Module, optimizer: Any, engine: Mapping[str, Any], folder: Path
) -> Callable[[], list[Path]]:
    """Copy this process's pieces; returns a function that writes them and lists the files.

    `engine` is what the engine keeps of itself in zero.json. The function raises OSError if the
    files cannot be written.
    """
    tensors, starts = {}, {}
    for piece in _mine([*_weights(module), *_states(module, optimizer)]):
        tensors[piece.name] = copied(piece.view)
        starts[piece.name] = piece.start
    path = folder / f"rank_{ranks.number():05d}.safetensors"
    index = folder / INDEX
    about = {
        **engine,
        "processes": ranks.count(),
        "shapes": shapes(module),
        "numbers": _numbers(optimizer),
    }

    def write() -> list[Path]:
        save_tensors(path, tensors, {"starts": json.dumps(starts)})
        if not ranks.leads():
            return [path]
        write_json(index, about)
        return [path, index]

    return write


def load(module: nn.Module, optimizer: Any, folder: Path) -> dict[str, Any]:
    """Fill this process's pieces; returns zero.json. BrokenCheckpoint if it cannot be read or fit.

    All processes read everything before any of them puts anything in its place.
    """
    about, found = ranks.together(partial(_read, module, optimizer, folder), BrokenCheckpoint)
    with torch.no_grad():
        for piece in _weights(module):
            piece.view.copy_(found[piece.name])
        refresh_masters(module, optimizer)
        if keys := {name.split("/")[0] for name in found} - {"weight", "buffer"}:
            _make_state(module, optimizer, keys, about["numbers"])
        for piece in _states(module, optimizer):
            piece.view.copy_(found[piece.name])
    return about


def _read(
    module: nn.Module, optimizer: Any, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of zero.json, and this process's pieces by name, in the memory of the host."""
    if not (folder / INDEX).exists():
        raise BrokenCheckpoint(
            f"{folder} was not made by zero_engine: go on with the engine that made it, or start "
            "a new run in another folder"
        )
    about = _index(folder)
    try:
        check_fit(folder, about["shapes"], shapes(module))
    except ValueError as problem:
        raise BrokenCheckpoint(str(problem)) from problem
    with Pieces(folder) as pieces:
        keys = pieces.kinds() - {"weight", "buffer"}
        kept, there = kept_by(torch_optimizer(optimizer)), keys | about["numbers"].keys()
        if there and there != kept:
            raise BrokenCheckpoint(
                f"{folder} keeps {', '.join(sorted(there))} of each weight; the optimizer of this "
                f"run keeps {', '.join(sorted(kept)) or 'nothing'}"
            )
        wanted = [*_weights(module)]
        wanted += [
            replace(piece, name=f"{key}/{piece.name}")
            for place in state_pieces(module, optimizer)
            for piece in [place.of(place.flat)]
            for key in keys
        ]
        found = {}
        for piece in wanted:
            found[piece.name] = torch.empty_like(piece.view, device="cpu")
            pieces.fill(replace(piece, view=found[piece.name]))
    return about, found


def _index(folder: Path) -> dict[str, Any]:
    """The content of zero.json; BrokenCheckpoint if it is not what `save` wrote."""
    path = folder / INDEX
    try:
        about = read_json(path)
        shapes = {str(name): tuple(map(int, shape)) for name, shape in about["shapes"].items()}
        numbers = {str(name): float(value) for name, value in about["numbers"].items()}
        scale, good = about.get("loss_scale", (1.0, 0))
        about |= {"loss_scale": [float(scale), int(good)]} if "loss_scale" in about else {}
    except (AttributeError, KeyError, TypeError) as problem:
        raise BrokenCheckpoint(f"{path} lacks shapes or numbers") from problem
    except ValueError as problem:
        raise BrokenCheckpoint(str(problem)) from problem
    return {**about, "shapes": shapes, "numbers": numbers}


def consolidate(folder: Path, out: Path, decay: str = "") -> None:
    """Write the whole network of a checkpoint, or its average at `decay`, as one safetensors file.

    It needs one process. ValueError for a checkpoint that is not whole or has no such average.
    """
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} is no checkpoint of zero_engine: it has no {INDEX}")
    verify(folder)
    shapes = _index(folder)["shapes"]
    prefix = f"averages.{decay.replace('.', '-')}." if decay else "net."
    tensors = {
        name: torch.empty(shape) for name, shape in shapes.items() if name.startswith(prefix)
    }
    if not tensors:
        kept = {name.split(".")[1].replace("-", ".") for name in shapes if name[:9] == "averages."}
        raise ValueError(
            f"{folder} has no average at decay {decay}; it has {', '.join(sorted(kept)) or 'none'}"
        )
    with Pieces(folder) as pieces:
        for name, tensor in tensors.items():
            kind = "weight" if f"weight/{name}" in pieces else "buffer"
            pieces.fill(Piece(f"{kind}/{name}", 0, tensor.view(-1)))
    whole = {name.removeprefix(prefix): x for name, x in tensors.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        save_tensors(partial, whole, digest=True)


class Pieces:
    """All pieces in a checkpoint's files; of a file only the elements that are needed are read."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files = ExitStack()
        self._found: dict[str, list[tuple[int, Any]]] = defaultdict(list)

    def __enter__(self) -> Pieces:
        for path in sorted(self._folder.glob("rank_*.safetensors")):
            try:
                self._open(path)
            except OSError as problem:
                raise BrokenCheckpoint(f"{path} cannot be read: {problem.strerror}") from problem
            except SafetensorError as problem:
                raise BrokenCheckpoint(f"{path} is no safetensors file: {problem}") from problem
            except (AttributeError, TypeError, ValueError, KeyError, RecursionError) as problem:
                raise BrokenCheckpoint(f"{path} does not say where its pieces start") from problem
        return self

    def _open(self, path: Path) -> None:
        file = self._files.enter_context(safe_open(path, framework="pt"))
        for name, start in json.loads(file.metadata()["starts"]).items():
            piece = file.get_slice(name)
            if len(piece.get_shape()) != 1:
                raise BrokenCheckpoint(f"{path}: {name} is no flat piece")
            self._found[name].append((int(start), piece))

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def kinds(self) -> set[str]:
        return {name.split("/")[0] for name in self._found}

    def fill(self, piece: Piece) -> None:
        """Read the piece; BrokenCheckpoint if the files do not have each of its elements once."""
        first, last = piece.start, piece.start + len(piece.view)
        filled = 0
        for start, saved in self._found.get(piece.name, ()):
            a, b = max(first, start), min(last, start + saved.get_shape()[0])
            if a < b:
                piece.view[a - first : b - first].copy_(saved[a - start : b - start])
                filled += b - a
        if filled != last - first:
            raise BrokenCheckpoint(
                f"{self._folder} has {filled} of {last - first} elements of {piece.name}"
            )


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, and of the buffers that a state_dict has."""
    found = {name: shape_of(param) for name, param in module.named_parameters()}
    return found | {name: tuple(buffer.shape) for name, buffer in _buffers(module)}


def _weights(module: nn.Module) -> Iterator[Piece]:
    for piece in weight_pieces(module):
        yield replace(piece, name=f"weight/{piece.name}")
    for name, buffer in _buffers(module):
        yield Piece(f"buffer/{name}", 0, buffer.view(-1), everywhere=True)


def _states(module: nn.Module, optimizer: Any) -> Iterator[Piece]:
    state = torch_optimizer(optimizer).state
    for place in state_pieces(module, optimizer):
        for key, value in state.get(place.flat, {}).items():
            if getattr(value, "ndim", 0):
                piece = place.of(value)
                yield replace(piece, name=f"{key}/{piece.name}")


def _mine(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """What this process must write: its own pieces, and its part of what all processes hold."""
    for piece in pieces:
        n = len(piece.view)
        first, last = 0, n
        if piece.everywhere:
            first, last = (n * (ranks.number() + i) // ranks.count() for i in (0, 1))
        if first < last:
            yield replace(piece, start=piece.start + first, view=piece.view[first:last])


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _numbers(optimizer: Any) -> dict[str, float]:
    """The numbers that the optimizer keeps, such as its steps; they are equal for all weights."""
    states = torch_optimizer(optimizer).state.values()
    scalars = [(k, v) for state in states for k, v in state.items() if not getattr(v, "ndim", 0)]
    return {key: max(float(v) for k, v in scalars if k == key) for key, _ in scalars}


def _make_state(
    module: nn.Module, optimizer: Any, keys: Iterable[str], numbers: Mapping[str, float]
) -> None:
    """Make the optimizer's state, which it would make itself only at its first step."""
    inner = torch_optimizer(optimizer)
    fused = any(group.get("fused") for group in inner.param_groups)
    for flat in {place.flat for place in state_pieces(module, optimizer)}:
        device = flat.device if fused else "cpu"
        counted = {key: torch.tensor(number, device=device) for key, number in numbers.items()}
        inner.state[flat] = {**counted, **{key: torch.zeros_like(flat) for key in keys}}
