"""What a step costs, in time and memory, beside flow matching and the counted minimum.

Nothing here may know of commands.
"""
