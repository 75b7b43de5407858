"""One view of every linear operator's weight: [groups, outputs, inputs, taps].

Conv and ConvTranspose of any rank, grouped and depthwise, Gemm and MatMul differ in the order of their axes alone. In
this view output channel o of group g is row (g, o), input channel i is column (g, i), and what folding and equalization
do is one line each. Vectors per channel are flat: group after group.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int

from ptqjax.kernels.namespace import array_namespace

View = Float[Array | np.ndarray, "g o i k"]
Outputs = Float[Array | np.ndarray, " outputs"]
Inputs = Float[Array | np.ndarray, " inputs"]


def grouped_view(weight: Float[Array | np.ndarray, "..."], *, groups: int, inputs_first: bool) -> View:
    """Returns `weight` as [groups, outputs, inputs, taps], outputs and inputs counted within a group.

    Args:
        weight: [outputs, inputs / groups, *kernel], or with `inputs_first` [inputs, outputs / groups, *kernel].
        groups: Number of groups; 1 for a Gemm.
        inputs_first: Whether the first axis counts inputs (ConvTranspose, MatMul, Gemm without transB).
    """
    view = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return view.swapaxes(1, 2) if inputs_first else view


def ungrouped_view(view: View, shape: tuple[int, ...], *, inputs_first: bool) -> Float[Array | np.ndarray, "..."]:
    """Returns the weight of `shape` whose `grouped_view` is `view`."""
    return (view.swapaxes(1, 2) if inputs_first else view).reshape(shape)


def scale_outputs(view: View, scale: Outputs) -> View:
    """Returns the view with each output channel multiplied by its scale."""
    groups, outputs = view.shape[:2]
    return view * scale.reshape(groups, outputs, 1, 1)


def scale_inputs(view: View, scale: Inputs) -> View:
    """Returns the view with each input channel multiplied by its scale."""
    groups, _, inputs, _ = view.shape
    return view * scale.reshape(groups, 1, inputs, 1)


def respond_to_constant(view: View, value: Inputs) -> Outputs:
    """Returns what the layer adds to its outputs for an input that is `value` everywhere: sum_{i,k} w[o,i,k] v[i].

    Where the operator pads with zeros, this holds away from the border alone.
    """
    groups, outputs, inputs, _ = view.shape
    return (view.sum(axis=3) @ value.reshape(groups, inputs, 1)).reshape(groups * outputs)


def output_ranges(view: View) -> Outputs:
    """Returns the largest absolute weight of each output channel."""
    xp = array_namespace(view)
    return xp.abs(view).max(axis=(2, 3)).reshape(-1)


def input_ranges(view: View) -> Inputs:
    """Returns the largest absolute weight of each input channel."""
    xp = array_namespace(view)
    return xp.abs(view).max(axis=(1, 3)).reshape(-1)


def largest_by_number(
    values: Float[Array | np.ndarray, " n"], numbers: Int[np.ndarray, " n"], count: int
) -> Float[Array | np.ndarray, " count"]:
    """Returns the largest value that has each number, 0 for none; values with a number outside 0..count-1 are left out.

    Values are not negative.
    """
    within = (numbers >= 0) & (numbers < count)
    if len(numbers) == count and np.array_equal(numbers, np.arange(count)):
        return values
    xp = array_namespace(values)
    found = xp.zeros(count, dtype=values.dtype)
    if xp is not np:
        return found.at[numbers[within]].max(values[within])
    np.maximum.at(found, numbers[within], values[within])
    return found
