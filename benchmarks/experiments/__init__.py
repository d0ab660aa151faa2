"""One run before it runs: `run()` takes everything from gin, builds it and checks it.

Nothing here may train, or know of grids and commands.
"""
