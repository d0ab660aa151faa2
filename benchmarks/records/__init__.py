"""The record of a run: the file that is the truth, its copy in MLflow, and where code came from.

Nothing here may know of experiments, runs or grids.
"""
