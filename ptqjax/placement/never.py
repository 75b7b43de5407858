"""Values that mean "never": found on their way from the constants that make them to the operators that pass them over.

Masks give what is not to count a value far below all others: -1e4, -1e9, float's lowest, -inf, whose exponential is
nothing. They come as constants, from constants that a mask chooses or is multiplied by, from Log of 0, or as an input
that is only added to what Softmax reads. As data they would swallow the range of all that is data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from ptqjax.ir import Constant, Graph, Model, Node, Origin, only_reader, origins_of, scalar_of, value_of
from ptqjax.placement.counting import Counting, Reach, WithoutNever
from ptqjax.placement.tensors import floating_tensors

_LARGE = 1e3  # a score that counts is smaller; masks begin at 1e4
_CHOSEN = 1e4  # a number of this size that a Where chooses is none of the data
_HUGE = 1e9  # no data are of this size, wherever they go
_LARGEST = float(np.finfo(np.float32).max)  # in place of inf, whose half is not below it
_LEAST = 100.0  # what a scale leaves of one that means never still does so
_HALF = 0.5  # a sum of one that means never and a score is beyond half of it

# Operators through which values pass, and the inputs that they pass from; () stands for all.
_MOVES = dict.fromkeys(
    (
        "Cast", "CastLike", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
        "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
    ),
    (0,),
)  # fmt: skip
_COMPUTES = {"Abs": (0,), "Neg": (0,), "Clip": (0,), "Div": (0,), "LogSoftmax": (0,), "Where": (1, 2)}
_COMPUTES |= dict.fromkeys(("Add", "Concat", "Max", "Min", "Mul", "Sub", "Sum", "ScatterElements", "ScatterND"), ())
_PASSES = _MOVES | _COMPUTES

_EXTREMA = frozenset({"GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMin"})
_FORGET = _EXTREMA | {
    "ArgMax", "ArgMin", "Exp", "HardSigmoid", "Hardmax", "LogSoftmax", "ReduceLogSumExp", "Sigmoid", "Softmax", "Tanh",
    "TopK",
}  # fmt: skip
_COMPARE = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor"})
_HEED = frozenset(_PASSES) | _FORGET | _COMPARE  # all others are layers, which no such value may reach
_FLAT_BEFORE = 13  # the opset from which Softmax is along one axis


@dataclass(frozen=True, kw_only=True, slots=True)
class Never:
    """Values that mean "never" among those of a tensor."""

    magnitude: float
    """The least that they have."""
    source: str
    """Where they come from, for people."""
    is_sure: bool = False
    """Whether they mean it wherever they go; else only on the way to what passes them over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nevers:
    """What values that mean "never" decide about tensors."""

    in_float: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are not rounded -> the reason: they carry such values, or are multiplied by them."""
    counted: Mapping[str, Counting] = field(default_factory=dict)
    """Tensors of which not all values count, where they have a grid of their own."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """What to say of those among `counted` in which such values are."""


def find_nevers(model: Model) -> Nevers:
    """Returns what is to be done about values that mean "never"; finds them on the graph and its constants alone."""
    graph = model.graph
    carried = _on_their_way(graph, _carried(model))
    in_float = {name: f"carries values that mean never ({never.source})" for name, never in carried.items()}
    counted: dict[str, Counting] = {}
    for name in dict.fromkeys((*carried, *_softmax_inputs(graph))):
        counting = None if name in graph.parameters else _counting(model, name, carried.get(name))
        if counting is not None:
            counted[name] = counting
            in_float.pop(name, None)
    reasons = {
        name: f"values that mean never ({carried[name].source}) do not count" for name in counted if name in carried
    }
    exact = dict.fromkeys(_choosing(model, carried), "chooses what means never, and has to be exact")
    asked = dict.fromkeys(_asked_for_nan(graph), "is asked for NaN, which no grid has")
    return Nevers(in_float={**exact, **in_float, **asked}, counted=counted, reasons=reasons)


@lru_cache(maxsize=64)
def mask_inputs(graph: Graph) -> frozenset[str]:
    """Returns the floating inputs that are only added to what Softmax reads, or chosen for it: masks.

    What they are added to is computed from data: a residual that happens to reach a Softmax has other readers as well.
    """
    floating = (spec.name for spec in graph.inputs if np.dtype(spec.dtype).kind == "f")
    reaching = _reaching_softmax(graph)
    origins = origins_of(graph)
    return frozenset(name for name in floating if name in reaching and _is_only_added(graph, name, origins))


# Where they come from


def _carried(model: Model) -> dict[str, Never]:
    """Returns the tensors that large constants reach, whether or not they mean never there."""
    graph = model.graph
    found: dict[str, Never] = {
        name: Never(magnitude=_LARGE, source=f"input '{name}' is a mask") for name in mask_inputs(graph)
    }
    for node in graph.nodes:
        positions = _passing(node)
        for position in positions:
            name = node.inputs[position] if position < len(node.inputs) else ""
            if name and name not in found and not _is_bound(model, node, position):
                found |= _of_constant(model, node, name)
        reads = [name for position, name in enumerate(node.inputs) if position in positions and name in found]
        nevers = [*_of_node(model, node).values(), *(_scaled(model, node, found[name]) for name in reads)]
        nevers = sorted((never for never in nevers if never.magnitude >= _LEAST), key=lambda never: never.magnitude)
        if nevers:
            found |= dict.fromkeys(filter(None, node.outputs), nevers[0])
    return found


def _passing(node: Node) -> range | tuple[int, ...]:
    """Returns the positions of the inputs whose values pass through the node."""
    if node.domain:
        return ()
    return _PASSES.get(node.op_type, (len(node.inputs),)) or range(len(node.inputs))


def _is_bound(model: Model, node: Node, position: int) -> bool:
    """Tells whether a constant only bounds values, so that none takes its value: the lowest, under a Max."""
    sign = {"Max": -1.0, "Min": 1.0}.get(node.op_type)
    number = scalar_of(model, node.inputs[position]) if sign is not None else None
    return number is not None and sign is not None and number * sign > 0


def _of_constant(model: Model, node: Node, name: str) -> dict[str, Never]:
    value = value_of(model, name)
    if value is None:
        return {}
    sure = _CHOSEN if node.op_type == "Where" and np.size(value) == 1 else _HUGE
    return _among(np.asarray(value), name, f"'{name}'", sure)


def _among(values: np.ndarray, tensor: str, source: str, sure: float = _HUGE) -> dict[str, Never]:
    """Returns what means never among constant values of a tensor, by that tensor; empty where nothing does."""
    if values.dtype.kind not in "fi" or values.dtype.itemsize < 2 or not values.size:  # noqa: PLR2004 - too narrow for it
        return {}
    lowest, highest = float(values.min()), float(values.max())
    farthest = lowest if -lowest > highest else highest
    if not abs(farthest) >= _LARGE:
        return {}
    magnitudes = np.abs(values.astype(np.float64))
    least = float(min(magnitudes[magnitudes >= _LARGE].min(), _LARGEST))
    return {tensor: Never(magnitude=least, source=f"{source} = {farthest:.6g}", is_sure=least >= sure)}


def _of_node(model: Model, node: Node) -> dict[str, Never]:
    """Returns what a node itself makes that means never, by its result; empty where it makes none."""
    if node.op_type == "ConstantOfShape" and isinstance(value := node.attribute("value"), Constant):
        return _among(value.value, node.output, "ConstantOfShape")
    if node.op_type == "Log":
        return {node.output: Never(magnitude=_LARGE, source="Log of 0")}
    if node.op_type == "Pad":
        name = node.inputs[2] if len(node.inputs) > 2 else ""  # noqa: PLR2004 - Pad's third input
        number = scalar_of(model, name) if name else node.attribute("value", 0.0)
        return _among(np.asarray(number or 0.0), node.output, "Pad")
    return {}


def _scaled(model: Model, node: Node, never: Never) -> Never:
    """Returns what is left of it where the node multiplies by a number, or divides by one."""
    if node.op_type == "LogSoftmax":  # what is masked stays so
        return replace(never, is_sure=True)
    if node.op_type not in ("Mul", "Div"):
        return never
    numbers = [number for name in node.inputs if (number := scalar_of(model, name)) is not None]
    number = abs(numbers[0]) if len(numbers) == 1 else 1.0
    if not number or number >= _LARGE:  # it is the one that means never
        return never
    factor = number if node.op_type == "Mul" else 1 / number
    return replace(never, magnitude=min(never.magnitude * factor, _LARGEST))


# Where they go


def _on_their_way(graph: Graph, carried: Mapping[str, Never]) -> dict[str, Never]:
    """Returns those of the tensors that reach what passes such values over, and all that are sure to have them."""
    wanted = {name for name, never in carried.items() if never.is_sure}
    for node in reversed(graph.nodes):
        if node.domain:
            continue
        if node.op_type in _FORGET and node.inputs[0] in carried:
            wanted.add(node.inputs[0])
        if not wanted.isdisjoint(node.outputs):
            positions = _passing(node)
            wanted.update(name for i, name in enumerate(node.inputs) if i in positions and name in carried)
    return {name: never for name, never in carried.items() if name in wanted}


def _reaching_softmax(graph: Graph) -> set[str]:
    """Returns the tensors whose values pass on to a Softmax."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op_type in ("Softmax", "LogSoftmax", "Exp") and not node.domain:
            found.add(node.inputs[0])
        if not found.isdisjoint(node.outputs):
            positions = _passing(node)
            found.update(name for i, name in enumerate(node.inputs) if i in positions)
    return found


