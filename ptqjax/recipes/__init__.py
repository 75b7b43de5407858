"""Runs whole pipelines from a file, keeps each stage in a store, and repeats them to the bit."""
