"""The points of the path that an objective draws, the velocities there, and MeanFlow's identity."""
