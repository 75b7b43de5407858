"""The settings of a quantization: one frozen, checked record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptqjax.config.checks import (
    DTYPES,
    RANGES,
    RUN_TIME,
    SettingError,
    Symmetry,
    check_choice,
    check_dtype,
    check_expressions,
    check_flag,
    check_granularity,
    check_ranges,
    check_symmetry,
    check_texts,
)
from ptqjax.config.constraints import check_allowed
from ptqjax.config.rules import Rule
from ptqjax.config.target import check_target_name, load_target

WEIGHT_DTYPES = DTYPES
"""Types that weights may have. Signed ones are symmetric and unsigned ones have a zero point, unless told otherwise."""
ACTIVATION_DTYPES = DTYPES
"""Types that activations may have; integers have a zero point, unless told otherwise."""
ABSORPTIONS = ("exact", "statistics", "off")
"""Ways to absorb high biases into the next layer."""
CORRECTIONS = ("none", "analytic", "empirical")
"""Ways to correct biases after quantization."""
SCALINGS = ("auto", "off", "weights", "ranges", "noise", "learned")
"""What the scales of channels between layers are chosen for."""
BOUNDS = ("exact", "relu", "leave", "auto")
"""What becomes of a Clip between scaled channels."""
COMPATIBILITIES = ("aimet",)
"""Other programs whose formulas for ranges can be followed."""
BIASES = ("int32", "float")
"""What biases may be."""
EFFORTS = ("fast", "balanced", "thorough")
"""How much is tried before a choice is made."""

ROUNDINGS = ("nearest", "solved", "learned")
"""How weights are rounded."""

__all__ = [
    "ABSORPTIONS",
    "ACTIVATION_DTYPES",
    "BOUNDS",
    "COMPATIBILITIES",
    "CORRECTIONS",
    "EFFORTS",
    "RANGES",
    "ROUNDINGS",
    "SCALINGS",
    "WEIGHT_DTYPES",
    "QuantizationConfig",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationConfig:
    """The settings of a quantization; every field is checked when the record is made.

    The defaults are those of the target "ort-cpu", and other targets may not take them all: `for_target` has each
    target's own.

    Raises:
        ConfigError: A field has a value that is not allowed, or that the target does not take.
    """

    weights: str = "int8"
    """Type of the weights: int2 to int16, uint2 to uint16, or one of `FLOAT_DTYPES`."""
    activations: str = "uint8"
    """Type of the activations: the same types; "float": they stay as they are, and weights alone are rounded; or
    "dynamic": products with weights round what they read on grids that are found at run time, uint8 from the least to
    the greatest value, or, where weights are in blocks, int8 for as many values as a block has."""
    granularity: str = "channel"
    """What shares a scale in a weight: "tensor", "channel", "block:N" (N weights in a row that are summed), or "lpbq:N"
    (low-power blocks: the scales of a channel's blocks are multiples of one by integers of as many bits as the weights
    have)."""
    ranges: str = "sqnr"
    """How ranges are chosen: "min-max", "moving-average", "sqnr", "percentile:P", "mse" or "entropy"."""
    weight_ranges: str | None = None
    """The scheme that weights' ranges are chosen by; None: `ranges`, but "min-max" in place of "sqnr" where a scale
    is for a channel or less and has fewer than 8 bits: there, what is cut off costs more than it spares. Where
    roundings are solved for, scales of fewer than 6 bits are then shrunk as far as that lessens the layer's error."""
    activation_ranges: str | None = None
    """The scheme that activations' ranges are chosen by; None: `ranges`."""
    weights_symmetric: Symmetry | None = None
    """How 0 lies on the grids of weights: False (anywhere), True (in the middle), "strict" (and the smallest integer
    unused), "unsigned" (at the lower end where no value is negative), "strict unsigned"; None: True where signed."""
    activations_symmetric: Symmetry | None = None
    """How 0 lies on the grids of activations, as `weights_symmetric` says it of weights; None: False."""
    power_of_two: bool = False
    """Whether all scales are powers of two."""
    biases: str | None = None
    """What biases are: "int32" integers with the scale of input times weight, or "float"; None: as the target says."""
    compatibility: str | None = None
    """Whose formulas for ranges are followed to the last bit; None: our own. "aimet": those of aimet-onnx 2.42."""
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
    rounding: str | None = None
    """How weights are rounded, one of `ROUNDINGS`: each to the integer next to it ("nearest"), or all of a layer's for
    the least error of its output on calibration data ("solved"), from there on by gradient descent on what blocks of
    layers give ("learned"); None: solved for, with data, where a weight has fewer than 8 bits, or one scale for all
    channels or activations are "dynamic" and `effort` is not "fast", and everywhere where that is "thorough"."""
    headroom: float | None = None
    """Factor by which activation ranges are widened beyond calibration, never past provable bounds; None:
    as measures best (`scaling="auto"`), else 1. A tensor of few values is given more (`ranges.headroom`), unless the
    setting is 1."""
    effort: str = "balanced"
    """How much time choices may take, one of `EFFORTS`: what closed forms say is taken ("fast"), what may win by them
    is tried on samples held back ("balanced"), or all is tried and scales are learned to the end ("thorough")."""
    target: str = "ort-cpu"
    """The runtime: name of a file of `ptqjax/targets`, or path of such a file (ends in .toml)."""
    seed: int = 0
    """The seed of what is random: which samples learning looks at, and in which order."""
    exclude: tuple[str, ...] = ()
    """Patterns of tensors that stay in float, as `Rule.tensors` has them."""
    exclude_nodes: tuple[str, ...] = ()
    """Patterns of nodes that stay in float, as `Rule.nodes` has them: weights, inputs and results."""
    supergroups: tuple[tuple[str, ...], ...] = ()
    """Runs of operators that are rounded once, behind the last, as in ("Conv", "Sigmoid"); beside the target's own."""
    rules: tuple[Rule, ...] = ()
    """What differs for some tensors; later rules win."""

    def __post_init__(self) -> None:
        check_dtype("weights", self.weights)
        check_dtype("activations", self.activations, also=RUN_TIME)
        check_granularity("granularity", self.granularity)
        check_ranges("ranges", self.ranges)
        check_flag("power_of_two", self.power_of_two)
        check_flag("equalize", self.equalize)
        check_choice("scaling", self.scaling, SCALINGS)
        check_choice("bounds", self.bounds, BOUNDS)
        check_choice("absorb", self.absorb, ABSORPTIONS)
        check_choice("correct", self.correct, CORRECTIONS)
        check_choice("effort", self.effort, EFFORTS)
        self._check_optional()
        self._check_numbers()
        check_texts("exclude", self.exclude, 'patterns, such as ("conv1*",)')
        check_texts("exclude_nodes", self.exclude_nodes, 'patterns of names of nodes, such as ("/head/*",)')
        check_expressions("exclude", self.exclude)
        check_expressions("exclude_nodes", self.exclude_nodes)
        _check_supergroups(self.supergroups)
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise SettingError("rules", f"rules={self.rules!r}: expected a tuple of Rule records")
        check_target_name(self.target)
        check_allowed(self, load_target(self.target))

    def _check_optional(self) -> None:
        checks = {
            "weight_ranges": check_ranges,
            "activation_ranges": check_ranges,
            "weights_symmetric": check_symmetry,
            "activations_symmetric": check_symmetry,
            "biases": lambda field, value: check_choice(field, value, BIASES),
            "rounding": lambda field, value: check_choice(field, value, ROUNDINGS),
            "compatibility": lambda field, value: check_choice(field, value, COMPATIBILITIES),
        }
        for name, check in checks.items():
            if getattr(self, name) is not None:
                check(name, getattr(self, name))

    def _check_numbers(self) -> None:
        is_number = isinstance(self.headroom, int | float) and not isinstance(self.headroom, bool)
        if self.headroom is not None and not (is_number and 1 <= self.headroom <= 10):  # noqa: PLR2004
            raise SettingError("headroom", f"headroom={self.headroom!r}: expected a number from 1 to 10, or None")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise SettingError("seed", f"seed={self.seed!r}: expected an integer, 0 or more")

    @classmethod
    def for_target(cls, target: str, **settings: Any) -> QuantizationConfig:
        """Returns the settings that `target` has for defaults, with those that are given in their place.

        Raises:
            ConfigError: The target is unknown, or does not take what is given.
        """
        check_target_name(target)
        return cls(**{**dict(load_target(target).defaults), "target": target, **settings})

    @property
    def activation_steps(self) -> str:
        """The type whose steps are about as fine as those of activations: their own, where they have one."""
        return {"float": "float16", "dynamic": "uint8"}.get(self.activations, self.activations)

    @property
    def block_size(self) -> int | None:
        """Number of weights that share a scale along the axis that is summed; None where not by blocks."""
        return block_size_of(self.granularity)


def block_size_of(granularity: str) -> int | None:
    """Returns N of "block:N" and "lpbq:N"; None for other granularities."""
    kind, _, size = granularity.partition(":")
    return int(size) if kind in ("block", "lpbq") else None


def _check_supergroups(value: Any) -> None:
    if not isinstance(value, tuple):
        raise SettingError("supergroups", f"supergroups={value!r}: expected a tuple of runs of operators")
    for run in value:
        check_texts("supergroups", run, 'operators, such as ("Conv", "Sigmoid")')
        if len(run) < 2:  # noqa: PLR2004 - nothing lies inside of less
            raise SettingError("supergroups", f"supergroups: {run!r} is no run; expected two operators or more")
