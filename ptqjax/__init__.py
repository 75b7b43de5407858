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
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptqjax.bridges import from_flax, to_flax
    from ptqjax.config import QuantizationConfig, Rule, config_from_aimet, read_config, write_config
    from ptqjax.encoding_files import read_encodings, read_quantized, read_state, write_encodings, write_state
    from ptqjax.errors import (
        ConfigError,
        DataDependentError,
        DataError,
        ModelError,
        OutputError,
        PtqjaxError,
        UnsupportedOperatorError,
    )
    from ptqjax.evaluate import evaluate
    from ptqjax.experiments.budgets import Budget, Drop
    from ptqjax.experiments.explain import explain
    from ptqjax.experiments.mixed_precision import mixed_precision
    from ptqjax.experiments.replay import replay
    from ptqjax.experiments.run import run_recipe
    from ptqjax.experiments.sensitivity import sensitivity
    from ptqjax.experiments.sweep import sweep
    from ptqjax.export import export
    from ptqjax.fit import Solving, correct_biases, solve_rounding
    from ptqjax.ir import Model, Record
    from ptqjax.lowering import apply
    from ptqjax.onnx_io import read, write
    from ptqjax.ops import lowers
    from ptqjax.pipeline import quantize
    from ptqjax.programs import keep_programs
    from ptqjax.quantize import Encoding, calibrate, choose_encoding, fit_pairs
    from ptqjax.simulate import simulate
    from ptqjax.transforms import equalize, fold_batch_norms
    from ptqjax.validate import validate

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
    "Encoding": "quantize",
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
    "calibrate": "quantize",
    "choose_encoding": "quantize",
    "config_from_aimet": "config",
    "correct_biases": "fit",
    "equalize": "transforms",
    "evaluate": "evaluate",
    "explain": "experiments.explain",
    "export": "export",
    "fit_pairs": "quantize",
    "fold_batch_norms": "transforms",
    "from_flax": "bridges",
    "keep_programs": "programs",
    "lowers": "ops",
    "mixed_precision": "experiments.mixed_precision",
    "quantize": "pipeline",
    "read": "onnx_io",
    "read_config": "config",
    "read_encodings": "encoding_files",
    "read_quantized": "encoding_files",
    "read_state": "encoding_files",
    "replay": "experiments.replay",
    "run_recipe": "experiments.run",
    "sensitivity": "experiments.sensitivity",
    "simulate": "simulate",
    "solve_rounding": "fit",
    "sweep": "experiments.sweep",
    "to_flax": "bridges",
    "validate": "validate",
    "write": "onnx_io",
    "write_config": "config",
    "write_encodings": "encoding_files",
    "write_state": "encoding_files",
}


class _Package(ModuleType):
    """A package in which the public functions keep their names.

    Five of them (`quantize`, `simulate`, `export`, `evaluate`, `validate`) are called like the module that they live in
    or beside. The import system sets each imported submodule as an attribute of its package; for these names it must
    not, or `ptqjax.simulate` would be the function or the module depending on who imported what before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _ROOM and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


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


sys.modules[__name__].__class__ = _Package
