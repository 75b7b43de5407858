"""A graph in stretches, each from one tensor that matters to the next: programs small enough to be compiled for each.

What runs layer by layer must not compile the network for each layer. A stretch has names of its own, so that equal
ones are one program; values cross in the layout that they have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ptqjax.ir import Graph, Node, Origin, captured, origins_of
from ptqjax.lowering.partition import unspecified


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Some nodes of a graph, under names by position."""

    graph: Graph
    """The nodes; its inputs are what crosses into it, its outputs what is read behind it."""
    names: Mapping[str, str]
    """The name here of each tensor of the whole graph that it reads or writes."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads of earlier stretches and of the graph's inputs, by the whole graph's names."""
        return self._whole(self.graph.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What later stretches read, by the whole graph's names."""
        return self._whole(self.graph.outputs)

    @property
    def written(self) -> tuple[str, ...]:
        """What its nodes compute, by the whole graph's names, in their order."""
        back = {here: name for name, here in self.names.items()}
        return tuple(back[name] for node in self.graph.nodes for name in node.outputs if name)

    def _whole(self, specs: Sequence[object]) -> tuple[str, ...]:
        back = {here: name for name, here in self.names.items()}
        return tuple(back[spec.name] for spec in specs)  # pyright: ignore[reportAttributeAccessIssue]


def stretches(graph: Graph, starts: Collection[str], crossing: Collection[str]) -> tuple[Stretch, ...]:
    """Returns the graph in stretches, a new one at each node that writes one of `starts`; the first may be empty.

    Args:
        graph: The whole graph.
        starts: Tensors whose nodes begin a stretch.
        crossing: Tensors that may cross from one to another: floating ones, computed from data. Others, such as
            shapes, are computed again where they are read.
    """
    runs = list(_runs(graph, frozenset(starts)))
    own = {name for run in runs for node in run for name in node.outputs}
    data = {name for name, origin in origins_of(graph).items() if origin == Origin.DATA}
    across = (frozenset(crossing) & own & data) | {spec.name for spec in graph.inputs}
    full = [_with_producers(graph, run, across) for run in runs]
    read = [_read_from_outside(graph, run) for run in full]
    found = []
    for index, (run, inputs) in enumerate(zip(full, read, strict=True)):
        written = [name for node in runs[index] for name in node.outputs if name in across]
        later = {name for names in read[index + 1 :] for name in names} | graph.output_names
        found.append(_stretch(graph, run, inputs, [name for name in written if name in later]))
    return tuple(found)


def _runs(graph: Graph, starts: frozenset[str]) -> Iterator[tuple[Node, ...]]:
    run: list[Node] = []
    for node in graph.nodes:
        if starts.intersection(node.outputs):
            yield tuple(run)
            run = []
        run.append(node)
    yield tuple(run)


def _with_producers(graph: Graph, run: tuple[Node, ...], across: Collection[str]) -> tuple[Node, ...]:
    """Returns the nodes with those before them that compute what cannot cross."""
    wanted = {node.output for node in run}
    todo = list(run)
    while todo:
        node = todo.pop()
        for name in (*node.inputs, *captured(node)):
            producer = graph.producers.get(name)
            if producer is not None and name not in across and producer.output not in wanted:
                wanted.add(producer.output)
                todo.append(producer)
    return tuple(node for node in graph.nodes if node.output in wanted)


def _read_from_outside(graph: Graph, run: tuple[Node, ...]) -> list[str]:
    written = {name for node in run for name in node.outputs}
    known = written | set(graph.parameters) | set(graph.constant_values)
    read = (name for node in run for name in (*node.inputs, *captured(node)) if name)
    return list(dict.fromkeys(name for name in read if name not in known))


def _stretch(graph: Graph, run: tuple[Node, ...], inputs: Sequence[str], outputs: Sequence[str]) -> Stretch:
    read = [name for node in run for name in (*node.inputs, *captured(node)) if name]
    tensors = dict.fromkeys([*inputs, *read, *(name for node in run for name in node.outputs if name)])
    renamed = not any(node.subgraphs for node in run)  # what a subgraph captures keeps its name
    names = {name: f"t{index}" if renamed else name for index, name in enumerate(tensors)}
    names[""] = ""
    nodes = tuple(
        replace(
            node,
            name="",
            inputs=tuple(names[name] for name in node.inputs),
            outputs=tuple(names[name] for name in node.outputs),
        )
        for node in run
    )
    constants = sorted((names[name], constant) for name, constant in graph.constants if name in tensors)
    part = Graph(
        name="stretch",
        inputs=tuple(unspecified(names[name]) for name in inputs),
        outputs=tuple(unspecified(names[name]) for name in outputs),
        nodes=nodes,
        constants=tuple(constants),
        parameters=tuple(sorted(names[name] for name in graph.parameters if name in tensors)),
        opsets=graph.opsets,
    )
    return Stretch(graph=part, names=names)
