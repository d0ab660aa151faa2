"""Optimisation: the loop, its engines, optimizers, EMA, checkpoints and callbacks."""