def _readers(graph: Graph, name: str) -> tuple[Node, ...]:
    """Returns the nodes that read elements of a tensor, not its sizes alone."""
    return tuple(node for node in graph.readers.get(name, ()) if node.domain or node.op_type not in ("Shape", "Size"))


def _is_only_added(graph: Graph, name: str, origins: Mapping[str, Origin]) -> bool:
    """Tells whether a tensor, or what it is moved to, is read by nothing but sums with computed scores."""
    readers = _readers(graph, name)
    return (
        bool(readers) and name not in graph.output_names and all(_adds(graph, node, name, origins) for node in readers)
    )


def _adds(graph: Graph, node: Node, name: str, origins: Mapping[str, Origin]) -> bool:
    if node.domain or node.inputs.index(name) not in _passing(node):
        return False
    others = [other for other in node.inputs if other and other != name]
    is_scaled = node.op_type == "Mul" and all(origins[other] != Origin.DATA for other in others)
    if node.op_type in _MOVES or is_scaled:
        return _is_only_added(graph, node.output, origins)
    is_to_scores = any(origins[other] == Origin.DATA and other in graph.producers for other in others)
    return node.op_type in ("Add", "Sub", "Where", "Max", "Min") and is_to_scores


# What is done about them


def _softmax_inputs(graph: Graph) -> Iterator[str]:
    yield from (node.inputs[0] for node in graph.nodes if node.op_type in ("Softmax", "Exp") and not node.domain)
    yield from (node.inputs[0] for node in graph.nodes if node.op_type == "ReduceMax" and not node.domain)


