"""Encodings brought to one structure, so that one compiled program serves them all.

A program depends on which tensors have an encoding, along which axis, and in which blocks or floating format. What is
missing is added switched off; one scale for a whole weight is repeated for its channels where others have one for each;
a bias that some leave in float gets an entry of its own, the one that `bias_encoding` derives. Each variant stays the
same function, to the bit. Blocks and floating formats stay what they are: these make another structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ptqjax.encodings.biases import BiasSite, bias_encoding, bias_sites, float_bias
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.ir import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """What of an encoding is static in a program."""

    axis: int | None
    block_size: int | None
    float_format: str | None
    scale_bits: int | None
    shape: tuple[int, ...]
    """The shape of the scale."""

    @property
    def is_plain(self) -> bool:
        """Tells whether it is a grid of integers, for a tensor or a channel at a time."""
        return self.block_size is None and self.float_format is None and self.scale_bits is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """Encodings in the structure that they share with others."""

    encodings: tuple[Encodings, ...]
    """Each variant's, leaves NumPy arrays of one type and shape wherever the structure is one."""
    structures: tuple[int, ...]
    """The number of each variant's structure, from 0 in order of appearance."""


def aligned(model: Model, encodings: Sequence[Encodings], *, adds: bool = True) -> Aligned:
    """Returns the encodings, all of `model`, in as few structures as can be found by taking them in order.

    Args:
        model: The model; of its arrays only shapes matter.
        encodings: Concrete encodings of each variant.
        adds: Whether what is missing is added, switched off. Else variants have the tensors that they had, and those
            of other tensors have another structure: for what asks which tensors have an encoding.
    """
    sites = bias_sites(model)
    explicit = _with_explicit_biases(encodings, sites) if adds else list(encodings)
    layouts: list[dict[str, _Layout]] = []
    structures = []
    for each in explicit:
        own = {name: _layout(encoding) for name, encoding in each.items()}
        fitting = ((i, layout) for i, layout in enumerate(layouts) if adds or layout.keys() == own.keys())
        joined = ((index, _joined(model, sites, layout, own)) for index, layout in fitting)
        index, layout = next(((i, found) for i, found in joined if found is not None), (len(layouts), own))
        layouts[index:] = [layout, *layouts[index + 1 :]]
        structures.append(index)
    found = (
        {name: _fitted(each.get(name), layout) for name, layout in sorted(layouts[index].items())}
        for each, index in zip(explicit, structures, strict=True)
    )
    return Aligned(encodings=tuple(found), structures=tuple(structures))


def _with_explicit_biases(encodings: Sequence[Encodings], sites: Iterable[BiasSite]) -> list[Encodings]:
    """Returns the encodings in which a bias that has an entry in one has an entry in all."""
    named = [site for site in sites if any(site.bias in each for each in encodings)]
    return [
        each | {site.bias: bias_encoding(each, site) or float_bias() for site in named if site.bias not in each}
        for each in encodings
    ]


def _layout(encoding: Encoding) -> _Layout:
    return _Layout(
        axis=encoding.axis,
        block_size=encoding.block_size,
        float_format=encoding.float_format,
        scale_bits=encoding.scale_bits,
        shape=np.shape(encoding.scale),
    )


def _joined(
    model: Model, sites: Sequence[BiasSite], layouts: Mapping[str, _Layout], others: Mapping[str, _Layout]
) -> dict[str, _Layout] | None:
    """Returns the layouts that serve both; None where there are none."""
    joined = {**others, **layouts}
    for name in layouts.keys() & others.keys():
        found = _common(model, sites, name, layouts[name], others[name])
        if found is None:
            return None
        joined[name] = found
    return joined


def _common(model: Model, sites: Sequence[BiasSite], name: str, one: _Layout, other: _Layout) -> _Layout | None:
    if one == other:
        return one
    fine = one if one.axis is not None else other
    coarse = other if fine is one else one
    if not (one.is_plain and other.is_plain) or coarse.axis is not None or len(fine.shape) != 1 or coarse.shape:
        return None
    return fine if _may_have_axis(model, sites, name, fine.axis) else None


def _may_have_axis(model: Model, sites: Sequence[BiasSite], name: str, axis: int | None) -> bool:
    """Tells whether a parameter may have its scale repeated along `axis` without changing what becomes of biases."""
    if name not in model.params or any(site.input == name for site in sites):
        return False
    return all(site.weight_axis == axis for site in sites if site.weight == name)


def _fitted(encoding: Encoding | None, layout: _Layout) -> Encoding:
    """Returns the encoding in a layout that serves it; where there is none, one that is switched off."""
    if encoding is None:
        one = np.float32(1)
        encoding = Encoding(scale=one, zero_point=np.float32(0), qmin=-one, qmax=one, enabled=np.asarray(False))
    return Encoding(
        scale=_spread(encoding.scale, layout.shape),
        zero_point=_spread(encoding.zero_point, layout.shape),
        qmin=np.asarray(encoding.qmin, np.float32),
        qmax=np.asarray(encoding.qmax, np.float32),
        enabled=np.asarray(encoding.enabled, np.bool_),
        axis=layout.axis,
        block_size=layout.block_size,
        float_format=layout.float_format,
        scale_bits=layout.scale_bits,
    )


def _spread(values: object, shape: tuple[int, ...]) -> np.ndarray:
    return np.array(np.broadcast_to(np.asarray(values, np.float32), shape))
