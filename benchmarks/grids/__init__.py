"""From a gin file to cells, and from cells to a comparison: arms, axes, seeds, who has finished.

Nothing here may know of commands.
"""
