"""Weights alone in integers, as ONNX Runtime multiplies by them: MatMulNBits, and GatherBlockQuantized for tables.

Both hold integers of 2, 4 or 8 bits packed in bytes, a row for each output, with a scale and a zero point for each
block of a row. Zero points are always written: without them the two operators mean different ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ptqjax.config.constraints import KERNEL_BLOCKS
from ptqjax.ir import Constant, Model, Node, Record, Report, fresh_name, rebuild
from ptqjax.qdq.stored_grids import MICROSOFT, OWN

IN_FLOAT, IN_INT8 = 1, 4
"""Accuracy levels: activations as they are, or rounded to int8 in blocks of the weight's size."""
_WIDTHS = (2, 4, 8)
_MATRIX = 2  # axes
_SPARED = 1.125  # times a row's length that its blocks may hold
_READERS = ("Gather", "Gemm", "MatMul")
_TYPES = ("int2", "uint2", "int4", "uint4", "int8", "uint8")
_BIAS = 2  # the input


class _Rows(NamedTuple):
    """A weight as rows of blocks."""

    codes: np.ndarray
    """Unsigned integers, [rows, values]."""
    scales: np.ndarray
    """[rows, blocks], float32."""
    zero_points: np.ndarray
    """[rows, blocks], unsigned integers."""
    bits: int
    """Bits of each."""
    block_size: int
    """Values that share a scale."""

    def packed(self) -> dict[str, np.ndarray]:
        """Returns codes, scales and zero points as the operators hold them: codes [rows, blocks, bytes]."""
        num_blocks = self.scales.shape[1]
        padding = num_blocks * self.block_size - self.codes.shape[1]
        codes = np.pad(self.codes, ((0, 0), (0, padding))).reshape(len(self.codes), num_blocks, -1)
        zeros = np.pad(self.zero_points, ((0, 0), (0, -num_blocks % (8 // self.bits))))
        return {
            "packed": _packed(codes, self.bits),
            "scales": self.scales,
            "zero_points": _packed(zeros, self.bits),
        }


@dataclass(kw_only=True)
class _Made:
    """What takes the place of operators on dequantized weights."""

    params: dict[str, Any]
    constants: dict[str, Constant]
    nodes: dict[int, list[Node]] = field(default_factory=dict)
    """By the node that they replace."""
    tables: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """The weights so far, by name: what holds their codes, scales and zero points."""


def with_matmul_nbits(model: Model) -> tuple[Model, Report]:
    """Returns the QDQ `model` with ONNX Runtime's operators for weights that floats are multiplied by, and a report.

    MatMul and Gemm become MatMulNBits, at the accuracy level 4 where what they read is rounded in blocks, else at 1;
    Gather of rows becomes GatherBlockQuantized. A weight with the numbers of a table shares its parameters. Left as
    they are: products of quantized activations, weights of other types than 2 to 8 bits, of other ranks than 2 or sizes
    of blocks than `KERNEL_BLOCKS`, and tables whose rows are quantized again. Arrays must be concrete. One record for
    each operator that reads a dequantized matrix.
    """
    made, report = _Made(params=dict(model.params), constants=dict(model.graph.constants)), []
    nodes = [node for node in model.graph.nodes if node.op_type in _READERS and not node.domain]
    for node in sorted(nodes, key=lambda each: each.op_type != "Gather"):  # tables come first: weights are told by them
        dequantizer = model.graph.producers.get(node.inputs[0 if node.op_type == "Gather" else 1])
        if dequantizer is None or dequantizer.op_type != "DequantizeLinear":
            continue
        reason = _objection(model, node, dequantizer)
        if not reason:
            rows = _rows_of(model, node, dequantizer)
            made.nodes[id(node)] = _nodes(model, node, rows, made)
        report.append(_record(node, reason))
    kept = [new for node in model.graph.nodes for new in made.nodes.get(id(node), [node])]
    changed = rebuild(model, nodes=kept, params=made.params, constants=made.constants) if made.nodes else model
    return _with_opset(changed), tuple(report)


def _objection(model: Model, node: Node, dequantizer: Node) -> str:
    """Returns why an operator on a dequantized matrix stays what it is, or nothing."""
    if not all(name in model.params for name in dequantizer.inputs) or len(dequantizer.inputs) <= _BIAS:
        return "its integers are computed"
    codes = model.params[dequantizer.inputs[0]]
    if np.ndim(codes) != _MATRIX or np.dtype(codes.dtype).name not in _TYPES:
        return f"its integers have the type {codes.dtype} and {np.ndim(codes)} axes; expected 2 to 8 bits, and 2 axes"
    is_table = node.op_type == "Gather"
    return (_objection_to_table if is_table else _objection_to_product)(model, node, dequantizer)


def _objection_to_product(model: Model, node: Node, dequantizer: Node) -> str:
    before = model.graph.producers.get(node.inputs[0])
    if before is not None and before.op_type == "DequantizeLinear":
        return "its activations are quantized"
    if not _is_plain(model, node):
        return "a Gemm with alpha, beta or transA, or with a computed bias"
    size = dequantizer.attribute("block_size")
    along = dequantizer.attribute("axis", 1) % _MATRIX
    if size and (along == _channel(node) or size not in KERNEL_BLOCKS):
        return f"blocks of {size} along axis {along}; expected {', '.join(map(str, KERNEL_BLOCKS))}, of what is summed"
    is_single = np.ndim(model.params[dequantizer.inputs[1]]) == 0
    return "" if size or is_single or along == _channel(node) else "its scales do not run along its outputs"


def _objection_to_table(model: Model, node: Node, dequantizer: Node) -> str:
    if node.attribute("axis", 0) % _MATRIX != 0:
        return "no rows are taken"
    if any(reader.op_type == "QuantizeLinear" for reader in model.graph.readers.get(node.output, ())):
        return "its rows are quantized again"
    size, along = dequantizer.attribute("block_size"), dequantizer.attribute("axis", 1) % _MATRIX
    if size and (along == 0 or size not in KERNEL_BLOCKS):
        return f"blocks of {size} along axis {along}; expected {', '.join(map(str, KERNEL_BLOCKS))}, along rows"
    is_single = np.ndim(model.params[dequantizer.inputs[1]]) == 0
    if not size and not is_single and along != 0:
        return "its scales do not run along its rows"
    return "" if np.shape(model.params[dequantizer.inputs[0]])[1] % 4 == 0 else "a row does not fill bytes"


def _is_plain(model: Model, node: Node) -> bool:
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else ""
    has_vector = not bias or (bias in model.params and np.ndim(model.params[bias]) == 1)
    scaled = node.attribute("alpha", 1.0) != 1 or (bool(bias) and node.attribute("beta", 1.0) != 1)
    return has_vector and not scaled and not node.attribute("transA", 0)


def _channel(node: Node) -> int:
    """Returns the axis of a product's weight that counts outputs."""
    return 0 if node.attribute("transB", 0) else 1


def _rows_of(model: Model, node: Node, dequantizer: Node) -> _Rows:
    codes, scales, zeros = (np.asarray(model.params[name]) for name in dequantizer.inputs)
    is_turned = node.op_type != "Gather" and _channel(node) == 1
    name = np.dtype(codes.dtype).name
    lowest = 0 if name.startswith("u") else -(2 ** (int(name.lstrip("uint")) - 1))
    matrices = [each.astype(np.int32) - lowest for each in (codes, zeros)]
    codes, zeros, scales = (each.T if is_turned else each for each in (*matrices, scales))
    size = dequantizer.attribute("block_size") or _block_size(codes.shape[1])
    num_blocks = -(-codes.shape[1] // size)
    scales, zeros = (_spread(np.asarray(each), len(codes), num_blocks) for each in (scales, zeros))
    bits, offset = _width(codes, zeros, name, size)
    return _Rows(
        (codes - offset).astype(np.uint8),
        np.ascontiguousarray(scales, np.float32),
        (zeros - offset).astype(np.uint8),
        bits,
        int(size),
    )


def _width(codes: np.ndarray, zeros: np.ndarray, name: str, size: int) -> tuple[int, int]:
    """Returns in how many bits integers are held, and what is subtracted from them: 2 where they are four in a row."""
    lowest, highest = min(codes.min(), zeros.min()), max(codes.max(), zeros.max())
    if highest - lowest < 4 and size in (32, 64, 128):  # noqa: PLR2004 - 2 bits, in blocks that have all kernels
        return 2, int(lowest)
    return (4 if name.endswith(("4", "2")) else 8), 0


def _block_size(length: int) -> int:
    """Returns in which blocks rows with one scale are held: large ones, unless they would hold much besides."""
    sizes = [size for size in KERNEL_BLOCKS[:-1] if -(-length // size) * size <= _SPARED * length]
    return max(sizes, default=KERNEL_BLOCKS[1] if length > KERNEL_BLOCKS[0] else KERNEL_BLOCKS[0])


def _spread(values: np.ndarray, num_rows: int, num_blocks: int) -> np.ndarray:
    """Returns scales or zero points, one for all, for each row or for each block, as [rows, blocks]."""
    values = values.reshape(-1, 1) if values.ndim == 1 else values
    return np.array(np.broadcast_to(values, (num_rows, num_blocks)))


def _packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Returns integers along the last axis in bytes, the first in the lowest bits."""
    each = integers.reshape(*integers.shape[:-1], -1, 8 // bits).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(each << shifts, axis=-1)


def _nodes(model: Model, node: Node, rows: _Rows, made: _Made) -> list[Node]:
    """Returns what takes the place of an operator, whose parameters are added to `made`."""
    graph, held = model.graph, rows.packed()
    is_table = node.op_type == "Gather"
    source = graph.producers[node.inputs[0 if is_table else 1]].output
    if is_table:
        held["packed"] = _packed(rows.codes, rows.bits)
    names, nodes = _held(model, source, held, made)
    if is_table:
        made.tables.append((source, names))
        inputs = (names["packed"], node.inputs[1], names["scales"], names["zero_points"])
        settings = {"bits": rows.bits, "block_size": rows.block_size, "gather_axis": 0, "quantize_axis": 1}
        return [*nodes, _microsoft("GatherBlockQuantized", inputs, node, settings)]
    before = graph.producers.get(node.inputs[0])
    rounded = before if before is not None and before.op_type == "RoundInBlocks" and before.domain == OWN else None
    bias = node.inputs[_BIAS] if len(node.inputs) > _BIAS else ""
    inputs = ((rounded or node).inputs[0], names["packed"], names["scales"], names["zero_points"])
    settings = {
        "K": rows.codes.shape[1],
        "N": rows.codes.shape[0],
        "accuracy_level": IN_FLOAT if rounded is None else IN_INT8,
        "bits": rows.bits,
        "block_size": rows.block_size,
    }
    return [*nodes, _microsoft("MatMulNBits", (*inputs, *(("", bias) if bias else ())), node, settings)]


def _microsoft(op_type: str, inputs: tuple[str, ...], node: Node, settings: dict[str, int]) -> Node:
    attributes = tuple(sorted(settings.items()))
    return Node(
        op_type=op_type, inputs=inputs, outputs=node.outputs, attributes=attributes, domain=MICROSOFT, name=node.name
    )


def _held(model: Model, source: str, held: dict[str, np.ndarray], made: _Made) -> tuple[dict[str, str], list[Node]]:
    """Returns the names of what holds a weight, and nodes that make it of a table's, where that is the same."""
    for table, names in made.tables:
        if all(_is_same(made.params[names[what]], value) for what, value in held.items()):
            if np.shape(made.params[names["packed"]]) == held["packed"].shape:
                return names, []
            shape = fresh_name(model.graph, f"{source}_shape")
            packed = fresh_name(model.graph, f"{source}_of_{table}")
            made.constants[shape] = Constant(np.asarray(held["packed"].shape, np.int64))
            return {**names, "packed": packed}, [
                Node(op_type="Reshape", inputs=(names["packed"], shape), outputs=(packed,))
            ]
    names = {what: fresh_name(model.graph, f"{source}_{what}") for what in held}
    made.params |= {names[what]: value for what, value in held.items()}
    return names, []


def _is_same(one: Any, other: np.ndarray) -> bool:
    return np.size(one) == other.size and np.array_equal(np.ravel(one), np.ravel(other))


def _with_opset(model: Model) -> Model:
    """Returns the model with the operator sets declared that its nodes are of."""
    graph = model.graph
    domains = {node.domain for node in graph.nodes}
    opsets = {domain: version for domain, version in graph.opsets if domain != OWN or OWN in domains}
    opsets |= {MICROSOFT: 1} if MICROSOFT in domains else {}
    return model.replace(graph=replace(graph, opsets=tuple(sorted(opsets.items()))))


def _record(node: Node, reason: str) -> Record:
    what = "GatherBlockQuantized" if node.op_type == "Gather" else "MatMulNBits"
    return Record(
        transform="matmul_nbits",
        done=not reason,
        what=f"{node.op_type} " + ("left as it is" if reason else f"written as {what}"),
        where=(node.output,),
        reason=reason,
    )
