"""Grids, where they go, and how their ranges are found."""
