"""The Python door: compare, open and evaluate runs from Python; see `run`."""

from __future__ import annotations
