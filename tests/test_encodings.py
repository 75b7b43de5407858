"""Laws of encodings: what a scale applies to, how ranges are chosen, and that order and grouping do not matter."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.encodings.encoding import (
    Encoding,
    along_axis,
    dequantize,
    fake_quantize,
    integers,
    make_encoding,
    quantize,
    storage_dtype,
)
from ptqjax.errors import ConfigError, DataError
from ptqjax.kernels import histogram as hist
from ptqjax.kernels import search
from ptqjax.kernels.grid import integer_range
from ptqjax.kernels.ranges import GridKind, grid_kind, grid_of_range, stack_kinds
from ptqjax.ranges.observers import SAMPLES, sampled
from ptqjax.ranges.schemes import ENTROPY, MIN_MAX, MOVING_AVERAGE, MSE, SQNR, percentile_scheme
from ptqjax.ranges.search import choose_encoding


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers of this test alone: the same whichever tests run before it, and where."""
    return np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"])
def test_dtype_is_that_of_the_grid(dtype: str) -> None:
    encoding = make_encoding(np.float32(0.1), np.float32(0), dtype=dtype)
    assert encoding.dtype == dtype
    assert storage_dtype(dtype).name == dtype


def test_an_encoding_is_a_pytree_whose_axis_is_static() -> None:
    encoding = make_encoding(np.full(3, 0.1, np.float32), np.zeros(3, np.float32), dtype="int8", axis=1)
    leaves, structure = jax.tree.flatten(encoding)
    assert len(leaves) == 5
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
    assert jax.tree.unflatten(structure, leaves).axis == 1
    assert structure != jax.tree.structure(encoding.replace(axis=0))


