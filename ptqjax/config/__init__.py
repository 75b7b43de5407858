"""How a model is to be quantized: settings, rules for single tensors, and what a runtime accepts."""

from ptqjax.config.aimet import config_from_aimet
from ptqjax.config.checks import FLOAT_DTYPES, RUN_TIME, SYMMETRIES, Symmetry, near_names
from ptqjax.config.files import config_from_table, config_from_toml, config_to_toml, located, read_config, write_config
from ptqjax.config.rules import Rule
from ptqjax.config.settings import (
    ABSORPTIONS,
    ACTIVATION_DTYPES,
    BOUNDS,
    COMPATIBILITIES,
    CORRECTIONS,
    EFFORTS,
    RANGES,
    SCALINGS,
    WEIGHT_DTYPES,
    QuantizationConfig,
)
from ptqjax.config.target import Target, load_target, target_names

__all__ = [
    "ABSORPTIONS",
    "ACTIVATION_DTYPES",
    "BOUNDS",
    "COMPATIBILITIES",
    "CORRECTIONS",
    "EFFORTS",
    "FLOAT_DTYPES",
    "RANGES",
    "RUN_TIME",
    "SCALINGS",
    "SYMMETRIES",
    "WEIGHT_DTYPES",
    "QuantizationConfig",
    "Rule",
    "Symmetry",
    "Target",
    "config_from_aimet",
    "config_from_table",
    "config_from_toml",
    "config_to_toml",
    "load_target",
    "located",
    "near_names",
    "read_config",
    "target_names",
    "write_config",
]
