"""Decoders as they are exported: which inputs are the past, which outputs go on as such, and whether a past fits.

Exporters name the past `past_key_values.0.key`, `past_key_values.0.decoder.value`, `past_0` or alike, and what
goes on `present.0.key`, `present_key_values...` or alike; its axes are [samples, heads, positions, width].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.errors import DataError
from ptqjax.ir import Graph, TensorSpec

_PAST = re.compile(r"past(_key_values|_key_value)?(?=[._]|$)")
_PRESENTS = ("present", "present_key_values", "present_key_value", "new")
_NAMES = {"ids": "input_ids", "mask": "attention_mask", "positions": "position_ids", "branch": "use_cache_branch"}
_RANK = 4
_POSITIONS = 2  # the axis of a past that grows


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """The inputs and outputs of a decoder with past."""

    ids: str
    """The input of token ids [N, T]."""
    mask: str | None
    """The input that tells which positions there are [N, P + T]; None without."""
    positions: str | None
    """The input of each token's place in its sequence [N, T]; None without."""
    branch: str | None
    """The input that picks a branch of an If-merged file: true where there is a past; None without."""
    pasts: Mapping[str, str]
    """The output that goes on as each input of the past, by input."""
    others: tuple[str, ...]
    """All other inputs, such as an encoder's states."""

    @property
    def own(self) -> tuple[str, ...]:
        """The inputs that follow from token ids alone."""
        found = (self.ids, self.mask, self.positions, self.branch)
        return (*(name for name in found if name is not None), *self.pasts)


def interface_of(graph: Graph) -> Interface | None:
    """Returns how a decoder takes its past; None where the graph is none with a past."""
    specs = {spec.name: spec for spec in graph.inputs}
    pasts = _pairs(graph)
    if _NAMES["ids"] not in specs or not pasts:
        return None
    known = {kind: name if name in specs else None for kind, name in _NAMES.items()}
    taken = {*pasts, *known.values()}
    return Interface(
        ids=_NAMES["ids"],
        mask=known["mask"],
        positions=known["positions"],
        branch=known["branch"],
        pasts=pasts,
        others=tuple(name for name in specs if name not in taken),
    )


def _pairs(graph: Graph) -> dict[str, str]:
    outputs = {spec.name for spec in graph.outputs}
    found = {}
    for spec in graph.inputs:
        match = _PAST.match(spec.name)
        if match is None or not (spec.shape is None or len(spec.shape) == _RANK):
            continue
        names = (f"{present}{spec.name[match.end() :]}" for present in _PRESENTS)
        output = next((name for name in names if name in outputs), None)
        if output is not None:
            found[spec.name] = output
    return found


def check_past(graph: Graph, inputs: Mapping[str, Any], place: str) -> None:
    """Checks that a batch's past, mask and positions fit each other and its ids, where the graph is such a decoder.

    Raises:
        DataError: Pasts are of different lengths, a mask does not cover past and ids, or positions are not as many as
            ids; the message names the input, the shapes and what would fit.
    """
    found = interface_of(graph)
    if found is None or np.ndim(inputs[found.ids]) != 2:  # noqa: PLR2004 - samples and tokens
        return
    ids = np.shape(inputs[found.ids])
    lengths = {name: np.shape(inputs[name])[_POSITIONS] for name in found.pasts if np.ndim(inputs[name]) == _RANK}
    first = next(iter(lengths), None)
    if first is None:
        return
    for name, length in lengths.items():
        if length != lengths[first]:
            raise DataError(
                f"{place}: input '{name}' holds {length} past positions, and '{first}' {lengths[first]}; expected as "
                "many in every layer: feed the outputs of one earlier step"
            )
    for name, length, what in (
        (found.mask, lengths[first] + ids[1], f"{lengths[first]} past positions and {ids[1]} tokens"),
        (found.positions, ids[1], f"{ids[1]} tokens"),
    ):
        if name is not None and np.ndim(inputs[name]) == 2 and np.shape(inputs[name])[1] != length:  # noqa: PLR2004
            raise DataError(
                f"{place}: input '{name}' has the shape {list(np.shape(inputs[name]))}; expected {[ids[0], length]}: "
                f"'{found.ids}' and '{first}' hold {what}"
            )


def empty_past(spec: TensorSpec, num_samples: int, place: str) -> np.ndarray:
    """Returns the past of no length.

    Raises:
        DataError: The graph does not say how many heads it has and how wide they are.
    """
    _, heads, _, width = spec.shape or (None,) * _RANK
    if not (isinstance(heads, int) and isinstance(width, int)):
        raise DataError(
            f"{place}: input '{spec.name}' has the shape {spec.shape}; expected numbers for its heads and their width, "
            "by which an empty past is made: give batches with a past, or export it with these"
        )
    return np.zeros((num_samples, heads, 0, width), spec.dtype)
