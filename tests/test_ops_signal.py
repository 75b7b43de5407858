"""Fourier transforms, windows and filters: against ONNX Runtime, NumPy, and by laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.errors import DataDependentError, UnsupportedOperatorError
from ptqjax.ops import find_lowering
from ptqjax.ops.signal import causal_conv_with_state, dft, mel_weight_matrix, stft
from tests.single_node import assert_as_in_onnxruntime

_SUMS = 1e-4  # of some ten numbers near 1, in another order


def _values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("length", [None, 5, 8, 9, 13])
@pytest.mark.parametrize(("parts", "settings"), [(1, {"onesided": 1}), (1, {}), (2, {}), (2, {"inverse": 1})])
def test_transforms_are_onnxruntimes(parts, settings, length):
    x = _values(2, 9, 3, parts)
    inputs = [x] if length is None else [x, np.array(length)]
    assert_as_in_onnxruntime("DFT", inputs, atol=_SUMS, opset=17, axis=1, **settings)
    inputs = [x, None if length is None else np.array(length), np.array(-3)]
    assert_as_in_onnxruntime("DFT", inputs, atol=_SUMS, opset=20, **settings)


@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize("length", [8, 9])
def test_the_inverse_gives_the_signal_back(length, onesided):
    x = jnp.asarray(_values(2, length, 3, 1 if onesided else 2))
    spectrum = dft(x, None, np.array(1), onesided=onesided)
    back = dft(spectrum, np.array(length), np.array(1), inverse=1, onesided=onesided)
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("length", [8, 9])
def test_a_real_signals_spectrum_is_that_of_complex_numbers(length):
    x = _values(2, length, 1)
    found, expected = dft(x), np.fft.fft(x[..., 0].astype(np.float64), axis=1)
    np.testing.assert_allclose(found, np.stack([expected.real, expected.imag], -1), atol=1e-5)
    half = dft(np.concatenate([x, np.zeros_like(x)], -1), onesided=1)
    np.testing.assert_allclose(half, np.asarray(found)[:, : length // 2 + 1], atol=1e-5)


@pytest.mark.parametrize("onesided", [0, 1])
def test_frames_are_onnxruntimes(onesided):
    signal, window = _values(2, 50, 1), np.abs(_values(12, seed=1))
    step, length = np.array(5), np.array(12)
    for inputs in ([signal, step, window], [signal, step, None, length], [signal, step, window, length]):
        assert_as_in_onnxruntime("STFT", inputs, atol=_SUMS, opset=17, onesided=onesided)


def test_frames_may_be_complex():
    signal, length = _values(1, 20, 2), 8
    z = signal[0, :, 0] + 1j * signal[0, :, 1]
    expected = np.stack([np.fft.fft(z[start : start + length]) for start in range(0, 13, 4)])
    found = np.asarray(stft(signal, np.array(4), None, np.array(length), onesided=0))[0]
    np.testing.assert_allclose(found[..., 0] + 1j * found[..., 1], expected, atol=1e-5)


@pytest.mark.parametrize("periodic", [0, 1])
@pytest.mark.parametrize("number", [1, 10, 11])
@pytest.mark.parametrize("op_type", ["HannWindow", "HammingWindow", "BlackmanWindow"])
def test_windows_are_onnxruntimes(op_type, number, periodic):
    dtype = {1: np.float32, 10: np.float16, 11: np.float64}[number]
    window = find_lowering(op_type, opset=17).function
    assert window(np.array(9), output_datatype=number).dtype == dtype
    if dtype == np.float32:
        settings = {"output_datatype": number, "periodic": periodic}
        assert_as_in_onnxruntime(op_type, [np.array(9)], atol=1e-6, opset=17, **settings)


def test_a_windows_size_must_be_known():
    with pytest.raises(DataDependentError, match="the size of HannWindow"):
        jax.jit(find_lowering("HannWindow", opset=17).function)(9)


@pytest.mark.parametrize(
    ("bins", "length", "rate", "low", "high"), [(8, 64, 8000, 20.0, 4000.0), (40, 64, 8192, 0, 4096)]
)
def test_mel_weights_are_onnxruntimes(bins, length, rate, low, high):
    """Also where bins are narrower than a frequency, so that triangles are points."""
    inputs = [np.array(bins), np.array(length), np.array(rate), np.float32(low), np.float32(high)]
    assert_as_in_onnxruntime("MelWeightMatrix", list(map(np.asarray, inputs)), atol=1e-6, opset=17)


def test_each_mel_bin_has_its_peak():
    inputs = (np.array(10), np.array(512), np.array(16000), np.float32(0), np.float32(8000))
    np.testing.assert_array_equal(mel_weight_matrix(*map(np.asarray, inputs)).max(axis=0), np.ones(10))


@pytest.mark.parametrize("activation", ["none", "silu", "swish"])
def test_a_filter_in_pieces_is_the_filter_of_the_whole(activation):
    x, weight, bias = _values(2, 3, 11), _values(3, 1, 4, seed=1), _values(3, seed=2)
    filtered = jax.jit(lambda part, state: causal_conv_with_state(part, weight, bias, state, activation=activation))
    whole, end = causal_conv_with_state(x, weight, bias, activation=activation)
    pieces, state = [], np.zeros((2, 3, 3), np.float32)
    for part in np.split(x, [1, 3, 8], axis=2):
        y, state = filtered(part, state)
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, 2), whole, atol=1e-5)
    np.testing.assert_array_equal(state, end)


def test_a_filter_refuses_unknown_activations():
    with pytest.raises(UnsupportedOperatorError, match="'relu'"):
        causal_conv_with_state(_values(1, 1, 2), _values(1, 1, 2), activation="relu")
