"""The data of commands: what they say of them, and how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ptqjax.data import Batches, Samples
    from ptqjax.ir import Graph

_BATCH = 32  # samples at a time


def say_reading(model: Path, data: Path | None, *, is_quiet: bool) -> None:
    """Says what is read: at once, before anything slow."""
    if not is_quiet:
        click.echo(f"reading {model}" + ("" if data is None else f" and {data}"), err=True)


def load(path: Path, graph: Graph) -> tuple[Samples, Batches]:
    """Returns the samples in a file, and the same in batches."""
    from ptqjax.data import Batches, load_samples

    samples = load_samples(path, graph)
    return samples, Batches(samples, graph, size=_BATCH)
