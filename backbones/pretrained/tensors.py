"""Safetensors files: writing them, and reading them into a network that they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DIGEST = "tensors_sha256"  # in the metadata of a file that is checked whenever it is read


class UnreadableTensors(ValueError):
    """A file that is no safetensors file."""


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    digest: bool = False,
) -> None:
    """Write tensors as a safetensors file; OSError if it cannot be written.

    Every file of ours is written here, since the library gives its files to their owner alone.
    With `digest` the file has the SHA-256 of its tensors, for one of which no other file says it.
    """
    unshared: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.contiguous()
        if value.data_ptr() in seen:  # safetensors takes no two tensors of one storage
            value = value.clone()
        seen.add(value.data_ptr())
        unshared[name] = value
    about = {**(metadata or {}), **({DIGEST: digest_of(unshared)} if digest else {})}
    path.touch()
    mode = path.stat().st_mode  # by the umask, as for every other file that is opened
    try:
        save_file(unshared, path, about or None)
        path.chmod(mode)
    except SafetensorError as problem:
        raise OSError(f"{path} cannot be written: {problem}") from problem


def load_into(path: Path, module: nn.Module) -> None:
    """Load weights that fit the module exactly; errors as of `fitting`."""
    module.load_state_dict(fitting(path, module))


def fitting(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Weights that fit the module exactly; ValueError names what differs or is missing.

    A file that is no safetensors file raises UnreadableTensors, which is a ValueError too.
    """
    _check_there(path)
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            recorded = (file.metadata() or {}).get(DIGEST)
    except SafetensorError as problem:
        raise UnreadableTensors(f"{path} is no safetensors file: {problem}") from problem
    if recorded is not None and digest_of(tensors) != recorded:
        raise ValueError(
            f"{path} was changed after it was written: the SHA-256 of its tensors is not the one "
            "that it says. Restore it, or make it again"
        )
    check_fit(
        path,
        {name: tuple(value.shape) for name, value in tensors.items()},
        {name: tuple(value.shape) for name, value in module.state_dict().items()},
    )
    return tensors


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and values."""
    content = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file by name; only its header is read.

    UnreadableTensors, which is a ValueError, for a file that is none.
    """
    _check_there(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as problem:
        raise UnreadableTensors(f"{path} is no safetensors file: {problem}") from problem


def _check_there(path: Path) -> None:
    if not path.is_file():
        there = sorted(f.name for f in path.parent.glob("*.safetensors"))
        raise ValueError(f"{path} is missing; there are: {', '.join(there) or 'no weights'}")


def check_fit(
    path: Path, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError unless the shapes of saved weights are those of the network."""
    differences = [f"{name} is missing" for name in here.keys() - there.keys()]
    differences += [f"{name} is unknown here" for name in there.keys() - here.keys()]
    differences += [
        f"{name} has shape {there[name]}, here {shape}"
        for name, shape in here.items()
        if name in there and there[name] != shape
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5]) + ("; ..." if len(differences) > 5 else "")
        raise ValueError(
            f"{path} does not fit this network in {len(differences)} of {len(here)} tensors: "
            f"{shown}. Use the backbone, heads and data shape that it was made with"
        )
