"""Fourier transforms, their windows, and causal filters of signals."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.ops.element_types import element_type
from ptqjax.ops.interpolation import check_choice, in_real_arithmetic
from ptqjax.ops.registry import known, lowers, static_integers

_FLOAT = 1  # ONNX's number of float32


@lowers("DFT", since=20)
def dft(x: Any, dft_length: Any = None, axis: Any = None, /, *, inverse: int = 0, onesided: int = 0) -> Any:
    """Returns the discrete Fourier transform of `x` [..., 1 (real) or 2 (real, imaginary)] along `axis`.

    The signal is cut or filled with zeros to `dft_length`. The inverse is divided by it. With `onesided` a real signal
    gives its non-negative frequencies, and the inverse gives a real signal from these.
    """
    along = -2 if axis is None else static_integers(axis, "the axis of DFT")[0]
    return _transformed(x, dft_length, along, inverse=bool(inverse), onesided=bool(onesided))


@lowers("DFT", since=17)
def dft_17(x: Any, dft_length: Any = None, /, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Any:
    """Returns `dft`; the axis is an attribute."""
    return _transformed(x, dft_length, axis, inverse=bool(inverse), onesided=bool(onesided))


@lowers("STFT", since=17)
def stft(signal: Any, frame_step: Any, window: Any = None, frame_length: Any = None, /, *, onesided: int = 1) -> Any:
    """Returns the Fourier transforms of overlapping frames of `signal` [n, length, 1 or 2]: [n, frames, bins, 2]."""
    step = static_integers(frame_step, "the frame_step of STFT")[0]
    if frame_length is not None:
        length = static_integers(frame_length, "the frame_length of STFT")[0]
    else:
        length = signal.shape[1] if window is None else window.shape[0]
    starts = np.arange(0, signal.shape[1] - length + 1, step)
    parts = signal.reshape(*signal.shape[:2], -1)
    frames = jnp.take(jnp.asarray(parts), starts[:, None] + np.arange(length), axis=1, mode="clip")
    if window is not None:
        frames = frames * window.reshape(1, 1, -1, 1)
    return _transformed(frames, None, 2, inverse=False, onesided=bool(onesided))


def _transformed(x: Any, dft_length: Any, axis: int, *, inverse: bool, onesided: bool) -> Any:
    axis %= x.ndim
    real = in_real_arithmetic(x)
    signal = real[..., 0] if x.shape[-1] == 1 else lax.complex(real[..., 0], real[..., 1])
    if dft_length is not None:
        length = static_integers(dft_length, "the dft_length of DFT")[0]
    else:
        length = 2 * (x.shape[axis] - 1) if inverse and onesided else x.shape[axis]
    if inverse and onesided:
        return jnp.fft.irfft(signal, n=length, axis=axis)[..., None].astype(x.dtype)
    if inverse:
        spectrum = jnp.fft.ifft(signal, n=length, axis=axis)
    elif x.shape[-1] == 1:
        spectrum = jnp.fft.rfft(signal, n=length, axis=axis)
        if not onesided:  # the rest mirrors it, to the bit
            rest = lax.slice_in_dim(spectrum, 1, (length + 1) // 2, axis=axis)
            spectrum = jnp.concatenate([spectrum, jnp.conj(jnp.flip(rest, axis))], axis=axis)
    else:
        spectrum = jnp.fft.fft(signal, n=length, axis=axis)
        if onesided:
            spectrum = lax.slice_in_dim(spectrum, 0, length // 2 + 1, axis=axis)
    return jnp.stack([spectrum.real, spectrum.imag], axis=-1).astype(x.dtype)


def _lower_window(op_type: str, shape: Callable[[np.ndarray], np.ndarray]) -> None:
    """Registers a window of a known size; `shape` is a function of the angle, which goes once around."""

    @lowers(op_type, since=17)
    def window(size: Any, /, *, output_datatype: int = _FLOAT, periodic: int = 1) -> np.ndarray:
        count = static_integers(size, f"the size of {op_type}")[0]
        around = count if periodic else max(count - 1, 1)
        return shape(2 * np.pi * np.arange(count) / around).astype(element_type(output_datatype))


_lower_window("HannWindow", lambda angle: 0.5 - 0.5 * np.cos(angle))
_lower_window("HammingWindow", lambda angle: (25 - 21 * np.cos(angle)) / 46)
_lower_window("BlackmanWindow", lambda angle: 0.42 - 0.5 * np.cos(angle) + 0.08 * np.cos(2 * angle))


@lowers("MelWeightMatrix", since=17)
def mel_weight_matrix(
    num_mel_bins: Any,
    dft_length: Any,
    sample_rate: Any,
    lower_edge_hertz: Any,
    upper_edge_hertz: Any,
    /,
    *,
    output_datatype: int = _FLOAT,
) -> np.ndarray:
    """Returns the matrix [frequencies, mel bins] that makes a mel spectrogram of a spectrogram.

    Each column is a triangle with its peak of 1 where the scale mel(f) = 2595 log10(1 + f / 700) has a step.
    """
    num, length, rate, low, high = (
        known(value, "an input of MelWeightMatrix").item()
        for value in (num_mel_bins, dft_length, sample_rate, lower_edge_hertz, upper_edge_hertz)
    )
    bottom, top = (2595 * np.log10(1 + edge / 700) for edge in (low, high))
    mels = bottom + np.arange(num + 2) * ((top - bottom) / (num + 2))
    hertz = 700 * (10 ** (mels / 2595) - 1)
    bins = np.floor((length + 1) * hertz / rate).astype(np.int64)
    left, centre, right = bins[None, :-2], bins[None, 1:-1], bins[None, 2:]
    frequency = np.arange(length // 2 + 1)[:, None]
    rising = np.where(centre == left, frequency == centre, (frequency - left) / np.maximum(centre - left, 1))
    falling = (right - frequency) / np.maximum(right - centre, 1)
    weights = np.where(frequency <= centre, rising * (frequency >= left), falling * (frequency < right))
    peak = (frequency == centre) & (right > centre)
    return np.where(peak, 1, weights).astype(element_type(output_datatype))


@lowers("CausalConvWithState", since=27)
def causal_conv_with_state(
    x: Any, weight: Any, bias: Any = None, past_state: Any = None, /, *, activation: str = "none"
) -> tuple[Any, Any]:
    """Returns the filter `weight` [c, 1, k] of each channel of `x` [n, c, length] and what precedes it, and its end.

    Before `x` comes `past_state` [n, c, k - 1], zeros where there is none; the second result is the next such state.
    """
    check_choice(activation, ("none", "silu", "swish"), "activation")
    taps = weight.shape[-1]
    past = jnp.zeros((*x.shape[:2], taps - 1), x.dtype) if past_state is None else jnp.asarray(past_state)
    padded = jnp.concatenate([past, jnp.asarray(x)], axis=2)
    values, filters = in_real_arithmetic(padded), in_real_arithmetic(weight)
    terms = [values[:, :, tap : tap + x.shape[2]] * filters[None, :, :, tap] for tap in range(taps)]
    y = reduce(jnp.add, terms)
    if bias is not None:
        y = y + bias.reshape(1, -1, 1).astype(y.dtype)
    if activation != "none":
        y = jax.nn.silu(y.astype(x.dtype).astype(y.dtype))
    return y.astype(x.dtype), lax.slice_in_dim(padded, padded.shape[2] - taps + 1, padded.shape[2], axis=2)
