"""How far each tensor of a quantized model is from the float model's, and what meets each grid.

One program runs the model and hands out its tensors, once in float and once quantized; sums are taken outside of it, in
NumPy: a reduction for each sum of each tensor took most of the time, for compilation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.data.batches import checked_batches, num_samples
from ptqjax.encodings.encoding import Encoding, Encodings, along_axis, concrete, fake_quantize
from ptqjax.ir import Graph, Model
from ptqjax.kernels.histogram import Histogram, histogram_of
from ptqjax.lowering import compiled, interpret
from ptqjax.qdq.insert import with_own_biases
from ptqjax.ranges.observers import sampled
from ptqjax.simulation import fake_quantization, round_parameters

_PIECE = 8  # samples at a time: values of both models are alive together
_BEYOND = 0.51  # steps from the value that it is rounded to: farther, it lies outside the grid (0.5, and float32)
_BOUNDS = ("Clip", "Max", "Min", "Relu")
_IMAGE_RANK = 3  # from which on a channel axis may lie last


class Sums(NamedTuple):
    """Sums over the values of a tensor that were seen: x of the float model, v of the quantized one."""

    signal: float
    """The sum of x^2."""
    noise: float
    """The sum of (Q(v) - x)^2: the error accumulated up to and including this tensor."""
    own_noise: float
    """The sum of (Q(v) - v)^2: the error that rounding this tensor adds."""
    clip_noise: float
    """The part of `own_noise` that is from values outside the grid."""
    num_clipped: int
    """How many values lie outside the grid."""
    num_values: int
    """The number of values."""

    def plus(self, other: Sums) -> Sums:
        """Returns the sums of both."""
        return Sums._make(mine + theirs for mine, theirs in zip(self, other, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Depth:
    """What was measured of the tensors of a quantized model."""

    sums: Mapping[str, Sums]
    """The sums by tensor: activations in the order in which they come into being, then parameters."""
    histograms: Mapping[str, Histogram]
    """What met the grid of each activation: a histogram each, on NumPy."""
    num_samples: int
    """How many samples went through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is static in the program."""

    graph: Graph
    """The graph."""
    tensors: frozenset[str]
    """The activations that are handed out."""


def measure_depth(
    reference: Model, model: Model, encodings: Encodings, batches: Iterable[Any], *, samples: int = 32
) -> Depth:
    """Returns how far each tensor of the quantized model is from the float one, over `samples` samples at most.

    Both models run a few samples at a time, by one program where their graphs are one. Tensors are matched by name;
    those that only one of the models has are left out. So are those that a Clip, Max, Min or Relu alone reads and whose
    grid is that of its result: what they lose beyond it is lost anyway. Values inside the subgraphs of If, Loop and
    Scan are not seen.

    Args:
        reference: The float model to compare with: of the same tensors in the same units (scaled as `model` is).
        model: The float model that the encodings belong to; its biases may have been corrected.
        encodings: The grids.
        batches: Inputs by name, samples along the first axis; only the first ones are read.
        samples: How many samples are looked at, at most; at least one batch of a fixed size.

    Raises:
        DataError: The batches do not fit the model.
    """
    names = _activations(reference, model, encodings)
    off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in encodings.items()}
    in_float, quantized = _Run(reference, off, names), _Run(model, encodings, names)
    sums: dict[str, Sums] = {}
    met: dict[str, list[np.ndarray]] = {name: [] for name in names if name in encodings}
    count = 0
    for piece in pieces(model.graph, batches, samples):
        floats, pairs = in_float.tensors(piece), quantized.tensors(piece)
        for name in (name for name in names if name in floats and name in pairs):
            found = _sums(floats[name][1], *pairs[name], encodings.get(name))
            sums[name] = sums[name].plus(found) if name in sums else found
            if name in met:
                met[name].append(np.asarray(sampled(pairs[name][0], num_samples(piece))))
        count += num_samples(piece)
    weights = [name for name in sorted(encodings) if name in model.params]
    return Depth(
        sums={name: sums[name] for name in names if name in sums}
        | {name: _sums_of_weight(np.asarray(model.params[name]), encodings[name]) for name in weights},
        histograms={name: _histogram(values) for name, values in met.items() if values},
        num_samples=count,
    )


class _Run:
    """A model under encodings, and the program that hands out its tensors."""

    def __init__(self, model: Model, encodings: Encodings, names: Sequence[str]) -> None:
        rounded, self._encodings = round_parameters(model, encodings)
        self._plan = _Plan(graph=rounded.graph, tensors=frozenset(names))
        self._params = jax.device_put(dict(rounded.params))

    def tensors(self, inputs: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns each tensor before and after its rounding."""
        return jax.device_get(_tensors(self._plan, self._params, self._encodings, inputs))


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


