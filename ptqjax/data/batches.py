"""Calibration batches, checked before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ptqjax.config import near_names
from ptqjax.data.parts import Part, Parts, parts_of, parts_on_host
from ptqjax.data.past import check_past
from ptqjax.errors import DataError
from ptqjax.ir import Graph, TensorSpec
from ptqjax.placement.never import mask_inputs


def checked_batches(graph: Graph, batches: Iterable[Any] | None) -> Iterator[dict[str, Any]]:
    """Yields the batches one by one, each an array for every graph input; the size of a batch may change.

    A batch that lies on several devices comes as its parts, one after the other, on the host of every process.

    Raises:
        DataError: There is no batch; or one lacks an input, has a surplus one, or an array of another type, rank or
            shape, or without elements, or with NaN or infinity. The message names the batch by its index from 0.
    """
    for place, batch in _named_batches(graph, batches):
        for part in parts_on_host(batch, place):
            yield _checked(graph, part, place)


def checked_parts(graph: Graph, batches: Iterable[Any] | None) -> Iterator[Parts]:
    """Yields the batches one by one, each as its parts on devices, which `checked_part` has still to check.

    Raises:
        DataError: There is no batch; or one is no mapping, lacks an input or has a surplus one; or its inputs are
            spread over devices in different ways.
    """
    for place, batch in _named_batches(graph, batches):
        yield parts_of(batch, place)


def _named_batches(graph: Graph, batches: Iterable[Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if batches is None or isinstance(batches, Mapping | str | np.ndarray) or not isinstance(batches, Iterable):
        found = "None" if batches is None else f"a {type(batches).__name__}"
        raise DataError(f"batches is {found}; expected an iterable of mappings {_example(graph)}")
    index = -1
    for index, batch in enumerate(batches):
        place = f"batch {index}"
        _check_names(graph, batch, place)
        yield place, {spec.name: batch[spec.name] for spec in graph.inputs}
    if index < 0:
        raise DataError(f"batches is empty; expected at least one mapping {_example(graph)}")


def checked_part(graph: Graph, part: Part) -> dict[str, Any]:
    """Returns the arrays of a part, which fit the graph's inputs.

    Raises:
        DataError: An array has another type, rank or shape, no elements, or NaN or infinity; the message names the
            batch by its index from 0, and the samples where it is divided.
    """
    return _checked(graph, part.inputs, part.place)


def num_samples(inputs: Mapping[str, Any]) -> int:
    """Returns the number of samples in a batch: the first axis of its first array that has one."""
    return next((array.shape[0] for array in inputs.values() if array.ndim), 1)


def _check_names(graph: Graph, batch: Any, place: str) -> None:
    if not isinstance(batch, Mapping):
        raise DataError(f"{place} is a {type(batch).__name__}; expected a mapping {_example(graph)}")
    known = [spec.name for spec in graph.inputs]
    surplus = [name for name in batch if name not in known]
    if surplus:
        raise DataError(
            f"{place} has the input {surplus[0]!r}, which the model has not; its inputs are {', '.join(known)}"
            f"{near_names(str(surplus[0]), known)}"
        )
    missing = [name for name in known if name not in batch]
    if missing:
        raise DataError(f"{place} lacks the input {missing[0]!r}; it has {', '.join(map(str, batch)) or 'none'}")


def _checked(graph: Graph, batch: Mapping[str, Any], place: str) -> dict[str, Any]:
    symbols: dict[str, int] = {}
    masks = mask_inputs(graph)
    found = {
        spec.name: _checked_array(spec, batch[spec.name], place, symbols, is_mask=spec.name in masks)
        for spec in graph.inputs
    }
    check_past(graph, found, place)
    return found


def _checked_array(spec: TensorSpec, value: Any, place: str, symbols: dict[str, int], *, is_mask: bool) -> Any:
    array = value if isinstance(value, np.ndarray | jax.Array) else _as_array(spec, value, place)
    if array.dtype != spec.dtype:
        raise DataError(
            f"{place}: input '{spec.name}' has the type {array.dtype}; expected {spec.dtype.name} "
            f"(convert it with .astype('{spec.dtype.name}'))"
        )
    _check_shape(spec, tuple(array.shape), place, symbols)
    if np.issubdtype(spec.dtype, np.floating) and not (fits := _counts(np.asarray(array), is_mask=is_mask)).all():
        host, at = np.asarray(array), tuple(int(i) for i in np.argwhere(~fits)[0])
        raise DataError(f"{place}: input '{spec.name}' holds {host[at]} at {at}; expected finite numbers")
    return array


def _counts(values: np.ndarray, *, is_mask: bool) -> np.ndarray:
    """Tells which values a model may be given: finite ones, and -inf in a mask, where it means never."""
    return np.asarray(np.isfinite(values) | (is_mask & np.isneginf(values)))


def _as_array(spec: TensorSpec, value: Any, place: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: input '{spec.name}' is no array: {error}") from error


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], place: str, symbols: dict[str, int]) -> None:
    if spec.shape is None:
        fits = True
    else:
        fits = len(shape) == len(spec.shape)
        for size, declared in zip(shape, spec.shape, strict=False):
            wanted = symbols.setdefault(declared, size) if isinstance(declared, str) else declared
            fits = fits and wanted in (None, size)
    if not fits:
        expected = "x".join("?" if size is None else str(size) for size in spec.shape or ()) or "a single number"
        found = "x".join(map(str, shape)) or "a single number"
        raise DataError(f"{place}: input '{spec.name}' has the shape {found}; expected {expected}")
    if 0 in shape[:1]:
        raise DataError(f"{place}: input '{spec.name}' has no elements (shape {shape}); leave the batch out")


def _example(graph: Graph) -> str:
    return "{" + ", ".join(f"'{spec.name}': array" for spec in graph.inputs) + "}"
