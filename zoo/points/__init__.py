"""The points of the path that an objective draws, and the velocities that it takes there."""
