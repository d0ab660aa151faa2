"""Data sets, which give a batch for each (seed, step): from files, arrays or a closed form.

The modules of this folder import nothing of networks, metrics, experiments or runs.
"""