def _counting(model: Model, name: str, never: Never | None) -> Counting | None:
    """Returns which values of a tensor count; None where all do, or where nothing but float holds it."""
    readers = _readers(model.graph, name)
    if not readers or name in model.graph.output_names:
        return None
    magnitude = float("inf") if never is None else never.magnitude * _HALF
    rows = {_row(model, node, name) for node in readers}
    if len(rows) == 1 and (row := next(iter(rows))) is not None:
        is_open = never is not None and _is_guarded(model.graph, readers)
        return None if is_open else Reach(axis=row[0], is_flat=row[1], never=magnitude)
    is_passed_over = all(node.op_type in _EXTREMA for node in readers)
    is_layers = any(node.domain or node.op_type not in _HEED for node in readers)
    return WithoutNever(never=magnitude) if never is not None and (is_passed_over or is_layers) else None


def _row(model: Model, node: Node, name: str) -> tuple[int, bool] | None:
    """Returns the axis of the Softmax that a node is, or is a part of; and whether those behind belong to the row."""
    graph = model.graph
    if node.op_type == "Softmax":
        is_flat = graph.opset() < _FLAT_BEFORE
        return int(node.attribute("axis", 1 if is_flat else -1)), is_flat
    if node.op_type == "Exp":  # of x - max x
        difference = graph.producers.get(name)
        return None if difference is None else _row_of_difference(model, difference)
    if node.op_type == "Sub":
        behind = only_reader(graph, node.output)
        return _row_of_difference(model, node) if behind is not None and behind.op_type == "Exp" else None
    if node.op_type == "ReduceMax":
        differences = {_row(model, reader, node.output) for reader in _readers(graph, node.output)}
        return differences.pop() if len(differences) == 1 else None
    return None


