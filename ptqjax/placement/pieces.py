"""Functions that a graph spells in pieces: a normalization of ten nodes, a GELU of five, x * sigmoid(x).

They are told by what they read, not by their spelling: a run of elementwise operators and reductions through which one
tensor, over two ways at least, becomes one other. Pow(x, 2) or x * x, Sqrt and Div or Reciprocal or Pow(-0.5), casts in
between, the order of factors, whichever exporter: all are such runs. A fused operator would round nothing inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from ptqjax.ir import Graph, Model, Node, only_reader

_SUMS = frozenset(["Add", "Sub", "Relu", "Clip", "Max", "Min"])  # a run of these alone is a sum, not a function
_CURVES = (
    "Abs Celu Div Elu Erf Exp HardSigmoid LeakyRelu Log Mul Neg Pow Reciprocal Sigmoid Softplus Softsign Sqrt Tanh "
    "ThresholdedRelu"
)
_REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare"
_FORMS = "Cast CastLike Expand Reshape Squeeze Unsqueeze"  # of the same numbers
_PIECES = _SUMS.union(_CURVES.split(), _REDUCTIONS.split(), _FORMS.split())
_READ_SIZES = frozenset(["Shape", "Size"])
_ONE_IS_DATA = frozenset([*_FORMS.split(), *_REDUCTIONS.split()])  # further inputs tell a type, a shape or axes
_MOST_PIECES = 64
_NAMES = (  # operators that tell a function from the others -> its name, for people; the first that fits
    ({"Erf"}, "GELU"),
    ({"Tanh", "Softplus"}, "Mish"),
    ({"Tanh", "Log"}, "Mish"),
    ({"Tanh", "Mul"}, "GELU"),
    ({"Sigmoid", "Mul"}, "Swish"),
    ({"HardSigmoid", "Mul"}, "HardSwish"),
    ({"Exp", "ReduceSum"}, "Softmax"),
    ({"ReduceMean", "Sub"}, "normalization"),
    ({"ReduceMean"}, "normalization by the root mean square"),
    ({"ReduceSum"}, "normalization by the L2 norm"),
    ({"ReduceSumSquare"}, "normalization by the L2 norm"),
    ({"ReduceL2"}, "normalization by the L2 norm"),
    ({"Clip", "Mul"}, "HardSwish"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """A function that several nodes spell."""

    name: str
    """What it is, for people."""
    entry: str
    """The tensor that it is a function of."""
    nodes: tuple[Node, ...]
    """The nodes, in the graph's order; the last one produces the result."""

    @property
    def result(self) -> str:
        """The function's value."""
        return self.nodes[-1].output

    @property
    def inside(self) -> tuple[str, ...]:
        """The tensors between entry and result, which nothing else reads."""
        return tuple(node.output for node in self.nodes[:-1])


def find_pieces(model: Model) -> tuple[Pieces, ...]:
    """Returns the functions of one tensor that several nodes spell, in the graph's order; no node is in two.

    Such a function reaches from a tensor that more than one of its nodes read to the last node where the ways join
    again, and takes in the affine map and the casts behind it. Nothing else reads what is inside, and all other
    operands are parameters, constants, or follow from sizes. One that has sums and bounds alone is left out.
    """
    search = _Search(model)
    found: list[Pieces] = []
    used: set[str] = set()
    starts = [spec.name for spec in model.graph.inputs]
    starts += [name for node in model.graph.nodes for name in node.outputs]
    for entry in starts:
        if not entry or entry in used or len(search.graph.readers.get(entry, ())) < 2:  # noqa: PLR2004 - ways
            continue
        for each in search.from_entry(entry):
            if used.isdisjoint(node.output for node in each.nodes):
                found.append(each)
                used.update(each.inside)
    return tuple(found)


def _name(nodes: Iterable[Node]) -> str:
    operators = list(dict.fromkeys(node.op_type for node in nodes))
    return next((name for needed, name in _NAMES if needed <= set(operators)), "+".join(operators))


