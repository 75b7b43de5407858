"""How a model is to be quantized: one frozen, checked record of settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ptqjax.errors import ConfigError

WEIGHT_DTYPES = ("int8", "uint8", "int4", "uint4", "int16", "uint16", "int6")
"""Integer types that weights may have. Signed ones are symmetric, unsigned ones have a zero point. int6 is stored in
int8, of which it uses the middle quarter."""
ACTIVATION_DTYPES = ("uint8", "int8", "uint16", "int16")
"""Integer types that activations may have; all have a zero point."""
RANGES = ("min-max", "sqnr")
"""Schemes that choose a range."""
ABSORPTIONS = ("exact", "statistics", "off")
"""Ways to absorb high biases into the next layer."""
CORRECTIONS = ("none", "analytic", "empirical")
"""Ways to correct biases after quantization."""
SCALINGS = ("auto", "off", "weights", "ranges", "noise", "learned")
"""What the scales of channels between layers are chosen for."""
BOUNDS = ("exact", "relu", "leave", "auto")
"""What becomes of a Clip between scaled channels."""

_PLANNED = {
    "ranges": ("moving-average", "percentile", "mse", "entropy"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """The settings of a quantization; every field is checked when the record is made.

    Raises:
        ConfigError: A field has a value that is not allowed, or not available yet.
    """

    weights: str = "int8"
    """Integer type of the weights, one of `WEIGHT_DTYPES`."""
    activations: str = "uint8"
    """Integer type of the activations, one of `ACTIVATION_DTYPES`."""
    granularity: str = "channel"
    """What shares a scale in a weight: "tensor", "channel", or "block:N" (N weights in a row that are summed)."""
    ranges: str = "sqnr"
    """How ranges are chosen, one of `RANGES`."""
    equalize: bool = True
    """Whether the pipeline removes constant channels, absorbs biases and scales channels between layers."""
    scaling: str = "auto"
    """What channels are scaled for, one of `SCALINGS`: nothing ("off"), equal weight ranges ("weights", the paper's),
    weight and activation ranges together ("ranges"), the least predicted output noise ("noise"), the output itself, by
    gradient descent on the calibration data ("learned"), or whichever of these measures best on calibration data, or
    without data predicts the least noise ("auto")."""
    bounds: str = "exact"
    """What becomes of a Clip between scaled channels, one of `BOUNDS`: a bound per channel ("exact"), a Relu ("relu",
    which changes the function where the Clip saturates), nothing is scaled there ("leave"), or relu or leave, layer by
    layer, by how much of the distribution lies beyond the bound ("auto"; the same as "exact" where the target takes
    bounds per channel)."""
    absorb: str = "exact"
    """Whether the pipeline absorbs high biases, one of `ABSORPTIONS`."""
    correct: str = "empirical"
    """How the pipeline corrects biases, one of `CORRECTIONS`; without data, "empirical" becomes "analytic"."""
    headroom: float | None = None
    """How many times wider than the calibration data's the ranges of activations are, bounded by what can occur; None:
    as measures best (`scaling="auto"`), else 1."""
    target: str = "ort-cpu"
    """The runtime: name of a file of `ptqjax/targets`, or path of such a file (ends in .toml)."""
    seed: int = 0
    """Of what is random: which samples learning looks at, and in which order."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of tensors that stay in float."""

    def __post_init__(self) -> None:
        _check_choice("weights", self.weights, WEIGHT_DTYPES)
        _check_choice("activations", self.activations, ACTIVATION_DTYPES)
        _check_choice("ranges", self.ranges, RANGES)
        _check_choice("absorb", self.absorb, ABSORPTIONS)
        _check_choice("correct", self.correct, CORRECTIONS)
        _check_choice("scaling", self.scaling, SCALINGS)
        _check_choice("bounds", self.bounds, BOUNDS)
        _check_granularity(self.granularity)
        if self.headroom is not None and not (isinstance(self.headroom, int | float) and 1 <= self.headroom <= 10):  # noqa: PLR2004
            raise ConfigError(f"headroom={self.headroom!r}: expected a number from 1 to 10, or None")
        _check_target(self.target)
        if not isinstance(self.equalize, bool):
            raise ConfigError(f"equalize={self.equalize!r}: expected True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r}: expected an integer, 0 or more")
        if not isinstance(self.exclude, tuple) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ConfigError(f'exclude={self.exclude!r}: expected a tuple of patterns, such as ("conv1*",)')

    @property
    def block_size(self) -> int | None:
        """Number of weights that share a scale along the axis that is summed; None where not by blocks."""
        return int(self.granularity.partition(":")[2]) if self.granularity.startswith("block:") else None


def target_names() -> tuple[str, ...]:
    """Returns the names of the targets that come with the package, sorted."""
    files = resources.files("ptqjax.targets").iterdir()
    return tuple(sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml")))


def near_names(wanted: str, names: Iterable[str]) -> str:
    """Returns the end of an error message that lists what `wanted` may have meant: '; near names: a, b', or ''."""
    near = difflib.get_close_matches(wanted, tuple(names), n=3, cutoff=0.5)
    return f"; near names: {', '.join(near)}" if near else ""


def _check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    available = f"expected one of {', '.join(allowed)}"
    if isinstance(value, str) and value.partition(":")[0] in _PLANNED.get(field, ()):
        raise ConfigError(f"{field}={value!r} is not yet available; {available}")
    near = near_names(value, allowed) if isinstance(value, str) else ""
    raise ConfigError(f"{field}={value!r} is unknown; {available}{near}")


def _check_granularity(value: object) -> None:
    if value in ("tensor", "channel"):
        return
    kind, _, size = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind == "block" and size.isdecimal() and int(size) > 0:
        return
    raise ConfigError(f"granularity={value!r} is unknown; expected tensor, channel, or block:N with N = 1 or more")


def _check_target(value: object) -> None:
    if isinstance(value, str) and (value in target_names() or (value.endswith(".toml") and Path(value).is_file())):
        return
    near = near_names(value, target_names()) if isinstance(value, str) else ""
    known = ", ".join(target_names())
    raise ConfigError(f"target={value!r} is unknown; expected one of {known}, or the path of a .toml file{near}")
