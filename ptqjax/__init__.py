"""Post-training quantization of ONNX models by pure JAX functions.

    model = ptqjax.read("model.onnx")
    result = ptqjax.quantize(model, batches)
    ptqjax.export(result.model, result.encodings, "out", "model")

`import ptqjax` reads no other module: a name is looked up in its room at its first use, and no backend starts before
something is computed.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptqjax.agreement import validate
    from ptqjax.bridges import from_flax, to_flax
    from ptqjax.config import QuantizationConfig, Rule, config_from_aimet, read_config, write_config
    from ptqjax.decoders import decoding_batches
    from ptqjax.encoding_files import read_encodings, read_quantized, read_state, write_encodings, write_state
    from ptqjax.encodings.encoding import Encoding
    from ptqjax.errors import (
        ConfigError,
        DataDependentError,
        DataError,
        ModelError,
        OutputError,
        PtqjaxError,
        UnsupportedOperatorError,
    )
    from ptqjax.evaluation import evaluate
    from ptqjax.experiments.budgets import Budget, Drop
    from ptqjax.experiments.sensitivities import sensitivity
    from ptqjax.experiments.sweeping import sweep
    from ptqjax.experiments.width_search import mixed_precision
    from ptqjax.exporting import export
    from ptqjax.fit import Solving, correct_biases, solve_rounding
    from ptqjax.ir import Model, Record
    from ptqjax.lowering import apply
    from ptqjax.onnx_io import read, write
    from ptqjax.ops import lowers
    from ptqjax.pipeline import quantize
    from ptqjax.programs import keep_programs
    from ptqjax.ranges.calibrate import calibrate
    from ptqjax.ranges.pairs import fit_pairs
    from ptqjax.ranges.search import choose_encoding
    from ptqjax.recipes.replaying import replay
    from ptqjax.recipes.run import run_recipe
    from ptqjax.report.explanation import explain
    from ptqjax.simulation import simulate
    from ptqjax.transforms import equalize, fold_batch_norms

__all__ = [
    "Budget",
    "ConfigError",
    "DataDependentError",
    "DataError",
    "Drop",
    "Encoding",
    "Model",
    "ModelError",
    "OutputError",
    "PtqjaxError",
    "QuantizationConfig",
    "Record",
    "Rule",
    "Solving",
    "UnsupportedOperatorError",
    "apply",
    "calibrate",
    "choose_encoding",
    "config_from_aimet",
    "correct_biases",
    "decoding_batches",
    "equalize",
    "evaluate",
    "explain",
    "export",
    "fit_pairs",
    "fold_batch_norms",
    "from_flax",
    "keep_programs",
    "lowers",
    "mixed_precision",
    "quantize",
    "read",
    "read_config",
    "read_encodings",
    "read_quantized",
    "read_state",
    "replay",
    "run_recipe",
    "sensitivity",
    "simulate",
    "solve_rounding",
    "sweep",
    "to_flax",
    "validate",
    "write",
    "write_config",
    "write_encodings",
    "write_state",
]

_ROOM = {
    "Budget": "experiments.budgets",
    "ConfigError": "errors",
    "DataDependentError": "errors",
    "DataError": "errors",
    "Drop": "experiments.budgets",
    "Encoding": "encodings.encoding",
    "Model": "ir",
    "ModelError": "errors",
    "OutputError": "errors",
    "PtqjaxError": "errors",
    "QuantizationConfig": "config",
    "Record": "ir",
    "Rule": "config",
    "Solving": "fit",
    "UnsupportedOperatorError": "errors",
    "apply": "lowering",
    "calibrate": "ranges.calibrate",
    "choose_encoding": "ranges.search",
    "config_from_aimet": "config",
    "correct_biases": "fit",
    "decoding_batches": "decoders",
    "equalize": "transforms",
    "evaluate": "evaluation",
    "explain": "report.explanation",
    "export": "exporting",
    "fit_pairs": "ranges.pairs",
    "fold_batch_norms": "transforms",
    "from_flax": "bridges",
    "keep_programs": "programs",
    "lowers": "ops",
    "mixed_precision": "experiments.width_search",
    "quantize": "pipeline",
    "read": "onnx_io",
    "read_config": "config",
    "read_encodings": "encoding_files",
    "read_quantized": "encoding_files",
    "read_state": "encoding_files",
    "replay": "recipes.replaying",
    "run_recipe": "recipes.run",
    "sensitivity": "experiments.sensitivities",
    "simulate": "simulation",
    "solve_rounding": "fit",
    "sweep": "experiments.sweeping",
    "to_flax": "bridges",
    "validate": "agreement",
    "write": "onnx_io",
    "write_config": "config",
    "write_encodings": "encoding_files",
    "write_state": "encoding_files",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415  (slow to import, seldom asked for)

        return version(__name__)
    if name not in _ROOM:
        raise AttributeError(f"module 'ptqjax' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
