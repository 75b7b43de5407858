"""Moments of normal variables behind activations: against numeric integration in float64, and their laws."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from ptqjax.kernels.moments import clipped_normal, cumulative_normal, leaky_normal, passing_probability

INF = np.inf


def quadrature(function, mean, std, kinks):
    """Mean and variance of function(x), x normal, by adaptive integration between the kinks."""

    def density(x):
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))

    edges = sorted({mean - 12 * std, mean, mean + 12 * std, *(k for k in kinks if abs(k - mean) < 12 * std)})
    pieces = list(pairwise(edges))

    def expectation(g):
        return sum(integrate.quad(lambda x: g(x) * density(x), *piece, epsabs=0, epsrel=1e-12)[0] for piece in pieces)

    first = expectation(function)
    return first, expectation(lambda x: (function(x) - first) ** 2)


LIMITS = [(-INF, INF), (0.0, INF), (0.0, 6.0), (-1.0, 1.0), (-INF, 2.0), (0.5, 0.75), (2.0, 2.0)]
NORMALS = [(0.0, 1.0), (-1.0, 0.7), (3.0, 2.5), (1.0, 0.05), (-4.0, 1.0), (9.0, 0.8)]


@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_clipped_moments_are_those_of_numeric_integration(mean, std, low, high):
    expected = quadrature(lambda x: np.clip(x, low, high), mean, std, (low, high))
    # float64 sums of a handful of terms of order std
    np.testing.assert_allclose(clipped_normal(mean, std, low, high), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.25, 1.0, 1.7])
@pytest.mark.parametrize(("low", "high"), [(-INF, INF), (-0.2, 1.5), (0.3, 6.0), (-2.0, -0.1)])
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_leaky_moments_are_those_of_numeric_integration(mean, std, low, high, slope):
    kinks = [0.0, low, high, *(limit / slope for limit in (low, high) if slope)]
    expected = quadrature(lambda x: np.clip(x if x > 0 else slope * x, low, high), mean, std, kinks)
    np.testing.assert_allclose(leaky_normal(mean, std, slope, low, high), expected, rtol=1e-9, atol=1e-13)


def test_a_negative_slope_is_right_without_limits():
    expected = quadrature(lambda x: x if x > 0 else -0.5 * x, 0.3, 1.2, (0.0,))
    np.testing.assert_allclose(leaky_normal(0.3, 1.2, -0.5), expected, rtol=1e-9)


def test_without_limits_nothing_changes():
    mean, variance = clipped_normal(np.asarray([3.0, -1.0]), np.asarray([2.0, 1e-3]), -INF, INF)
    np.testing.assert_array_equal(mean, [3.0, -1.0])
    np.testing.assert_allclose(variance, [4.0, 1e-6], rtol=1e-14)


def test_the_sign_of_the_standard_deviation_does_not_matter():
    # DFQ's formula taken with gamma = -1 gives -0.083 for this Relu, the mean is 1.083
    signed = clipped_normal(1.0, -1.0, 0.0, INF)
    assert signed == clipped_normal(1.0, 1.0, 0.0, INF)
    np.testing.assert_allclose(signed[0], 1.0833154705876864, rtol=1e-12)


@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_a_constant_is_clipped_exactly(low, high):
    means = np.asarray([-7.3, 0.0, 0.1, 2.0, 8.1])
    mean, variance = clipped_normal(means, np.zeros(5), low, high)
    np.testing.assert_array_equal(mean, np.clip(means, low, high))
    np.testing.assert_array_equal(variance, np.zeros(5))


def test_small_deviations_keep_their_digits_far_from_zero():
    mean, variance = clipped_normal(1e4, 1e-4, 0.0, INF)
    np.testing.assert_allclose((mean, variance), (1e4, 1e-8), rtol=1e-12)


def test_limits_may_differ_by_channel():
    high = np.asarray([1.0, 6.0, INF])
    mean, variance = clipped_normal(np.full(3, 0.5), np.ones(3), 0.0, high)
    for channel in range(3):
        expected = clipped_normal(0.5, 1.0, 0.0, high[channel])
        np.testing.assert_array_equal((mean[channel], variance[channel]), expected)


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize("mean", [-50.0, 0.0, 1.0, 50.0])
def test_gradients_are_finite(mean, std, low, high):
    for function in (clipped_normal, lambda m, s, a, b: leaky_normal(m, s, 0.1, a, b)):
        for part in (0, 1):
            found = jax.grad(lambda m, s, function=function, part=part: function(m, s, low, high)[part], (0, 1))
            assert np.isfinite(found(jnp.float32(mean), jnp.float32(std))).all()


def test_gradients_are_those_of_finite_differences():
    step = 1e-5

    def numeric(function, x):
        return (function(x + step) - function(x - step)) / (2 * step)

    for part in (0, 1):
        by_mean = jax.grad(lambda m, part=part: clipped_normal(m, 0.7, 0.0, 1.0)[part])(jnp.float32(0.4))
        by_std = jax.grad(lambda s, part=part: clipped_normal(0.4, s, 0.0, 1.0)[part])(jnp.float32(0.7))
        expected = numeric(lambda m, part=part: clipped_normal(m, 0.7, 0.0, 1.0)[part], 0.4)
        np.testing.assert_allclose(by_mean, expected, rtol=1e-4)  # float32
        expected = numeric(lambda s, part=part: clipped_normal(0.4, s, 0.0, 1.0)[part], 0.7)
        np.testing.assert_allclose(by_std, expected, rtol=1e-4)


def test_vmap_and_jit_give_what_numpy_gives():
    means, stds = np.linspace(-3, 8, 12), np.linspace(0, 2, 12)
    expected = clipped_normal(means, stds, 0.0, 6.0)
    traced = jax.jit(jax.vmap(lambda m, s: clipped_normal(m, s, 0.0, 6.0)))(jnp.asarray(means), jnp.asarray(stds))
    np.testing.assert_allclose(traced[0], expected[0], atol=2e-6)  # float32
    np.testing.assert_allclose(traced[1], expected[1], atol=4e-6)


@pytest.mark.parametrize(("low", "high"), LIMITS)
@pytest.mark.parametrize(("mean", "std"), NORMALS)
def test_what_passes_is_the_derivative_of_the_mean(mean, std, low, high):
    step = 1e-5 * std
    slope = (clipped_normal(mean + step, std, low, high)[0] - clipped_normal(mean - step, std, low, high)[0]) / step / 2
    np.testing.assert_allclose(passing_probability(mean, std, low, high), slope, atol=1e-7)  # digits lost to the step


def test_the_cumulative_probability_is_monotone_and_steps_at_a_constant():
    values = np.asarray([-INF, -1.0, 0.0, 1.0, INF])
    np.testing.assert_allclose(cumulative_normal(values, 0.0, 1.0), [0, 0.15865525, 0.5, 0.84134475, 1], atol=1e-8)
    np.testing.assert_array_equal(cumulative_normal(values, 0.0, 0.0), [0, 0, 1, 1, 1])
