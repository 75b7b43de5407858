"""ONNX's own test cases, their kinds, and how one is run here: what the tests and `scripts/coverage.py` share."""

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import onnx
from onnx import numpy_helper

from ptqjax.errors import PtqjaxError
from ptqjax.lowering import apply, precision
from ptqjax.onnx_io import read

KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")
"""The kinds of cases that ONNX has here."""

_STRING = onnx.TensorProto.STRING
_FIRST_NARROW = onnx.TensorProto.FLOAT8E4M3FN  # all element types from here on have 8 bits or fewer


@cache
def load(kind: str) -> list[Any]:
    """Returns ONNX's cases of one kind: "node", "simple", "pytorch-operator" or "pytorch-converted"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX's generators divide by zero on purpose
        from onnx.backend.test.loader import load_model_tests  # noqa: PLC0415

        return sorted(load_model_tests(kind=kind), key=lambda case: case.name)


def model_of(case: Any) -> onnx.ModelProto:
    """Returns the model of a case, which lies in a file where it was not generated."""
    return case.model if case.model is not None else onnx.load(f"{case.model_dir}/model.onnx")


def group_of(case: Any) -> str:
    """Returns the group that a node case counts in: plain, narrow, sequence, string or training."""
    model = model_of(case)
    if any("training" in node.domain or "preview" in node.domain for node in model.graph.node):
        return "training"
    values = [value.type for value in (*model.graph.input, *model.graph.output)]
    types = {value.tensor_type.elem_type for value in values}
    if _STRING in types:
        return "string"
    if any(value.WhichOneof("value") != "tensor_type" for value in values):
        return "sequence"
    return "narrow" if any(kind >= _FIRST_NARROW for kind in types) else "plain"


def run(case: Any) -> None:
    """Runs a case with its own tolerance.

    Raises:
        AssertionError: A result has another type or shape, or is too far away.
        PtqjaxError: The model cannot be read or run.
    """
    model = model_of(case)
    graph = read(model)
    check(case, [apply(graph.graph, graph.params, inputs) for inputs, _ in data_sets(case, model)])


def check(case: Any, results: Sequence[dict[str, Any]]) -> None:
    """Holds the results of a case, those of a data set after another, to its own tolerance.

    Raises:
        AssertionError: One has another type or shape, or is too far away.
    """
    for outputs, (_, wanted) in zip(results, data_sets(case, model_of(case)), strict=True):
        for name, expected in wanted.items():
            assert_same(outputs[name], expected, rtol=case.rtol, atol=case.atol)


def results_together(cases: Sequence[Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of cases by name, computed in two programs: those that need 64 bits, and the rest.

    Left out are cases that do not run as a part of a program: shapes depend on data, or there is an error. Optimized
    for compiling fast: nothing is computed twice.
    """
    found = {}
    for wide in (False, True):
        chosen = {
            case.name: arguments for case in cases if (arguments := _arguments(case)) and _is_wide(arguments) == wide
        }
        with jax.enable_x64(wide):
            found |= _results(chosen)
    return {name: results for name, results in found.items() if results is not None}


def _arguments(case: Any) -> tuple[Any, Any, list[dict[str, Any]]] | None:
    model = model_of(case)
    try:
        graph = read(model)
    except PtqjaxError:
        return None
    return graph.graph, graph.params, [inputs for inputs, _ in data_sets(case, model)]


def _is_wide(arguments: tuple[Any, Any, list[dict[str, Any]]]) -> bool:
    graph, params, inputs = arguments
    with precision(graph, params, inputs[0]):
        return jax.config.jax_enable_x64


def _results(chosen: dict[str, tuple[Any, Any, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Returns the results by name; None for what could not be traced."""

    def program(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: _traced(chosen[name][0], *arrays[name]) for name in chosen}

    compiled = jax.jit(program, compiler_options={"xla_backend_optimization_level": 0})
    try:
        return compiled({name: (params, inputs) for name, (_, params, inputs) in chosen.items()})
    except jax.errors.JaxRuntimeError:
        return {}


def _traced(graph: Any, params: Any, inputs: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    try:
        return [apply(graph, params, each) for each in inputs]
    except Exception:  # noqa: BLE001 (whatever it is, the case shows it alone)
        return None


def assert_same(result: Any, expected: Any, *, rtol: float, atol: float) -> None:
    """Checks that a tensor, sequence or empty optional is what is expected."""
    if expected is None:
        assert result is None
        return
    if isinstance(expected, list):
        assert isinstance(result, list)
        assert len(result) == len(expected)
        for one, wanted in zip(result, expected, strict=True):
            assert_same(one, wanted, rtol=rtol, atol=atol)
        return
    result, expected = np.asarray(result), np.asarray(expected)
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    if result.dtype.kind == "V" or expected.dtype.kind not in "biufc":  # types that NumPy borrows and cannot subtract
        result, expected = result.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=atol)


def data_sets(case: Any, model: onnx.ModelProto) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yields the inputs and the expected outputs of a case, by name: arrays, lists of them, or None."""
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    outputs = [value.name for value in model.graph.output]
    for given, expected in case.data_sets or _stored_data_sets(case, model):
        yield (
            dict(zip(names, map(_value, given), strict=False)),
            dict(zip(outputs, map(_value, expected), strict=True)),
        )


def _stored_data_sets(case: Any, model: onnx.ModelProto) -> Iterator[tuple[list[Any], list[Any]]]:
    from pathlib import Path  # noqa: PLC0415

    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        given = [_load(folder / f"input_{i}.pb", value) for i, value in enumerate(model.graph.input)]
        expected = [_load(folder / f"output_{i}.pb", value) for i, value in enumerate(model.graph.output)]
        yield [value for value in given if value is not None], expected


def _load(path: Any, value: onnx.ValueInfoProto) -> Any:
    protos = {"tensor_type": onnx.TensorProto, "sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
    if not path.exists():
        return None
    return protos[value.type.WhichOneof("value")].FromString(path.read_bytes())


def _value(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, onnx.SequenceProto):
        return numpy_helper.to_list(value)
    if isinstance(value, onnx.OptionalProto):
        return numpy_helper.to_optional(value)
    return value