def _row_of_difference(model: Model, node: Node) -> tuple[int, bool] | None:
    """Returns the axis of x - max x, whose exponential is that of a Softmax in pieces."""
    largest = model.graph.producers.get(node.inputs[-1]) if node.op_type == "Sub" else None
    if largest is None or largest.op_type != "ReduceMax" or largest.inputs[0] != node.inputs[0]:
        return None
    given = largest.attribute("axes")
    if given is None and len(largest.inputs) > 1:
        given = value_of(model, largest.inputs[1])
    axes = () if given is None else np.ravel(given)
    return (int(axes[0]), False) if len(axes) == 1 else None


def _is_guarded(graph: Graph, readers: tuple[Node, ...]) -> bool:
    """Tells whether the result of one is asked for NaN, which a row gives of which nothing counts."""
    return any(reader.op_type == "IsNaN" for node in readers for reader in graph.readers.get(node.output, ()))


def _asked_for_nan(graph: Graph) -> Iterator[str]:
    """Yields the results of Softmax, whole or in pieces, that are asked for NaN."""
    for node in graph.nodes:
        producer = graph.producers.get(node.inputs[0]) if node.op_type == "IsNaN" and not node.domain else None
        if producer is not None and producer.op_type in ("Softmax", "Div"):
            yield node.inputs[0]


# What chooses them


def _choosing(model: Model, carried: Mapping[str, Never]) -> set[str]:
    """Returns masks that are multiplied by what means never, or choose it, and all that they are computed from.

    Of 1 - m, times -3.4e38, the smallest error of m makes a mask of what is none.
    """
    floating = frozenset(floating_tensors(model))
    found: set[str] = set()
    for node in model.graph.nodes:
        if node.output in carried and not node.domain and node.op_type in ("Mul", "Div", "Where"):
            masks = node.inputs[:1] if node.op_type == "Where" else node.inputs
            for name in masks:
                if name and name not in carried:
                    found |= _of_mask(model, name, floating, {}) or set()
    return found & floating


def _of_mask(model: Model, name: str, floating: frozenset[str], known: dict[str, set[str] | None]) -> set[str] | None:
    """Returns the tensors that a mask is computed from, with itself; None where it is no mask: a layer computes it."""
    if name not in known:
        node = model.graph.producers.get(name)
        is_simple = node is None or (not node.domain and (node.op_type in _PASSES or node.op_type in _COMPARE))
        if node is None or (not is_simple and name not in floating):
            known[name] = {name}
        else:
            reads = (each for each in node.inputs if each)
            parts = [_of_mask(model, each, floating, known) for each in reads] if is_simple else [None]
            known[name] = None if None in parts else {name}.union(*(part for part in parts if part is not None))
    return known[name]
