"""The peak memory of training: allocated bytes on CUDA, the process's resident peak on Linux.

A resident peak is that of the whole process: it contains the libraries (about 600 MiB) and what
the metrics keep. It is reset where training begins, after freed memory was given back to the
system. So runs that follow each other in one process do not inherit each other's peaks.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The largest memory since it was made, except while paused; None where it cannot be known."""

    def __init__(self, device: torch.device):
        self._device = device
        self._highest = 0.0
        self._reset()

    @property
    def mib(self) -> float | None:
        now = self._read()
        return None if now is None else max(self._highest, now) / 2**20

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the memory of the block out of the peak."""
        self._highest = max(self._highest, self._read() or 0.0)
        try:
            yield
        finally:
            self._reset()

    def _read(self) -> float | None:
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        if self._device.type != "cpu" or not _RESET.exists():
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return 1024.0 * int(found[1]) if found else None

    def _reset(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._device.type == "cpu" and _RESET.exists():
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
                libc.malloc_trim(0)
            _RESET.write_text("5")  # Linux then sets the peak to what is resident now
