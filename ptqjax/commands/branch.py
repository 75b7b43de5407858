"""Files that merge a decoder's first step and those that follow: the branch with past is what commands work on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ptqjax.ir import Graph, Model

BRANCH = "use_cache_branch"
"""The input that picks the branch: true for the one with past."""


def read_with_branch(path: Path) -> Model:
    """Returns the model in a file; of one with merged branches the one with past, which takes an empty one as well."""
    import ptqjax

    model = ptqjax.read(path)
    if not is_merged(model.graph):
        return model
    click.echo(
        f"Note: {path.name} merges two branches by '{BRANCH}'; the one with past is quantized, which takes an empty "
        "past as well: the result has no such input",
        err=True,
    )
    return ptqjax.read(path, fixed={BRANCH: True})


def is_merged(graph: Graph) -> bool:
    """Tells whether an input picks between branches with and without past."""
    return any(spec.name == BRANCH and spec.dtype.kind == "b" for spec in graph.inputs)


def like_model(reference: Path, graph: Graph) -> Path | bytes:
    """Returns a reference for a model: its file, or the branch with past where the file merges it and the model not."""
    import ptqjax
    from ptqjax.onnx_io import to_proto

    if is_merged(graph) or not is_merged(ptqjax.read(reference).graph):
        return reference
    return to_proto(ptqjax.read(reference, fixed={BRANCH: True})).SerializeToString()
