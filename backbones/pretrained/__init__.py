"""Networks that were trained before: public checkpoints in our form, and our own exported folders.

Nothing here may know of training.
"""
