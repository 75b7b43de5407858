"""The option of commands that measure: what to tell although no output looks so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqjax.errors import ConfigError
from ptqjax.metrics.named import METRICS

if TYPE_CHECKING:
    from ptqjax.metrics import Metric

metric_option = click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME[:OUTPUT]|FILE.py:FUNCTION",
    help="Tell this as well; may be given several times. agreement: how often the largest element of the first output, "
    "or of OUTPUT, is the float model's, which is told anyway of an output that looks like classes. token_accuracy, "
    "cross_entropy, perplexity: of scores [samples, tokens, classes] against labels [samples, tokens]. kl: the scores' "
    "divergence from the float model's; cosine: of embeddings with them. FILE.py:FUNCTION: of your own, a Metric or a "
    "function of ptqjax.metrics.Seen to numbers, whose mean is told.",
)
"""Adds `--metric`, whose values reach the command as `metrics`."""
_SOURCE = ".py"


def require_metrics(metrics: Sequence[str]) -> None:
    """Refuses what no command measures, before any work.

    Raises:
        ConfigError: A metric is none of `METRICS`, alone or with an output, nor in a Python file.
    """
    for name in metrics:
        kind, _, _ = name.partition(":")
        if kind in METRICS or (_SOURCE in name and _source_of(name).is_file()):
            continue
        if _SOURCE in name:
            raise ConfigError(f"--metric {name}: there is no file '{_source_of(name)}'; expected FILE.py:FUNCTION")
        raise ConfigError(
            f"--metric {name}: unknown; expected one of {', '.join(METRICS)}, such a name with :OUTPUT, or "
            "FILE.py:FUNCTION (SQNR, and with labels top-1 or perplexity, are always told)"
        )


def metrics_of(metrics: Sequence[str]) -> tuple[str | Metric | Callable[..., Any], ...]:
    """Returns what is to be measured: names as they are, and what Python files define.

    Raises:
        ConfigError: A file does not run, or does not define what is named.
    """
    return tuple(_loaded(name) if _SOURCE in name else name for name in metrics)


def _source_of(name: str) -> Path:
    return Path(name.rpartition(":")[0])


def _loaded(name: str) -> Any:
    file, function = _source_of(name), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--metric {name}: '{file}' is no Python file; expected FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--metric {name}: '{file}' does not run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if found is None:
        raise ConfigError(f"--metric {name}: '{file}' defines no '{function}'; expected a function or a Metric")
    return found
