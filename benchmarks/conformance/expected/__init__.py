"""Gradients in expectation: their moments at the exact solution, and their signs beside it."""
