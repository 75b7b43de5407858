"""One step of learning a block's roundings, as a program that equal blocks share."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ptqjax.encodings.encoding import Encodings
from ptqjax.fit.walking import with_layouts
from ptqjax.ir import Graph, Model
from ptqjax.kernels.soft_rounding import straight_codes
from ptqjax.lowering import compiled, interpret_in_layout
from ptqjax.simulation import fake_quantization


class Plan(NamedTuple):
    """What is static while a block is learned; all names are those of the part's own graph."""

    graph: Graph
    """The block."""
    steps: tuple[tuple[str, ...], ...]
    """Activations whose steps are learned; those of a group share one."""


class Variables(NamedTuple):
    """What is learned."""

    weights: dict[str, Any]
    """By weight, in steps of its grid and unrounded, see `kernels.soft_rounding`."""
    shifts: dict[str, Any]
    """What biases are raised by, in their units."""
    log_steps: tuple[Any, ...]
    """By group of activations, the logarithm of what their steps are multiplied by."""


class Fixed(NamedTuple):
    """What stays as it is while a block is learned."""

    params: dict[str, Any]
    """Its parameters, as they were solved for."""
    limits: dict[str, tuple[Any, Any]]
    """The smallest and the largest codes of each weight, counted from the one that stands for 0."""
    scales: dict[str, Any]
    """The scales of each weight, ready to multiply codes."""
    paces: dict[str, Any]
    """The factor of each weight's rate."""
    units: dict[str, Any]
    """The units of each bias."""
    encodings: Encodings
    """The encodings of the activations that the block computes."""
    powers: tuple[Any, ...]
    """The mean of squares of each output in float."""
    start: Any
    """The noise at the beginning, over the powers."""
    mixed: Any
    """Share of the inputs that is taken from the float network."""


class Sample(NamedTuple):
    """Inputs of a block in both networks, and its outputs in float; samples along the first axis."""

    quantized: tuple[dict[str, Any], dict[str, Any]]
    """The inputs with their channels last, and the others, behind blocks that are rounded."""
    exact: tuple[dict[str, Any], dict[str, Any]]
    """The inputs with their channels last, and the others, in float."""
    targets: tuple[Any, ...]
    """The outputs."""


def _rounded(plan: Plan, variables: Variables, fixed: Fixed) -> tuple[dict[str, Any], Encodings]:
    """Returns the block's parameters, rounded, and the encodings of its activations; gradients pass through."""
    weights = {
        name: straight_codes(numbers, *fixed.limits[name]) * fixed.scales[name]
        for name, numbers in variables.weights.items()
    }
    biases = {name: fixed.params[name] + fixed.units[name] * shift for name, shift in variables.shifts.items()}
    return fixed.params | weights | biases, _with_steps(plan, variables, fixed.encodings)


def _with_steps(plan: Plan, variables: Variables, encodings: Encodings) -> Encodings:
    """Returns the encodings with learned steps."""
    found = dict(encodings)
    for names, log_step in zip(plan.steps, variables.log_steps, strict=True):
        for name in names:
            found[name] = found[name].replace(scale=found[name].scale * jnp.exp(log_step))
    return found


def _noise(plan: Plan, variables: Variables, fixed: Fixed, sample: Sample, key: Any) -> Any:
    """Returns the error of the outputs over their power, summed over the outputs."""
    params, encodings = _rounded(plan, variables, fixed)
    inputs = with_layouts(*_mixed(sample, fixed.mixed, key))
    intercept = fake_quantization(Model(graph=plan.graph, params=params), encodings)
    found = interpret_in_layout(plan.graph, params, inputs, intercept=intercept)
    outputs = [found[spec.name].array for spec in plan.graph.outputs]
    errors = [jnp.mean((y - target) ** 2) for y, target in zip(outputs, sample.targets, strict=True)]
    return jnp.sum(jnp.stack([error / power for error, power in zip(errors, fixed.powers, strict=True)]))


def _mixed(sample: Sample, share: Any, key: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the inputs with some elements taken from the float network.

    Source: Wei et al., "QDrop", ICLR 2022, at the input of a block.
    """

    def mix(x: Any, exact: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.where(jax.random.uniform(key, x.shape) < share, exact, x)

    last, plain = jax.tree.map(mix, sample.quantized, sample.exact)
    return last, plain


@cache
def _optimizer() -> Any:
    import optax  # noqa: PLC0415  (slow to import, and needed where roundings are learned alone)

    return optax.scale_by_adam()


class Progress(NamedTuple):
    """How far learning has come."""

    variables: Variables
    """What is learned."""
    state: Any
    """The optimizer's."""

    @staticmethod
    def at(start: Variables) -> Progress:
        """Returns the beginning."""
        return Progress(start, _optimizer().init(start))


class Draw(NamedTuple):
    """What differs from step to step."""

    rows: Any
    """The samples to look at, [batch]."""
    seeds: Any
    """Seed and number of what is mixed, [2]."""
    rates: Any
    """The rates of weights, in steps of their grids; of biases, in their units; of the logarithms of steps: [3]."""


def _step(plan: Plan, progress: Progress, fixed: Fixed, data: Sample, draw: Draw) -> Progress:
    sample = jax.tree.map(lambda array: array[draw.rows], data)
    key = jax.random.fold_in(jax.random.key(draw.seeds[0]), draw.seeds[1])
    slope = jax.grad(lambda v: _noise(plan, v, fixed, sample, key) / fixed.start)(progress.variables)
    slope = jax.tree.map(lambda value: jnp.where(jnp.isfinite(value), value, 0.0), slope)
    change, state = _optimizer().update(slope, progress.state)
    of_weights, of_biases, of_steps = draw.rates
    change = Variables(
        {name: -of_weights * fixed.paces[name] * each for name, each in change.weights.items()},
        jax.tree.map(lambda each: -of_biases * each, change.shifts),
        jax.tree.map(lambda each: -of_steps * each, change.log_steps),
    )
    return Progress(jax.tree.map(jnp.add, progress.variables, change), state)


step = compiled(_step)
"""(plan, progress, fixed, data, draw) -> the progress after a step of Adam."""
