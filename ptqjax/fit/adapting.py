"""Weights and biases adapted to the rounding: what is done to a model once its encodings are known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.encodings.alignment import aligned
from ptqjax.encodings.biases import guard_biases, sums_in_fixed_point
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import ConfigError
from ptqjax.fit.bias_correction import correct_each
from ptqjax.fit.rounding import Solving, solve_rounding
from ptqjax.fit.ways import POLICIES
from ptqjax.ir import Model, Report
from ptqjax.placement.tables import tied_weights
from ptqjax.ranges.observing import Means
from ptqjax.ranges.pairs import Pairs, moves_for, pairs_for
from ptqjax.transforms.linear import HOSTS

_WHOLE = 8  # bits from which rounding to nearest is enough, where a channel has a scale of its own


class Adapted(NamedTuple):
    """A model that anticipates the rounding."""

    model: Model
    """The model."""
    encodings: Encodings
    """Its encodings; scales that would make a bias overflow are raised."""
    report: Report
    """What was done."""


def adapt(
    model: Model,
    encodings: Encodings,
    batches: Iterable[Mapping[str, Any]] | None,
    config: QuantizationConfig | None = None,
    *,
    frozen: Collection[str] = (),
) -> Adapted:
    """Returns the model with weights and biases adapted to the rounding as `config` says, its encodings, and a report.

    What the stage "correct" of `quantize` does: weights are kept from saturating 16-bit sums where the target has
    such, rounded as `config.rounding` says, biases corrected as `config.correct` says ("empirical" becomes "analytic"
    without data), and scales raised where a bias would not fit into int32.

    Args:
        model: The float model, scaled and calibrated.
        encodings: Its encodings.
        batches: Calibration data; None where there are none.
        config: The settings; None: the defaults.
        frozen: Tensors whose encodings were given: their integers stay what they are.

    Raises:
        PtqjaxError: As `solve_rounding` and `correct_biases` do.
        ConfigError: Weights are to be solved for, and there are no data.
    """
    config = config or QuantizationConfig()
    method = "analytic" if config.correct == "empirical" and batches is None else config.correct
    return adapt_each(model, [encodings], [config], batches, method=method, frozen=frozen)[0]


def adapt_each(
    model: Model,
    variants: Sequence[Encodings],
    configs: Sequence[QuantizationConfig],
    batches: Iterable[Mapping[str, Any]] | None,
    *,
    method: str,
    means: Means | None = None,
    frozen: Collection[str] = (),
) -> tuple[Adapted, ...]:
    """Returns the model adapted to each of several encodings, in order: its weights rounded, its biases corrected.

    Where weights are solved for, biases take the mean error on the way, layer by layer, unless the setting `correct` is
    "none"; else one pass corrects the biases of all variants.

    Args:
        model: The float model.
        variants: Encodings of it.
        configs: The settings of each.
        batches: Calibration data; None where there are none.
        method: How biases are corrected beside weights rounded to nearest, one of `config.settings.CORRECTIONS`.
        means: As `correct_each` takes them.
        frozen: Tensors whose encodings were given: their integers stay what they are.

    Raises:
        PtqjaxError: As `solve_rounding` and `correct_each` do.
        ConfigError: Weights are to be solved for, and there are no data.
    """
    pairs = [pairs_for(c, model, e, kept=frozen) for c, e in zip(configs, variants, strict=True)]
    has_data = batches is not None
    solved = [is_solved_for(model, e.encodings, c, has_data=has_data) for e, c in zip(pairs, configs, strict=True)]
    plain = [each for each, is_solved in zip(pairs, solved, strict=True) if not is_solved]
    corrected = iter(_corrected(model, plain, batches, method, means))
    found = []
    for each, config, is_solved in zip(pairs, configs, solved, strict=True):
        one = _solved(model, each, config, batches or (), frozen) if is_solved else next(corrected)
        found.append(_guarded(one, config))  # corrected biases may have grown
    return tuple(found)


def is_solved_for(model: Model, encodings: Encodings, config: QuantizationConfig, *, has_data: bool) -> bool:
    """Tells whether the roundings of weights are solved for under these encodings.

    Where `config.rounding` leaves it open: where a weight has fewer than 8 bits, or one step serves a whole weight and
    `config.effort` is not "fast", or it is "thorough".

    Raises:
        ConfigError: It is asked for, and there are no data.
    """
    check_data(config, has_data=has_data)
    if config.rounding is not None or not has_data or config.compatibility is not None:
        return config.rounding == "solved"
    return any(_is_coarse(encodings[name], config) for name in _weights(model) if name in encodings)


def check_data(config: QuantizationConfig, *, has_data: bool, label: str = "") -> None:
    """Checks that there are data where roundings are to be solved for.

    Raises:
        ConfigError: There are none; the message begins with `label`.
    """
    if config.rounding == "solved" and not has_data:
        raise ConfigError(
            f"{label}rounding='solved' needs calibration data, and there are none: give batches, or take "
            "rounding='nearest'"
        )


def _weights(model: Model) -> Iterator[str]:
    nodes = (node for node in model.graph.nodes if node.op_type in HOSTS and not node.domain)
    return (node.inputs[1] for node in nodes if node.inputs[1] in model.params)


def _is_coarse(encoding: Encoding, config: QuantizationConfig) -> bool:
    if encoding.float_format is not None or not np.all(np.asarray(encoding.enabled)):
        return False
    has_one_step = np.ndim(encoding.scale) == 0 and config.effort != "fast"
    return encoding.num_bits < _WHOLE or has_one_step or config.effort == "thorough"


def _corrected(
    model: Model,
    variants: Sequence[Pairs],
    batches: Iterable[Mapping[str, Any]] | None,
    method: str,
    means: Means | None,
) -> Iterator[Adapted]:
    if method == "none" or not variants:
        return (
            Adapted(each.applied(model) if each.has_changed else model, each.encodings, each.report)
            for each in variants
        )
    alike = aligned(model, [each.encodings for each in variants], adds=False).encodings  # one program for all
    weights = [each.weights for each in variants]
    every = correct_each(model, alike, batches, method=method, means=means, weights=weights)
    return (
        Adapted(changed, each.encodings, (*each.report, *report))
        for (changed, report), each in zip(every, variants, strict=True)
    )


def _solved(
    model: Model,
    pairs: Pairs,
    config: QuantizationConfig,
    batches: Iterable[Mapping[str, Any]],
    frozen: Collection[str],
) -> Adapted:
    first = _guarded(Adapted(model, pairs.encodings, pairs.report), config)  # raised later, a scale asks for others
    settings = Solving(
        seed=config.seed,
        samples=POLICIES[config.effort].rounding_samples,
        corrects=config.correct != "none",
        kept=frozenset(frozen) | set(tied_weights(model, load_target(config.target))),
        moved=moves_for(config, model, first.encodings),
    )
    solved, report = solve_rounding(model, first.encodings, batches, settings)
    return Adapted(solved, first.encodings, (*first.report, *report))


def _guarded(adapted: Adapted, config: QuantizationConfig) -> Adapted:
    encodings, report = guard_biases(adapted.model, adapted.encodings, fixed_point=sums_in_fixed_point(config))
    return Adapted(adapted.model, encodings, (*adapted.report, *report))
