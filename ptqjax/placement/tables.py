"""Tables of which rows are taken, where a layer multiplies by one of them transposed: both have one grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptqjax.config import Target
from ptqjax.encodings.encoding import Encoding
from ptqjax.ir import Model
from ptqjax.placement.granularity import Use, all_uses
from ptqjax.placement.sites import WEIGHT, Site

_MATRIX = 2  # axes


def transposed_tables(model: Model, uses: Mapping[str, Sequence[Use]]) -> dict[str, str]:
    """Returns the weights that hold the numbers of a table transposed -> that table.

    Reading a model makes a parameter of Transpose(table), as of all that is computed from constants; so a table that is
    also the head of a language model is told by its numbers.
    """
    matrices = {name: model.params[name] for name in uses if np.ndim(model.params[name]) == _MATRIX}
    tables = [name for name in matrices if any(use.node.op_type == "Gather" for use in uses[name])]
    found: dict[str, str] = {}
    for name, value in matrices.items():
        table = next((each for each in tables if each != name and _is_transposed(matrices[each], value)), None)
        if table is not None and name not in tables:
            found[name] = table
    return found


def tied_weights(model: Model, target: Target) -> dict[str, str]:
    """Returns what `transposed_tables` does, of the weights and tables that a target has in integers."""
    return transposed_tables(model, all_uses(model, target))


def is_transposed(site: Site, table: Site) -> bool:
    """Tells whether the grids of a weight and of the table that it is transposed can be one."""
    axes = [axis % _MATRIX for axis in (site.axis, table.axis) if axis is not None]
    return sorted(axes) in ([], [0, 1]) and all(
        getattr(site, field) == getattr(table, field)
        for field in ("dtype", "symmetric", "block_size", "power_of_two", "scale_bits", "ranges", "fixed_range")
    )


def as_shared(encoding: Encoding, site: Site) -> Encoding:
    """Returns the encoding that a site shares, as its own tensor has it: a weight's along its own axis."""
    if site.kind != WEIGHT or site.root == site.tensor or encoding.axis is None:
        return encoding
    return encoding.replace(
        scale=np.asarray(encoding.scale).T, zero_point=np.asarray(encoding.zero_point).T, axis=site.axis
    )


def _is_transposed(table: Any, value: Any) -> bool:
    if np.shape(table) != np.shape(value)[::-1] or not np.array_equal(table[:1].T, value[:, :1]):
        return False  # one row tells most apart, and large tables lie in files
    return np.array_equal(np.transpose(np.asarray(table)), value)
