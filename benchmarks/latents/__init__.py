"""Pictures as latents of a frozen autoencoder: encoding them to disk, and the data set of them.

The modules of this folder import nothing of experiments or runs.
"""
