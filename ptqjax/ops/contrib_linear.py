"""Linear layers of com.microsoft: with transposes, activations or packed weights inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.activation import elu, hard_sigmoid, leaky_relu
from ptqjax.ops.convolution import conv, conv_channels_last
from ptqjax.ops.integer import matmul_integer
from ptqjax.ops.layout import to_channels_last, with_rank
from ptqjax.ops.linear import gemm, matmul
from ptqjax.ops.quantization import dynamic_quantize_linear
from ptqjax.ops.registry import MICROSOFT, lowers, lowers_channels_last

# Activations by the name that fused operators give, as functions of x and the numbers that they bring along.
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "": lambda x, *_: x,
    "Clip": jnp.clip,
    "Elu": lambda x, alpha=1.0, *_: elu(x, alpha=alpha),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5, *_: hard_sigmoid(x, alpha=alpha, beta=beta),
    "LeakyRelu": lambda x, alpha=0.01, *_: leaky_relu(x, alpha=alpha),
    "Relu": lambda x, *_: jnp.maximum(x, 0),
    "Sigmoid": lambda x, *_: jax.nn.sigmoid(x),
    "Tanh": lambda x, *_: jnp.tanh(x),
}


@lowers("FusedConv", since=1, domain=MICROSOFT)
def fused_conv(
    x: Any,
    w: Any,
    bias: Any = None,
    summand: Any = None,
    /,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns activation(conv(x, w) + bias + summand)."""
    del kernel_shape  # the weight has it
    y = conv(x, w, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return _activated(y if summand is None else y + summand, activation, activation_params)


@lowers_channels_last("FusedConv", since=1, domain=MICROSOFT, starts=True)
def fused_conv_channels_last(
    x: Any,
    w: Any,
    bias: Any = None,
    summand: Any = None,
    /,
    *,
    activation: str = "",
    activation_params: Sequence[float] = (),
    **window: Any,
) -> Any:
    """Returns `fused_conv` of a channels-last `x`, with its attributes, channels last."""
    y = conv_channels_last(x, w, bias, **window)
    y = y if summand is None else y + to_channels_last(summand)
    return _activated(y, activation, activation_params)


@lowers("FusedGemm", since=1, domain=MICROSOFT)
def fused_gemm(
    a: Any,
    b: Any,
    c: Any = None,
    /,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's name
    transB: int = 0,  # noqa: N803 - ONNX's name
) -> Any:
    """Returns activation(alpha a b + beta c)."""
    numbers = [value for value in (activation_alpha, activation_beta, activation_gamma) if value is not None]
    return _activated(gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB), activation, numbers)


def _activated(x: Any, name: str, numbers: Sequence[float]) -> Any:
    if name not in _ACTIVATIONS:
        raise UnsupportedOperatorError(f"activation '{name}' is unknown; known are {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[name](x, *numbers)


@lowers("TransposeMatMul", since=1, domain=MICROSOFT)  # what it was called before
@lowers("FusedMatMul", since=1, domain=MICROSOFT)
def fused_matmul(
    a: Any,
    b: Any,
    /,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's name
    transB: int = 0,  # noqa: N803 - ONNX's name
    transBatchA: int = 0,  # noqa: N803 - ONNX's name
    transBatchB: int = 0,  # noqa: N803 - ONNX's name
) -> Any:
    """Returns alpha a b; where asked, first the first axis moves behind the batch, then the last two change places."""
    y = matmul(_transposed(a, transA, transBatchA), _transposed(b, transB, transBatchB))
    return y if alpha == 1 else y * y.dtype.type(alpha)


def _transposed(x: Any, swaps: int, moves_first: int) -> Any:
    x = jnp.moveaxis(x, 0, -2) if moves_first and x.ndim > 1 else x
    return jnp.swapaxes(x, -1, -2) if swaps and x.ndim > 1 else x


@lowers("MatMulIntegerToFloat", since=1, domain=MICROSOFT)
def matmul_integer_to_float(  # noqa: PLR0917 - ONNX's operands
    a: Any,
    b: Any,
    a_scale: Any,
    b_scale: Any,
    a_zero_point: Any = None,
    b_zero_point: Any = None,
    bias: Any = None,
    /,
) -> Any:
    """Returns the product of the integers that the scales and zero points stand for, in float32, plus the bias."""
    total = matmul_integer(a, b, a_zero_point, b_zero_point).astype(b_scale.dtype)
    y = total * with_rank(a_scale.reshape(-1) * b_scale.reshape(-1), total.ndim)
    return y if bias is None else y + with_rank(bias, y.ndim)


@lowers("DynamicQuantizeMatMul", since=1, domain=MICROSOFT)
def dynamic_quantize_matmul(a: Any, b: Any, b_scale: Any, b_zero_point: Any = None, bias: Any = None, /) -> Any:
    """Returns `matmul_integer_to_float` of `a`, quantized to uint8 by its own range, and the integers `b`."""
    q, scale, zero_point = dynamic_quantize_linear(a)
    return matmul_integer_to_float(q, b, scale, b_scale, zero_point, b_zero_point, bias)
