"""From a model and calibration data to encodings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.config import QuantizationConfig, near_names
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.ir import Graph, Model, Report
from ptqjax.kernels.ranges import stack_kinds
from ptqjax.lowering import compiled, interpret
from ptqjax.quantize.batches import checked_batches, num_samples
from ptqjax.quantize.bias import float_bias, guard_biases, sums_in_fixed_point
from ptqjax.quantize.data_free import encode_from_statistics
from ptqjax.quantize.encodings import Encoding, Encodings
from ptqjax.quantize.observers import Observer, RangeScheme
from ptqjax.quantize.placement import ACTIVATION, Site, kind_of, place
from ptqjax.quantize.schemes import MIN_MAX, find_scheme
from ptqjax.quantize.search import encode_constants
from ptqjax.quantize.site_encodings import (
    as_aimet_has_it,
    cast_encoding,
    encoding_of_grid,
    encoding_of_range,
    fixed_encoding,
    is_float,
    needs_range,
)


def calibrate(
    model: Model,
    batches: Iterable[Any] | None,
    config: QuantizationConfig | None = None,
    *,
    frozen: Mapping[str, Encoding] | None = None,
) -> Encodings:
    """Returns the encodings of all tensors that `place` plans to round; see `calibrate_and_report`."""
    return calibrate_and_report(model, batches, config, frozen=frozen)[0]


def calibrate_and_report(
    model: Model,
    batches: Iterable[Any] | None,
    config: QuantizationConfig | None = None,
    *,
    frozen: Mapping[str, Encoding] | None = None,
) -> tuple[Encodings, Report]:
    """Returns the encodings, and a record for each weight whose scale was raised so that its bias fits into int32.

    Activations are those of the float model; without batches, they are as batch norms tell, see
    `data_free.encode_from_statistics`, and weights as with data. Batches are read once, one at a time, in any order and
    of any sizes (each new size is compiled anew); memory does not grow with their number. Extremes are those of all
    values; schemes that look at more count `observers.SAMPLES` values of each tensor and sample, always at the same
    places. With `config.compatibility`, batches count one by one and in their order.

    Args:
        model: The model; nothing in it changes.
        batches: An iterable of {input name: array}, first axis samples; None where there is no data.
        config: Types, granularity, scheme, target; None: the defaults.
        frozen: Encodings that are kept as they are, by tensor, and shared by the tensors that are tied to it. A tensor
            with an encoding of its own keeps that, whatever it is tied to.

    Raises:
        DataError: The batches do not fit the model, a tensor takes a value that is not finite, or an observer has no
            room for more samples (after half a million or more); the message names the tensor or input and the batch.
            Without batches: nothing is known of some activations; it names them.
        ConfigError: A pattern of `config.exclude` matches nothing, the target cannot be read, or a frozen tensor is
            none that is rounded.
        ModelError: The model is quantized already, or a tensor to be rounded is not float32.
        UnsupportedOperatorError: A node has no lowering.
    """
    config = QuantizationConfig() if config is None else config
    frozen = {} if frozen is None else frozen
    placement = place(model, config)
    sites = placement.sites
    _check_frozen(frozen, sites)
    free = [site for site in sites if site.root not in frozen and site.tensor not in frozen]
    own = dict(frozen) | _encode_known(model, free, config)
    observed = [site for site in free if site.root == site.tensor and site.tensor not in own]
    own |= encode_from_statistics(model, observed) if batches is None else _encode(model, batches, observed, config)
    encodings = {site.tensor: own[site.tensor if site.tensor in frozen else site.root] for site in sites}
    encodings |= {name: float_bias() for name in placement.float_biases}
    return guard_biases(model, encodings, fixed_point=sums_in_fixed_point(config))


def _check_frozen(frozen: Mapping[str, Encoding], sites: Sequence[Site]) -> None:
    known = [site.tensor for site in sites]
    surplus = next((name for name in frozen if name not in known), None)
    if surplus is not None:
        raise ConfigError(
            f"frozen: '{surplus}' is none of the {len(known)} tensors that are rounded under this configuration"
            f"{near_names(surplus, known)}"
        )


def _encode_known(model: Model, sites: Sequence[Site], config: QuantizationConfig) -> dict[str, Encoding]:
    """Returns the encodings that follow from the model alone: of parameters, fixed ranges and casts."""
    constant = [site for site in sites if site.kind != ACTIVATION and site.fixed_range is None]
    found: dict[str, Encoding] = {}
    for scheme, alike in _by_scheme(constant, config):
        found |= encode_constants(alike, model.params, scheme, compatibility=config.compatibility)
    for site in sites:
        if site.fixed_range is not None:
            found[site.tensor] = fixed_encoding(site, compatibility=config.compatibility)
        elif site.kind == ACTIVATION and not needs_range(site):
            found[site.tensor] = cast_encoding(site)
    return found


def _by_scheme(sites: Sequence[Site], config: QuantizationConfig) -> list[tuple[RangeScheme, list[Site]]]:
    """Returns the schemes of the sites, in the order of their first ones."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.ranges or config.ranges, []).append(site)
    return [(find_scheme(name, config.compatibility), alike) for name, alike in groups.items()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What is static in a step."""

    graph: Graph
    """The model's graph."""
    parts: tuple[tuple[Observer, tuple[str, ...]], ...]
    """The ways to observe, and the tensors that each is for."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """All tensors that are observed."""
        return tuple(name for _, names in self.parts for name in names)


def _encode(
    model: Model, batches: Iterable[Any], sites: Sequence[Site], config: QuantizationConfig
) -> dict[str, Encoding]:
    data = checked_batches(model.graph, batches)
    groups = _by_scheme([site for site in sites if not is_float(site)], config)
    floats = [site for site in sites if is_float(site)]
    groups += [(MIN_MAX, floats)] if floats else []
    if not groups:
        return _encode_nothing(data)
    encodings: dict[str, Encoding] = {}
    for (scheme, alike), state in zip(groups, _observed(model, data, groups), strict=True):
        encodings |= _finished(scheme, state, alike, config.compatibility)
    return encodings


def _observed(
    model: Model, data: Iterable[Mapping[str, Any]], groups: Sequence[tuple[RangeScheme, list[Site]]]
) -> tuple[Any, ...]:
    """Returns what the observer of each scheme kept of its sites."""
    parts = tuple((scheme.observer, tuple(site.tensor for site in sites)) for scheme, sites in groups)
    plan = _Plan(graph=model.graph, parts=parts)
    tensors = plan.tensors
    # Copied: leaves that share a buffer could not be donated to the step.
    states = jax.tree.map(jnp.copy, tuple(observer.init(len(names)) for observer, names in parts))
    params = jax.device_put(dict(model.params))
    seen = 0
    for index, inputs in enumerate(data):
        seen += num_samples(inputs)
        _check_room([scheme for scheme, _ in groups], seen, index)
        states, is_finite = _step(plan, params, states, inputs)
        # Waits for the step: JAX would otherwise run ahead and hold many batches at once.
        _check_finite(tensors, np.asarray(is_finite), index)
    return states


def _finished(scheme: RangeScheme, state: Any, sites: Sequence[Site], compatibility: str | None) -> dict[str, Encoding]:
    ends = jax.tree.map(np.asarray, scheme.observer.extremes(state))
    if is_float(sites[0]):
        pairs = zip(sites, ends.lowest, ends.highest, strict=True)
        return {site.tensor: encoding_of_range(site, low, high) for site, low, high in pairs}
    grids = zip(*scheme.finish(state, stack_kinds([kind_of(site) for site in sites])), strict=True)
    if compatibility is not None:
        is_zero = (ends.lowest == 0) & (ends.highest == 0)
        sites = [as_aimet_has_it(s, scheme.name, is_all_zero=bool(z)) for s, z in zip(sites, is_zero, strict=True)]
    return {site.tensor: encoding_of_grid(site, *grid) for site, grid in zip(sites, grids, strict=True)}


def _encode_nothing(data: Iterable[Mapping[str, Any]]) -> dict[str, Encoding]:
    """Goes through the data, so that bad ones are an error even where none are needed."""
    for _ in data:
        pass
    return {}


@partial(compiled, donated=2)
def _step(plan: _Plan, params: dict[str, Any], states: Any, inputs: dict[str, Any]) -> tuple[Any, jax.Array]:
    """Returns the states after one batch, and which tensors were finite; forward pass and observers in one program."""
    tensors, wanted = plan.tensors, frozenset(plan.tensors)
    _, observed = interpret(
        plan.graph, params, inputs, intercept=lambda name, value, _: (value, value if name in wanted else None)
    )
    absent = [name for name in tensors if name not in observed]
    if absent:
        raise ModelError(f"tensor '{absent[0]}' depends on constants alone; fold it into a parameter, or exclude it")
    updated = tuple(
        observer.update(state, [observed[name] for name in names], num_samples(inputs))
        for (observer, names), state in zip(plan.parts, states, strict=True)
    )
    extremes = [observer.extremes(state) for (observer, _), state in zip(plan.parts, updated, strict=True)]
    return updated, jnp.concatenate([jnp.isfinite(each.lowest) & jnp.isfinite(each.highest) for each in extremes])


def _check_room(schemes: Sequence[RangeScheme], seen: int, index: int) -> None:
    for scheme in schemes:
        most = scheme.observer.most_samples
        if most is not None and seen > most:
            raise DataError(
                f"batch {index}: {seen} samples so far, and the scheme '{scheme.name}' has room for {most}; give fewer"
            )


def _check_finite(tensors: tuple[str, ...], is_finite: np.ndarray, index: int) -> None:
    if not is_finite.all():
        raise DataError(
            f"tensor '{tensors[int(np.argmin(is_finite))]}' is NaN or infinite in batch {index}; "
            "check the model in float on that batch, or exclude the tensor"
        )
