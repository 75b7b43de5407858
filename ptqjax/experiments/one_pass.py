"""What every group's rounding does to the outputs, from one pass forward and one back: an estimate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import PtqjaxError
from ptqjax.experiments.effects import Effects, Labels, floating_outputs, with_labels
from ptqjax.experiments.injection import Injection, Place, injection_of
from ptqjax.experiments.tied_tensors import Group
from ptqjax.ir import Graph, Model
from ptqjax.kernels.brief import SOON
from ptqjax.kernels.draws import Draw
from ptqjax.lowering import compiled, interpret
from ptqjax.metrics import checked_labels
from ptqjax.progress import Follow
from ptqjax.simulation import fake_quantization, round_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How effects are estimated; static under `jit`."""

    is_alone: bool
    """Whether each group alone is rounded, and the rest is in float; or all is rounded, and each group alone is put
    back into float."""
    has_loss: bool = False
    """Whether the task's loss is followed as well."""


def estimate_effects(
    model: Model,
    batches: Iterable[Mapping[str, Any]],
    encodings: Encodings,
    groups: Sequence[Group],
    *,
    is_alone: bool,
    labels: Labels = None,
    seed: int = 0,
    follow: Follow | None = None,
    solved: Mapping[str, Any] | None = None,
) -> Effects:
    """Returns about what each group does to the outputs; one pass forward and back, memory of one batch.

    Let J be the derivative of a sample's outputs by a group's error n: the difference that rounding makes to what the
    group's tensors hold, or to what operators make of its parameters.

    Alone, with r a vector of random signs, c = r^T J n has the mean square |J n|^2: the noise in the outputs, to second
    order. One pass back gives the c of all groups. The task's loss rises by g^T J n + (f^T J n)^2 / 2, with g the
    loss's gradient by the outputs, and f that gradient for a label drawn from the model's own distribution: the second
    order by Fisher's matrix.

    Beside the others, with e the error of a sample's outputs where all is rounded, the noise |e|^2 loses 2 e^T J n
    where the group is put back into float, and the loss g^T J n: to first order. Nothing is drawn.

    Biases beside a rounded input and weight are rounded; their errors belong to no group.

    Args:
        model: The float model.
        batches: Inputs by name; each new size is compiled anew. One or two, in a sequence, run a program that compiles
            sooner and runs longer.
        encodings: The grids. Their values are arguments of one compiled program.
        groups: What is followed. The others are in float, where `is_alone`, else rounded.
        is_alone: Whether each group is rounded alone, or all are but the group.
        labels: Which task's loss is followed.
        seed: Of what is drawn.
        follow: Shows how far the pass is.
        solved: Parameters, by name, that are rounded from these values in place of the model's own.

    Raises:
        DataError: The batches do not fit the model, there are none, or not as many labels as samples;
            or a label is no class.
        ModelError: No output holds floating numbers.
    """
    static = _Static(
        graph=model.graph,
        injection=injection_of(model.graph, groups, from_float=is_alone),
        estimate=Estimate(is_alone=is_alone, has_loss=labels is not None),
    )
    source = model.replace(params={**model.params, **(solved or {})})
    in_hand = round_parameters(source, encodings)[0].params  # in the program, each would be a branch of its own
    rounded = {name: in_hand.get(name, value) for name, value in model.params.items()}
    params = jax.device_put(_Params(dict(model.params), rounded))
    noise, loss, power, count = np.zeros(len(groups)), np.zeros(len(groups)), 0.0, 0
    measure = _measure_soon if isinstance(batches, Sequence) and len(batches) <= _FEW_BATCHES else _measure
    shown = follow(batches, "sensitivity") if follow else batches
    for number, (batch, classes) in enumerate(with_labels(model.graph, shown, labels)):
        given = _Batch(inputs=batch, classes=classes, draw=Draw.of(seed, number))
        found = jax.device_get(measure(static, params, encodings, given))
        if isinstance(labels, np.ndarray):
            checked_labels(labels, num_classes=int(found["num_classes"]), place="labels")
        noise, loss = noise + found["noise"], loss + found["loss"]
        power, count = power + float(found["power"]), count + len(classes)
    with np.errstate(divide="ignore", invalid="ignore"):  # outputs of 0 everywhere: the caller tells
        return Effects(noise=noise / np.float64(power), loss=None if labels is None else loss / count)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Static:
    """What is static in the program."""

    graph: Graph
    """The model's graph."""
    injection: Injection
    """The graph with errors that can be scaled."""
    estimate: Estimate
    """What is asked."""


class _Params(NamedTuple):
    """The parameters on both sides of their rounding."""

    in_float: Mapping[str, Any]
    """The parameters as the model has them."""
    rounded: Mapping[str, Any]
    """On their grids."""


