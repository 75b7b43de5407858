"""Calls of functions replaced by the functions' bodies, where an operator has no meaning of its own here.

A function comes from the model, or from ONNX itself, whose schemas define many operators by others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import onnx
import onnx.inliner

from ptqjax.errors import ModelError
from ptqjax.onnx_io.graphs import domain_of, opsets_of
from ptqjax.onnx_io.limits import as_text, check_size, nodes_within
from ptqjax.onnx_io.schema import schema

HasLowering: TypeAlias = Callable[[str, str, int], bool]
"""Tells whether an operator (its name, domain and opset version) has a meaning of its own."""

_Key: TypeAlias = tuple[str, str, str]  # domain, name, overload

_MAX_CALLS_DEEP = 64  # functions that call functions
_MAX_BYTES = 2**28  # of all nodes, those of functions counted wherever they are called
_MAX_ROUNDS = 8  # ONNX's bodies hold operators that have bodies


@dataclass(frozen=True, slots=True)
class _Cost:
    """What inlining a call would add."""

    nodes: int
    size: int  # bytes


def without_own_functions(proto: onnx.ModelProto, has_lowering: HasLowering) -> onnx.ModelProto:
    """Returns the model with the calls of its functions inlined, save those that have a lowering; `proto` stays.

    Raises:
        ModelError: A function calls itself, functions call functions too deeply or would expand to too many nodes, or
            a function is written for an operator set in which its operators mean something else than in the model's.
    """
    if not proto.functions:
        return proto
    opsets = opsets_of(proto.opset_import)
    functions = {_key(function): function for function in proto.functions}
    costs: dict[_Key, _Cost] = {}
    total = _cost(proto.graph.node, functions, costs, ())
    check_size(total.nodes)
    if total.size > _MAX_BYTES + proto.ByteSize():
        raise ModelError(f"inlining its functions would take {total.size} bytes; export it without functions")
    kept = {key for key in costs if has_lowering(key[1], key[0], opsets.get(key[0], 1))}
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    del model.functions[:]
    for key in costs:
        for entry in functions[key].opset_import:
            if domain_of(entry.domain) not in opsets:
                opsets[domain_of(entry.domain)] = entry.version
                model.opset_import.add(domain=entry.domain, version=entry.version)
        model.functions.append(_in_opsets(functions[key], opsets))
    names = [(key[0], key[1]) for key in kept]
    inlined = _inlined(lambda: onnx.inliner.inline_selected_functions(model, names, exclude=True))
    del inlined.functions[:]
    return inlined


def without_schema_functions(proto: onnx.ModelProto, has_lowering: HasLowering) -> onnx.ModelProto:
    """Returns the model with operators that have no lowering replaced by what ONNX's schemas define them by.

    Operators stay where the types that a body depends on cannot be inferred. `proto` stays.

    Raises:
        ModelError: The model would become too large.
    """
    opsets = opsets_of(proto.opset_import)
    for _ in range(_MAX_ROUNDS):
        used = {(domain_of(node.domain), as_text(node.op_type)) for node in nodes_within(proto.graph.node)}
        wanted = [key for key in sorted(used) if _is_to_inline(*key, opsets, has_lowering)]
        if not wanted:
            return proto
        before = proto
        inline = partial(onnx.inliner.inline_selected_functions, before, wanted, inline_schema_functions=True)
        try:
            proto = _inlined(inline)
        except ModelError:
            return proto
        check_size(sum(1 for _ in nodes_within(proto.graph.node)))
        if len(proto.graph.node) == len(before.graph.node):
            return proto
    return proto


def _is_to_inline(domain: str, op_type: str, opsets: Mapping[str, int], has_lowering: HasLowering) -> bool:
    version = opsets.get(domain, 1)
    found = schema(op_type, version, domain)
    bodies: Any = found  # its type's description leaves these properties out
    if found is None or not (bodies.has_function or bodies.has_context_dependent_function):
        return False
    return not has_lowering(op_type, domain, version)


def _inlined(inline: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
    try:
        return inline()
    except Exception as error:
        raise ModelError(f"its functions cannot be inlined: {error}; export it without functions") from error


def _key(function: onnx.FunctionProto) -> _Key:
    return domain_of(function.domain), function.name, function.overload


def _cost(
    nodes: Sequence[onnx.NodeProto],
    functions: Mapping[_Key, onnx.FunctionProto],
    costs: dict[_Key, _Cost],
    path: tuple[_Key, ...],
) -> _Cost:
    """Returns the size of all nodes with functions inlined; adds those of the functions that are called to `costs`."""
    num_nodes = size = 0
    for node in nodes_within(nodes):
        key = (domain_of(node.domain), as_text(node.op_type), node.overload)
        num_nodes += 1
        size += node.ByteSize()
        if key not in functions:
            continue
        if key in path or len(path) >= _MAX_CALLS_DEEP:
            what = "calls itself" if key in path else f"is called through {len(path)} others"
            raise ModelError(
                f"function '{key[1]}' of domain '{key[0]}' {what}; functions are inlined, so they must end"
            )
        if key not in costs:
            costs[key] = _cost(functions[key].node, functions, costs, (*path, key))
        num_nodes += costs[key].nodes
        size += costs[key].size
    return _Cost(num_nodes, size)


def _in_opsets(function: onnx.FunctionProto, opsets: Mapping[str, int]) -> onnx.FunctionProto:
    """Returns the function written for the model's operator sets, if its operators mean the same in these.

    Raises:
        ModelError: One of them does not.
    """
    own = opsets_of(function.opset_import)
    for node in nodes_within(function.node):
        domain = domain_of(node.domain)
        old, new = own.get(domain, opsets.get(domain, 1)), opsets.get(domain, 1)
        before, after = schema(node.op_type, old, domain), schema(node.op_type, new, domain)
        if old != new and before and (after is None or before.since_version != after.since_version):
            raise ModelError(
                f"function '{function.name}' of domain '{function.domain}' is written for operator set {old}, in which "
                f"{node.op_type} means something else than in the model's {new}; export the model without functions"
            )
    changed = onnx.FunctionProto()
    changed.CopyFrom(function)
    del changed.opset_import[:]
    for domain in own:
        changed.opset_import.add(domain=domain, version=opsets[domain])
    return changed
