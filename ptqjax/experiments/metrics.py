"""What outputs are measured by: the names of `ptqjax.metrics`, which experiments share with `evaluate`."""

from ptqjax.metrics import METRICS, Metric, Outputs, Seen, find_metrics, mean_of

__all__ = ["METRICS", "Metric", "Outputs", "Seen", "find_metrics", "mean_of"]
