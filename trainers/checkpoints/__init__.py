"""Checkpoints: folders that are whole or not there, what is in them, and when one is written.

Nothing here may know of engines.
"""
