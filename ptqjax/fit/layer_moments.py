"""Second moments of what a layer of a network multiplies, beside what it would multiply in float."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ptqjax.ir import Node
from ptqjax.kernels.gram import Moments, Taps, moments, patches
from ptqjax.kernels.windows import output_sizes
from ptqjax.lowering import Value, compiled, in_onnx_layout
from ptqjax.ops.convolution import crops_of, window_of
from ptqjax.transforms.linear import Linear

POSITIONS = 128
"""Outputs that are looked at in each sample, at places drawn for each batch."""


def moments_of_halves(
    layer: Linear, kernel: tuple[int, ...], pairs: Iterable[tuple[Value, Value]], seed: int
) -> tuple[Moments, Moments]:
    """Returns the moments over two halves of the samples: even ones and odd ones; of batches of one, even batches.

    Args:
        layer: The layer.
        kernel: The sizes of its kernel; () for a layer without one.
        pairs: What the layer reads in the quantized network, and in float, by batch.
        seed: Of the outputs that are looked at.
    """
    total: tuple[Moments, Moments] | None = None
    for index, pair in enumerate(pairs):
        found = _of_batch(layer, kernel, pair, index, seed)
        total = found if total is None else (total[0].plus(found[0]), total[1].plus(found[1]))
    assert total is not None  # noqa: S101 (there is a batch)
    first, second = (Moments(*map(np.asarray, half)) for half in total)
    return first, second


def _of_batch(
    layer: Linear, kernel: tuple[int, ...], pair: tuple[Value, Value], index: int, seed: int
) -> tuple[Moments, Moments]:
    x, exact = (_channels_last(value, layer) for value in pair)
    taps, sizes = _taps(layer.node, kernel, x.shape[1:-1])
    positions = _positions(sizes, np.random.default_rng((seed, index)))
    first, second = _moments_of_halves(taps, layer.groups, x, exact, positions)
    return (second, first) if x.shape[0] == 1 and index % 2 else (first, second)


def _channels_last(value: Value, layer: Linear) -> Any:
    """Returns the layer's input as [n, *spatial, c]; what a product without taps reads has one or no axis between."""
    array, rank = value.array, value.array.ndim
    if value.channels_last and layer.input_axis % rank == 1:
        return array
    array = in_onnx_layout(value)
    if layer.node.op_type in {"Conv", "ConvTranspose"}:
        return jnp.moveaxis(array, 1, -1)
    array = jnp.moveaxis(array, layer.input_axis % rank, -1)
    return array.reshape(array.shape[0], -1, array.shape[-1]) if rank > 2 else array  # noqa: PLR2004


def _taps(node: Node, kernel: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[Taps, tuple[int, ...]]:
    """Returns what each output sees, and the sizes of the output, along the spatial axes."""
    if node.op_type not in {"Conv", "ConvTranspose"}:
        ones = (1,) * len(sizes)
        return Taps(
            kernel=ones, strides=ones, dilations=ones, padding=((0, 0),) * len(sizes), holes=(0,) * len(sizes)
        ), sizes
    given = {name: node.attribute(name) for name in ("auto_pad", "dilations", "pads", "strides")}
    given = {name: value for name, value in given.items() if value is not None}
    if node.op_type == "Conv":
        window = window_of(sizes, kernel, **given)
        holes = (0,) * len(sizes)
        return Taps(kernel=kernel, holes=holes, **window), output_sizes(sizes, kernel=kernel, **window)
    return _transposed_taps(node, kernel, sizes, given)


def _transposed_taps(
    node: Node, kernel: tuple[int, ...], sizes: tuple[int, ...], given: dict[str, Any]
) -> tuple[Taps, tuple[int, ...]]:
    ones = (1,) * len(sizes)
    strides, dilations = given.get("strides") or ones, given.get("dilations") or ones
    extra = node.attribute("output_padding") or (0,) * len(sizes)
    crops = crops_of(
        sizes,
        kernel,
        auto_pad=given.get("auto_pad", "NOTSET"),
        dilations=dilations,
        extra=extra,
        output_shape=node.attribute("output_shape") or (),
        pads=given.get("pads", ()),
        strides=strides,
    )
    extents = [(count - 1) * dilation for count, dilation in zip(kernel, dilations, strict=True)]
    padding = tuple(
        (extent - low, extent - high + more) for extent, (low, high), more in zip(extents, crops, extra, strict=True)
    )
    taps = Taps(
        kernel=kernel,
        strides=ones,
        dilations=tuple(dilations),
        padding=padding,
        holes=tuple(stride - 1 for stride in strides),
        is_flipped=True,
    )
    spread = [(size - 1) * stride + 1 for size, stride in zip(sizes, strides, strict=True)]
    return taps, output_sizes(spread, kernel=kernel, strides=ones, dilations=dilations, padding=padding)


def _positions(sizes: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Returns the places of outputs to look at, [p, rank]."""
    count = int(np.prod(sizes))
    chosen = np.sort(random.choice(count, min(POSITIONS, count), replace=False))
    return np.stack(np.unravel_index(chosen, sizes), axis=-1) if sizes else np.zeros((1, 0), np.int64)


@partial(compiled, num_static=2, is_brief=True)
def _moments_of_halves(taps: Taps, groups: int, x: Any, exact: Any, positions: Any) -> tuple[Moments, Moments]:
    rows, float_rows = (patches(each, taps, positions) for each in (x, exact))

    def half(start: int) -> Moments:
        count = rows[start::2].shape[0] * rows.shape[1]
        some, exactly = (each[start::2].reshape(count, *each.shape[2:]) for each in (rows, float_rows))
        return moments(some, exactly, groups)

    return half(0), half(1)
