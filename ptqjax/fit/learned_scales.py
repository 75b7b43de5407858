"""Learned equalization: log scales by gradient descent on what quantization does to the outputs.

The function that the float model computes is the same at every step, since all that changes are scales between layers
(and shifts, where nothing lies between). What is minimized is the noise of the simulated model's outputs, through the
straight-through estimator, with each layer's mean error taken out as bias correction will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.data.batches import num_samples
from ptqjax.data.regroup import can_be_regrouped, first_samples, grouped, joined
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import ConfigError, DataError
from ptqjax.fit.behaviour import observe_behaviour
from ptqjax.ir import Model, Record, Report
from ptqjax.kernels.brief import FEW_TIMES, are_taken, brief_options
from ptqjax.lowering import axis_in_layout, interpret
from ptqjax.placement.place import place_as_found
from ptqjax.ranges.calibrate import calibrate
from ptqjax.simulation import fake_quantization
from ptqjax.transforms.behaviour import Behaviour
from ptqjax.transforms.linear import linear_layers
from ptqjax.transforms.rescale import rescale
from ptqjax.transforms.shifts import find_shiftable, shift
from ptqjax.transforms.ties import Ties, find_ties

_NAME = "learn_scales"
_LOSSES = ("sqnr", "kl")
_EVERY = 10  # steps between looks at the samples held back
_PATIENCE = 3  # looks without an improvement, after which learning ends


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """How scales are learned."""

    loss: str = "sqnr"
    """What is minimized: the noise of the outputs against their power ("sqnr"), or the divergence of the classes'
    probabilities, softmax of the first output ("kl")."""
    num_steps: int = 100
    """Steps of Adam, at most: it ends where samples held back do not improve. The rate falls along a cosine."""
    batch_size: int = 8
    """Samples a step."""
    rate: float = 0.02
    """Rate at the start, in units of log scales."""
    held_back: float = 0.25
    """Share of the samples that is only looked at, to keep the best step."""
    seed: int = 0
    """The seed of the order in which samples are drawn."""
    shifts: bool = True
    """Whether shifts between layers without an activation are learned as well."""

    def __post_init__(self) -> None:
        if self.loss not in _LOSSES:
            raise ConfigError(f"loss={self.loss!r} is unknown; expected one of {', '.join(_LOSSES)}")
        if not 0 < self.held_back < 1:
            raise ConfigError(f"held_back={self.held_back}: expected a share of the samples, above 0 and below 1")


class _Variables(NamedTuple):
    """What is learned."""

    scales: Any
    """Log scales, [num_scales]."""
    shifts: dict[str, Any]
    """How far channels are lowered, in standard deviations of the channel, by tensor."""


class _Sample(NamedTuple):
    """A batch and what the float model makes of it."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    means: dict[str, Any]
    """Mean per channel of each layer's output."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is static while scales are learned."""

    model: Model
    """The model at the start, its bounds per channel already."""
    ties: Ties
    """Its ties."""
    behaviour: Mapping[str, Behaviour]
    """The behaviour of the model's tensors."""
    encodings: Encodings
    """At the start."""
    roots: Mapping[str, str]
    """For each activation with an encoding, the tensor whose range decides."""
    learning: Learning
    """The settings."""


