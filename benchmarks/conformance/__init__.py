"""The conformance suite: what every objective must meet, and what the zoo's own must be besides.

`check("mean_flow")` runs it; registering an objective is enrolling it. See zoo/oracles for the
exact solutions and registry/protocols for what an objective may declare about itself.
"""

from __future__ import annotations

from benchmarks.conformance.report import Report, check
from benchmarks.conformance.results import Result

__all__ = ["Report", "Result", "check"]
