"""What a report says, as plain data: the content of `report.json`, and what the page is made from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptqjax.encodings.encoding import Encoding
from ptqjax.ir import Model, Node, Record, TensorSpec, all_nodes
from ptqjax.transforms.moments import channel_ranges
from ptqjax.versions import versions

_NUM_STD = 3.0  # around the mean: 99.7 % of a normal channel
_WEIGHTED = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}  # operator -> axis of the weight's output channels


PLAIN_SESSION = "plain session"
"""The row of the last model as a session without options computes it, where its sums saturate on this machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of the table: the model after a stage, against the float model as it was read."""

    stage: str
    """What was done last: "float", "fold", "equalize", "correct"; or `PLAIN_SESSION`."""
    metrics: Mapping[str, float]
    """Figures by name. Of the model computed in float: "float_sqnr_db" (dB). Quantized: "sqnr_db" (dB, over all
    outputs), "worst_sqnr_db" (dB, of the output or part that has least, where there are several), "agreement" (where an
    output looks like classes) and "top1" (0..1)."""
    outputs: Mapping[str, float] = field(default_factory=dict)
    """SQNR in dB of each output, or part of one, where there are several."""


def facts(
    *,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: str,
    rows: Sequence[Row],
    records: Iterable[Record],
    measured_in: str = "the simulation",
    encodings: Mapping[str, Encoding],
    before: Model,
    after: Model,
) -> dict[str, Any]:
    """Returns all that a report says, as data that JSON can hold; the same run gives the same order of keys.

    Args:
        source: Where the model and the data came from: paths, hashes, counts.
        settings: The configuration, by field.
        device: The device that computed.
        rows: The table, in order.
        measured_in: What computed it; "" where nothing was measured.
        records: What every transform did and left alone.
        encodings: The chosen grids, by tensor.
        before: The model before equalization (batch norms folded): its weights are compared with those of `after`.
        after: The model that was exported.
    """
    return {
        "source": dict(source),
        "settings": dict(settings),
        "device": device,
        "versions": versions(),
        "model": contents(after),
        "measured_in": measured_in,
        "stages": [_row(row) for row in rows],
        "records": [_record(record) for record in records],
        "encodings": {name: encoding_facts(name, encodings[name], after) for name in sorted(encodings)},
        "weight_ranges": weight_ranges(before, after),
        "activation_ranges": activation_ranges(before, after, encodings),
    }


def _row(row: Row) -> dict[str, Any]:
    outputs = {"outputs": numbers(row.outputs)} if row.outputs else {}
    return {"stage": row.stage, "metrics": numbers(row.metrics), **outputs}


def to_json(report: Mapping[str, Any]) -> str:
    """Returns the facts as JSON text; figures that are no numbers (the SQNR of an exact copy) become strings."""
    return json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def contents(model: Model) -> dict[str, Any]:
    """Returns what is in a model: inputs, outputs, opset, how many of each operator (subgraphs count), parameters."""
    graph = model.graph
    operators = Counter(map(operator_name, all_nodes(graph)))
    return {
        "inputs": [_spec(spec) for spec in graph.inputs],
        "outputs": [_spec(spec) for spec in graph.outputs],
        "opset": graph.opset(),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "num_parameters": int(sum(np.size(value) for value in model.params.values())),
    }


def operator_name(node: Node) -> str:
    """Returns what tables call an operator: its type, after its domain where that is not ONNX's own."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def encoding_facts(name: str, encoding: Encoding, model: Model) -> dict[str, Any]:
    """Returns a grid as plain data: what it is for, its type, and the range that it spans, per channel where it is."""
    scale = np.asarray(encoding.scale, np.float64).ravel()
    zero_point = np.asarray(encoding.zero_point, np.float64).ravel()
    return {
        "kind": "weight" if name in model.params else "activation",
        "dtype": encoding.dtype,
        "num_bits": encoding.num_bits,
        "axis": encoding.axis,
        "block_size": encoding.block_size,
        "enabled": bool(np.all(np.asarray(encoding.enabled))),
        "scale": scale.tolist(),
        "zero_point": zero_point.astype(np.int64).tolist(),
        "minimum": float(np.min((np.asarray(encoding.qmin, np.float64).ravel() - zero_point) * scale)),
        "maximum": float(np.max((np.asarray(encoding.qmax, np.float64).ravel() - zero_point) * scale)),
    }


def weight_ranges(before: Model, after: Model) -> dict[str, dict[str, list[float]]]:
    """Returns the largest magnitude in each output channel of each weight, before and after, by its name after.

    A weight's counterpart is what the same operator multiplied with before, told by its result: transforms give a
    weight that several read a copy for each, under another name. Weights without one, or of another shape, are left
    out.
    """
    found = {}
    for node in after.graph.nodes:
        name = node.inputs[1] if node.op_type in _WEIGHTED else ""
        old_name = _counterpart(before, node, name) if name in after.params else None
        if old_name is None:
            continue
        axis = _WEIGHTED[node.op_type]
        if node.op_type == "Gemm" and node.attribute("transB", 0):
            axis = 0
        old, new = np.asarray(before.params[old_name]), np.asarray(after.params[name])
        if new.ndim > axis and old.shape == new.shape:
            found[name] = {"before": _channel_ranges(old, axis), "after": _channel_ranges(new, axis)}
    return found


def activation_ranges(
    before: Model, after: Model, encodings: Mapping[str, Encoding]
) -> dict[str, dict[str, list[float]]]:
    """Returns how large each channel of an activation becomes, before and after, where batch norms tell.

    The larger magnitude of the ends of `transforms.moments.channel_ranges`, three standard deviations around the mean
    and within what is provable, of quantized tensors that both models have.
    """
    old, new = (channel_ranges(model, num_std=_NUM_STD) for model in (before, after))
    found = {}
    for name in sorted(set(old) & set(new) & set(encodings)):
        pair = {"before": _reach(*old[name]), "after": _reach(*new[name])}
        if len(pair["before"]) == len(pair["after"]) and np.all(np.isfinite(pair["before"] + pair["after"])):
            found[name] = pair
    return found


def _counterpart(before: Model, node: Node, weight: str) -> str | None:
    """Returns the weight that the operator with the same result had, or else the one of the same name."""
    same = before.graph.producers.get(node.output)
    if same is not None and same.op_type == node.op_type and same.inputs[1] in before.params:
        return same.inputs[1]
    return weight if weight in before.params else None


def _reach(low: Any, high: Any) -> list[float]:
    return np.maximum(np.abs(np.asarray(low, np.float64)), np.abs(np.asarray(high, np.float64))).tolist()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics as Python floats."""
    return {name: float(value) for name, value in metrics.items()}


def _channel_ranges(weight: np.ndarray, axis: int) -> list[float]:
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    return np.abs(rows.astype(np.float64)).max(axis=1, initial=0.0).tolist()


def _record(record: Record) -> dict[str, Any]:
    fields = record.as_dict()
    return fields | {"where": list(record.where), "before": numbers(record.before), "after": numbers(record.after)}


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype.name, "shape": None if spec.shape is None else list(spec.shape)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value
