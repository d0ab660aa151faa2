"""The protocol of published tables for a finished run: many samples, features, a reference.

Nothing here may know of grids and commands.
"""