def per_position(encoding: Encoding, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the scale of each element, by the definition."""
    found = np.empty(shape, np.float32)
    for index in np.ndindex(shape):
        if encoding.axis is None:
            found[index] = encoding.scale
        elif encoding.block_size is None:
            found[index] = encoding.scale[index[encoding.axis]]
        else:
            axis = encoding.axis % len(shape)
            found[index] = encoding.scale[
                tuple(i // encoding.block_size if a == axis else i for a, i in enumerate(index))
            ]
    return found


@pytest.mark.parametrize(
    ("axis", "block_size", "scale_shape"),
    [(None, None, ()), (0, None, (4,)), (-1, None, (3,)), (1, 2, (4, 3, 3)), (1, 4, (4, 2, 3)), (-3, 4, (1, 6, 3))],
)
def test_each_element_has_the_scale_of_its_channel_or_block(
    axis, block_size, scale_shape, rng: np.random.Generator
) -> None:
    scale = rng.uniform(0.1, 1, scale_shape).astype(np.float32)
    encoding = make_encoding(scale, np.zeros_like(scale), dtype="int8", axis=axis, block_size=block_size)
    spread = along_axis(encoding.scale, encoding, (4, 6, 3))
    np.testing.assert_array_equal(np.broadcast_to(spread, (4, 6, 3)), per_position(encoding, (4, 6, 3)))
    chosen = choose_encoding(rng.normal(size=(4, 6, 3)), ranges="min-max", axis=axis, block_size=block_size)
    assert chosen.scale.shape == chosen.zero_point.shape == scale_shape


def test_numpy_and_jax_give_the_same_codes_and_values(rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 6, 3)).astype(np.float32)
    encoding = choose_encoding(x, dtype="uint8", axis=1)
    np.testing.assert_array_equal(jax.jit(quantize)(x, encoding), quantize(x, encoding))
    np.testing.assert_array_equal(jax.jit(fake_quantize)(x, encoding), fake_quantize(x, encoding))
    np.testing.assert_array_equal(
        dequantize(integers(x, encoding).astype(np.float32), encoding), fake_quantize(x, encoding)
    )
    assert integers(x, encoding).dtype == np.uint8


@pytest.mark.parametrize("ranges", ["min-max", "sqnr"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_equals_each_channel_alone(ranges: str, axis: int, rng: np.random.Generator) -> None:
    x = (rng.normal(size=(3, 5, 7)) * rng.uniform(0.01, 10, size=(3, 5, 7))).astype(np.float32)
    together = choose_encoding(x, dtype="int4", ranges=ranges, axis=axis)
    alone = [choose_encoding(np.take(x, i, axis), dtype="int4", ranges=ranges) for i in range(x.shape[axis])]
    np.testing.assert_array_equal(together.scale, [encoding.scale for encoding in alone])


def test_min_max_is_the_equation(rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 50)).astype(np.float32) + 0.5
    signed = choose_encoding(x, ranges="min-max", axis=0, symmetric=True)
    np.testing.assert_array_equal(signed.scale, (np.abs(x).max(axis=1).astype(np.float64) / 127).astype(np.float32))
    assert not signed.zero_point.any()
    unsigned = choose_encoding(x, dtype="uint8", ranges="min-max")
    np.testing.assert_allclose(unsigned.scale, (float(x.max()) - float(x.min())) / 255, rtol=1e-7)
    assert unsigned.zero_point == round(-float(x.min()) / float(unsigned.scale))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int4"])
@pytest.mark.parametrize("ranges", ["min-max", "sqnr"])
@pytest.mark.parametrize(
    "data", [[0.0, 0, 0], [3.5, 3.5], [-4.5], [1e38, -1e38], [3.4028e38, -3.4028e38], [1e-40], [1e-37, -1e-38], [7.0]]
)
def test_degenerate_data_has_a_finite_encoding_that_keeps_it(data: list[float], ranges: str, dtype: str) -> None:
    x = np.asarray(data, dtype=np.float32)
    encoding = choose_encoding(x, dtype=dtype, ranges=ranges)
    assert np.isfinite(encoding.scale)
    assert encoding.scale > 0
    error = np.abs(fake_quantize(x, encoding).astype(np.float64) - x)
    assert np.all(error <= encoding.scale * (1 + 1e-3))
    assert x.any() or encoding.scale == 1


def test_an_all_zero_channel_takes_the_largest_scale_of_the_others(rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 9)).astype(np.float32)
    x[2] = 0
    scale = choose_encoding(x, axis=0).scale
    assert scale[2] == scale[[0, 1, 3]].max()


def oracle_error(x: np.ndarray, scale: float, zero_point: float, dtype: str) -> float:
    """Returns the weighted squared error in float64."""
    qmin, qmax = integer_range(dtype)
    x = x.astype(np.float64)
    wanted = np.round(x / scale) + zero_point
    codes = np.clip(wanted, qmin, qmax)
    return float(
        np.sum((x - (codes - zero_point) * scale) ** 2 * np.where(codes == wanted, 1, search.SATURATION_WEIGHT))
    )


@pytest.mark.parametrize(("dtype", "symmetric"), [("int8", True), ("int4", True), ("uint8", False), ("uint4", False)])
def test_sqnr_finds_what_an_exhaustive_search_in_float64_finds(
    dtype: str, rng: np.random.Generator, *, symmetric: bool
) -> None:
    x = np.concatenate([rng.laplace(size=900), [12.0, -9.0]]).astype(np.float32)
    found = choose_encoding(x, dtype=dtype, symmetric=symmetric)
    qmin, qmax = integer_range(dtype)
    kind = GridKind(qmin=qmin, qmax=qmax, symmetric=symmetric)
    ends = np.linspace(0.02, 1, 99)
    pairs = [(f, f) for f in ends] if symmetric else [(a, b) for a in ends[::3] for b in ends[::3]]
    grids = (grid_of_range(x.min() * a, x.max() * b, kind) for a, b in pairs)
    least = min(oracle_error(x, float(scale), float(zero_point), dtype) for scale, zero_point in grids)
    # The candidates are others than the oracle's, and the error is not convex: two lattices differ by some percent.
    assert oracle_error(x, float(found.scale), float(found.zero_point), dtype) <= least * 1.03


def test_sqnr_is_never_worse_than_min_max(rng: np.random.Generator) -> None:
    for dtype in ("int8", "uint8", "int4"):
        x = rng.standard_t(2, size=2000).astype(np.float32)
        errors = [
            oracle_error(x, float(e.scale), float(e.zero_point), dtype)
            for e in (choose_encoding(x, dtype=dtype, ranges=r) for r in ("sqnr", "min-max"))
        ]
        assert errors[0] <= errors[1] * (1 + 1e-5)  # the sums are in float32


def test_total_error_equals_float64(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 200)).astype(np.float32)
    rows = search.rows_of([x])
    kind = GridKind(qmin=np.float32(-8), qmax=np.float32(7), symmetric=np.asarray(True))
    scale, zero_point = grid_of_range(rows.lowest * 0.7, rows.highest * 0.7, kind)
    unit = 2.0 ** np.frexp(np.abs(x).max(axis=1))[1]
    expected = [oracle_error(x[i] / unit[i], float(scale[i]), float(zero_point[i]), "int4") for i in range(len(x))]
    found = search.total_error(rows, jnp.asarray(scale), jnp.asarray(zero_point), kind, search.SATURATION_WEIGHT)
    found = np.asarray(found)[: len(x)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_trace_serves_all_widths_symmetries_and_weights(rng: np.random.Generator, monkeypatch) -> None:
    traces = []
    original = search.total_error
    monkeypatch.setattr(search, "total_error", lambda *arguments: traces.append(1) or original(*arguments))
    x = rng.normal(size=(13, 999)).astype(np.float32)  # of a shape that no other test has
    for dtype in ("int2", "int4", "uint8", "int16"):
        for symmetric in (True, False, "strict", "unsigned"):
            for ranges in ("sqnr", "mse"):
                choose_encoding(x, dtype=dtype, symmetric=symmetric, ranges=ranges, axis=0)
    assert len(traces) == 1


def test_a_list_of_batches_is_the_data_together(rng: np.random.Generator) -> None:
    x = rng.normal(size=(40, 3)).astype(np.float32)
    whole, parts = choose_encoding(x), choose_encoding([x[:7], x[7:]])
    np.testing.assert_array_equal(whole.scale, parts.scale)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((0, 3)), "no values"),
        (np.asarray([1.0, np.nan]), r"holds nan at \(1,\)"),
        (np.asarray([[1.0, np.inf]]), r"holds inf at \(0, 1\)"),
        (np.asarray([1, 2]), "type int64; expected floating"),
        (np.asarray([1, 2]).astype(ml_dtypes.int4), "type int4; expected floating"),
        (np.zeros(2, [("a", "f4")]), "expected floating"),
        (np.asarray([1.0, 1e300]), r"holds 1e\+300 at \(1,\)"),
        ([np.zeros(2, np.float16), np.zeros(2, ml_dtypes.bfloat16)], "do not fit together"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], "do not fit together"),
        ([], "the list is empty"),
    ],
)
def test_bad_samples_are_an_error_that_names_the_place(samples, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_encoding(samples)


@pytest.mark.parametrize(
    "bad",
    [
        {"dtype": "int17"},
        {"ranges": "msa"},
        {"ranges": "percentile:abc"},
        {"ranges": "percentile:50"},
        {"ranges": "percentile:nan"},
        {"axis": 2},
        {"block_size": 2},
        {"axis": 0, "block_size": 0},
        {"symmetric": "Strict"},
        {"scale_bits": 4},
        {"compatibility": "tensorrt"},
    ],
)
def test_bad_settings_are_an_error(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        choose_encoding(np.ones((2, 3)), **bad)


# Histograms


def counts_of(values: np.ndarray, exponent: int, num_bins: int) -> np.ndarray:
    """Returns the counts of one tensor by the definition, in float64."""
    bins = np.floor(values.astype(np.float64) / 2.0**exponent).astype(int) + num_bins // 2
    return np.bincount(bins, minlength=num_bins)


@jax.jit
def add(histogram: hist.Histogram, values: jax.Array) -> hist.Histogram:
    return hist.add_values(histogram, values, jnp.ones(values.shape, bool), jnp.abs(values).max(axis=1))


merge = jax.jit(hist.merge_histograms)

BATCHES = st.lists(
    st.tuples(st.integers(-100, 100), st.integers(0, 2**31)).map(
        lambda s: (np.random.default_rng(s[1]).normal(size=(2, 16)) * 2.0 ** s[0]).astype(np.float32)
    ),
    min_size=1,
    max_size=5,
)


@given(batches=BATCHES)
@settings(max_examples=25, deadline=None)
def test_histograms_of_any_order_and_grouping_are_equal_and_lose_nothing(batches: list[np.ndarray]) -> None:
    forward = backward = merged = hist.empty_histogram(2, 64)
    apart = [add(merged, batch) for batch in batches]
    for one, other, single in zip(batches, reversed(batches), apart, strict=True):
        forward, backward = add(forward, one), add(backward, other)
        merged = merge(single, merged)
    for other in (backward, merged):
        np.testing.assert_array_equal(forward.counts, other.counts)
        np.testing.assert_array_equal(forward.exponent, other.exponent)
    together = np.concatenate(batches, axis=1)
    for i in range(2):
        expected = counts_of(together[i], int(forward.exponent[i]), 64)
        np.testing.assert_array_equal(forward.counts[i], expected)
    in_hand = hist.histogram_of(together, 64)
    np.testing.assert_array_equal(in_hand.counts, forward.counts)
    np.testing.assert_array_equal(in_hand.exponent, forward.exponent)


def test_power_of_two_is_exact() -> None:
    exponents = np.arange(-126, 128)
    np.testing.assert_array_equal(hist.power_of_two(jnp.asarray(exponents)), np.exp2(exponents).astype(np.float32))


# Schemes


SCHEMES = (MIN_MAX, MOVING_AVERAGE, SQNR, MSE, ENTROPY, percentile_scheme("99.9"), percentile_scheme("100"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_scheme_ignores_order_and_grouping_of_batches(scheme, rng: np.random.Generator) -> None:
    data = [(rng.normal(size=(4, 30, 5)) * spread).astype(np.float32) for spread in (1, 0.1, 50)]
    kind = stack_kinds([grid_kind("uint8"), grid_kind("int4")])

    update = jax.jit(scheme.observer.update, static_argnums=2)

    def stream(batches):
        state = scheme.observer.init(2)
        for batch in batches:
            state = update(state, [batch, -batch], len(batch))
        return state

    whole = stream(data)
    states = [
        stream(data[::-1]),
        stream([np.concatenate(data)]),
        scheme.observer.merge(stream(data[2:]), stream(data[:2])),
    ]
    for state in states:
        jax.tree.map(np.testing.assert_array_equal, state, whole)
    lowest, highest = range_of(scheme.finish(whole, kind), kind)
    everything = np.concatenate(data)
    step = (highest - lowest) / (kind.qmax - kind.qmin)  # the zero point is rounded
    assert np.all(lowest + step >= [everything.min(), -everything.max()])
    assert np.all(highest - step <= [everything.max(), -everything.min()])


def range_of(grid, kind):
    scale, zero_point = grid
    return scale * (kind.qmin - zero_point), scale * (kind.qmax - zero_point)


def errors_of_streamed_and_best(x: np.ndarray) -> tuple[float, float]:
    """Returns the weighted squared error of the range found batch by batch, and of that found with all data in hand."""
    state = jax.jit(SQNR.observer.update, static_argnums=2)(SQNR.observer.init(1), [x], len(x))
    kind = stack_kinds([grid_kind("uint8")])
    scale, zero_point = SQNR.finish(state, kind)
    best = choose_encoding(x, dtype="uint8")
    return (
        oracle_error(x, float(scale[0]), float(zero_point[0]), "uint8"),
        oracle_error(x, float(best.scale), float(best.zero_point), "uint8"),
    )


@pytest.mark.parametrize("seed", range(8))
def test_streamed_sqnr_is_the_best_where_all_values_are_counted(seed: int) -> None:
    x = np.maximum(np.random.default_rng(seed).laplace(size=(8, 4000)) + 0.3, 0).astype(np.float32)
    assert x[0].size <= SAMPLES
    found, best = errors_of_streamed_and_best(x)
    # All that differs are bins, of a sixteenth of a step here: what is rounded seems off by a thirty-second of a step
    # more or less, which can turn the choice among candidates of nearly equal error.
    assert found <= best * 1.03


@pytest.mark.parametrize("seed", range(4))
def test_streamed_sqnr_is_near_the_best_where_a_sample_is_counted(seed: int) -> None:
    x = np.maximum(np.random.default_rng(seed).laplace(size=(16, 4 * SAMPLES)) + 0.3, 0).astype(np.float32)
    found, best = errors_of_streamed_and_best(x)
    # A quarter is counted, so some 3 values lie beyond the largest one counted, by 1 on average and 2 in the mean
    # square (the tail is exponential): an error of 3 * 3 * 2 if they are clipped, beside 2.6e5 (13 / 255)^2 / 12 = 57
    # of rounding. Twice the best leaves room for three times as much.
    assert found <= best * 2


KIND = stack_kinds([grid_kind("uint8")])


def test_an_outlier_that_the_sample_misses_still_bounds_the_range() -> None:
    x = np.zeros((1, 100_000), np.float32)
    x[0, 7] = -1000.0
    for scheme in (MIN_MAX, SQNR):
        state = jax.jit(scheme.observer.update, static_argnums=2)(scheme.observer.init(1), [x], 1)
        lowest, highest = range_of(scheme.finish(state, KIND), KIND)
        np.testing.assert_allclose(lowest[0], -1000, rtol=1e-6)
        assert highest[0] == 0


def test_the_sample_is_even_over_space_and_channels() -> None:
    for shape in ((2, 56, 56, 32), (2, 32, 56, 56), (2, 7, 7, 1280), (2, 1001)):
        size = int(np.prod(shape[1:]))
        index = jnp.arange(2 * size, dtype=jnp.float32).reshape(shape)
        taken = np.asarray(sampled(index, 2)).reshape(2, -1)
        assert taken.shape[1] == min(size, SAMPLES)
        np.testing.assert_array_equal(taken[1] - size, taken[0])  # the same places of every sample
        assert len(np.unique(taken[0])) == taken.shape[1]
        gaps = np.diff(np.concatenate([taken[0], taken[0][:1] + size]))
        # Gaps are of three lengths at most; a stride near n times the golden ratio keeps them alike up to sqrt(n).
        assert gaps.max() <= 6 * size / taken.shape[1]
        last = np.bincount(taken[0].astype(int) % shape[-1] * 8 // shape[-1], minlength=8)
        assert last.min() > 0.5 * taken.shape[1] / 8