def _activations(reference: Model, model: Model, encodings: Encodings) -> tuple[str, ...]:
    """Returns the activations to look at, quantized ones and outputs, in the order in which they come into being."""
    graph = with_own_biases(model, encodings).graph
    known = {name for node in reference.graph.nodes for name in node.outputs}
    known |= {spec.name for spec in reference.graph.inputs}
    wanted = {*encodings, *(spec.name for spec in graph.outputs)}
    order = [*(spec.name for spec in graph.inputs), *(name for node in graph.nodes for name in node.outputs)]
    return tuple(name for name in order if name in wanted & known and not _is_bounded_next(graph, name, encodings))


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


@partial(compiled, is_brief=True)
def _tensors(
    plan: _Plan, params: Mapping[str, Any], encodings: Encodings, inputs: Mapping[str, Any]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns the activations of one piece; in whatever layout, but for those with a scale for each channel."""
    rounding = fake_quantization(Model(graph=plan.graph, params=dict(params)), encodings)

    def intercept(name: str, value: jax.Array, axis: int | None) -> tuple[jax.Array, Any]:
        rounded, _ = rounding(name, value, axis)
        if name not in plan.tensors:
            return rounded, None
        has_axis = name in encodings and encodings[name].axis is not None
        both = (_in_onnx_layout(value, axis), _in_onnx_layout(rounded, axis)) if has_axis else (value, rounded)
        return rounded, both

    return interpret(plan.graph, params, inputs, intercept=intercept)[1]


def _in_onnx_layout(value: jax.Array, axis: int | None) -> jax.Array:
    is_last = axis is not None and value.ndim >= _IMAGE_RANK and axis % value.ndim == value.ndim - 1
    return jnp.moveaxis(value, -1, 1) if is_last else value


def _sums(x: np.ndarray, value: np.ndarray, rounded: np.ndarray, encoding: Encoding | None) -> Sums:
    own = rounded - value
    clipped = None if encoding is None else _is_clipped(value, own, concrete(encoding))
    return Sums(
        signal=_squared(x),
        noise=_squared(rounded - x),
        own_noise=_squared(own),
        clip_noise=0.0 if clipped is None else _squared(own[clipped]),
        num_clipped=0 if clipped is None else int(np.count_nonzero(clipped)),
        num_values=value.size,
    )


def _sums_of_weight(value: np.ndarray, encoding: Encoding) -> Sums:
    return _sums(value, value, np.asarray(fake_quantize(value, concrete(encoding))), encoding)


def _squared(values: np.ndarray) -> float:
    """Returns the sum of squares: of a row in the values' precision, of the rows in float64."""
    rows = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))


def _is_clipped(value: np.ndarray, own: np.ndarray, encoding: Encoding) -> np.ndarray:
    if not encoding.enabled:
        return np.zeros(value.shape, bool)
    scale = along_axis(encoding.scale, encoding, value.shape)
    if encoding.float_format is not None:
        return np.abs(value) > encoding.qmax * scale
    return np.abs(own) > _BEYOND * scale


def _histogram(parts: Sequence[np.ndarray]) -> Histogram:
    found = histogram_of(np.concatenate(parts)[None].astype(np.float32))
    return Histogram(counts=found.counts[0], exponent=found.exponent[0])
