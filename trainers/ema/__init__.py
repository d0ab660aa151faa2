"""Averages of the weights while they are trained, and of any width afterwards.

Nothing here may know of engines.
"""
