"""From a gin file to cells, and from cells to a comparison: arms, axes, seeds, finished cells.

Nothing here may know of commands.
"""
