"""Rewrites of a model: they return another model and a report, and run nothing."""
