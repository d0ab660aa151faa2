"""Papers that both a law of times and an objective come from."""

from __future__ import annotations

from registry.protocols import Reference

MEAN_FLOW = Reference(
    title="Mean Flows for One-step Generative Modeling",
    authors="Geng et al.",
    year=2025,
    arxiv="2505.13447",
)
SOFLOW = Reference(
    title="SoFlow: Solution Flow Models for One-Step Generative Modeling",
    authors="Luo et al.",
    year=2025,
    arxiv="2512.15657",
)
TWINFLOW = Reference(
    title="TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows",
    authors="Cheng et al.",
    year=2025,
    arxiv="2512.05150",
)
FLOW_ANCHORED = Reference(
    title="Flow-Anchored Consistency Models",
    authors="Peng et al.",
    year=2025,
    arxiv="2507.03738",
)
