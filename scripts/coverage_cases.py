"""ONNX's own cases: which pass here, and which in ONNX Runtime's CPU provider; a table and what fails."""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from tests import onnx_cases

_CHUNK = 100  # cases between two clearings of JAX's caches
_REASON = 150  # characters
_PASSABLE = range(1, 14)  # ONNX's numbers of NumPy's own types


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one case."""

    group: str
    """What the case counts in: the kind, and for kind "node" the group of its types."""
    name: str
    """The case's name."""
    here: str
    """Why it fails here; "" where it passes."""
    runtime: str
    """Why it fails in ONNX Runtime; "" where it passes."""


def outcomes(processes: int) -> list[Outcome]:
    """Returns what became of every case; as many are run at a time as there are processes."""
    chunks = [
        (kind, start, start + _CHUNK)
        for kind in onnx_cases.KINDS
        for start in range(0, len(onnx_cases.load(kind)), _CHUNK)
    ]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [outcome for found in pool.map(_outcomes_of_chunk, chunks) for outcome in found]


def table(found: Sequence[Outcome]) -> str:
    """Returns how many cases pass, as Markdown."""
    groups = Counter(outcome.group for outcome in found)
    here = Counter(outcome.group for outcome in found if not outcome.here)
    runtime = Counter(outcome.group for outcome in found if not outcome.runtime)
    lines = ["| kind | cases | passed | failed | passed by ONNX Runtime |", "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {group} | {count} | {here[group]} | {count - here[group]} | {runtime[group]} |"
        for group, count in groups.most_common()
    ]
    totals = (groups.total(), here.total(), groups.total() - here.total(), runtime.total())
    return "\n".join([*lines, "| all | " + " | ".join(map(str, totals)) + " |"])


def failures(found: Sequence[Outcome]) -> str:
    """Returns what fails here and why, as Markdown: a line for each reason."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in found:
        if outcome.here:
            reasons[outcome.group, outcome.here].append(outcome.name.removeprefix("test_"))
    lines = ["| kind | why | cases |", "|---|---|---|"]
    lines += [f"| {group} | {_escaped(why)} | {', '.join(names)} |" for (group, why), names in reasons.items()]
    return "\n".join(lines)


def _outcomes_of_chunk(chunk: tuple[str, int, int]) -> list[Outcome]:
    kind, start, stop = chunk
    jax.config.update("jax_platforms", "cpu")
    found = [_outcome(kind, case) for case in _cases(kind)[start:stop]]
    jax.clear_caches()
    return found


@lru_cache
def _cases(kind: str) -> list[Any]:
    return onnx_cases.load(kind)


def _outcome(kind: str, case: Any) -> Outcome:
    return Outcome(
        group=f"node, {onnx_cases.group_of(case)}" if kind == "node" else kind,
        name=case.name,
        here=_failure(onnx_cases.run, case),
        runtime=_failure(_run_in_runtime, case),
    )


def _failure(run: Callable[[Any], None], case: Any) -> str:
    """Returns why the case fails; "" where it passes."""
    try:
        with np.errstate(all="ignore"):
            run(case)
    except AssertionError as error:
        return "another value" if "tolerance" in str(error) else "another type or shape"
    except Exception as error:  # noqa: BLE001 (whatever is raised is a case that fails)
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    """Returns the message without node, tensor, address and remedy, so that like reasons are alike."""
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    reason = re.sub(r"^[\w.]+( '[^']*')? \(producing '[^']*'\): ", "", first)
    return re.sub(r" at 0x[0-9a-f]+", "", reason).partition("; ")[0][:_REASON]


def _run_in_runtime(case: Any) -> None:
    """Runs a case in ONNX Runtime; types that its Python interface cannot hand over are handed over by the graph."""
    model = onnx_cases.model_of(case)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    for inputs, outputs in onnx_cases.data_sets(case, model):
        proto, feeds = _with_passable_types(model, inputs)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results: list[Any] = list(session.run([value.name for value in proto.graph.output], feeds))
        for result, expected in zip(results, outputs.values(), strict=True):
            exact = result.astype(expected.dtype) if _is_ml_dtype(expected) else result
            onnx_cases.assert_same(exact, expected, rtol=case.rtol, atol=case.atol)


def _with_passable_types(model: onnx.ModelProto, inputs: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Returns the model with inputs of types unknown to NumPy as initializers, and such outputs cast to float32."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    inputs = {
        name: value if value is None or isinstance(value, list) else np.asarray(value) for name, value in inputs.items()
    }
    fixed = {name for name, value in inputs.items() if _is_ml_dtype(value)}
    graph.initializer.extend(numpy_helper.from_array(inputs[name], name) for name in sorted(fixed))
    kept = [value for value in graph.input if value.name not in fixed]
    del graph.input[:]
    graph.input.extend(kept)
    for value in graph.output:
        kind = value.type.tensor_type.elem_type
        if kind and kind not in _PASSABLE:
            wide = f"{value.name}_as_float32"
            graph.node.append(helper.make_node("Cast", [value.name], [wide], to=TensorProto.FLOAT))
            value.name, value.type.tensor_type.elem_type = wide, TensorProto.FLOAT
    return model, {name: value for name, value in inputs.items() if name not in fixed and value is not None}


def _is_ml_dtype(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind not in "biufcOSU"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
