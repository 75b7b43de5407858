"""Chooses how far the grid of each tensor reaches: observes activations, searches ranges, widens and mends them."""
