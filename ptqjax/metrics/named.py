"""The metrics that have names, and how they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ptqjax.config import near_names
from ptqjax.errors import ConfigError
from ptqjax.metrics.classes import agreement, top1
from ptqjax.metrics.records import Metric, Seen, mean_of
from ptqjax.metrics.sequences import cosine, cross_entropy, kl, perplexity, token_accuracy
from ptqjax.metrics.sums import sqnr_db

METRICS: Mapping[str, Callable[[str | None], Metric]] = {
    "sqnr_db": sqnr_db,
    "agreement": agreement,
    "top1": top1,
    "token_accuracy": token_accuracy,
    "cross_entropy": cross_entropy,
    "perplexity": perplexity,
    "kl": kl,
    "cosine": cosine,
}
"""The metrics that have names: each a function of the output that it is of, None for the one that it picks itself."""

Asked = str | Metric | Callable[[Seen], object]
"""A metric as it is asked for: "KIND" or "KIND:OUTPUT", a record, or a function of `Seen` whose mean is taken."""


def metric_named(name: str) -> Metric:
    """Returns the metric "KIND", or "KIND:OUTPUT" of one output.

    Raises:
        ConfigError: The kind is unknown.
    """
    kind, _, output = name.partition(":")
    if kind not in METRICS:
        raise ConfigError(
            f"metrics: {name!r} is unknown; expected {', '.join(METRICS)}, such a name with ':OUTPUT', or a Metric"
            f"{near_names(kind, METRICS)}"
        )
    return METRICS[kind](output or None)


def find_metrics(metrics: Sequence[Asked], *, has_labels: bool, has_reference: bool = True) -> tuple[Metric, ...]:
    """Returns the metrics, each given by its name, as a record, or as a function whose mean is taken (`mean_of`).

    Raises:
        ConfigError: A name is unknown, two are called alike, or one is of labels or a reference, and there are none.
    """
    if isinstance(metrics, str):
        raise ConfigError(f"metrics={metrics!r} is a text; expected a sequence of names, as in ({metrics!r},)")
    found = tuple(_record(metric) for metric in metrics)
    names = [metric.name for metric in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"metrics: {names.count(twice)} are called {twice!r}; give each a name of its own")
    for metric in found:
        if metric.needs_labels and not has_labels:
            raise ConfigError(
                f"metrics: {metric.name!r} is of labels, and there are none; give labels, or leave it out"
            )
        if metric.needs_reference and not has_reference:
            raise ConfigError(
                f"metrics: {metric.name!r} compares with a reference, and there is none; give reference=, the float "
                "model, or leave it out"
            )
    return found


def _record(asked: Asked) -> Metric:
    if isinstance(asked, Metric):
        return asked
    return metric_named(asked) if isinstance(asked, str) else mean_of(asked)
