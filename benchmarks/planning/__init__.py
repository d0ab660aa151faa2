"""Does a run fit into memory, with which micro-batch, and how long it takes: without running it.

Nothing here may know of commands.
"""
