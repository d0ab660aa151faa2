"""Predicts whether a run fits into memory, with which micro-batch, and how long it takes.

Only check.py trains. Nothing here may know of commands.
"""
