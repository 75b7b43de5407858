"""A block as the program that learns takes it: what is learned of it, where that begins, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptqjax.encodings.encoding import Encoding, Encodings, along_axis
from ptqjax.fit.block_steps import Fixed, Plan, Variables
from ptqjax.fit.rounding import Solving
from ptqjax.fit.walking import Walk
from ptqjax.kernels.soft_rounding import codes_of, start_of
from ptqjax.lowering import Stretch
from ptqjax.transforms.linear import Linear

_BIAS_RATE = 0.003  # in units of `_unit`
_STEP_RATE = 0.001  # of logarithms
_MANY = 64  # weights of one output from which each may go at the full rate
_SMALLEST = 1e-12  # of the noise that a loss is told in


@dataclass(frozen=True, kw_only=True)
class BlockProblem:
    """What is learned of a block."""

    block: Stretch
    """The block; the names below are those of its own graph, where nothing else is said."""
    params: Mapping[str, np.ndarray]
    """Its parameters at the beginning, rounded."""
    limits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """The smallest and the largest codes of each weight."""
    scales: Mapping[str, np.ndarray]
    """The scales of each weight, ready to multiply codes."""
    paces: Mapping[str, np.float32]
    """The pace of each weight: 1, and less where few are summed, since there each counts for more."""
    units: Mapping[str, np.ndarray]
    """The units of the biases that are learned."""
    grids: Encodings
    """The encodings of the activations that the block computes, by the whole graph's names."""
    tied: tuple[tuple[str, ...], ...]
    """Activations whose steps are learned, those of one grid together, by the whole graph's names."""
    start: Variables
    """Where learning begins: at the parameters."""
    moved: Callable[[str, np.ndarray], np.ndarray] | None
    """The function that moves solved weights, as `Solving` has it."""

    @staticmethod
    def of(
        walk: Walk,
        block: Stretch,
        params: Mapping[str, Any],
        layers: Sequence[Linear],
        *,
        solving: Solving,
        free: frozenset[str],
    ) -> BlockProblem:
        """Returns the problem of a block whose parameters lie on their grids; of activations, `free` may be learned."""
        here, grids = block.names, walk.grids(block)
        own = {here[name]: np.asarray(params[name]) for name in walk.model.graph.parameters if name in here}
        limits, scales, numbers, paces, units = {}, {}, {}, {}, {}
        for layer in layers:
            name, encoding = here[layer.weight], walk.encodings[layer.weight]
            exact = np.asarray(walk.model.params[layer.weight], np.float32)
            scales[name], *ends = _grid(encoding, exact.shape)
            limits[name] = (ends[0], ends[1])
            numbers[name] = start_of(exact / scales[name], codes_of(own[name] / scales[name], *ends))
            paces[name] = np.float32(min(1.0, exact.size / layer.num_outputs / _MANY))
            if solving.corrects and layer.bias and layer.node.attribute("beta", 1.0) == 1:
                units[here[layer.bias]] = _unit(walk, layer, own[here[layer.bias]])
        tied = _tied(walk, grids, free)
        shifts = {name: np.zeros(own[name].shape, np.float32) for name in units}
        return BlockProblem(
            block=block,
            params=own,
            limits=limits,
            scales=scales,
            paces=paces,
            units=units,
            grids=grids,
            tied=tied,
            start=Variables(numbers, shifts, tuple(np.float32(0) for _ in tied)),
            moved=solving.moved,
        )

    def plan(self) -> Plan:
        """Returns what is static while it is learned."""
        names = self.block.names
        return Plan(graph=self.block.graph, steps=tuple(tuple(names[name] for name in tied) for tied in self.tied))

    @staticmethod
    def rates(of_weights: float, falling: float) -> np.ndarray:
        """Returns the rates of a step, [3]: of weights, and what those of biases and steps of activations fall by."""
        return np.asarray([of_weights * falling, _BIAS_RATE * falling, _STEP_RATE * falling], np.float32)

    def fixed(self, powers: Sequence[float], start: float, *, mixed: float) -> Fixed:
        """Returns what stays as it is: the powers of outputs and the noise at the start are what a loss is told in."""
        return Fixed(
            params=dict(self.params),
            limits=dict(self.limits),
            scales=dict(self.scales),
            paces=dict(self.paces),
            units=dict(self.units),
            encodings={self.block.names[name]: encoding for name, encoding in self.grids.items()},
            powers=tuple(np.float32(power) for power in powers),
            start=np.float32(max(start, _SMALLEST)),
            mixed=np.float32(mixed),
        )

    def hardened(self, variables: Variables) -> tuple[dict[str, Any], Encodings]:
        """Returns parameters with each weight on its grid, and changed encodings, by the whole graph's names."""
        back = {here: name for name, here in self.block.names.items()}
        changed: dict[str, Any] = {}
        for name, numbers in variables.weights.items():
            weight = (codes_of(numbers, *self.limits[name]) * self.scales[name]).astype(self.params[name].dtype)
            changed[back[name]] = weight if self.moved is None else self.moved(back[name], weight)
        for name, shift in variables.shifts.items():
            raised = self.params[name] + self.units[name] * np.asarray(shift)
            changed[back[name]] = raised.astype(self.params[name].dtype)
        factors = zip(self.tied, variables.log_steps, strict=True)
        return changed, {name: _scaled(self.grids[name], factor) for names, factor in factors for name in names}


def _grid(encoding: Encoding, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scale, smallest and largest code, counted from 0's, ready for weights of `shape`."""
    scale, zero = (along_axis(np.asarray(each), encoding, shape) for each in (encoding.scale, encoding.zero_point))
    low, high = (np.asarray(end - zero, np.float32) for end in (encoding.qmin, encoding.qmax))
    return np.asarray(scale, np.float32), low, high


def _unit(walk: Walk, layer: Linear, bias: np.ndarray) -> np.ndarray:
    """Returns what one step of a weight adds to the output at an eighth of the input's range: one number or each's."""
    scale, x = np.asarray(walk.encodings[layer.weight].scale, np.float32), walk.encodings.get(layer.input)
    reach = 1.0 if x is None or x.is_dynamic else float(np.max(np.asarray(x.scale)) * (x.qmax - x.qmin)) / 8
    each = scale.reshape(bias.shape) if scale.size == bias.size else scale.max()
    return np.asarray(each * reach, np.float32)


def _tied(walk: Walk, grids: Encodings, free: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """Returns the activations of a block whose steps may be learned, those on one grid together.

    A grid that tensors outside of the block have as well is left alone: they are on one grid for a reason.
    """
    every: dict[Any, list[str]] = {}
    for name, encoding in walk.activations.items():
        every.setdefault(_key(encoding), []).append(name)
    groups = (every[key] for key in dict.fromkeys(map(_key, grids.values())))
    return tuple(tuple(names) for names in groups if all(_can_move(name, grids, free) for name in names))


def _can_move(name: str, grids: Encodings, free: frozenset[str]) -> bool:
    if name not in grids or name not in free or grids[name].is_dynamic:
        return False
    return grids[name].float_format is None and bool(np.all(grids[name].enabled))


def _key(encoding: Encoding) -> tuple[bytes, ...]:
    leaves = (encoding.scale, encoding.zero_point, encoding.qmin, encoding.qmax)
    return tuple(np.asarray(leaf, np.float32).tobytes() for leaf in leaves)


def _scaled(encoding: Encoding, log_factor: Any) -> Encoding:
    return encoding.replace(scale=(np.asarray(encoding.scale) * np.exp(np.asarray(log_factor))).astype(np.float32))
