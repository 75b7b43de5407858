"""The names that users have, of tensors and of nodes: what a pattern matches, what is said where it matches none."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from ptqjax.config import near_names
from ptqjax.ir import Graph, Node

_MOST = 3  # names that a message gives
_WORDS = re.compile(r"[^A-Za-z0-9]+")
_NOTES = {
    "tensors": "; `ptqjax inspect MODEL.onnx` lists all",
    "nodes": "; nodes of batch norms are folded into the layers before them, which are to be named instead",
}
_WILD = re.compile(r"^re:|\.?[*?+]|\[[^\]]*\]")  # of globs and of expressions


def matches_name(pattern: str, name: str) -> bool:
    """Tells whether a pattern of a rule or of `exclude` matches a name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def node_name(node: Node) -> str:
    """Returns what patterns of nodes match: the node's own name, or where it has none the tensor that it produces."""
    return node.name or node.output


def nodes_named(graph: Graph, patterns: Iterable[str]) -> tuple[Node, ...]:
    """Returns the nodes whose name one of the patterns matches, in the graph's order."""
    patterns = tuple(patterns)
    return tuple(node for node in graph.nodes if any(matches_name(pattern, node_name(node)) for pattern in patterns))


def tensors_around(nodes: Iterable[Node], moved: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """Returns what some nodes read and write: parameters, inputs and results.

    An input that was moved there (by a Reshape, say) counts with the tensor that it was moved from: rounded there, it
    is rounded here.

    Args:
        nodes: The nodes.
        moved: The tensors whose values are moved elsewhere -> all tensors that hold them then.
    """
    nodes = tuple(nodes)
    read = {name for node in nodes for name in node.inputs if name}
    sources = {source for source, results in moved.items() if not read.isdisjoint(results)}
    return frozenset(read | sources | {name for node in nodes for name in node.outputs if name})


def without_match(pattern: str, names: Sequence[str], graph: Graph, *, of: str) -> str:
    """Returns what is said of a pattern that matches nothing: what it may have meant, and how to say that.

    Args:
        pattern: The pattern.
        names: The names that it was held against.
        graph: The graph that they are from.
        of: What they are names of: "tensors" or "nodes".
    """
    other = _among_nodes(graph, pattern) if of == "tensors" else _among_tensors(graph, pattern)
    return f"the pattern {pattern!r} matches none of {len(names)} {of}{other or _near(pattern, names, of)}"


def _among_nodes(graph: Graph, pattern: str) -> str:
    """Returns which nodes a pattern for tensors matches, what they produce, and how to mean them; "" for none."""
    nodes = nodes_named(graph, [pattern])
    made = ", ".join(f"{node_name(node)!r} produces {node.output!r}" for node in nodes[:_MOST])
    more = f", and {len(nodes) - _MOST} more" if len(nodes) > _MOST else ""
    how = "write --exclude-node, or nodes = ... in a rule, to mean layers with their weights, inputs and results"
    return f"; it matches nodes: {made}{more}; name these tensors, or {how}" if nodes else ""


def _among_tensors(graph: Graph, pattern: str) -> str:
    """Returns which nodes produce, or read, the tensors that a pattern for nodes matches; "" for none."""
    tensors = [name for name in (*graph.producers, *graph.readers) if matches_name(pattern, name)]
    around = {
        name: [graph.producers[name]] if name in graph.producers else graph.readers.get(name, ()) for name in tensors
    }
    said = [f"{name!r} is of {', '.join(repr(node_name(node)) for node in nodes)}" for name, nodes in around.items()]
    return f"; it matches tensors: {', '.join(said[:_MOST])}; name these nodes, or the tensor itself" if said else ""


def _near(pattern: str, names: Sequence[str], of: str) -> str:
    """Returns names like a pattern's text; where there are none, names that hold a part of it, or the first ones."""
    near = near_names(pattern, names) or near_names(_WILD.sub("", pattern), names)
    if near or not names:
        return near
    longest = max(_WORDS.split(pattern), key=len).lower()
    holding = [name for name in names if len(longest) > 1 and longest in name.lower()]
    if holding:
        return f"; near names: {', '.join(holding[:_MOST])}"
    return f"; the first are {', '.join(names[:_MOST])}{_NOTES[of]}"
