"""What a mixed-precision model may cost, or lose; and what widths of groups cost, as functions of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError
from ptqjax.experiments.allocation import Cost
from ptqjax.experiments.costs import FLOAT_BITS, CostModel
from ptqjax.experiments.tied_tensors import Group, Kind

COSTS: Mapping[str, tuple[Kind, ...]] = {
    "mean_weight_bits": ("weight",),
    "mean_activation_bits": ("activation",),
    "model_bytes": ("weight",),
    "bit_operations": ("weight", "activation"),
}
"""What can be limited, and the kinds of groups whose widths it depends on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The most that a model may cost: one limit for each kind of tensor whose widths are to be chosen.

    Raises:
        ConfigError: There is no limit, one is not positive, or two are for the same tensors.
    """

    mean_weight_bits: int | float | None = None
    """The upper limit of `Costs.mean_weight_bits`; None: no limit."""
    mean_activation_bits: int | float | None = None
    """The upper limit of `Costs.mean_activation_bits`; None: no limit."""
    model_bytes: int | float | None = None
    """The upper limit of `Costs.model_bytes`; None: no limit."""
    bit_operations: int | float | None = None
    """The upper limit of `Costs.bit_operations`; None: no limit."""

    def __post_init__(self) -> None:
        limits = {field.name: getattr(self, field.name) for field in fields(self)}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        if not limits:
            raise ConfigError(f"the budget has no limit; expected one of {', '.join(COSTS)}")
        for name, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
                raise ConfigError(f"budget: {name}={limit!r}; expected a number above 0")
        kinds = [kind for name in limits for kind in COSTS[name]]
        if len(set(kinds)) < len(kinds):
            raise ConfigError(
                f"budget: {' and '.join(limits)} limit the same widths; give one of them, and look at the front for "
                "the other"
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(limit) for name, limit in found.items() if limit is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The most that a model may lose, at the least cost.

    Raises:
        ConfigError: A field has a value that is not allowed.
    """

    most: int | float = 0.01
    """The most that the metric may lie below the float model's: a fraction, as in 0.01 for one point."""
    metric: str = "agreement"
    """"agreement" with the float model, whose own is 1, or "top1", which needs labels."""
    cost: str = "mean_weight_bits"
    """What is to be small: a field of `Budget`."""

    def __post_init__(self) -> None:
        if isinstance(self.most, bool) or not isinstance(self.most, int | float) or not 0 <= self.most < 1:
            raise ConfigError(f"drop: most={self.most!r}; expected a fraction from 0 to 1, as in 0.01 for one point")
        if self.metric not in ("agreement", "top1"):
            raise ConfigError(f"drop: metric={self.metric!r} is unknown; expected agreement or top1")
        if self.cost not in COSTS:
            raise ConfigError(f"drop: cost={self.cost!r} is unknown; expected one of {', '.join(COSTS)}")


def cost_functions(costs: CostModel, groups: Sequence[Group], encodings: Encodings) -> dict[str, Cost]:
    """Returns each cost as a function of the widths of `groups`; all that is not in a group is as in `encodings`."""
    return {
        "mean_weight_bits": _mean_bits(costs.weights, groups, encodings),
        "mean_activation_bits": _mean_bits(
            {name: size for name, size in costs.activations.items() if name in encodings}, groups, encodings
        ),
        "model_bytes": _model_bytes(costs, groups, encodings),
        "bit_operations": _bit_operations(costs, groups, encodings),
    }


def _bits_of(encodings: Encodings, tensor: str) -> int:
    encoding = encodings.get(tensor)
    return encoding.num_bits if encoding is not None and encoding.enabled else FLOAT_BITS


def _mean_bits(sizes: Mapping[str, int] | Mapping[str, float], groups: Sequence[Group], encodings: Encodings) -> Cost:
    grouped = {tensor for group in groups for tensor in group.tensors}
    weights = np.array([sum(sizes.get(tensor, 0) for tensor in group.tensors) for group in groups], float)
    fixed = sum(size * _bits_of(encodings, name) for name, size in sizes.items() if name not in grouped)
    total = sum(sizes.values()) or 1
    return lambda widths: float((fixed + weights @ widths) / total)


def _model_bytes(costs: CostModel, groups: Sequence[Group], encodings: Encodings) -> Cost:
    params = costs.model.params
    tensors = [(index, tensor) for index, group in enumerate(groups) for tensor in group.tensors]
    index = np.array([found for found, _ in tensors], int)
    counts = np.array([np.size(params[tensor]) if tensor in params else 0 for _, tensor in tensors], int)
    scales = np.array([np.size(encodings[tensor].scale) for _, tensor in tensors], int)

    def grouped(widths: np.ndarray) -> int:
        bits = widths[index]
        return int(np.sum(-(-counts * bits // 8)) + np.sum(-(-scales * bits // 8)))

    now = np.array([_bits_of(encodings, group.name) for group in groups], int)
    fixed = costs.costs(encodings).model_bytes - grouped(now)
    return lambda widths: float(fixed + grouped(widths))


def _bit_operations(costs: CostModel, groups: Sequence[Group], encodings: Encodings) -> Cost:
    place = {tensor: index for index, group in enumerate(groups) for tensor in group.tensors}
    others = {name for product in costs.products for name in product.operands} - place.keys()
    slots = place | {name: len(groups) + index for index, name in enumerate(sorted(others))}
    fixed = np.array([_bits_of(encodings, name) for name in sorted(others)], float)
    left, right = (np.array([slots[product.operands[i]] for product in costs.products], int) for i in (0, 1))
    counts = np.array([product.multiplications for product in costs.products], float)

    def cost(widths: np.ndarray) -> float:
        bits = np.concatenate([widths, fixed])
        return float(np.sum(counts * bits[left] * bits[right]))

    return cost


Limits = Mapping[str, float]
"""The most of each cost, by its name."""


def require_possible(functions: Mapping[str, Cost], limits: Limits, narrowest: np.ndarray) -> None:
    """Checks that the narrowest widths keep the limits.

    Raises:
        ConfigError: They do not; the message has the smallest limit that is possible.
    """
    for name, limit in limits.items():
        least = functions[name](narrowest)
        if least > limit:
            raise ConfigError(
                f"budget: {name}={limit:g} is less than the smallest possible, {least:.10g}, with all widths at their "
                "narrowest; allow more, or give narrower widths"
            )
