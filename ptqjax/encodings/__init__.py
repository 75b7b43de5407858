"""Says what an encoding is: the grid of one tensor, and the grid of a bias that follows from two others."""
