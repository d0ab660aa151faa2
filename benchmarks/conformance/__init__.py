"""The conformance suite: what every objective must meet, and what the zoo's own must meet too.

`check("mean_flow")` runs it; registering an objective is enrolling it. See zoo/oracles for the
exact solutions and registry/protocols for what an objective may declare about itself.
"""

from __future__ import annotations

from benchmarks.conformance.report import ConformanceReport, check
from benchmarks.conformance.results import ClaimResult

__all__ = ["ClaimResult", "ConformanceReport", "check"]
