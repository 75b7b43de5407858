"""Predicted noise of a quantized network's output as a function of the scales between its layers.

Every quantizer adds noise of variance d^2 / 12, d its step; G, the power gain of each channel, carries it to the
output. With theta the log scales, and everything in the units before scaling (there the gains do not depend on theta):

    activations   sum_c G_c e^(2 theta_c) d^2 / 12,   d = (max_c h_c e^-theta_c + max_c l_c e^-theta_c) / steps
    weights       sum_oi G_o e^(2 theta_o) P_i e^(-2 theta_i) d^2 / 12,  d = max_oi |W_oi| e^(theta_i - theta_o) / steps

h and l are how far a channel reaches above and below zero, P the power of an input over the taps. Sums, products and
maxima of exponentials of theta: the logarithm of the whole is convex (a geometric program), so that what descent finds
is the optimum.

Source: ours. Meller et al., Same, Same But Different (ICML 2019), and Nagel et al. (ICCV 2019) look at weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptqjax.pytrees import PyTreeNode, static_field

NOTHING = -60.0
"""Logarithm that stands for zero: finite, so that no difference is nan."""

Log = Float[Array, ""]


class ActivationNoise(PyTreeNode):
    """A tensor that is rounded, per channel; all but the numbers of scales are logarithms."""

    above: Any
    """Reach above zero, [c]."""
    below: Any
    """Reach below zero, [c]."""
    gain: Any
    """Power gain to the output, [c]."""
    scales: Any
    """Number of the scale, [c]."""


class WeightNoise(PyTreeNode):
    """A weight that is rounded; all but the numbers of scales are logarithms."""

    ranges: Any
    """Largest magnitude over the taps, [groups, outputs, inputs]."""
    gain: Any
    """Power gain of the outputs, [groups, outputs]."""
    power: Any
    """Power of the inputs, times taps, [groups, inputs]."""
    outputs: Any
    """Numbers of the outputs' scales, [groups, outputs]."""
    inputs: Any
    """Numbers of the inputs' scales, [groups, inputs]."""
    per_channel: bool = static_field(default=False)
    """Whether each output channel has a step of its own."""


def activation_noise(log_scales: Any, term: ActivationNoise, *, steps: int, sharpness: Any) -> Log:
    """Returns the logarithm of the noise that a tensor's rounding adds to the output."""
    theta = log_scales[term.scales]
    width = jnp.logaddexp(
        _largest(term.above - theta, sharpness=sharpness), _largest(term.below - theta, sharpness=sharpness)
    )
    return jax.nn.logsumexp(term.gain + 2 * theta) + 2 * width - jnp.log(12.0 * steps**2)


def weight_noise(log_scales: Any, term: WeightNoise, *, steps: int, sharpness: Any) -> Log:
    """Returns the logarithm of the noise that a weight's rounding adds to the output."""
    rows, columns = log_scales[term.outputs], log_scales[term.inputs]
    arriving = jax.nn.logsumexp(term.power - 2 * columns, axis=1)
    if term.per_channel:  # a row's own scale leaves its step in proportion: it drops out
        width = _largest(term.ranges + columns[:, None, :], axis=2, sharpness=sharpness)
        leaving = jax.nn.logsumexp(term.gain + 2 * width, axis=1)
        return jax.nn.logsumexp(leaving + arriving) - jnp.log(12.0 * steps**2)
    width = _largest(term.ranges + columns[:, None, :] - rows[:, :, None], sharpness=sharpness)
    leaving = jax.nn.logsumexp(term.gain + 2 * rows, axis=1)
    return jax.nn.logsumexp(leaving + arriving) + 2 * width - jnp.log(12.0 * steps**2)


def output_noise(
    log_scales: Float[Array | np.ndarray, " s"],
    activations: Sequence[ActivationNoise],
    weights: Sequence[WeightNoise],
    *,
    activation_steps: int,
    weight_steps: int,
    sharpness: Any = 200.0,
) -> Log:
    """Returns the logarithm of the whole noise; maxima are smooth, at most log(n) / sharpness too large."""
    terms = [activation_noise(log_scales, term, steps=activation_steps, sharpness=sharpness) for term in activations]
    terms += [weight_noise(log_scales, term, steps=weight_steps, sharpness=sharpness) for term in weights]
    return jax.nn.logsumexp(jnp.stack(terms))


def least_noise(
    start: Float[np.ndarray, " s"],
    activations: Sequence[ActivationNoise],
    weights: Sequence[WeightNoise],
    *,
    activation_steps: int,
    weight_steps: int,
    num_steps: int = 150,
    rate: float = 0.05,
) -> tuple[np.ndarray, float, float]:
    """Returns log scales of least predicted noise, and the logarithm of the noise before and after.

    Adam on the logarithm of the noise, which is convex, with a rate that falls along a cosine. Scale 0 stays at one.
    """
    theta = jnp.asarray(start, jnp.float32)
    steps = (activation_steps, weight_steps)
    scales, before, after = _descend(theta, (tuple(activations), tuple(weights)), steps, num_steps, rate)
    return np.asarray(scales, np.float64), float(before), float(after)


def _largest(values: Any, *, sharpness: Any, axis: int | None = None) -> Any:
    """Returns a smooth maximum."""
    return jax.nn.logsumexp(sharpness * values, axis=axis) / sharpness


@partial(jax.jit, static_argnums=(2, 3, 4))
def _descend(start: Any, terms: Any, steps: tuple[int, int], num_steps: int, rate: float) -> tuple[Any, Any, Any]:
    import optax  # noqa: PLC0415  (slow to import, and needed where scales are searched alone)

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def noise(theta: Any, sharpness: Any) -> Any:
        theta = theta.at[0].set(0.0)
        return output_noise(theta, *terms, activation_steps=steps[0], weight_steps=steps[1], sharpness=sharpness)

    def step(carry: tuple[Any, Any], sharpness: Any) -> tuple[tuple[Any, Any], Any]:
        theta, state = carry
        value, slope = jax.value_and_grad(noise)(theta, sharpness)
        change, state = optimizer.update(slope, state)
        return (optax.apply_updates(theta, change), state), value

    sharpness = jnp.geomspace(30.0, 200.0, num_steps)
    (theta, _), values = jax.lax.scan(step, (start, optimizer.init(start)), sharpness)
    theta = theta.at[0].set(0.0)
    return theta, values[0], noise(theta, 200.0)