def learn_scales(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    config: QuantizationConfig | None = None,
    learning: Learning | None = None,
    *,
    bounds: str = "exact",
) -> tuple[Model, Report]:
    """Returns the model with channels scaled for the least noise of its quantized outputs, function kept.

    Begins at the scales that the model has: equalize it before. Samples held back decide which step is kept, the first
    included, so that what is learned is no worse on them than what was given.

    Args:
        model: The float model, folded and equalized in closed form.
        batches: Calibration data: arrays by input name, samples along the first axis.
        config: Types, granularity and ranges that the model will be quantized with.
        learning: How to learn.
        bounds: "exact": bounds become one per channel; else no Clip that is left is scaled.

    Raises:
        DataError: The batches do not fit the model, or there are fewer than two samples.
        ConfigError: A setting of `learning` is not allowed.
    """
    config, learning = config or QuantizationConfig(), learning or Learning()
    given, limited = model, find_ties(model).limited
    left = [] if bounds == "exact" else [found.node.output for found in limited if found.node.op_type == "Clip"]
    ties = find_ties(model, left=left)
    model = rescale(model, ties, np.zeros(ties.num_scales))  # bounds become one per channel
    ties = find_ties(model, left=left)
    if not ties.sets:
        return model, (Record(transform=_NAME, done=False, what="left alone", where=(), reason="nothing is tied"),)
    batches = first_samples(model.graph, batches)
    used, held = _divided(model, batches, learning)
    size = max(num_samples(batch) for batch in batches)
    as_seen = replace(config, headroom=config.headroom or 1.0)  # what is learned is what meets the data
    encodings = calibrate(model, _regrouped(model, [sample.inputs for sample in used], size), as_seen)
    task = _Task(
        model=model,
        ties=ties,
        behaviour=observe_behaviour(model, [sample.inputs for sample in used]),
        encodings=encodings,
        roots={site.tensor: site.root for site in place_as_found(model, config, encodings).sites},
        learning=learning,
    )
    best, losses = _descended(task, used, held)
    is_better = losses[1] < losses[0]
    return _applied(task, jax.device_get(best)) if is_better else given, (_record(task, best, losses),)


def _divided(model: Model, batches: Any, learning: Learning) -> tuple[list[_Sample], list[_Sample]]:
    """Returns the samples to learn from and those held back, in batches, with the float model's answers."""
    found = batches
    axes = _layer_axes(find_ties(model))
    answer = jax.jit(lambda inputs: _answers(model, axes, inputs))
    if can_be_regrouped(model.graph, found):
        samples = joined(found)
        count = len(next(iter(samples.values())))
        order = np.random.default_rng(learning.seed).permutation(count)
        num_held = max(1, round(count * learning.held_back))
        _check_count(count - num_held, count, "samples")
        parts = [grouped(samples, part, learning.batch_size) for part in (order[num_held:], order[:num_held])]
    else:
        num_held = max(1, round(len(found) * learning.held_back))
        _check_count(len(found) - num_held, len(found), "batches, which cannot be divided,")
        parts = [found[num_held:], found[:num_held]]
    used, held = ([_Sample(batch, *jax.device_get(answer(batch))) for batch in part] for part in parts)
    return used, held


def _regrouped(model: Model, batches: list[Any], size: int) -> list[Any]:
    """Returns the samples in batches of another size where that is possible: a size that programs are there for."""
    if not can_be_regrouped(model.graph, batches):
        return batches
    samples = joined(batches)
    count = len(next(iter(samples.values())))
    return grouped(samples, np.arange(count), size) if count >= size else batches


def _check_count(left: int, count: int, what: str) -> None:
    if left < 1:
        raise DataError(f"there are {count} {what} to learn scales from; expected two at least, one to be held back")


def _layer_axes(ties: Ties) -> dict[str, int]:
    """Returns the axis that counts the channels of each layer's output, where it is known."""
    return {name: ties.channels[name].axis for name in ties.layers if name in ties.channels}


