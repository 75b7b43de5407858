"""The quantized model with what is asked of it while it is in the making: one program to correct biases and to judge.

`simulate` is for calls without number; this is for a few passes over the data. Parameters come rounded, so that it
compiles soon, and what differs between its uses is an argument and not another program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ptqjax.encodings.encoding import Encodings
from ptqjax.ir import Graph, Model
from ptqjax.kernels.brief import FEW_TIMES
from ptqjax.lowering import axis_in_layout, compiled, interpret
from ptqjax.ranges.observing import Axes, channel_means
from ptqjax.simulation import fake_quantization, round_parameters


class Outcome(NamedTuple):
    """What a pass over one batch gives."""

    errors: dict[str, Any]
    """The mean of each channel less what was expected, by layer, [c]."""
    outputs: dict[str, Any]
    """The outputs by name."""


class QuantizedPass:
    """A model under its encodings, its parameters rounded once for all batches."""

    def __init__(self, model: Model, encodings: Encodings, axes: Axes, *, biases: bool) -> None:
        """Rounds the parameters.

        Args:
            model: The float model.
            encodings: Of weights and activations, concrete; where none is enabled, the model runs in float.
            axes: The layers whose mean outputs are compared with expected ones, each with the axis of its channels.
            biases: Whether biases are rounded as well: not while they are corrected, for they are rounded once, behind.
        """
        rounded, self._encodings = round_parameters(model, encodings, biases=biases)
        self._params = OnDevices(rounded.params)
        self._plan = _Plan(graph=rounded.graph, axes=axes)

    def run(
        self, inputs: Mapping[str, Any], means: Mapping[str, Any], *, is_corrected: bool, device: Any = None
    ) -> Outcome:
        """Returns what a batch gives.

        Args:
            inputs: Inputs by name.
            means: The mean that is expected of each channel, by layer, [c].
            is_corrected: Whether each layer's mean error is taken out before the next layer sees it.
            device: Where to compute; None: where JAX chooses.
        """
        expected = {name: means[name] for name, _ in self._plan.axes}
        target = _Target(expected, np.asarray(is_corrected))
        return Outcome(*_run(self._plan, self._params.on(device), self._encodings, target, inputs))


class OnDevices:
    """Parameters, put on each device that asks for them once."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        """Takes the parameters by name."""
        self._params = dict(params)
        self._there: dict[Any, Any] = {}

    def on(self, device: Any) -> Any:
        """Returns the parameters on a device; None for the one that JAX chooses."""
        if device not in self._there:
            self._there[device] = jax.device_put(self._params, device)
        return self._there[device]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is static in the program."""

    graph: Graph
    """The model's graph."""
    axes: Axes
    """The outputs of layers that are looked at, with the axes of their channels."""


class _Target(NamedTuple):
    """What the layers are compared with."""

    means: dict[str, Any]
    """The mean that is expected of each channel, by layer, [c]."""
    is_corrected: Any
    """Whether the difference is taken out, boolean scalar."""


@partial(compiled, is_brief=True, options=FEW_TIMES)
def _run(
    plan: _Plan,
    params: Mapping[str, Any],
    encodings: Encodings,
    target: _Target,
    batch: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    axis_of = dict(plan.axes)
    quantize = fake_quantization(Model(graph=plan.graph, params=dict(params)), encodings)

    def correct(name: str, value: Array, channel_axis: int | None) -> tuple[Array, Array | None]:
        error = None
        if name in axis_of:
            axis = axis_in_layout(axis_of[name] % value.ndim, channel_axis)
            error = channel_means(value, axis_of[name], channel_axis) - target.means[name]
            taken = jnp.where(target.is_corrected, error, 0)
            value = value - jnp.expand_dims(taken, tuple(i for i in range(value.ndim) if i != axis))
        if name in encodings:
            value, _ = quantize(name, value, channel_axis)
        return value, error

    outputs, errors = interpret(plan.graph, params, batch, intercept=correct)
    return errors, outputs
