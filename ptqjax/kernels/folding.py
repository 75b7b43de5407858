"""Batch normalization as part of the linear layer beside it.

Source: Jacob et al., Quantization and Training of Neural Networks (CVPR 2018), section 3.2; here for either side.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float

from ptqjax.kernels.grouped import View, respond_to_constant, scale_inputs, scale_outputs
from ptqjax.kernels.namespace import array_namespace

Channels = Float[Array | np.ndarray, " c"]
Inputs = Float[Array | np.ndarray, " inputs"]
Outputs = Float[Array | np.ndarray, " outputs"]


def batch_norm_as_affine(
    gamma: Channels, beta: Channels, mean: Channels, variance: Channels, *, epsilon: float
) -> tuple[Channels, Channels]:
    """Returns (k, t) with batch_norm(x) = k x + t: k = gamma / sqrt(variance + epsilon), t = beta - k mean."""
    xp = array_namespace(gamma, beta, mean, variance)
    scale = gamma / xp.sqrt(variance + epsilon)
    return scale, beta - scale * mean


def fold_after(view: View, bias: Outputs, scale: Outputs, shift: Outputs) -> tuple[View, Outputs]:
    """Returns weight view and bias of x -> scale (w x + b) + shift, scale and shift per output channel."""
    return scale_outputs(view, scale), bias * scale + shift


def fold_before(view: View, bias: Outputs, scale: Inputs, shift: Inputs) -> tuple[View, Outputs]:
    """Returns weight view and bias of x -> w (scale x + shift) + b, scale and shift per input channel.

    Exact where the layer does not pad, or shift is zero: padding puts zeros where a shifted zero would have to be.
    """
    return scale_inputs(view, scale), bias + respond_to_constant(view, shift)
