"""Activations whose grids are found at run time: what products with weights read, and nothing else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ptqjax.config import FLOAT_DTYPES, Target
from ptqjax.errors import ConfigError
from ptqjax.ir import Graph, Model, Node
from ptqjax.placement.granularity import Use
from ptqjax.placement.rules import Settings, num_bits
from ptqjax.placement.shared import Decided
from ptqjax.placement.sites import ACTIVATION, WEIGHT, Site, Skipped

Reads: TypeAlias = Mapping[tuple[str, int | None], list[Node]]
"""The products that round what they read, by tensor and block size; None for one grid."""

_MATRIX = 2  # axes
_WHOLE = 8  # bits of the widest integers that such products take


def rounded_reads(model: Model, target: Target, decided: Decided) -> dict[tuple[str, int | None], list[Node]]:
    """Returns the products that round what they read, by tensor and block size; None for one grid.

    They are the target's, with a weight that is a matrix of integers of 8 bits at most, with a scale for all, for each
    output, or for each block of what is summed.

    Args:
        model: The model.
        target: The runtime.
        decided: What was decided about parameters.
    """
    found: dict[tuple[str, int | None], list[Node]] = {}
    for node in model.graph.nodes:
        site = _weight_of(model, node, target, decided)
        if site is not None:
            found.setdefault((node.inputs[0], site.block_size), []).append(node)
    return found


def _weight_of(model: Model, node: Node, target: Target, decided: Decided) -> Site | None:
    """Returns the site of a product's weight, if what it is multiplied by can be rounded at run time."""
    if node.op_type not in target.dynamic_products or node.domain or node.inputs[0] in model.params:
        return None
    site = decided.get(node.inputs[1])
    if not isinstance(site, Site) or site.kind != WEIGHT or np.ndim(model.params[site.tensor]) != _MATRIX:
        return None
    if site.dtype in FLOAT_DTYPES or num_bits(site.dtype) > _WHOLE or not _is_plain(node):
        return None
    summed = 1 if node.attribute("transB", 0) else 0
    along_outputs = site.axis is None or site.axis % _MATRIX != summed
    return site if along_outputs != (site.block_size is not None) else None


def _is_plain(node: Node) -> bool:
    """Tells whether a Gemm multiplies as a MatMul does, and adds its bias as it is."""
    return node.attribute("alpha", 1.0) == 1 and node.attribute("beta", 1.0) == 1 and not node.attribute("transA", 0)


def at_run_time(graph: Graph, tensor: str, reads: Reads, run_time: str) -> Site | Skipped:
    """Returns what becomes of an activation, or of a constant like one, where none has a grid beforehand.

    Args:
        graph: The graph.
        tensor: The tensor.
        reads: As `rounded_reads` returns them.
        run_time: What activations are, one of `RUN_TIME`.
    """
    if run_time == "float":
        return Skipped(tensor=tensor, reason="activations='float'")
    found = _block_size_read(graph, tensor, reads)
    if isinstance(found, str):
        return Skipped(tensor=tensor, reason=found)
    reason = "its grid is found at run time" + ("" if found is None else f", block by block ({found})")
    return Site(
        tensor=tensor,
        kind=ACTIVATION,
        dtype="uint8" if found is None else "int8",
        symmetric=False if found is None else "strict",
        root=tensor,
        reason=reason,
        axis=None if found is None else -1,
        block_size=found,
        is_dynamic=True,
    )


def _block_size_read(graph: Graph, tensor: str, reads: Reads) -> int | str | None:
    """Returns the block size in which a tensor is rounded, None for one grid; or, as text, why it stays in float."""
    nodes = graph.readers.get(tensor, ())
    for (name, block_size), products in reads.items():
        if name == tensor and len(products) == len(nodes) and tensor not in graph.output_names:
            return block_size
    if any(name == tensor for name, _ in reads):
        return "not only products with weights read it, which alone find grids at run time"
    return "no product with a weight reads it"


def stores_zero_points(target: Target, run_time: str, settings: Settings, uses: Sequence[Use]) -> bool:
    """Tells whether the operators that use a weight have a zero point for each scale in any case.

    Those of `target` have that multiply floats, or what is rounded in blocks, by integers of 8 bits at most.
    """
    if target.exported_weights != "matmul-nbits" or settings.dtype in FLOAT_DTYPES or num_bits(settings.dtype) > _WHOLE:
        return False
    by_blocks = run_time == "float" or (run_time == "dynamic" and settings.granularity.startswith(("block", "lpbq")))
    return by_blocks and all(use.node.op_type in ("Gather", "Gemm", "MatMul") for use in uses)


def check_tied(site: Site, table: Site, *, is_same: bool) -> None:
    """Checks that a weight which is a table transposed has the table's grid.

    Raises:
        ConfigError: It has another: the two are stored once.
    """
    if not is_same:
        raise ConfigError(
            f"'{site.tensor}' is the table '{table.tensor}' transposed, stored once, and their settings differ "
            f"({site.dtype} and {table.dtype}, or how scales run); name both in the rule, or exclude one of them"
        )
