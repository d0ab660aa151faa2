"""Data sets: batches by (seed, step), from files, arrays or a closed form.

Nothing here may know of networks, metrics, experiments or runs.
"""
