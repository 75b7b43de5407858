"""How far each tensor of a quantized model is from the float model's, and what meets each grid, in one program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.ir import Graph, Model
from ptqjax.kernels.histogram import Histogram
from ptqjax.lowering import Intercept, compiled, interpret
from ptqjax.pytrees import PyTreeNode
from ptqjax.quantize import Encoding, Encodings
from ptqjax.quantize.batches import checked_batches, num_samples
from ptqjax.quantize.encodings import along_axis
from ptqjax.quantize.observers import DISTRIBUTION
from ptqjax.quantize.qdq import with_own_biases
from ptqjax.simulate import fake_quantization

_PIECE = 8  # samples at a time: values of both models are alive together
_BEYOND = 0.51  # steps from the value that it is rounded to: farther, it lies outside the grid (0.5, and float32)
_BOUNDS = ("Clip", "Max", "Min", "Relu")
_IMAGE_RANK = 3  # from which on a channel axis may lie last


class Sums(PyTreeNode):
    """Sums over the values of a tensor that were seen: x of the float model, v of the quantized one.

    Scalars; inside the program, one for each place along the first axis.
    """

    signal: Any
    """Of x^2."""
    noise: Any
    """Of (Q(v) - x)^2: all that was rounded up to and with this tensor."""
    own_noise: Any
    """Of (Q(v) - v)^2: what this tensor's rounding adds."""
    clip_noise: Any
    """The part of `own_noise` that is from values outside the grid."""
    num_clipped: Any
    """How many values lie outside the grid."""
    num_values: Any
    """How many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """What was measured of the tensors of a quantized model."""

    sums: Mapping[str, Sums]
    """By tensor (activations in the order in which they come into being, then parameters), as float64."""
    histograms: Mapping[str, Histogram]
    """What met the grid of each activation: a histogram each, on NumPy."""
    num_samples: int
    """How many samples went through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is static in the program."""

    reference: Graph
    """The float model's graph."""
    graph: Graph
    """The quantized model's, without its encodings."""
    tensors: tuple[str, ...]
    """The activations to look at, quantized ones and outputs."""
    weights: tuple[str, ...]
    """The parameters to look at."""
    seen: tuple[str, ...]
    """The activations of which histograms are kept."""


def measure_depth(
    reference: Model, model: Model, encodings: Encodings, batches: Iterable[Any], *, samples: int = 32
) -> Depth:
    """Returns how far each tensor of the quantized model is from the float one, over `samples` samples at most.

    Both models run in one compiled program, a few samples at a time. Tensors are matched by name; those that only one
    of the models has are left out. So are those that a Clip, Max, Min or Relu alone reads and whose grid is that of its
    result: what they lose beyond it is lost anyway. Values inside the subgraphs of If, Loop and Scan are not seen.

    Args:
        reference: The float model to compare with: of the same tensors in the same units (scaled as `model` is).
        model: The float model that the encodings belong to; its biases may have been corrected.
        encodings: The grids.
        batches: Inputs by name, samples along the first axis; only the first ones are read.
        samples: How many samples are looked at, at most; at least one batch of a fixed size.

    Raises:
        DataError: The batches do not fit the model.
    """
    plan = _plan(reference, model, encodings)
    histograms = DISTRIBUTION.init(len(plan.seen)) if plan.seen else None
    total: dict[str, Sums] = {}
    count = 0
    params = tuple(jax.device_put(dict(each.params)) for each in (reference, model))
    for piece in pieces(model.graph, batches, samples):
        sums, histograms = _step(plan, params, encodings, histograms, piece)
        found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).sum(), sums)
        again = {name: each for name, each in found.items() if name in total and name in plan.tensors}  # not weights
        total = found | total | {name: jax.tree.map(np.add, total[name], each) for name, each in again.items()}
        count += num_samples(piece)
    order = [name for name in (*plan.tensors, *plan.weights) if name in total]
    return Depth(
        sums={name: total[name] for name in order},
        histograms={} if histograms is None else _each(plan.seen, histograms.histogram),
        num_samples=count,
    )


def pieces(graph: Graph, batches: Iterable[Any], samples: int) -> Iterator[dict[str, Any]]:
    """Yields the first `samples` samples a few at a time, all pieces of one size; batches of a fixed size whole."""
    fixed = any(not spec.shape or isinstance(spec.shape[0], int) for spec in graph.inputs)
    left, size = samples, None
    for batch in checked_batches(graph, batches):
        wanted = num_samples(batch) if fixed else min(_PIECE, num_samples(batch), samples)
        size = size or wanted
        for start in range(0, num_samples(batch) - size + 1, size):
            if left <= 0:
                return
            yield batch if fixed else {name: value[start : start + size] for name, value in batch.items()}
            left -= size


