"""The record of a run: the file that is the truth, its copy in MLflow, and the version of the code.

The modules of this folder import nothing of experiments, runs or grids.
"""
