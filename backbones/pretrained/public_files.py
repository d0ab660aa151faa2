"""Checkpoint files of public codes, read without executing what is in them."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def read_state(path: Path) -> Mapping[str, Any]:
    """The contents of a checkpoint file; nothing in it is executed.

    FileNotFoundError if there is none, ValueError if it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"its suffix is {path.suffix!r}; allowed are {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # arguments of public scripts
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"it cannot be read: {error}") from error
