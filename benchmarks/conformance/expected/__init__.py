"""What holds in expectation: moments of the gradient at the exact solution, its signs beside it,
and the law of samples.
"""
