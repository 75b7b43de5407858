"""How good outputs are: records of pure functions, fed batch by batch, which every room that measures shares."""

from ptqjax.metrics.labels import IGNORED, checked_labels
from ptqjax.metrics.named import METRICS, find_metrics
from ptqjax.metrics.records import Metric, Outputs, Seen, Tally, mean_of
from ptqjax.metrics.sums import decibels, energy

__all__ = [
    "IGNORED",
    "METRICS",
    "Metric",
    "Outputs",
    "Seen",
    "Tally",
    "checked_labels",
    "decibels",
    "energy",
    "find_metrics",
    "mean_of",
]
