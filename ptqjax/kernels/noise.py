"""Predicted noise of a quantized network's output as a function of the scales between its layers.

Every quantizer adds noise of variance d^2 / 12, d its step; G, the power gain of each channel, carries it to the
output. With theta the log scales, and everything in the units before scaling (there the gains do not depend on theta):

    activations   sum_c G_c e^(2 theta_c) d^2 / 12,   d = (max_c h_c e^-theta_c + max_c l_c e^-theta_c) / steps
    weights       sum_oi G_o e^(2 theta_o) P_i e^(-2 theta_i) d^2 / 12,  d = max_oi |W_oi| e^(theta_i - theta_o) / steps

h and l are how far a channel reaches above and below zero, P the power of an input over the taps. Sums, products and
maxima of exponentials of theta: the logarithm of the whole is convex (a geometric program), so that what descent finds
is the optimum.

All tensors and weights of a network lie in a few stacked arrays (`stack_terms`), and their sums and maxima are taken by
segments: one small program, whose compilation takes as long for a hundred layers as for one.

Source: ours. Meller et al., Same, Same But Different (ICML 2019), and Nagel et al. (ICCV 2019) look at weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ptqjax.kernels.brief import FEW_TIMES, SOON, are_taken, brief_options
from ptqjax.pytrees import PyTreeNode, static_field

NOTHING = -60.0
"""Logarithm that stands for zero: finite, so that no difference is nan."""

_TILE = 32
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


class _Channels(PyTreeNode):
    """Channels of all tensors in a row, and what they belong to; the last is a filler that counts nowhere."""

    scales: Any
    """Number of the scale, [n]."""
    owner: Any
    """What the channel belongs to, counted from 0, sorted, [n]."""
    weigh: Any
    """Logarithm of the gain, or of the power, [n]."""


class Terms(PyTreeNode):
    """The noise of all rounded activations and weights of a network, as `stack_terms` stacks it."""

    activations: _Channels
    """Channels of activations, by tensor."""
    reach: Any
    """How far these reach above and below zero, logarithms, [2, n]."""
    rows: _Channels
    """Output channels of weights, by weight and group."""
    columns: _Channels
    """Input channels of weights, by weight and group."""
    weight_of_group: Any
    """The weight that each group belongs to, sorted, [g]; the last group is the filler's."""
    has_own_step: Any
    """Whether the rows of a group have a step each, [g]."""
    tiles: Any
    """Largest magnitudes over the taps, logarithms, cut into tiles of rows and columns, [t, 32, 32]."""
    tile_rows: Any
    """The rows of a tile, [t, 32]."""
    tile_columns: Any
    """The columns of a tile, [t, 32]."""
    pairs: Any
    """The magnitudes of `tiles` in groups too small for a tile, [p]."""
    pair_rows: Any
    """The row of each, [p]."""
    pair_columns: Any
    """The column of each, [p]."""
    num_tensors: int = static_field()
    """How many activations there are."""


def stack_terms(activations: Sequence[ActivationNoise], weights: Sequence[WeightNoise]) -> Terms:
    """Returns the terms of a network in a few arrays (NumPy), whose number does not depend on how many there are."""
    groups = [len(term.ranges) for term in weights]
    first = np.cumsum([0, *groups])
    owners = [np.arange(count)[:, None] + start for count, start in zip(groups, first, strict=False)]
    rows = _channels([(term.outputs, owner, term.gain) for term, owner in zip(weights, owners, strict=True)])
    columns = _channels([(term.inputs, owner, term.power) for term, owner in zip(weights, owners, strict=True)])
    tiles, pairs = _entries(weights, fillers=(len(rows.scales) - 1.0, len(columns.scales) - 1.0))
    return Terms(
        activations=_channels([(term.scales, index, term.gain) for index, term in enumerate(activations)]),
        reach=np.stack(
            [_joined([np.asarray(getattr(term, end)) for term in activations], NOTHING) for end in ("above", "below")]
        ),
        rows=rows,
        columns=columns,
        weight_of_group=np.repeat(np.arange(len(weights) + 1), [*groups, 1]).astype(np.int32),
        has_own_step=np.repeat([*(term.per_channel for term in weights), False], [*groups, 1]),
        tiles=tiles[0],
        tile_rows=tiles[1],
        tile_columns=tiles[2],
        pairs=pairs[0],
        pair_rows=pairs[1],
        pair_columns=pairs[2],
        num_tensors=len(activations),
    )


