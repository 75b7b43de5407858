"""Compares an exported file in ONNX Runtime, in steps of its grids, with the integer program.

One rounding that falls the other way changes all that follows, so exactness is judged twice: each group is recomputed
from ONNX Runtime's own integers before it, and each tensor is computed all the way from the inputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ptqjax import onnx_io
from ptqjax.agreement.findings import Distance, Group, Validation
from ptqjax.agreement.fusions import Fusions, is_seen_in_integers, operators, otherwise_fused
from ptqjax.agreement.runtime import model_file, optimized, run, session
from ptqjax.agreement.totals import NO_DISTANCE, Sums, with_elements
from ptqjax.data.batches import checked_batches, num_samples
from ptqjax.errors import ModelError
from ptqjax.ir import Model, Node, Report, TensorSpec, rebuild, value_of
from ptqjax.lowering import apply_few_times
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.transforms.saturation import saturating_weights, warn_of_saturation


def validate(
    model: Model | str | os.PathLike[str] | bytes,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: str = "cpu",
    in_float: bool = True,
) -> Validation:
    """Returns how an exported QDQ model in ONNX Runtime compares with what is simulated.

    Where all integers of a batch are equal all the way from the inputs, each group has been computed from ONNX
    Runtime's own integers already, and is not computed again.

    Args:
        model: The QDQ model: its file, the folder that `ptqjax quantize` wrote, its bytes, or the model as read.
        batches: Inputs by name, samples along the first axis; one batch at a time is held.
        device: Where ONNX Runtime computes: "cpu", "cuda" or "auto".
        in_float: Whether the float program is compared as well.

    Raises:
        ModelError: The model cannot be read or run, or is not quantized.
        DataError: There are no batches, or one does not fit or holds NaN or infinity (`checked_batches`).
        ConfigError: onnxruntime is not installed, or has no such device.
    """
    quantized = model if isinstance(model, Model) else onnx_io.read(model_file(model))
    tensors = _quantized_tensors(quantized)
    if not tensors:
        raise ModelError(
            "the model has no QuantizeLinear node: there is nothing to validate; export it quantized first"
        )
    programs = _Programs.of(quantized, tensors)
    runtimes, fusions = _runtimes(programs, tensors, device)
    tally = _Tally(alone=dict.fromkeys(tensors, NO_DISTANCE), end_to_end=dict.fromkeys(tensors, NO_DISTANCE))
    for batch in checked_batches(quantized.graph, batches):
        tally = tally.plus(programs, runtimes, batch, in_float=in_float)
    groups = tuple(_group(fusions, quantized, name, tally) for name in tensors)
    unverified = [group.tensor for group in groups if not group.is_verified]
    saturating = saturating_weights(programs.fused)
    likeness = tally.integer.likeness()
    is_equal = likeness.equal == 1 and all(group.end_to_end.equal == 1 for group in groups)
    return Validation(
        groups=groups,
        integer=likeness,
        float=tally.floating.likeness() if in_float else None,
        num_samples=tally.num_samples,
        fusion=programs.report,
        saturating=saturating,
        warnings=(*otherwise_fused(fusions, unverified, is_equal=is_equal), *warn_of_saturation(saturating)),
    )


_AGAIN = " recomputed"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Programs:
    """The models that are computed here."""

    quantized: Model
    """The QDQ model: what the float program computes."""
    fused: Model
    """The integer program."""
    exposed: Model
    """The integer program with all quantized tensors as outputs."""
    cut: Model
    """The integer program from each quantized tensor to those behind it."""
    report: Report
    """Which operators are computed in integers."""

    @staticmethod
    def of(quantized: Model, tensors: Mapping[str, np.dtype]) -> _Programs:
        fused, report = fuse_quantized(quantized)
        return _Programs(
            quantized=quantized,
            fused=fused,
            exposed=_with_outputs(fused, tensors),
            cut=_cut(fused, tensors),
            report=report,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Runtimes:
    """The models that ONNX Runtime computes, as sessions."""

    exposed: Any
    """With all quantized tensors as outputs."""
    plain: Any
    """The session of the file as it is; the same one where exposing changes nothing."""


def _runtimes(programs: _Programs, tensors: Mapping[str, np.dtype], device: str) -> tuple[_Runtimes, Fusions]:
    exposed = _with_outputs(programs.quantized, tensors)
    runtime = session(exposed, device=device)
    fusions = Fusions(plain=optimized(programs.quantized), exposed=optimized(exposed), foreseen=programs.fused.graph)
    is_same = operators(fusions.plain) == operators(fusions.exposed)
    plain = runtime if is_same else session(programs.quantized, device=device)
    return _Runtimes(exposed=runtime, plain=plain), fusions


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tally:
    """What was counted so far."""

    alone: Mapping[str, Distance]
    end_to_end: Mapping[str, Distance]
    integer: Sums = field(default_factory=Sums)
    floating: Sums = field(default_factory=Sums)
    num_samples: int = 0

    def plus(self, programs: _Programs, runtimes: _Runtimes, batch: Mapping[str, Any], *, in_float: bool) -> _Tally:
        """Returns the tally with one batch more."""
        quantized = programs.quantized
        found = run(runtimes.exposed, batch)
        whole = found if runtimes.plain is runtimes.exposed else run(runtimes.plain, batch)
        outputs = {spec.name: whole[spec.name] for spec in quantized.graph.outputs}
        whole_way = _computed(programs.exposed, batch)
        is_equal = all(np.array_equal(found[name], whole_way[name]) for name in self.alone)
        given = {**batch, **{name: found[name] for name in self.alone}}
        again = found if is_equal else _recomputed(programs.cut, given)
        floating = self.floating.plus(outputs, _computed(quantized, batch)) if in_float else self.floating
        return _Tally(
            alone={name: with_elements(each, found[name], again[name]) for name, each in self.alone.items()},
            end_to_end={
                name: with_elements(each, found[name], whole_way[name]) for name, each in self.end_to_end.items()
            },
            integer=self.integer.plus(outputs, whole_way),
            floating=floating,
            num_samples=self.num_samples + num_samples(batch),
        )


def _computed(model: Model, batch: Mapping[str, Any]) -> dict[str, Any]:
    return apply_few_times(model.graph, model.params, batch)


def _recomputed(cut: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns each quantized tensor, by its own name, computed from those before it."""
    return {name.removesuffix(_AGAIN): value for name, value in _computed(cut, given).items()}


