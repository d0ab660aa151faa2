"""The objectives, one file for each method; importing this package registers them."""

from zoo.objectives import decm, dumo, flow_matching, mean_flow, shortcut

__all__ = ["decm", "dumo", "flow_matching", "mean_flow", "shortcut"]
