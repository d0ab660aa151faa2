"""Averages of the weights: those kept while a run trains, and those made afterwards of any width.

Nothing here may know of engines.
"""
