"""Devices by name."""

from __future__ import annotations

import torch


def device_of(name: str, option: str) -> torch.device:
    """The device that torch calls `name`; ValueError if this machine has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"{option} = {name!r} is no device; give 'auto', 'cpu', 'cuda' or 'cuda:1', say"
        ) from error
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(
            f"{option} = {name!r}, and PyTorch finds {found} CUDA devices here; 'auto' takes the "
            "CPU where there is none"
        )
    return device
