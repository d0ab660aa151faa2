"""What a run is before it starts: `run()` takes everything from gin, builds it and checks it.

Nothing here may train, or know of grids and commands.
"""
