"""The option of commands that measure: what to tell although no output looks so."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ptqjax.errors import ConfigError

metric_option = click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="agreement[:OUTPUT]",
    help="Tell how often the largest element of the first output, or of OUTPUT, is the float model's; without this, it "
    "is told of an output that looks like classes, of shape [samples, classes].",
)
"""Adds `--metric`, whose values reach the command as `metrics`."""


def require_metrics(metrics: Sequence[str]) -> None:
    """Refuses what no command measures, before any work.

    Raises:
        ConfigError: A metric is not "agreement" or "agreement:OUTPUT".
    """
    for name in metrics:
        if name.partition(":")[0] != "agreement":
            raise ConfigError(
                f"--metric {name}: unknown; expected agreement, or agreement:OUTPUT (SQNR, and with labels top-1, are "
                "always told)"
            )
