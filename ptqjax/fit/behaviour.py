"""How the channels of a float model behave on data: their reach, their power, and what noise in them does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.data.batches import checked_batches, num_samples
from ptqjax.errors import ModelError
from ptqjax.ir import Graph, Model
from ptqjax.kernels.draws import Draw
from ptqjax.lowering import axis_in_layout, compiled, interpret
from ptqjax.transforms.activations import limits_of
from ptqjax.transforms.behaviour import Behaviour
from ptqjax.transforms.linear import linear_layers
from ptqjax.transforms.rank import ranks_of
from ptqjax.transforms.ties import find_ties

_RANK = 2  # sample and channel


def observe_behaviour(
    model: Model, batches: Iterable[Mapping[str, Any]] | None, *, seed: int = 0
) -> dict[str, Behaviour]:
    """Returns what each tensor's channels do on data; one pass, forward and backward, memory of one batch.

    Gains are measured: a random vector of signs is sent back from the outputs of each sample, each output in units of
    its own size (the root of its mean sum of squares); the squares of what arrives at a channel, summed over its
    places, have as their mean the power that noise in the channel has in the outputs. What has no values in a batch,
    such as the past of a first step, tells nothing there.

    Raises:
        DataError: The batches do not fit the model, or there are none.
    """
    params = jax.device_put(dict(model.params))
    names = [spec.name for spec in model.graph.inputs]
    names += [name for node in model.graph.nodes for name in node.outputs if name]
    axes = tuple((name, axis) for name, axis in _channel_axes(model, names).items())
    count = 0
    total: dict[str, Any] = {}
    for index, batch in enumerate(checked_batches(model.graph, batches)):
        found = jax.device_get(_measure(model.graph, axes, params, Draw.of(seed, index), batch))
        size = num_samples(batch)
        total, count = _merged(total, found, size), count + size
    return {
        name: Behaviour(
            low=parts["low"], high=parts["high"], mean=parts["mean"] / parts["count"],
            power=parts["power"] / parts["count"], gain=parts["gain"] / count,
        )
        for name, parts in total.items() if parts is not None
    }  # fmt: skip


def _channel_axes(model: Model, names: Iterable[str]) -> dict[str, int]:
    """Returns the axis that counts a tensor's channels: by the ties, by what a matrix multiplies, or else axis 1."""
    channels, ranks = find_ties(model).channels, ranks_of(model)
    read = {layer.input: layer.input_axis for layer in linear_layers(model).values()}
    last = {name: ranks[name] - 1 for name, axis in read.items() if axis < 0 and ranks.get(name, 0) > 1}
    return {name: channels[name].axis if name in channels else last.get(name, 1) for name in names}


def observe_shares_beyond(model: Model, batches: Iterable[Mapping[str, Any]] | None) -> dict[str, float]:
    """Returns which share of the values lies beyond the upper bound of each Clip between scalable channels, by output.

    Raises:
        DataError: The batches do not fit the model, or there are none.
    """
    limits = {
        found.node.output: (found.node.inputs[0], float(np.max(limits_of(model, found.node)[1])))
        for found in find_ties(model).limited
        if found.node.op_type == "Clip"
    }
    params, totals, count = jax.device_put(dict(model.params)), dict.fromkeys(limits, 0.0), 0
    for batch in checked_batches(model.graph, batches):
        found = jax.device_get(_beyond(model.graph, tuple(limits.items()), params, batch))
        size = num_samples(batch)
        totals, count = {name: total + size * float(found[name]) for name, total in totals.items()}, count + size
    return {name: total / count for name, total in totals.items()}


@partial(compiled, num_static=2, is_brief=True)
def _beyond(
    graph: Graph, limits: tuple[tuple[str, tuple[str, float]], ...], params: Mapping[str, Any], batch: Any
) -> dict[str, jax.Array]:
    def shares(name: str, value: jax.Array, _: int | None) -> tuple[jax.Array, Any]:
        found = {
            output: jnp.sum(value > high) / max(value.size, 1) for output, (tensor, high) in limits if tensor == name
        }
        return value, found or None

    seen = interpret(graph, params, batch, intercept=shares)[1]
    return {output: share for found in seen.values() for output, share in found.items()}


