"""From a graph in protobuf to a `Graph`: every tensor a constant of it, every name written once within its scopes.

A subgraph sees the tensors of the graphs around it. Where it gives one of its own the name of one of theirs, its own is
renamed, so that a name means one tensor wherever it is visible.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from ptqjax.errors import ModelError
from ptqjax.ir import Attribute, Constant, Graph, Node, SparseConstant, TensorSpec
from ptqjax.onnx_io.limits import as_text
from ptqjax.onnx_io.schema import arity, default_attributes
from ptqjax.onnx_io.specs import spec_of, spec_of_type
from ptqjax.onnx_io.tensors import Storage, array_of, dense

_STANDARD_DOMAIN = "ai.onnx"  # another spelling of "", ONNX's own domain

_NO_VERSION = 2**31
_CONSTANT_TYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": np.object_,
    "value_strings": np.object_,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a graph of a file is read with."""

    opsets: Mapping[str, int]
    """Version of each operator set, by domain."""
    storage: Storage
    """Where tensors lie."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scope:
    """The names that are visible in a graph."""

    names: ChainMap[str, str] = field(default_factory=lambda: ChainMap({}))
    """From the names in the file to those in the `Graph`, innermost graph first."""
    taken: ChainMap[str, str] = field(default_factory=lambda: ChainMap({}))
    """The names in the `Graph`s."""
    depth: int = 0
    """The number of graphs entered; 0 outside of the model's own."""

    def read(self, name: str) -> str:
        """Returns what `name` is called in the `Graph`; itself where nothing produces it."""
        found = self.names.maps[0].get(name)  # mostly there; a ChainMap is slow to ask
        return found if found is not None else self.names.get(name, name)

    def entered(self, defined: Iterable[str]) -> _Scope:
        """Returns the scope of a graph in this one that defines these names."""
        own = dict.fromkeys(defined)
        names: dict[str, str] = {}
        for name in own:
            fresh, number = name, 0
            while fresh in self.taken or (number and fresh in own):
                number = 2 * number + 1  # doubled, so that a file cannot hold many names in a row that are taken
                fresh = f"{name}_{number}"
            names[name] = fresh
        return _Scope(
            names=self.names.new_child(names),
            taken=self.taken.new_child({name: name for name in names.values()}),
            depth=self.depth + 1,
        )


