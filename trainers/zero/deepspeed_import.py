"""Imports DeepSpeed without its warnings and without its compiled operators."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainers import ranks


@contextmanager
def quiet_deepspeed(device: torch.device) -> Iterator[Any]:
    """The package; inside the `with` block it logs errors alone.

    It would warn of every optimizer that is not its own. On a CPU it would also compile, at every
    start, an operator that serves inference alone.
    """
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_number()))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.setLevel(logging.ERROR)
    try:
        yield deepspeed
    finally:
        deepspeed_log.setLevel(logging.WARNING)