def _channels(parts: Sequence[tuple[Any, Any, Any]]) -> _Channels:
    """Returns the channels of parts (numbers of scales, owners, gains or powers) in a row, and a filler."""
    flat = [[each.ravel() for each in np.broadcast_arrays(*part)] for part in parts]
    scales, owners, weigh = ([part[i] for part in flat] for i in range(3))
    last = max((int(each.max()) for each in owners), default=-1) + 1
    return _Channels(
        scales=_joined(scales, 0.0).astype(np.int32),
        owner=_joined(owners, float(last)).astype(np.int32),
        weigh=_joined(weigh, NOTHING),
    )


def _joined(parts: list[np.ndarray], filler: float) -> np.ndarray:
    return np.concatenate([*parts, [filler]]).astype(np.float32)


def _entries(weights: Sequence[WeightNoise], *, fillers: tuple[float, float]) -> tuple[Any, Any]:
    """Returns magnitudes with their rows and columns, in tiles and one by one; `fillers`: row and column of none."""
    tiles: list[Any] = [(np.full((1, _TILE, _TILE), NOTHING), *(np.full((1, _TILE), filler) for filler in fillers))]
    pairs: list[Any] = [(np.array([NOTHING]), *(np.array([filler]) for filler in fillers))]
    row, column = 0, 0
    for term in weights:
        groups, outputs, inputs = term.ranges.shape
        rows = row + np.arange(groups * outputs).reshape(groups, outputs)
        columns = column + np.arange(groups * inputs).reshape(groups, inputs)
        row, column = row + rows.size, column + columns.size
        if outputs * inputs < _TILE:
            every = np.broadcast_arrays(term.ranges, rows[:, :, None], columns[:, None, :])
            pairs.append(tuple(each.ravel() for each in every))
            continue
        cut = _cut(_cut(term.ranges, 1, NOTHING), 3, NOTHING).transpose(0, 1, 3, 2, 4)  # [g, rows, columns, 32, 32]
        its_rows, its_columns = _cut(rows, 1, fillers[0])[:, :, None], _cut(columns, 1, fillers[1])[:, None]
        shape = cut.shape[:3]
        its_rows, its_columns = (np.broadcast_to(each, (*shape, _TILE)) for each in (its_rows, its_columns))
        tiles.append((cut.reshape(-1, _TILE, _TILE), its_rows.reshape(-1, _TILE), its_columns.reshape(-1, _TILE)))
    return _together(tiles), _together(pairs)


