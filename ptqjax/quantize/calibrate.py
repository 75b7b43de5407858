"""From a model and calibration data to encodings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.errors import DataError, ModelError
from ptqjax.ir import Graph, Model, Report
from ptqjax.kernels.ranges import grid_of_range, stack_kinds
from ptqjax.lowering import compiled, interpret
from ptqjax.quantize.batches import checked_batches, num_samples
from ptqjax.quantize.bias import guard_biases
from ptqjax.quantize.data_free import encode_from_statistics
from ptqjax.quantize.encodings import Encoding, Encodings, make_encoding
from ptqjax.quantize.observers import Observer, RangeScheme, find_scheme
from ptqjax.quantize.placement import ACTIVATION, Site, kind_of, place
from ptqjax.quantize.search import encode_constants


def calibrate(model: Model, batches: Iterable[Any] | None, config: QuantizationConfig | None = None) -> Encodings:
    """Returns the encodings of all tensors that `place` plans to round; see `calibrate_and_report`."""
    return calibrate_and_report(model, batches, config)[0]


def calibrate_and_report(
    model: Model, batches: Iterable[Any] | None, config: QuantizationConfig | None = None
) -> tuple[Encodings, Report]:
    """Returns the encodings, and a record for each weight whose scale was raised so that its bias fits into int32.

    Activations are those of the float model; without batches, they are as batch norms tell, see
    `data_free.encode_from_statistics`, and weights as with data. Batches are read once, one at a time, in any order and
    of any sizes (each new size is compiled anew); memory does not grow with their number. Extremes are those of all
    values; the scheme "sqnr" counts `observers.SAMPLES` values of each tensor and sample, always at the same places.

    Args:
        model: The model; nothing in it changes.
        batches: An iterable of {input name: array}, first axis samples; None where there is no data.
        config: Types, granularity, scheme, target; None: the defaults.

    Raises:
        DataError: The batches do not fit the model, or a tensor takes a value that is not finite; the message names the
            tensor or input and the batch. Without batches: nothing is known of some activations; it names them.
        ConfigError: A pattern of `config.exclude` matches nothing, or the target cannot be read.
        ModelError: The model is quantized already, or a tensor to be rounded is not float32.
        UnsupportedOperatorError: A node has no lowering.
    """
    config = QuantizationConfig() if config is None else config
    placement, scheme = place(model, config), find_scheme(config.ranges)
    constant = [site for site in placement.sites if site.kind != ACTIVATION]
    roots = [site for site in placement.sites if site.kind == ACTIVATION and site.root == site.tensor]
    own = encode_constants(constant, model.params, scheme)
    own |= {site.tensor: _fixed(site) for site in roots if site.fixed_range is not None}
    observed = [site for site in roots if site.fixed_range is None]
    own |= encode_from_statistics(model, observed) if batches is None else _encode(model, batches, observed, scheme)
    return guard_biases(model, {site.tensor: own[site.root] for site in placement.sites})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is static in a step."""

    graph: Graph
    """The model's graph."""
    tensors: tuple[str, ...]
    """The tensors to observe."""
    observer: Observer
    """How."""


def _encode(model: Model, batches: Iterable[Any], sites: Sequence[Site], scheme: RangeScheme) -> dict[str, Encoding]:
    data = checked_batches(model.graph, batches)
    return _encode_observed(model, data, sites, scheme) if sites else _encode_nothing(data)


def _encode_observed(
    model: Model, data: Iterable[Mapping[str, Any]], sites: Sequence[Site], scheme: RangeScheme
) -> dict[str, Encoding]:
    tensors = tuple(site.tensor for site in sites)
    state = scheme.observer.init(len(tensors))
    plan = _Plan(graph=model.graph, tensors=tensors, observer=scheme.observer)
    params = jax.device_put(dict(model.params))
    for index, inputs in enumerate(data):
        state, is_finite = _step(plan, params, state, inputs)
        # Waits for the step: JAX would otherwise run ahead and hold many batches at once.
        _check_finite(tensors, np.asarray(is_finite), index)
    scale, zero_point = scheme.finish(state, stack_kinds([kind_of(site) for site in sites]))
    return {
        site.tensor: make_encoding(scale[i], zero_point[i], dtype=site.dtype, symmetric=site.symmetric)
        for i, site in enumerate(sites)
    }


def _encode_nothing(data: Iterable[Mapping[str, Any]]) -> dict[str, Encoding]:
    """Goes through the data, so that bad ones are an error even where none are needed."""
    for _ in data:
        pass
    return {}


@partial(compiled, donated=2)
def _step(plan: _Plan, params: dict[str, Any], state: Any, inputs: dict[str, Any]) -> tuple[Any, jax.Array]:
    """Returns the state after one batch, and which tensors were finite; forward pass and observers in one program."""
    tensors, wanted = plan.tensors, frozenset(plan.tensors)
    _, observed = interpret(
        plan.graph, params, inputs, intercept=lambda name, value, _: (value, value if name in wanted else None)
    )
    absent = [name for name in tensors if name not in observed]
    if absent:
        raise ModelError(f"tensor '{absent[0]}' depends on constants alone; fold it into a parameter, or exclude it")
    state = plan.observer.update(state, [observed[name] for name in tensors], num_samples(inputs))
    extremes = plan.observer.extremes(state)
    return state, jnp.isfinite(extremes.lowest) & jnp.isfinite(extremes.highest)


def _check_finite(tensors: tuple[str, ...], is_finite: np.ndarray, index: int) -> None:
    if not is_finite.all():
        raise DataError(
            f"tensor '{tensors[int(np.argmin(is_finite))]}' is NaN or infinite in batch {index}; "
            "check the model in float on that batch, or exclude the tensor"
        )


def _fixed(site: Site) -> Encoding:
    low, high = site.fixed_range or (0.0, 0.0)
    scale, zero_point = grid_of_range(low, high, kind_of(site))
    return make_encoding(scale, zero_point, dtype=site.dtype, symmetric=site.symmetric)