def opsets_of(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Returns the version of each operator set by domain, "" for ONNX's own.

    Raises:
        ModelError: A domain is named with two versions, or with what is none.
    """
    opsets: dict[str, int] = {}
    for entry in imports:
        domain = domain_of(entry.domain)
        if not 0 <= entry.version < _NO_VERSION:
            raise ModelError(f"it names version {entry.version} of operator set '{domain}'; the file is damaged")
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise ModelError(f"it names operator set '{domain or _STANDARD_DOMAIN}' with two versions; export it again")
    return opsets


def domain_of(domain: Any) -> str:
    """Returns the domain, "" for ONNX's own however it is spelled."""
    return "" if domain == _STANDARD_DOMAIN else as_text(domain)


def graph_of(proto: onnx.GraphProto, source: Source) -> Graph:
    """Returns the graph of a model with all its tensors as constants; nodes keep their order.

    Initializers that are graph inputs as well are no inputs. Constant nodes are constants, here and in subgraphs.

    Raises:
        ModelError: A tensor, type or node is damaged; the message names it.
    """
    return _graph(proto, source, _Scope())


def _graph(proto: onnx.GraphProto, source: Source, outer: _Scope) -> Graph:
    names = outer.entered(map(as_text, _defined(proto)))
    tensors = dict(_tensors(proto, source, names))
    inputs = [info for info in proto.input if outer.depth or names.read(info.name) not in tensors]
    fed = {names.read(info.name) for info in inputs}
    nodes = [node for node in proto.node if not _is_constant(node) and any(node.output)]
    return Graph(
        name=as_text(proto.name),
        inputs=tuple(_renamed(spec_of(info), names) for info in inputs),
        outputs=tuple(_renamed(spec_of(info), names) for info in proto.output),
        nodes=tuple(_node(node, source, names) for node in nodes),
        constants=tuple(sorted((name, Constant(value)) for name, value in tensors.items() if name not in fed)),
        opsets=tuple(sorted(source.opsets.items())),
    )


def _defined(proto: onnx.GraphProto) -> Iterator[str]:
    for info in proto.input:
        yield info.name
    for tensor in proto.initializer:
        yield tensor.name
    for sparse in proto.sparse_initializer:
        yield sparse.values.name
    for node in proto.node:
        yield from filter(None, node.output)


def _tensors(proto: onnx.GraphProto, source: Source, names: _Scope) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the initializers and the values of the Constant nodes.

    Raises:
        ModelError: Two of them have one name.
    """
    initializers = [tensor.name for tensor in proto.initializer]
    sparse = [tensor.values.name for tensor in proto.sparse_initializer]
    constants = [node.output[0] for node in proto.node if _is_constant(node) and any(node.output)]
    counts = Counter((*initializers, *sparse, *constants))
    name, count = next(iter(counts.most_common(1)), ("", 0))
    if count > 1:
        raise ModelError(f"tensor '{name}' is produced {count} times; every tensor must have one producer")
    if "" in counts:
        raise ModelError("an initializer has no name; the file is damaged")
    for tensor in proto.initializer:
        yield names.read(tensor.name), array_of(tensor, source.storage)
    for tensor in proto.sparse_initializer:
        yield names.read(tensor.values.name), dense(tensor, source.storage)
    for node in proto.node:
        if _is_constant(node) and any(node.output):
            yield names.read(node.output[0]), _constant_value(node, source)


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and not domain_of(node.domain)


def _constant_value(node: onnx.NodeProto, source: Source) -> np.ndarray:
    """Returns the tensor of a Constant node, whichever of its attributes holds it."""
    if len(node.attribute) == 1 and len(node.output) == 1:
        attribute = node.attribute[0]
        if attribute.name == "value" and attribute.type == onnx.AttributeProto.TENSOR:
            return array_of(attribute.t, source.storage)
        if attribute.name == "sparse_value" and attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            return dense(attribute.sparse_tensor, source.storage)
        if attribute.name in _CONSTANT_TYPES:
            value = _attribute(attribute, source, _Scope())
            return _frozen(_plain(value, _CONSTANT_TYPES[attribute.name], node))
    raise ModelError(f"the Constant node that produces '{node.output[0]}' holds no value; the file is damaged")


def _plain(value: Any, dtype: Any, node: onnx.NodeProto) -> np.ndarray:
    try:
        return np.array(value, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"the Constant node that produces '{node.output[0]}' is damaged: {error}") from error


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _renamed(spec: TensorSpec, names: _Scope) -> TensorSpec:
    return replace(spec, name=names.read(spec.name))


def _node(proto: onnx.NodeProto, source: Source, names: _Scope) -> Node:
    op_type, domain = as_text(proto.op_type), domain_of(proto.domain)
    given = {as_text(attribute.name): attribute for attribute in proto.attribute}
    place = f"{op_type} (producing '{next(filter(None, proto.output))}')"
    if len(given) != len(proto.attribute):
        raise ModelError(f"{place} has an attribute twice; the file is damaged")
    if not domain and "" not in source.opsets:
        raise ModelError(f"{place} is of ONNX's own operator set, whose version the file does not name")
    _check_arity(proto, source.opsets.get(domain, 1), domain, place)
    defaults = {value.name: value for value in default_attributes(op_type, source.opsets.get(domain, 1), domain)}
    try:
        attributes = tuple(
            (name, _attribute(value, source, names)) for name, value in sorted((defaults | given).items())
        )
    except ModelError as error:
        raise ModelError(f"{place}: {error}") from error
    return Node(
        op_type=op_type,
        inputs=tuple(names.read(as_text(name)) for name in proto.input),
        outputs=tuple(map(names.read, proto.output)),
        attributes=attributes,
        domain=domain,
        name=as_text(proto.name),
    )


def _check_arity(proto: onnx.NodeProto, opset: int, domain: str, place: str) -> None:
    counts = arity(proto.op_type, opset, domain)
    if counts is None:
        return
    num_inputs = len(proto.input)
    while num_inputs and not proto.input[num_inputs - 1]:
        num_inputs -= 1
    if num_inputs > counts.max_inputs or len(proto.input) < counts.min_inputs:
        expected = f"{counts.min_inputs} to {counts.max_inputs}"
        raise ModelError(f"{place} has {num_inputs} inputs; expected {expected} in operator set {opset}")
    if len(proto.output) > counts.max_outputs:
        raise ModelError(f"{place} has {len(proto.output)} outputs; expected at most {counts.max_outputs}")


def _attribute(proto: onnx.AttributeProto, source: Source, names: _Scope) -> Attribute:
    """Returns the value of an attribute.

    Raises:
        ModelError: It has none, or one that is damaged.
    """
    convert = _CONVERSIONS.get(proto.type)
    if convert is None or proto.ref_attr_name:
        kind = "a reference" if proto.ref_attr_name else f"of kind {proto.type}"
        raise ModelError(f"attribute '{proto.name}' is {kind}, which has no value here; the file is damaged")
    return convert(proto, source, names)


def _tensor(proto: onnx.TensorProto, source: Source) -> Constant:
    return Constant(array_of(proto, source.storage))


def _sparse(proto: onnx.SparseTensorProto, source: Source) -> SparseConstant:
    values, indices = _tensor(proto.values, source), _tensor(proto.indices, source)
    return SparseConstant(values=values, indices=indices, shape=tuple(proto.dims))


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="surrogateescape")


_KINDS = onnx.AttributeProto
_CONVERSIONS: dict[int, Callable[[onnx.AttributeProto, Source, _Scope], Attribute]] = {
    _KINDS.INT: lambda proto, *_: proto.i,
    _KINDS.FLOAT: lambda proto, *_: proto.f,
    _KINDS.STRING: lambda proto, *_: _text(proto.s),
    _KINDS.INTS: lambda proto, *_: tuple(proto.ints),
    _KINDS.FLOATS: lambda proto, *_: tuple(proto.floats),
    _KINDS.STRINGS: lambda proto, *_: tuple(map(_text, proto.strings)),
    _KINDS.TENSOR: lambda proto, source, _: _tensor(proto.t, source),
    _KINDS.TENSORS: lambda proto, source, _: tuple(_tensor(tensor, source) for tensor in proto.tensors),
    _KINDS.SPARSE_TENSOR: lambda proto, source, _: _sparse(proto.sparse_tensor, source),
    _KINDS.SPARSE_TENSORS: lambda proto, source, _: tuple(_sparse(each, source) for each in proto.sparse_tensors),
    _KINDS.GRAPH: lambda proto, source, names: _graph(proto.g, source, names),
    _KINDS.GRAPHS: lambda proto, source, names: tuple(_graph(graph, source, names) for graph in proto.graphs),
    _KINDS.TYPE_PROTO: lambda proto, *_: spec_of_type(proto.tp),
    _KINDS.TYPE_PROTOS: lambda proto, *_: tuple(spec_of_type(kind) for kind in proto.type_protos),
}
