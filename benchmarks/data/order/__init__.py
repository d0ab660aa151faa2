"""In which order the samples of a data set come, as functions of the seed and the place."""
