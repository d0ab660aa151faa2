"""Pictures as latents of a frozen autoencoder: encoding them to disk, and the data set of them.

Nothing here may know of experiments or runs.
"""