def _plan(reference: Model, model: Model, encodings: Encodings) -> _Plan:
    graph = with_own_biases(model, encodings).graph
    known = {name for node in reference.graph.nodes for name in node.outputs}
    known |= {spec.name for spec in reference.graph.inputs}
    wanted = {*encodings, *(spec.name for spec in graph.outputs)}
    order = [*(spec.name for spec in graph.inputs), *(name for node in graph.nodes for name in node.outputs)]
    tensors = tuple(name for name in order if name in wanted & known and not _is_bounded_next(graph, name, encodings))
    return _Plan(
        reference=reference.graph,
        graph=graph,
        tensors=tensors,
        weights=tuple(name for name in sorted(encodings) if name in graph.parameters and name in model.params),
        seen=tuple(name for name in tensors if name in encodings),
    )


def _is_bounded_next(graph: Graph, name: str, encodings: Encodings) -> bool:
    """Tells whether rounding is all that the grid of `name` does: what it clips, the next operator would."""
    readers = [node for node in graph.nodes if name in node.inputs]
    is_output = name in {spec.name for spec in graph.outputs}
    return (
        bool(readers)
        and not is_output
        and name in encodings
        and all(
            node.op_type in _BOUNDS and _is_same_grid(encodings[name], encodings.get(node.output)) for node in readers
        )
    )


def _is_same_grid(first: Encoding, second: Encoding | None) -> bool:
    fields = ("scale", "zero_point", "qmin", "qmax", "enabled")
    return second is not None and all(np.array_equal(getattr(first, f), getattr(second, f)) for f in fields)


@compiled
def _step(
    plan: _Plan,
    params: tuple[Mapping[str, Any], ...],
    encodings: Encodings,
    histograms: Any,
    inputs: Mapping[str, Any],
) -> tuple[dict[str, Sums], Any]:
    """Returns the sums of one batch and the histograms with it; `params` are those of the reference and the model."""
    reference_params, own_params = params
    model = with_own_biases(Model(graph=plan.graph, params=dict(own_params)), encodings)
    tensors = frozenset(plan.tensors)
    _, floats = interpret(plan.reference, reference_params, inputs, intercept=_kept(tensors))
    wanted = tensors | frozenset(plan.weights)
    rounding = _with_both(wanted, fake_quantization(model, encodings))
    _, pairs = interpret(model.graph, model.params, inputs, intercept=rounding)
    sums = {
        name: _sums(floats.get(name, pairs[name][0]), pairs[name], encodings.get(name))
        for name in (*plan.tensors, *plan.weights)
        if name in pairs and (name in floats or name not in tensors)
    }
    if histograms is None:
        return sums, None
    return sums, DISTRIBUTION.update(histograms, [pairs[name][0] for name in plan.seen], num_samples(inputs))


def _kept(tensors: frozenset[str]) -> Intercept:
    return lambda name, value, axis: (value, _in_onnx_layout(value, axis) if name in tensors else None)


def _with_both(tensors: frozenset[str], rounding: Intercept) -> Intercept:
    """Returns `rounding`, with each value before and after it observed."""

    def intercept(name: str, value: jax.Array, axis: int | None) -> tuple[jax.Array, Any]:
        rounded, _ = rounding(name, value, axis)
        both = (_in_onnx_layout(value, axis), _in_onnx_layout(rounded, axis))
        return rounded, both if name in tensors else None

    return intercept


def _in_onnx_layout(value: jax.Array, axis: int | None) -> jax.Array:
    """Returns the value with its channels second; the two models need not lie in memory alike."""
    is_last = axis is not None and value.ndim >= _IMAGE_RANK and axis % value.ndim == value.ndim - 1
    return jnp.moveaxis(value, -1, 1) if is_last else value


def _sums(x: jax.Array, before_and_after: tuple[jax.Array, jax.Array], encoding: Encoding | None) -> Sums:
    value, rounded = before_and_after
    own = jnp.square(rounded - value)
    clipped = jnp.zeros(value.shape, bool) if encoding is None else _is_clipped(value, rounded, encoding)
    terms = (jnp.square(x), jnp.square(rounded - x), own, jnp.where(clipped, own, 0), clipped.astype(jnp.float32))
    # One reduction for all: each by itself would be a kernel of its own, and take most of the time of compilation.
    # Along the first axis float64 adds, on the host: 24 bits do not hold as many terms as the first layers have.
    sums = lax.reduce(terms, (np.float32(0),) * len(terms), _added, tuple(range(1, x.ndim)))
    return Sums(*sums, num_values=jnp.asarray(value.size, jnp.float32))


def _added(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _is_clipped(value: jax.Array, rounded: jax.Array, encoding: Encoding) -> jax.Array:
    scale = along_axis(encoding.scale, encoding, value.shape)
    if encoding.float_format is not None:
        return encoding.enabled & (jnp.abs(value) > encoding.qmax * scale)
    return jnp.abs(rounded - value) > _BEYOND * scale


def _each(names: Sequence[str], histogram: Histogram) -> dict[str, Histogram]:
    counts, exponents = np.asarray(histogram.counts), np.asarray(histogram.exponent)
    return {name: Histogram(counts=counts[i], exponent=exponents[i]) for i, name in enumerate(names)}
