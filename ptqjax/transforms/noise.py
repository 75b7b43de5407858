"""Scales of least predicted output noise: every quantizer of the graph counts by what its noise does to the outputs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.errors import ConfigError
from ptqjax.ir import Model, Record, Report
from ptqjax.kernels.equalization import tap_ranges
from ptqjax.kernels.noise import (
    NOTHING,
    ActivationNoise,
    WeightNoise,
    least_noise,
    output_noise,
    stack_terms,
    unscaled_noise,
)
from ptqjax.transforms.balance import weight_balance
from ptqjax.transforms.behaviour import Behaviour, implied_behaviour
from ptqjax.transforms.linear import weight_view
from ptqjax.transforms.relaxation import relax_bounds
from ptqjax.transforms.rescale import rescale
from ptqjax.transforms.scaling import inside_activations, scaling_report
from ptqjax.transforms.ties import Ties, find_ties

_NAME = "scale_channels"
_WORTHWHILE = 0.1  # dB: less is what convergence left to an earlier run

_Sources = tuple[tuple[ActivationNoise, ...], tuple[WeightNoise, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """How fine the grids will be."""

    weights: int = 127
    """Largest code of a weight: 127 for int8."""
    activations: int = 255
    """Number of steps of an activation's grid: 255 for uint8."""
    per_channel: bool = False
    """Whether each output channel of a weight has a step of its own."""


def scale_for_noise(
    model: Model,
    behaviour: Mapping[str, Behaviour] | None = None,
    *,
    steps: Steps | None = None,
    bounds: str = "exact",
    beyond: Mapping[str, float] | None = None,
    rounded: Container[str] | None = None,
) -> tuple[Model, Report]:
    """Returns the model with channels scaled for the least predicted output noise, function kept, and the report.

    The prediction counts each rounded tensor and weight by what its noise does to the outputs (`kernels.noise`); it is
    convex in the log scales, so that there is one optimum, found by descent. Takes a compilation, then about a second.

    Args:
        model: The model, batch norms folded.
        behaviour: How its tensors' channels behave, as `fit.observe_behaviour` measured; None: as statistics imply.
        steps: How fine the grids will be; None: 8 bits per tensor.
        bounds: See `relax_bounds`.
        beyond: See `relax_bounds`.
        rounded: The activations that will be rounded; None: all whose behaviour is known.

    Returns:
        The model, a record of the prediction for the whole network, one for each tied set, and one for each layer that
        cannot be scaled.

    Raises:
        ConfigError: `bounds` is unknown, or nothing is known of any tensor.
    """
    steps = steps or Steps()
    model, left, relaxed = relax_bounds(model, bounds=bounds, beyond=beyond)
    ties, known = find_ties(model, left=left), implied_behaviour(model) if behaviour is None else behaviour
    balance = weight_balance(model, ties)
    terms = noise_terms(model, ties, known, per_channel=steps.per_channel, rounded=rounded)
    if not ties.sets:
        return model, (*relaxed, *scaling_report(ties, balance, None, []))
    if behaviour is not None and not (terms[0] and terms[1]):
        return model, (*relaxed, *scaling_report(ties, balance, None, [""] * len(ties.sets)))
    if not terms[0] or not terms[1]:
        raise ConfigError(
            "scaling='noise' needs to know how activations behave, and no batch norm tells; pass the model with its "
            "batch norms, or a behaviour observed on data, or scale for 'weights'"
        )
    found, before, after = noise_optimal_scales(
        ties, terms, weight_steps=steps.weights, activation_steps=steps.activations
    )
    is_worthwhile = after - before > _WORTHWHILE
    scales = found if is_worthwhile else None
    whole = Record(
        transform=_NAME,
        done=is_worthwhile,
        what="scales of least predicted output noise" if is_worthwhile else "left alone",
        where=tuple(spec.name for spec in model.graph.outputs),
        reason="" if is_worthwhile else "no scales have clearly less noise",
        before={"predicted SQNR, dB": before},
        after={"predicted SQNR, dB": after if is_worthwhile else before},
    )
    reasons = ["for the least predicted output noise"] * len(ties.sets)
    report = scaling_report(ties, balance, scales, reasons)
    return (rescale(model, ties, found) if is_worthwhile else model), (*relaxed, whole, *report)


def noise_terms(
    model: Model,
    ties: Ties,
    behaviour: Mapping[str, Behaviour],
    *,
    per_channel: bool = False,
    corrected: bool = True,
    rounded: Container[str] | None = None,
) -> _Sources:
    """Returns the sources of noise in `model`, as `kernels.noise` takes them.

    Args:
        model: The model.
        ties: Its ties.
        behaviour: Of its tensors, by name; what is not there is no source of noise.
        per_channel: Whether each output channel of a weight has a step of its own.
        corrected: Whether biases will be corrected, so that a weight's error counts by the variance of what it
            multiplies and not by its mean square.
        rounded: The activations that will be rounded; None: all in `behaviour`.
    """
    inside = inside_activations(model)
    seen = [name for name in behaviour if name not in inside and name in ties.channels]
    seen = seen if rounded is None else [name for name in seen if name in rounded]
    activations = (_activation(ties, name, behaviour[name]) for name in seen if _fits(ties, name, behaviour[name]))
    weights = (
        _weight(model, ties, output, behaviour, per_channel=per_channel, corrected=corrected) for output in ties.layers
    )
    return tuple(activations), tuple(term for term in weights if term is not None)


