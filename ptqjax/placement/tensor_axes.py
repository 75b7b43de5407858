"""What a model says of a tensor that files of encodings do not: its shape, and the axes that its operator gives it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptqjax.ir import Model
from ptqjax.placement.granularity import operand_axes
from ptqjax.placement.tensors import floating_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorAxes:
    """A tensor's shape and axes, as far as the model tells them."""

    shape: tuple[int, ...] | None = None
    """The shape of a parameter; None for what flows."""
    channel: int | None = None
    """The axis of output channels, for the weight of an operator."""
    summed: int | None = None
    """The axis that is summed, which blocks cut."""

    def same(self, one: int, other: int) -> bool:
        """Tells whether two spellings of an axis mean the same one."""
        if self.shape is None or not (self.fits(one) and self.fits(other)):
            return one == other
        return (one - other) % len(self.shape) == 0

    def spelled(self, axis: int | None, block_size: int | None) -> int | None:
        """Returns the axis of scales as placement spells it, where it is that of channels or that of blocks."""
        usual = self.channel if block_size is None else self.summed
        return usual if axis is not None and usual is not None and self.same(axis, usual) else axis

    def fits(self, axis: int) -> bool:
        """Tells whether the tensor may have the axis."""
        return self.shape is None or -len(self.shape) <= axis < len(self.shape)


def tensor_axes(model: Model) -> dict[str, TensorAxes]:
    """Returns what is known of each floating tensor of the model, by name.

    Conv has its output channels on axis 0, ConvTranspose on 1, Gemm on 0 or 1 as transB says, MatMul on the last one.
    Where the readers of a weight disagree, its axes are not known.
    """
    uses: dict[str, set[tuple[int, int]]] = {}
    for node in model.graph.nodes:
        for tensor, channel, summed in operand_axes(node):
            uses.setdefault(tensor, set()).add((channel, summed))
    return {name: _axes(model, name, uses.get(name, set())) for name in floating_tensors(model)}


def _axes(model: Model, name: str, uses: set[tuple[int, int]]) -> TensorAxes:
    if name not in model.params:
        return TensorAxes()
    shape = np.shape(model.params[name])
    if len(uses) != 1 or len(shape) < 2:  # noqa: PLR2004 - a vector has no channels
        return TensorAxes(shape=shape)
    ((channel, summed),) = uses
    return TensorAxes(shape=shape, channel=channel, summed=summed)
