"""Metrics: features of pictures, distances between sets of samples, errors of flow maps.

Nothing here may know of experiments, runs or records.
"""
