"""Says where grids go: which tensors are rounded, which share a grid, how fine it is, and why others stay in float."""