class _Search:
    """Looks for functions in one graph."""

    def __init__(self, model: Model) -> None:
        self.graph = model.graph
        self.fixed = _fixed(model)
        self.places = {id(node): place for place, node in enumerate(model.graph.nodes)}

    def from_entry(self, entry: str) -> Iterator[Pieces]:
        """Yields the functions that begin at `entry`, or at casts in front, the longest first; no node is in two."""
        cone, taken = self._cone(entry), set[str]()
        for last in reversed(cone):
            nodes = self._between(entry, last, cone)
            names = {node.output for node in nodes}
            if not self._joins(last) or not self._is_closed(nodes) or not _has_two_ways(entry, nodes) or names & taken:
                continue
            taken |= names
            casts = self._casts(entry, nodes)
            whole = (*casts, *nodes, *self._affine_behind(last))
            if not {node.op_type for node in whole} <= _SUMS:
                yield Pieces(name=_name(whole), entry=casts[0].inputs[0] if casts else entry, nodes=whole)

    def _cone(self, entry: str) -> list[Node]:
        """Returns the pieces that depend on `entry` alone, in the graph's order, no more than there may be."""
        reached, cone = {entry}, []
        waiting = self._readers(entry)
        while waiting and len(cone) < _MOST_PIECES:
            node = self.graph.nodes[heappop(waiting)]
            is_new = node.output not in reached and node.output not in self.fixed
            if is_new and self._is_piece(node) and self._is_made_of(node, reached):
                reached.add(node.output)
                cone.append(node)
                for place in self._readers(node.output):
                    heappush(waiting, place)
        return cone

    def _readers(self, tensor: str) -> list[int]:
        """Returns the places of the nodes that read a tensor, sorted: a heap."""
        return sorted({self.places[id(node)] for node in self.graph.readers.get(tensor, ())})

    def _is_made_of(self, node: Node, reached: set[str]) -> bool:
        return all(name in reached or name in self.fixed for name in node.inputs)

    def _is_piece(self, node: Node) -> bool:
        is_known = node.op_type in _PIECES and not node.domain and len(node.outputs) == 1
        return is_known and (node.op_type not in _ONE_IS_DATA or self.fixed.issuperset(node.inputs[1:]))

    def _between(self, entry: str, last: Node, cone: list[Node]) -> tuple[Node, ...]:
        """Returns the nodes of the cone that lie on a way from `entry` to `last`."""
        wanted = {last.output}
        for node in reversed(cone):
            if node.output in wanted:
                wanted.update(name for name in node.inputs if name != entry)
        return tuple(node for node in cone if node.output in wanted)

    def _joins(self, node: Node) -> bool:
        return len({name for name in node.inputs if name not in self.fixed}) > 1

    def _is_closed(self, nodes: tuple[Node, ...]) -> bool:
        """Tells whether nothing outside reads what is inside, but for its size or type."""
        own = {id(node) for node in nodes}
        return all(self._is_read_within(node.output, own) for node in nodes[:-1])

    def _is_read_within(self, tensor: str, own: set[int]) -> bool:
        readers = (node for node in self.graph.readers.get(tensor, ()) if _reads_values(node, tensor))
        return tensor not in self.graph.output_names and all(id(node) in own for node in readers)

    def _casts(self, entry: str, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
        """Returns the casts in front, where the function alone reads what they write."""
        cast, own = self.graph.producers.get(entry), {id(node) for node in nodes}
        if cast is None or cast.op_type != "Cast" or not self._is_read_within(entry, own):
            return ()
        return (*self._casts(cast.inputs[0], (cast,)), cast)

    def _affine_behind(self, last: Node) -> Iterator[Node]:
        """Yields the product and the sum with fixed operands that follow, once each, and casts."""
        steps = [("Mul", "Div"), ("Add", "Sub")]
        while (node := only_reader(self.graph, last.output)) is not None and not node.domain:
            step = next((i for i, operators in enumerate(steps) if node.op_type in operators), None)
            is_affine = step is not None and all(name in self.fixed for name in node.inputs if name != last.output)
            if not is_affine and node.op_type != "Cast":
                return
            steps = steps if step is None else steps[step + 1 :]
            yield node
            last = node


def _fixed(model: Model) -> set[str]:
    """Returns the tensors that no input's values decide: parameters, constants, and what follows from sizes."""
    graph: Graph = model.graph
    fixed = {"", *graph.parameters, *graph.constant_values}
    for node in graph.nodes:
        read = [name for name in node.inputs if _reads_values(node, name)]
        if not node.subgraphs and fixed.issuperset(read) and (read or node.op_type in _READ_SIZES):
            fixed.update(node.outputs)
    return fixed


def _reads_values(node: Node, tensor: str) -> bool:
    """Tells whether a node reads more of a tensor than its size or its type."""
    reads_type = node.op_type == "CastLike" and tensor != node.inputs[0]
    return node.op_type not in _READ_SIZES and not reads_type


def _has_two_ways(entry: str, nodes: tuple[Node, ...]) -> bool:
    return sum(entry in node.inputs for node in nodes) > 1
