"""Where cells run: this process, several processes, a Ray cluster, the ranks of a launcher.

A launcher is handed what to run. Nothing here may know of experiments, runs or grids.
"""