def _answers(model: Model, axes: Mapping[str, int], inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    def means(name: str, value: Any, channel_axis: int | None) -> tuple[Any, Any]:
        return value, _means(value, axis_in_layout(axes[name], channel_axis)) if name in axes else None

    return interpret(model.graph, model.params, inputs, intercept=means)


def _means(value: Any, axis: int) -> Any:
    return jnp.mean(value, axis=tuple(i for i in range(value.ndim) if i != axis))


# --- the model and its grids as functions of the variables


def _start(task: _Task) -> _Variables:
    shiftable = find_shiftable(task.model) if task.learning.shifts else ()
    names = [found.producer.output for found in shiftable]
    shifts = {name: jnp.zeros(len(task.behaviour[name].mean), jnp.float32) for name in names if name in task.behaviour}
    return _Variables(scales=jnp.zeros(task.ties.num_scales, jnp.float32), shifts=shifts)


def _applied(task: _Task, variables: _Variables) -> Model:
    moved = shift(task.model, _amounts(task, variables)) if variables.shifts else task.model
    scales = variables.scales
    fixed = jnp.asarray(scales).at[0].set(0.0) if isinstance(scales, jax.Array) else np.append(0.0, scales[1:])
    layers = linear_layers(moved)  # some may have got their first bias
    tied = {name: replace(found, layer=layers[name]) for name, found in task.ties.layers.items()}
    return rescale(moved, replace(task.ties, layers=tied), fixed)


def _amounts(task: _Task, variables: _Variables) -> dict[str, Any]:
    return {name: amount * _deviation(task.behaviour[name]) for name, amount in variables.shifts.items()}


def _deviation(known: Behaviour) -> np.ndarray:
    return np.sqrt(np.maximum(known.power - known.mean**2, 0.0)).astype(np.float32)


def _encodings(task: _Task, variables: _Variables, params: Mapping[str, Any]) -> Encodings:
    """Returns the grids of the start with their ends moved in proportion to the ends of the data."""
    found: Encodings = {}
    for name, encoding in task.encodings.items():
        if name in task.model.params:
            before, after = np.asarray(task.model.params[name]), params[name]
            found[name] = _moved(encoding, _ends(before, encoding), _ends(after, encoding))
        else:
            found[name] = _of_activation(task, variables, task.roots.get(name, name), encoding)
    return found


def _ends(values: Any, encoding: Encoding) -> tuple[Any, Any]:
    xp = jnp if isinstance(values, jax.Array) else np
    if encoding.axis is None or encoding.block_size is not None:
        return xp.minimum(values.min(), 0), xp.maximum(values.max(), 0)
    axis = encoding.axis % values.ndim
    others = tuple(i for i in range(values.ndim) if i != axis)
    return xp.minimum(values.min(axis=others), 0), xp.maximum(values.max(axis=others), 0)


def _of_activation(task: _Task, variables: _Variables, root: str, encoding: Encoding) -> Encoding:
    channels, known = task.ties.channels.get(root), task.behaviour.get(root)
    if channels is None or known is None or np.shape(known.low) != channels.scales.shape:
        return encoding
    moved = _amounts(task, variables).get(root, 0.0)
    factor = jnp.exp(-variables.scales.at[0].set(0.0)[channels.scales])
    low, high = np.minimum(known.low, 0).min(), np.maximum(known.high, 0).max()
    after = jnp.minimum((known.low - moved) * factor, 0).min(), jnp.maximum((known.high - moved) * factor, 0).max()
    return _moved(encoding, (low, high), after)


def _moved(encoding: Encoding, before: tuple[Any, Any], after: tuple[Any, Any]) -> Encoding:
    """Returns the encoding with each end of its range in proportion to that of the data; blocks keep their grid."""
    if encoding.block_size is not None:
        return encoding
    is_symmetric = np.all(np.asarray(encoding.zero_point) == np.floor((encoding.qmin + encoding.qmax + 1) / 2))
    if is_symmetric and float(encoding.qmin) < 0:
        was = np.maximum(before[1], -before[0])
        ratio = jnp.maximum(after[1], -after[0]) / jnp.where(was > 0, was, 1.0)
        return encoding.replace(scale=encoding.scale * jnp.where(was > 0, ratio, 1.0).astype(jnp.float32))
    ends = []
    for limit, was, now in zip((encoding.qmin, encoding.qmax), before, after, strict=True):
        end = (limit - encoding.zero_point) * encoding.scale
        ends.append(end * jnp.where(was != 0, now / jnp.where(was != 0, was, 1.0), 1.0))
    scale = (ends[1] - ends[0]) / (encoding.qmax - encoding.qmin)
    zero = encoding.qmin - ends[0] / jnp.maximum(scale, np.finfo(np.float32).tiny)
    rounded = zero + jax.lax.stop_gradient(jnp.clip(jnp.round(zero), encoding.qmin, encoding.qmax) - zero)
    return encoding.replace(scale=scale.astype(jnp.float32), zero_point=rounded.astype(jnp.float32))


# --- the loss and its descent


def _loss(task: _Task, variables: _Variables, sample: _Sample) -> Any:
    model = _applied(task, variables)
    encodings = _encodings(task, variables, model.params)
    quantize = fake_quantization(model, encodings)
    means, axes = _float_means(task, variables, sample.means), _layer_axes(task.ties)

    def corrected(name: str, value: Any, channel_axis: int | None) -> tuple[Any, None]:
        if name in means:
            axis = axis_in_layout(axes[name], channel_axis)
            error = _means(value, axis) - means[name]
            value = value - jnp.expand_dims(error, tuple(i for i in range(value.ndim) if i != axis))
        return (quantize(name, value, channel_axis)[0] if name in encodings else value), None

    outputs, _ = interpret(model.graph, model.params, sample.inputs, intercept=corrected)
    return _distance(task.learning.loss, outputs, sample.outputs)


def _float_means(task: _Task, variables: _Variables, means: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the means of the layers' outputs as shifts and scales leave them."""
    amounts, scales = _amounts(task, variables), variables.scales.at[0].set(0.0)
    return {
        name: (mean - amounts.get(name, 0.0)) * jnp.exp(-scales[task.ties.layers[name].outputs])
        for name, mean in means.items()
    }


def _distance(loss: str, outputs: Mapping[str, Any], wanted: Mapping[str, Any]) -> Any:
    """Returns the logarithm of noise over signal, summed over the outputs, or the divergence of the first."""
    if loss == "kl":
        name = next(iter(wanted))
        q, p = (jax.nn.log_softmax(values[name].reshape(len(values[name]), -1)) for values in (outputs, wanted))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=1))
    floating = [name for name, value in wanted.items() if jnp.issubdtype(value.dtype, jnp.floating)]
    powers = [jnp.sum(wanted[name] ** 2) for name in floating]
    noises = [jnp.sum((outputs[name] - wanted[name]) ** 2) for name in floating]
    ratios = [noise / jnp.where(power > 0, power, 1.0) for noise, power in zip(noises, powers, strict=True)]
    return jnp.log(jnp.maximum(jnp.sum(jnp.stack(ratios)), np.finfo(np.float32).tiny))