def _merged(total: Any, found: Any, size: int) -> Any:
    weighted = {
        name: {
            "low": parts["low"],
            "high": parts["high"],
            "mean": parts["mean"].astype(np.float64) * size,
            "power": parts["power"].astype(np.float64) * size,
            "gain": parts["gain"].astype(np.float64),
            "count": size,
        }
        for name, parts in found.items()
    }
    return total | {name: _joined(total[name], parts) if name in total else parts for name, parts in weighted.items()}


def _joined(one: Any, other: Any) -> Any:
    """Returns both parts as one; None where they are unlike: axis 1 may count no channels, and differ in length."""
    if one is None or np.shape(one["low"]) != np.shape(other["low"]):
        return None
    join = {"low": np.minimum, "high": np.maximum}
    return {key: join.get(key, np.add)(one[key], value) for key, value in other.items()}


@partial(compiled, num_static=2, is_brief=True)
def _measure(
    graph: Graph, axes: tuple[tuple[str, int], ...], params: Mapping[str, Any], draw: Draw, batch: Mapping[str, Any]
) -> dict[str, dict[str, jax.Array]]:
    key = draw.key()
    counts = jax.eval_shape(lambda: _forward(graph, axes, params, batch, None)[1])

    def run(probes: Mapping[str, Any]) -> Any:
        return _forward(graph, axes, params, batch, probes)

    probes = {name: jnp.zeros(parts["low"].shape, jnp.float32) for name, parts in counts.items()}
    outputs, pull, observed = jax.vjp(run, probes, has_aux=True)
    floating = {name: value for name, value in outputs.items() if jnp.issubdtype(value.dtype, jnp.floating)}
    if not floating:
        raise ModelError(
            "none of the outputs holds floating numbers, to which noise could be followed; expected one: quantize with "
            "scaling='off'"
        )
    signs = {
        name: _signs(jax.random.fold_in(key, index), value)
        if name in floating
        else np.zeros(value.shape, jax.dtypes.float0)
        for index, (name, value) in enumerate(outputs.items())
    }
    (gains,) = pull(signs)
    return {name: parts | {"gain": gains[name]} for name, parts in observed.items()}


def _signs(key: Any, output: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.sum(output.astype(jnp.float32) ** 2) / output.shape[0])
    return jax.random.rademacher(key, output.shape, output.dtype) / jnp.where(size > 0, size, 1.0).astype(output.dtype)


def _forward(
    graph: Graph, axes: tuple[tuple[str, int], ...], params: Any, batch: Any, probes: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    axis_of = dict(axes)

    def intercept(name: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, Any]:
        if name not in axis_of or value.ndim < _RANK or not value.size:
            return value, None
        axis = axis_in_layout(axis_of[name], channel_axis)
        others = tuple(i for i in range(value.ndim) if i != axis)
        wide = value.astype(jnp.float32)
        seen = {
            "low": wide.min(axis=others),
            "high": wide.max(axis=others),
            "mean": wide.mean(axis=others),
            "power": (wide**2).mean(axis=others),
        }
        return (value if probes is None else _probed(value, probes[name], axis)), seen

    return interpret(graph, params, batch, intercept=intercept)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _probed(value: Any, probe: Any, axis: int) -> Any:
    """Returns `value`; what is sent back to `probe` is the square of what is sent back to `value`, per channel."""
    del probe, axis
    return value


def _probed_forward(value: Any, probe: Any, axis: int) -> tuple[Any, None]:
    del probe, axis
    return value, None


def _probed_backward(axis: int, _: None, arriving: Any) -> tuple[Any, Any]:
    others = tuple(i for i in range(arriving.ndim) if i != axis)
    return arriving, jnp.sum(arriving.astype(jnp.float32) ** 2, axis=others)


_probed.defvjp(_probed_forward, _probed_backward)
