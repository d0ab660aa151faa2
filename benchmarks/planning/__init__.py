"""Predicts whether a run fits into memory, with which micro-batch, and how long it takes.

Nothing here trains, but for check.py, or knows of commands.
"""
