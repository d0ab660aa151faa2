"""Papers from which several parts come: laws of times or of guidance, velocities, objectives."""

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
IMPROVED_MEAN_FLOW = Reference(
    title="Improved Mean Flows: On the Challenges of Fastforward Generative Models",
    authors="Geng et al.",
    year=2025,
    arxiv="2512.02012",
)
TERMINAL_VELOCITY = Reference(
    title="Terminal Velocity Matching",
    authors="Zhou et al.",
    year=2025,
    arxiv="2511.19797",
)
EXPLICIT_SHORTCUT = Reference(
    title="On the Design of One-step Diffusion via Shortcutting Flow Paths",
    authors="Lin et al.",
    year=2025,
    arxiv="2512.11831",
)
