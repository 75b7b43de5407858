"""Conv and ConvTranspose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ptqjax.kernels.convolution import convolve, convolve_channels_last, transposed_convolve
from ptqjax.kernels.gpu_convolution import convolve_on_gpu
from ptqjax.kernels.platforms import current
from ptqjax.kernels.windows import Padding, explicit_padding
from ptqjax.ops.registry import lowers, lowers_channels_last


@lowers("Conv", since=1)
def conv(
    x: Any,
    w: Any,
    bias: Any = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the cross-correlation of `x` [n, c, *spatial] with `w` [o, c / group, *kernel], plus the bias."""
    del kernel_shape  # the weight has it
    window = window_of(x.shape[2:], w.shape[2:], auto_pad=auto_pad, dilations=dilations, pads=pads, strides=strides)
    y = convolve(x, w, groups=group, **window)
    return y if bias is None else y + bias.reshape(1, -1, *(1,) * (y.ndim - 2))


@lowers_channels_last("Conv", since=1, starts=True)
def conv_channels_last(
    x: Any, w: Any, bias: Any = None, /, *, group: int = 1, kernel_shape: Sequence[int] = (), **window: Any
) -> Any:
    """Returns `conv` of a channels-last `x`, with its attributes, channels last."""
    del kernel_shape
    product = convolve_on_gpu if current().platform == "gpu" else convolve_channels_last
    y = product(x, w, groups=group, **window_of(x.shape[1:-1], w.shape[2:], **window))
    return y if bias is None else y + bias.reshape(*(1,) * (y.ndim - 1), -1)


@lowers("ConvTranspose", since=1)
def conv_transpose(
    x: Any,
    w: Any,
    bias: Any = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    output_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Any:
    """Returns the transpose of the convolution with `w` [c, o / group, *kernel], applied to `x`, plus the bias."""
    del kernel_shape
    ones = (1,) * (x.ndim - 2)
    strides, dilations, extra = strides or ones, dilations or ones, output_padding or (0,) * len(ones)
    crops = crops_of(
        x.shape[2:],
        w.shape[2:],
        auto_pad=auto_pad,
        dilations=dilations,
        extra=extra,
        output_shape=output_shape,
        pads=pads,
        strides=strides,
    )
    y = transposed_convolve(x, w, strides=strides, crops=crops, dilations=dilations, extra=extra, groups=group)
    return y if bias is None else y + jnp.reshape(bias, (1, -1, *ones))


def window_of(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> dict[str, Any]:
    """Returns the strides, padding and dilations that ONNX's attributes of a Conv stand for on an input of `sizes`."""
    ones = (1,) * len(sizes)
    strides, dilations, pads = tuple(strides or ones), tuple(dilations or ones), tuple(pads or (0,) * 2 * len(sizes))
    padding = explicit_padding(sizes, kernel=kernel, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad)
    return {"strides": strides, "padding": padding, "dilations": dilations}


def crops_of(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    auto_pad: str,
    dilations: Sequence[int],
    extra: Sequence[int],
    output_shape: Sequence[int],
    pads: Sequence[int],
    strides: Sequence[int],
) -> Padding:
    """Returns how many elements ONNX's pads take off the full result, per axis, at both ends."""
    if not output_shape and auto_pad in ("NOTSET", "VALID"):
        pads = pads or (0,) * 2 * len(sizes)
        return tuple(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))
    wanted = output_shape or [size * stride for size, stride in zip(sizes, strides, strict=True)]
    crops = []
    for size, taps, stride, dilation, more, goal in zip(
        sizes, kernel, strides, dilations, extra, wanted[-len(sizes) :], strict=True
    ):
        total = stride * (size - 1) + more + (taps - 1) * dilation + 1 - goal  # below 0: zeros are added
        less, rest = total // 2, total - total // 2
        crops.append((less, rest) if auto_pad == "SAME_UPPER" else (rest, less))
    return tuple(crops)