class _Batch(NamedTuple):
    """What is measured on."""

    inputs: Mapping[str, Any]
    """The samples."""
    classes: Any
    """The label of each sample; -1 for the class that the float model names."""
    draw: Draw
    """What is drawn with."""


def _effects_of_batch(static: _Static, params: _Params, encodings: Encodings, batch: _Batch) -> dict[str, jax.Array]:
    """Returns by group the sums over a batch's samples of noise and loss, and the power of the outputs."""
    num_samples, num_groups = batch.classes.shape[0], static.injection.num_groups
    amplitudes = (jnp.zeros((num_groups, num_samples)), jnp.zeros(num_groups))
    fixed = _of_fixed_length(static.graph, params.in_float, batch.inputs, num_samples)
    program = _Program(static, params, encodings, num_samples, fixed)
    outputs, pull = jax.vjp(lambda given: floating_outputs(program.run(batch.inputs, *given)), amplitudes)
    outputs = {spec.name: outputs[spec.name] for spec in static.graph.outputs if spec.name in outputs}  # not sorted
    if static.estimate.is_alone:
        weights, wanted = _weights(outputs), outputs
        signs = _signs(outputs, batch.draw.key())
        directions = [{name: sign * jnp.sqrt(weights[name]).astype(sign.dtype) for name, sign in signs.items()}]
    else:
        wanted = floating_outputs(interpret(static.graph, params.in_float, batch.inputs)[0])
        weights = _weights(wanted)
        errors = {name: value - wanted[name] for name, value in outputs.items()}
        directions = [{name: 2 * weights[name].astype(error.dtype) * error for name, error in errors.items()}]
    directions += _of_the_loss(static.estimate, outputs, wanted, batch)
    # One after the other: a product with a batch of one direction compiles twice as long as one without.
    pulled = [pull(direction)[0] for direction in directions]
    found = tuple(jnp.stack(each) for each in zip(*pulled, strict=True))
    power = jnp.stack([jnp.sum(value.astype(jnp.float32) ** 2) for value in wanted.values()]).sum()
    noise, *loss = program.by_sample(*found)
    num_classes = jnp.asarray(next(iter(outputs.values()))[0].size)
    return {"power": power, "num_classes": num_classes} | _effects(static.estimate, noise, loss)


_measure = compiled(_effects_of_batch, is_brief=True)
_measure_soon = compiled(_effects_of_batch, is_brief=True, options=SOON)
_FEW_BATCHES = 2  # MobileNetV2, 8 samples: 7.3 s to compile and 1.0 a batch, or 2.0 and 2.3