def covers_noise(model: Model, behaviour: Mapping[str, Behaviour], *, per_channel: bool = False) -> bool:
    """Tells whether `behaviour` is known of all that predicted noise of scalable layers needs."""
    ties = find_ties(model)
    activations, weights = noise_terms(model, ties, behaviour, per_channel=per_channel)
    return bool(activations) and len(weights) == len(ties.layers)


def unscaled_decibels(model: Model, behaviour: Mapping[str, Behaviour], steps: Steps) -> float | None:
    """Returns the predicted noise of the model as it is, in dB below the output's power; compiles nothing.

    None where `behaviour` does not tell all that `covers_noise` asks for.
    """
    ties = find_ties(model)
    activations, weights = noise_terms(model, ties, behaviour, per_channel=steps.per_channel)
    if not activations or len(weights) != len(ties.layers):
        return None
    parts = unscaled_noise(activations, weights, activation_steps=steps.activations, weight_steps=steps.weights)
    return _decibels(float(np.log(sum(part.sum() for part in parts))))


def noise_optimal_scales(
    ties: Ties,
    terms: _Sources,
    *,
    weight_steps: int,
    activation_steps: int,
    start: Any | None = None,
    num_steps: int = 60,
) -> tuple[np.ndarray, float, float]:
    """Returns log scales [num_scales], and the predicted noise before and after in dB below the output's power.

    Args:
        ties: The ties that the scales are of.
        terms: The sources of noise, see `noise_terms`.
        weight_steps: Largest code of a weight: 127 for int8.
        activation_steps: Number of steps of an activation's grid: 255 for uint8.
        start: Where to begin; None for ones.
        num_steps: Steps of descent.
    """
    start = np.zeros(ties.num_scales) if start is None else np.asarray(start)
    steps = {"activation_steps": activation_steps, "weight_steps": weight_steps}
    scales, before, after = least_noise(start, stack_terms(*terms), **steps, num_steps=num_steps)
    return scales, _decibels(before), _decibels(after)


def predicted_decibels(terms: _Sources, log_scales: Any, *, weight_steps: int, activation_steps: int) -> float:
    """Returns the predicted noise, in dB below the output's power, at given scales."""
    noise = output_noise(
        np.asarray(log_scales, np.float32),
        stack_terms(*terms),
        activation_steps=activation_steps,
        weight_steps=weight_steps,
    )
    return _decibels(float(noise))


def _decibels(log_noise: float) -> float:
    return float(-10 / np.log(10) * log_noise)


def _fits(ties: Ties, name: str, known: Behaviour) -> bool:
    return np.shape(known.low) == ties.channels[name].scales.shape


def _activation(ties: Ties, name: str, known: Behaviour) -> ActivationNoise:
    return ActivationNoise(
        above=_log(np.maximum(known.high, 0)),
        below=_log(np.maximum(-known.low, 0)),
        gain=_log(known.gain),
        scales=ties.channels[name].scales,
    )


def _weight(
    model: Model, ties: Ties, output: str, behaviour: Mapping[str, Behaviour], *, per_channel: bool, corrected: bool
) -> WeightNoise | None:
    tied = ties.layers[output]
    leaving = behaviour.get(output)
    power = _input_power(behaviour.get(tied.layer.input), tied.layer.num_inputs, corrected=corrected)
    if leaving is None or power is None or np.size(leaving.gain) != tied.layer.num_outputs:
        return None
    view = weight_view(model, tied.layer)
    groups, outputs, inputs, taps = view.shape
    return WeightNoise(
        ranges=_log(tap_ranges(view)),
        gain=_log(leaving.gain).reshape(groups, outputs),
        power=_log(power * taps).reshape(groups, inputs),
        outputs=tied.outputs.reshape(groups, outputs),
        inputs=tied.inputs.reshape(groups, inputs),
        per_channel=per_channel,
    )


def _input_power(known: Behaviour | None, count: int, *, corrected: bool) -> np.ndarray | None:
    """Returns the power per input channel; behind a Flatten, each channel stands for several inputs."""
    if known is None or count % np.size(known.power):
        return None
    power = np.maximum(known.power - known.mean**2, 0) if corrected else known.power
    return np.repeat(power, count // np.size(power))


def _log(values: Any) -> np.ndarray:
    """Returns the logarithm, no less than `NOTHING`."""
    values = np.asarray(values, np.float64)
    return np.maximum(np.log(np.where(values > 0, values, 1.0)), NOTHING) * (values > 0) + NOTHING * (values <= 0)