def _quantized_tensors(model: Model) -> dict[str, np.dtype]:
    """Returns the outputs of QuantizeLinear nodes with their types, in the order of the graph."""
    quantizers = (node for node in model.graph.nodes if node.op_type == "QuantizeLinear")
    return {node.output: _zero_point_type(model, node) for node in quantizers}


def _zero_point_type(model: Model, quantizer: Node) -> np.dtype:
    zero_point = value_of(model, quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None  # noqa: PLR2004
    return np.dtype(np.uint8) if zero_point is None else np.dtype(zero_point.dtype)


def _specs(tensors: Mapping[str, np.dtype]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype=dtype, shape=None) for name, dtype in tensors.items())


def _with_outputs(model: Model, tensors: Mapping[str, np.dtype]) -> Model:
    graph = model.graph
    return model.replace(graph=replace(graph, outputs=(*graph.outputs, *_specs(tensors))))


def _again(tensor: str) -> str:
    return f"{tensor}{_AGAIN}"


def _cut(fused: Model, tensors: Mapping[str, np.dtype]) -> Model:
    """Returns the model cut at `tensors`: each of them is an input, and an output under the name `_again` of it."""
    graph = fused.graph
    nodes = tuple(
        replace(node, outputs=tuple(_again(name) if name in tensors else name for name in node.outputs))
        for node in graph.nodes
    )
    again = _specs({_again(name): dtype for name, dtype in tensors.items()})
    cut = replace(graph, inputs=(*graph.inputs, *_specs(tensors)), outputs=again, nodes=nodes)
    return rebuild(fused.replace(graph=cut))


def _group(fusions: Fusions, quantized: Model, tensor: str, tally: _Tally) -> Group:
    node = fusions.foreseen.producers[tensor]
    before = quantized.graph.producers.get(quantized.graph.producers[tensor].inputs[0])
    is_foreseen = node.op_type != "QuantizeLinear"
    integer = is_foreseen and is_seen_in_integers(fusions, tensor, node.op_type)
    operator = node.op_type if integer else "" if before is None else before.op_type
    return Group(
        tensor=tensor,
        operator=operator or "graph input",
        is_foreseen=is_foreseen,
        integer=integer,
        alone=tally.alone[tensor],
        end_to_end=tally.end_to_end[tensor],
    )
