"""Files that merge a decoder's first step and those that follow: the branch with past is what commands work on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ptqjax.ir import Model


def read_with_branch(path: Path) -> Model:
    """Returns what `read_with_past` does, and says which branch of a merged file that is."""
    import ptqjax
    from ptqjax.decoders import BRANCH, is_merged, read_with_past

    model = ptqjax.read(path)
    if not is_merged(model.graph):
        return model
    click.echo(
        f"Note: {path.name} merges two branches by '{BRANCH}'; the one with past is quantized, which takes an empty "
        "past as well: the result has no such input",
        err=True,
    )
    return read_with_past(path)