def _of_fixed_length(
    graph: Graph, params: Mapping[str, Any], inputs: Mapping[str, Any], num_samples: int
) -> frozenset[str]:
    """Returns the tensors whose first axis is as long with one sample more; none, where the graph does not take that.

    So an axis that is only by chance as long as the batch is not taken for that of the samples.
    """
    more = {
        name: jax.ShapeDtypeStruct((num_samples + 1, *value.shape[1:]), value.dtype)
        for name, value in inputs.items()
        if value.ndim and value.shape[0] == num_samples
    }

    def seen(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        return interpret(graph, params, inputs, intercept=lambda _, value, __: (value, value), platform="cpu")[1]

    try:
        found = jax.eval_shape(seen, dict(params), {**inputs, **more})
    except (PtqjaxError, TypeError, ValueError):
        return frozenset()
    return frozenset(name for name, value in found.items() if value.ndim and value.shape[0] == num_samples)


def _effects(estimate: Estimate, noise: jax.Array, loss: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Returns the sums over samples; of each direction, what arrives at the amplitudes of groups and samples."""
    if not estimate.is_alone:
        return {"noise": -noise.sum(1), "loss": -loss[0].sum(1) if loss else jnp.zeros(len(noise))}
    rise = loss[0].sum(1) + (loss[1] ** 2).sum(1) / 2 if loss else jnp.zeros(len(noise))
    return {"noise": (noise**2).sum(1), "loss": rise}


def _weights(wanted: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns what each output's noise is multiplied by, so that all outputs count alike: 1 where there is but one.

    With P the power of all n outputs, P / (n P_o): the sum over P is then the mean over outputs of noise over power.
    """
    if len(wanted) == 1:
        return {name: jnp.ones((), jnp.float32) for name in wanted}
    powers = {name: jnp.sum(value.astype(jnp.float32) ** 2) for name, value in wanted.items()}
    mean = jnp.stack(list(powers.values())).sum() / len(powers)
    return {name: jnp.where(power > 0, mean / jnp.where(power > 0, power, 1), 0) for name, power in powers.items()}


def _signs(outputs: Mapping[str, jax.Array], key: Any) -> dict[str, jax.Array]:
    keys = jax.random.split(key, len(outputs))
    return {
        name: jax.random.rademacher(each, value.shape, value.dtype)
        for each, (name, value) in zip(keys, outputs.items(), strict=True)
    }


def _of_the_loss(
    estimate: Estimate, outputs: Mapping[str, jax.Array], wanted: Mapping[str, jax.Array], batch: _Batch
) -> list[dict[str, jax.Array]]:
    """Returns the gradients of cross-entropy by the outputs: for the classes, and for ones that are drawn."""
    if not estimate.has_loss:
        return []
    name = next(iter(outputs))
    logits = outputs[name].reshape(len(batch.classes), -1)
    predicted = jnp.argmax(wanted[name].reshape(logits.shape), axis=1)
    classes = jnp.where(batch.classes < 0, predicted, batch.classes)
    drawn = jax.random.categorical(jax.random.fold_in(batch.draw.key(), 1), logits, axis=1)

    def gradient(classes: jax.Array) -> dict[str, jax.Array]:
        by_logits = jax.nn.softmax(logits, axis=1) - jax.nn.one_hot(classes, logits.shape[1], dtype=logits.dtype)
        zeros = {other: jnp.zeros_like(value) for other, value in outputs.items()}
        return zeros | {name: by_logits.reshape(outputs[name].shape)}

    return [gradient(classes), gradient(drawn)] if estimate.is_alone else [gradient(classes)]


class _Program:
    """The model, with the error of each group times an amplitude: one for each sample, or one for all of them."""

    def __init__(
        self,
        static: _Static,
        params: _Params,
        encodings: Encodings,
        num_samples: int,
        fixed: frozenset[str],
    ) -> None:
        self._injection = static.injection
        self._is_alone = static.estimate.is_alone
        self._num_samples = num_samples
        self._fixed = fixed
        self._round = fake_quantization(Model(graph=static.graph, params=dict(params.in_float)), encodings)
        self._params = self._with_other_sides(params)
        self._places: dict[str, list[Place]] = {}
        for place in static.injection.places:
            self._places.setdefault(place.tensor, []).append(place)
        self._of_all_samples: set[int] = set()

    def _with_other_sides(self, params: _Params) -> dict[str, Any]:
        here, there = params if self._is_alone else params[::-1]
        return {**here, **{other: there[name] for name, other in self._injection.others}}

    def run(self, inputs: Mapping[str, Any], by_sample: jax.Array, common: jax.Array) -> dict[str, Any]:
        """Returns the outputs for amplitudes by group and sample, and by group."""
        copies: dict[str, jax.Array] = {}
        grids, others = dict(self._injection.rounded), self._injection.copies

        def intercept(name: str, value: jax.Array, axis: int | None) -> tuple[jax.Array, None]:
            if name in self._injection.still:
                return jax.lax.stop_gradient(value), None
            if name in grids:
                return self._round(grids[name], jax.lax.stop_gradient(value), axis)[0], None
            if name in others:
                copies[name] = value
                return value, None
            if name in self._params:
                return value, None
            result = value if self._is_alone else self._round(name, value, axis)[0]
            for place in self._places.get(name, ()):
                error = self._error(place, jax.lax.stop_gradient(value), copies, axis)
                result += (self._amplitude(place, value, by_sample, common) * error).astype(value.dtype)
            return result, None

        return interpret(self._injection.graph, self._params, inputs, intercept=intercept)[0]

    def _error(self, place: Place, value: jax.Array, copies: Mapping[str, jax.Array], axis: int | None) -> jax.Array:
        """Returns what the other side of a rounding adds to the tensor."""
        if not place.other:
            rounded = self._round(place.tensor, value, axis)[0]
            return rounded - value if self._is_alone else value - rounded
        if place.other not in copies:
            return jnp.zeros_like(value)  # no floating number depends on it
        other = copies[place.other]
        return self._round(place.tensor, other, axis)[0] - other if place.is_rounded_again else other - value

    def _amplitude(self, place: Place, value: jax.Array, by_sample: jax.Array, common: jax.Array) -> jax.Array:
        if value.ndim and value.shape[0] == self._num_samples and place.tensor not in self._fixed:
            return by_sample[place.group].reshape(-1, *(1,) * (value.ndim - 1))
        self._of_all_samples.add(place.group)
        return common[place.group].reshape((1,) * value.ndim)

    def by_sample(self, by_sample: jax.Array, common: jax.Array) -> list[jax.Array]:
        """Returns what arrived at the amplitudes of groups and samples, for each of the directions that were sent.

        A group with a place where samples lie together has the sum over all samples in the place of the first.
        """
        is_common = np.isin(np.arange(len(common[0])), sorted(self._of_all_samples))[:, None]
        first = np.arange(self._num_samples) == 0
        total = (by_sample.sum(2) + common)[:, :, None] * first[None, None, :]
        return list(jnp.where(is_common[None], total, by_sample))
