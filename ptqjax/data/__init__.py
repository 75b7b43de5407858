"""Reads samples from files and hands them out in batches that are checked against the model."""
