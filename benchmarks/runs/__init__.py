"""What a run does: its teacher, training, samples, measurement and result; and finished runs.

Nothing here may know of grids and commands.
"""