def _together(parts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns magnitudes, rows and columns of all parts, one after the other."""
    magnitudes, rows, columns = (np.concatenate(each) for each in zip(*parts, strict=True))
    return magnitudes.astype(np.float32), rows.astype(np.int32), columns.astype(np.int32)


def _cut(values: np.ndarray, axis: int, filler: float) -> np.ndarray:
    """Returns `values` with an axis cut into [pieces, 32]; the last piece is filled up."""
    missing = -values.shape[axis] % _TILE
    padding = [(0, missing if i == axis else 0) for i in range(values.ndim)]
    filled = np.pad(values, padding, constant_values=filler)
    return filled.reshape(*values.shape[:axis], -1, _TILE, *values.shape[axis + 1 :])


def output_noise(
    log_scales: Float[Array | np.ndarray, " s"],
    terms: Terms,
    *,
    activation_steps: int,
    weight_steps: int,
    sharpness: Any = 200.0,
) -> Log:
    """Returns the logarithm of the whole noise; maxima are smooth, at most log(n) / sharpness too large."""
    theta = jnp.asarray(log_scales)
    noises = (
        _activation_noise(theta, terms, sharpness) - 2 * np.log(activation_steps),
        _weight_noise(theta, terms, sharpness) - 2 * np.log(weight_steps),
    )
    return jax.nn.logsumexp(jnp.concatenate(noises)) - np.float32(np.log(12.0))


def _activation_noise(theta: Any, terms: Terms, sharpness: Any) -> Any:
    """Returns the logarithm of what each tensor's rounding adds, times 12 steps^2; the last is the filler's."""
    channels, num = terms.activations, terms.num_tensors + 1
    own = theta[channels.scales]
    above, below = (_log_sum(sharpness * (reach - own), channels.owner, num) / sharpness for reach in terms.reach)
    return _log_sum(channels.weigh + 2 * own, channels.owner, num) + 2 * jnp.logaddexp(above, below)


def _weight_noise(theta: Any, terms: Terms, sharpness: Any) -> Any:
    """Returns the logarithm of what each group's rounding adds, times 12 steps^2; the last is the filler's."""
    rows, columns, num = terms.rows, terms.columns, len(terms.weight_of_group)
    own, others = theta[rows.scales], theta[columns.scales]
    widths, weights = _row_widths(others, terms, sharpness), jnp.asarray(terms.weight_of_group)[rows.owner]
    common = _log_sum(sharpness * (widths - own), weights, num) / sharpness
    # A row with a step of its own leaves it in proportion to its scale, which so drops out.
    step = jnp.where(jnp.asarray(terms.has_own_step)[rows.owner], widths, own + common[weights])
    leaving = _log_sum(rows.weigh + 2 * step, rows.owner, num)
    return leaving + _log_sum(columns.weigh - 2 * others, columns.owner, num)


def _row_widths(columns: Any, terms: Terms, sharpness: Any) -> Any:
    """Returns the smooth maximum over the inputs of each row's magnitudes, the inputs' scales applied."""
    in_tiles = jax.nn.logsumexp(sharpness * (terms.tiles + columns[terms.tile_columns][:, None, :]), axis=2)
    in_pairs = sharpness * (terms.pairs + columns[terms.pair_columns])
    values = jnp.concatenate([in_tiles.reshape(-1), in_pairs])
    owner = jnp.concatenate([terms.tile_rows.reshape(-1), terms.pair_rows])
    return _log_sum(values, owner, len(terms.rows.scales)) / sharpness


def _log_sum(values: Any, owner: Any, num: int) -> Any:
    """Returns log(sum(exp(values))) over the values of each owner; `NOTHING` where there are none."""
    largest = jax.ops.segment_max(jax.lax.stop_gradient(values), owner, num)
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = jax.ops.segment_sum(jnp.exp(values - largest[owner]), owner, num)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + largest, NOTHING)


def least_noise(
    start: Float[np.ndarray, " s"],
    terms: Terms,
    *,
    activation_steps: int,
    weight_steps: int,
    num_steps: int = 60,
    rate: float = 0.1,
) -> tuple[np.ndarray, float, float]:
    """Returns log scales of least predicted noise, and the logarithm of the noise before and after.

    Adam on the logarithm of the noise, which is convex, with a rate that falls along a cosine. Scale 0 stays at one.
    """
    theta = np.asarray(start, np.float32)
    on_cpu = _descend_few_times if are_taken(FEW_TIMES) else _descend
    descend = _descend_soon if brief_options(terms) else on_cpu
    scales, before, after = descend(theta, terms, (activation_steps, weight_steps), num_steps, rate)
    return np.asarray(scales, np.float64), float(before), float(after)


def _descended(start: Any, terms: Any, steps: tuple[int, int], num_steps: int, rate: float) -> tuple[Any, Any, Any]:
    import optax  # noqa: PLC0415  (slow to import, and needed where scales are searched alone)

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def noise(theta: Any, sharpness: Any) -> Any:
        theta = theta.at[0].set(0.0)
        return output_noise(theta, terms, activation_steps=steps[0], weight_steps=steps[1], sharpness=sharpness)

    def step(carry: tuple[Any, Any], sharpness: Any) -> tuple[tuple[Any, Any], Any]:
        theta, state = carry
        value, slope = jax.value_and_grad(noise)(theta, sharpness)
        change, state = optimizer.update(slope, state)
        return (optax.apply_updates(theta, change), state), value

    sharpness = jnp.geomspace(30.0, 200.0, num_steps)
    (theta, _), values = jax.lax.scan(step, (start, optimizer.init(start)), sharpness)
    theta = theta.at[0].set(0.0)
    return theta, values[0], noise(theta, 200.0)


_descend, _descend_few_times, _descend_soon = (
    jax.jit(_descended, static_argnums=(2, 3, 4), compiler_options=options) for options in (None, FEW_TIMES, SOON)
)