def _descended(task: _Task, used: Sequence[_Sample], held: Sequence[_Sample]) -> tuple[_Variables, tuple[float, float]]:
    """Returns the variables that did best on the samples held back, and the loss there before and after."""
    import optax  # noqa: PLC0415  (slow to import, and needed where scales are learned alone)

    learning = task.learning
    optimizer = optax.adam(optax.cosine_decay_schedule(learning.rate, learning.num_steps))
    brief = brief_options((task.model.params, used[0])) or (FEW_TIMES if are_taken(FEW_TIMES) else {})

    @partial(jax.jit, compiler_options=brief)
    def loss(variables: _Variables, sample: _Sample) -> Any:
        return _loss(task, variables, sample)

    @partial(jax.jit, compiler_options=brief)
    def step(variables: _Variables, state: Any, sample: _Sample) -> tuple[_Variables, Any]:
        slope = jax.grad(lambda found: _loss(task, found, sample))(variables)
        slope = jax.tree.map(lambda value: jnp.where(jnp.isfinite(value), value, 0.0), slope)
        change, state = optimizer.update(slope, state)
        return optax.apply_updates(variables, change), state  # pyright: ignore[reportReturnType]

    def judged(variables: _Variables) -> float:
        return float(np.mean([float(loss(variables, sample)) for sample in held]))

    variables = _start(task)
    state = optimizer.init(variables)  # pyright: ignore[reportArgumentType]
    best, first = variables, judged(variables)
    lowest, in_vain = first, 0
    random, order = np.random.default_rng(learning.seed), np.arange(len(used))
    for index in range(learning.num_steps):
        if index % len(used) == 0:
            order = random.permutation(len(used))
        variables, state = step(variables, state, used[order[index % len(used)]])
        if (index + 1) % _EVERY and index + 1 < learning.num_steps:
            continue
        now, in_vain = judged(variables), in_vain + 1
        if now < lowest:
            best, lowest, in_vain = variables, now, 0
        if in_vain == _PATIENCE:
            break
    return best, (first, lowest)


def _record(task: _Task, best: _Variables, losses: tuple[float, float]) -> Record:
    is_noise = task.learning.loss == "sqnr"
    name = "SQNR on samples held back, dB" if is_noise else "divergence on samples held back"
    before, after = (-10 / np.log(10) * loss if is_noise else loss for loss in losses)
    spread = {"largest |log scale|": float(np.abs(np.asarray(best.scales)).max())}
    return Record(
        transform=_NAME,
        done=losses[1] < losses[0],
        what="scales learned" if losses[1] < losses[0] else "left as they were",
        where=tuple(found.place for found in task.ties.sets),
        reason="" if losses[1] < losses[0] else "no step did better on the samples held back",
        before={name: float(before)},
        after={name: float(after)} | spread,
    )
