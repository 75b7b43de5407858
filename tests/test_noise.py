"""Laws of predicted noise: the objective is what its equations say, convex, blind to common factors, and minimized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.kernels.noise import (
    NOTHING,
    ActivationNoise,
    WeightNoise,
    least_noise,
    output_noise,
    stack_terms,
    unscaled_noise,
)

STEPS = {"activation_steps": 255, "weight_steps": 127}
NUM_SCALES = 11  # the fixed one, five channels, five channels
FIRST, SECOND = np.arange(1, 6), np.arange(6, 11)


def activation(seed: int, scales: np.ndarray) -> ActivationNoise:
    above, below, gain = np.random.default_rng(seed).normal(size=(3, len(scales)))
    return ActivationNoise(above=2 * above, below=below, gain=2 * gain, scales=scales)


def weight(seed: int, outputs: np.ndarray, inputs: np.ndarray, *, per_channel: bool = False) -> WeightNoise:
    """`outputs` and `inputs` are [groups, channels]."""
    random = np.random.default_rng(seed)
    groups = len(outputs)
    return WeightNoise(
        ranges=2 * random.normal(size=(groups, outputs.shape[1], inputs.shape[1])),
        gain=2 * random.normal(size=outputs.shape),
        power=2 * random.normal(size=inputs.shape),
        outputs=outputs,
        inputs=inputs,
        per_channel=per_channel,
    )


def chain(seed: int, *, per_channel: bool = False) -> tuple[list[ActivationNoise], list[WeightNoise]]:
    """Fixed inputs, five channels, depthwise to five others, a fixed output."""
    fixed = np.zeros((1, 3), int)
    weights = [
        weight(seed, FIRST[None], fixed, per_channel=per_channel),
        weight(seed + 1, SECOND[:, None], FIRST[:, None], per_channel=per_channel),
        weight(seed + 2, fixed, SECOND[None], per_channel=per_channel),
    ]
    return [activation(seed + 3, FIRST), activation(seed + 4, SECOND)], weights


def exact(theta: np.ndarray, activations: list[ActivationNoise], weights: list[WeightNoise]) -> float:
    """The equations with sums, products and maxima, in float64."""
    total = 0.0
    for term in activations:
        scale = np.exp(theta[term.scales])
        reach = (np.exp(term.above) / scale).max() + (np.exp(term.below) / scale).max()
        step = reach / STEPS["activation_steps"]
        total += (np.exp(term.gain) * scale**2).sum() * step**2 / 12
    for term in weights:
        groups, outputs, inputs = term.ranges.shape
        rows, columns = np.exp(theta[term.outputs]), np.exp(theta[term.inputs])
        scaled = np.exp(term.ranges) * columns[:, None, :] / rows[:, :, None]
        for g in range(groups):
            for o in range(outputs):
                largest = scaled[g, o].max() if term.per_channel else scaled.max()
                step = largest / STEPS["weight_steps"]
                for i in range(inputs):
                    carried = np.exp(term.gain[g, o]) * rows[g, o] ** 2 * np.exp(term.power[g, i]) / columns[g, i] ** 2
                    total += carried * step**2 / 12
    return float(np.log(total))


def at(theta: np.ndarray, terms: tuple[list[ActivationNoise], list[WeightNoise]], sharpness: float = 200.0) -> float:
    return float(_compiled(jnp.asarray(theta, jnp.float32), stack_terms(*terms), sharpness))


@jax.jit
def _compiled(theta, terms, sharpness):
    return output_noise(theta, terms, **STEPS, sharpness=sharpness)


def random_theta(seed: int) -> np.ndarray:
    theta = np.random.default_rng(seed).normal(size=NUM_SCALES)
    theta[0] = 0.0
    return theta


@pytest.mark.parametrize("per_channel", [False, True])
def test_noise_without_scales_is_that_of_the_equations_where_all_are_one(per_channel: bool) -> None:  # noqa: FBT001
    activations, weights = chain(0, per_channel=per_channel)
    found = unscaled_noise(activations, weights, **STEPS)
    assert [part.shape for part in found] == [(2,), (3,)]
    whole = exact(np.zeros(NUM_SCALES), activations, weights)
    assert np.log(sum(part.sum() for part in found)) == pytest.approx(whole, rel=1e-12)
    assert np.log(found[0][1]) == pytest.approx(exact(np.zeros(NUM_SCALES), activations[1:], []), rel=1e-12)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_objective_is_the_noise_of_its_equations(seed: int, per_channel: bool) -> None:  # noqa: FBT001
    terms, theta = chain(10 * seed, per_channel=per_channel), random_theta(seed)
    # A smooth maximum is at most log(30) / sharpness too large and counts twice; float32 rounds logarithms of some 10
    # to 1e-6, of some 1e4 with the sharpness: 1e-3 over the sharpness.
    np.testing.assert_allclose(at(theta, terms, 1e4), exact(theta, *terms), atol=2 * np.log(30) / 1e4 + 1e-5)
    assert -1e-5 <= at(theta, terms) - exact(theta, *terms) <= 2 * np.log(30) / 200 + 1e-5


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_larger_than_a_tile_and_smaller_ones_stand_side_by_side(per_channel: bool) -> None:  # noqa: FBT001
    shapes = [(2, 40, 70), (1, 3, 5), (1, 32, 32), (4, 1, 33), (1, 64, 1)]
    random = np.random.default_rng(0)
    weights = [
        weight(
            i, random.integers(0, NUM_SCALES, (g, o)), random.integers(0, NUM_SCALES, (g, k)), per_channel=per_channel
        )
        for i, (g, o, k) in enumerate(shapes)
    ]
    terms, theta = ([activation(9, FIRST)], weights), random_theta(3)
    np.testing.assert_allclose(at(theta, terms, 1e4), exact(theta, *terms), atol=2 * np.log(2800) / 1e4 + 1e-5)
    for index in range(len(weights)):  # each counts by itself as well: none hides behind another
        one = [], weights[index : index + 1]
        np.testing.assert_allclose(at(theta, one, 1e4), exact(theta, *one), atol=2 * np.log(2800) / 1e4 + 1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.0), per_channel=st.booleans())
def test_the_objective_is_convex_along_any_line(seed: int, share: float, per_channel: bool) -> None:  # noqa: FBT001
    terms = chain(seed, per_channel=per_channel)
    a, b = 3 * random_theta(seed), 3 * random_theta(seed + 1)
    between = at(share * a + (1 - share) * b, terms)
    assert between <= share * at(a, terms) + (1 - share) * at(b, terms) + 1e-4  # rounding of values of some 30


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_factor_common_to_the_channels_of_a_set_changes_nothing(per_channel: bool) -> None:  # noqa: FBT001
    terms, theta = chain(0, per_channel=per_channel), random_theta(0)
    for channels in (FIRST, SECOND):
        moved = theta.copy()
        moved[channels] += 1.5
        assert abs(at(moved, terms) - at(theta, terms)) < 1e-5
        moved[channels[0]] += 1.5
        assert abs(at(moved, terms) - at(theta, terms)) > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("per_channel", [False, True])
def test_no_perturbation_of_the_least_noise_has_less(seed: int, per_channel: bool) -> None:  # noqa: FBT001
    terms = chain(10 * seed, per_channel=per_channel)
    start = np.zeros(NUM_SCALES)
    best, before, after = least_noise(start, stack_terms(*terms), **STEPS)
    assert best[0] == 0.0
    np.testing.assert_allclose(after, at(best, terms), rtol=1e-5)
    assert before == pytest.approx(at(start, terms, 30.0), rel=1e-5) or before == pytest.approx(
        at(start, terms), rel=1e-5
    )
    assert exact(best, *terms) < exact(start, *terms) - 0.1
    random = np.random.default_rng(seed)
    for index in range(50):
        change = random.normal(size=NUM_SCALES) * (1.0, 0.3, 0.1)[index % 3]
        change[0] = 0.0
        # Smooth maxima and the last step of the descent: less than a hundredth, 0.05 dB.
        assert exact(best + change, *terms) > exact(best, *terms) - 0.01


def test_dead_channels_leave_everything_finite() -> None:
    (first, second), (one, two, three) = chain(0)
    dead = np.array([False, True, False, False, False])
    first = first.replace(
        above=np.where(dead, NOTHING, first.above), below=np.full(5, NOTHING), gain=np.where(dead, NOTHING, first.gain)
    )
    one = one.replace(ranges=np.where(dead[None, :, None], NOTHING, one.ranges))
    two = two.replace(
        gain=np.where(dead[:, None], NOTHING, two.gain), power=np.where(dead[:, None], NOTHING, two.power)
    )
    terms = [first, second], [one, two, three]
    value, slope = jax.jit(jax.value_and_grad(lambda theta: output_noise(theta, stack_terms(*terms), **STEPS)))(
        jnp.zeros(NUM_SCALES)
    )
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    best, _, after = least_noise(np.zeros(NUM_SCALES), stack_terms(*terms), **STEPS)
    assert np.isfinite(best).all()
    assert after < value


def test_all_channels_dead_is_finite() -> None:
    nothing = np.full(5, NOTHING)
    terms = [ActivationNoise(above=nothing, below=nothing, gain=nothing, scales=FIRST)], []
    best, before, after = least_noise(np.ones(NUM_SCALES), stack_terms(*terms), **STEPS)
    assert best[0] == 0.0, "the fixed scale, wherever one starts"
    assert np.isfinite([before, after, *best]).all()


def test_noise_has_gradients_and_batches() -> None:
    (first, _), (_, depthwise, last) = chain(0)
    points = jnp.asarray(np.stack([random_theta(seed) for seed in range(3)]), jnp.float32)
    for alone in (([first], []), ([], [depthwise]), ([], [last])):

        def value(theta: jax.Array, alone=alone) -> jax.Array:
            return output_noise(theta, stack_terms(*alone), **STEPS, sharpness=20.0)

        batched = jax.jit(jax.vmap(value))
        np.testing.assert_allclose(batched(points)[1], jax.jit(value)(points[1]), rtol=1e-5)
        slopes = jax.jit(jax.vmap(jax.grad(value)))(points)
        direction = random_theta(7)
        ahead, behind = (batched(points + sign * 1e-2 * direction[None].astype(np.float32)) for sign in (1, -1))
        # A difference over 2e-2 of values of some 10 in float32, and the third derivative: sharpness^2 (1e-2)^2 / 6.
        np.testing.assert_allclose(slopes @ direction, (ahead - behind) / 2e-2, atol=2e-2)


def test_a_row_with_a_step_of_its_own_does_not_feel_its_scale() -> None:
    theta = random_theta(0)
    moved = theta.copy()
    moved[SECOND] += np.array([3.0, -1.0, 0.0, 2.0, 0.5])
    for per_channel in (True, False):
        term = weight(0, SECOND[None], FIRST[None], per_channel=per_channel)
        found = [at(each, ([], [term])) for each in (theta, moved)]
        assert (found[0] == found[1]) is per_channel
