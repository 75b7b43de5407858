"""Laws of every scheme: zero on the grid, finite results, brute force, percentiles, entropy, exact sums."""

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.config.checks import DTYPES, SYMMETRIES
from ptqjax.encodings.encoding import fake_quantize, integers
from ptqjax.encodings.low_power import compose, decompose
from ptqjax.errors import ConfigError, DataError
from ptqjax.kernels.exact_sums import add_terms, empty_sums, means_of
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.kernels.histogram import histogram_of
from ptqjax.kernels.ranges import GridKind, Symmetry, grid_kind, grid_of_range, stack_kinds
from ptqjax.ranges import schemes
from ptqjax.ranges.observers import DISTRIBUTION
from ptqjax.ranges.schemes import ENTROPY, MOVING_AVERAGE, MSE, SQNR, RangeScheme, find_scheme
from ptqjax.ranges.search import choose_encoding

NAMES = ("min-max", "moving-average", "sqnr", "mse", "entropy", "percentile:99.9", "percentile:51", "percentile:100")
INTEGERS = tuple(name for name in DTYPES if name not in FLOAT_FORMATS)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers of this test alone."""
    return np.random.default_rng(0)


def streamed(scheme: RangeScheme, batches: list[np.ndarray], kind: GridKind) -> tuple[float, float]:
    """Returns scale and zero point of one tensor that comes in batches."""
    state = scheme.observer.init(1)
    update = jax.jit(scheme.observer.update, static_argnums=2)
    for batch in batches:
        state = update(state, [batch], len(batch))
    scale, zero_point = scheme.finish(state, stack_kinds([kind]))
    return float(scale[0]), float(zero_point[0])


def range_of(scale: float, zero_point: float, kind: GridKind) -> tuple[float, float]:
    return scale * (float(kind.qmin) - zero_point), scale * (float(kind.qmax) - zero_point)


# Zero, and data at the ends of what numbers can be

VALUES = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(
    data=st.lists(VALUES, min_size=1, max_size=8),
    name=st.sampled_from(NAMES),
    dtype=st.sampled_from(DTYPES),
    symmetric=st.sampled_from(SYMMETRIES),
    power_of_two=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_zero_is_on_every_grid(
    data: list[float], name: str, dtype: str, *, symmetric: Symmetry, power_of_two: bool
) -> None:
    x = np.asarray(data, np.float32)
    encoding = choose_encoding(x, dtype=dtype, symmetric=symmetric, ranges=name, power_of_two=power_of_two)
    assert np.isfinite(encoding.scale)
    assert encoding.scale > 0
    assert fake_quantize(np.zeros(1, np.float32), encoding) == 0
    if dtype not in FLOAT_FORMATS:
        assert encoding.zero_point == np.round(encoding.zero_point)
        assert encoding.qmin <= encoding.zero_point <= encoding.qmax
        assert np.isfinite(fake_quantize(x, encoding)).all()


DEGENERATE = {
    "zeros": [0.0, 0.0, 0.0],
    "a constant": [3.5, 3.5],
    "one element": [-4.5],
    "subnormal": [1e-40, 3e-41],
    "1e38": [1e38, -1e38, 5.0],
    "the largest": [3.4028e38, -3.4028e38],
}


@pytest.mark.parametrize("symmetric", SYMMETRIES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("data", DEGENERATE)
def test_degenerate_data_has_a_finite_encoding(data: str, name: str, symmetric: Symmetry) -> None:
    x = np.asarray(DEGENERATE[data], np.float32)
    for dtype in ("int2", "uint4", "int8", "uint16", "float8_e4m3fn", "float16"):
        encoding = choose_encoding(x, dtype=dtype, symmetric=symmetric, ranges=name)
        assert np.isfinite(encoding.scale)
        assert encoding.scale > 0
        if not x.any():
            assert encoding.scale == 1
        if dtype in ("int8", "uint16") and data != "1e38" and not name.startswith("percentile:51"):
            error = np.abs(fake_quantize(x, encoding).astype(np.float64) - x)
            assert np.all(error <= encoding.scale * (1 + 1e-3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_data_that_are_not_finite_are_an_error(name: str, bad: float) -> None:
    with pytest.raises(DataError, match=r"'samples' holds -?(nan|inf) at \(1,\)"):
        choose_encoding(np.asarray([1.0, bad], np.float32), ranges=name)


@pytest.mark.parametrize("name", ["sqrn", "percentile:", "percentile:abc", "percentile:100.1", "percentile:50", ""])
def test_a_scheme_that_does_not_exist_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="ranges="):
        find_scheme(name)
    with pytest.raises(ConfigError, match="near names: sqnr"):
        find_scheme("sqnrr")


@pytest.mark.parametrize("name", ["moving-average", "mse", "entropy"])
def test_what_aimet_does_not_have_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"ranges='{name}' is not available with compatibility='aimet'"):
        choose_encoding(np.ones(3, np.float32), ranges=name, compatibility="aimet")


# Least error


def error_of(x: np.ndarray, scale: float, zero_point: float, kind: GridKind, weight: float) -> float:
    x = x.astype(np.float64)
    wanted = np.round(x / scale) + zero_point
    codes = np.clip(wanted, kind.qmin, kind.qmax)
    return float(np.sum((x - (codes - zero_point) * scale) ** 2 * np.where(codes == wanted, 1, weight)))


def least_error(x: np.ndarray, kind: GridKind, weight: float) -> float:
    """Returns the least error over a fine lattice of both ends, and a finer one around its best, in float64."""
    fractions = np.concatenate([np.linspace(0.02, 1, 50), 1 - np.geomspace(1e-5, 1e-2, 10)])
    pairs = [(a, b) for a in fractions for b in fractions]
    if kind.symmetric:
        pairs = [(a, a) for a in np.linspace(0.005, 1, 400)]
    best = (np.inf, 1.0, 1.0)
    for step in (0.02, 0.004, 0.0008):
        tried = []
        for low, high in np.clip(pairs, 1e-3, 1):
            scale, zero_point = grid_of_range(float(x.min()) * low, float(x.max()) * high, kind)
            tried.append((error_of(x, float(scale), float(zero_point), kind, weight), low, high))
        best = min(best, *tried)
        around = np.linspace(-step, step, 7)
        pairs = [(best[1] + a, best[2] + (a if kind.symmetric else b)) for a in around for b in around]
    return best[0]


DATA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "laplace": lambda rng: rng.laplace(size=600),
    "an outlier": lambda rng: np.concatenate([rng.normal(size=600), [12.0, -9.0]]),
    "relu": lambda rng: np.maximum(rng.normal(size=800), 0),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(("name", "weight"), [("sqnr", 3.0), ("mse", 1.0)])
def test_no_fine_search_in_float64_finds_a_much_better_range(
    name: str, weight: float, bits: int, rng: np.random.Generator, *, symmetric: bool
) -> None:
    kind = grid_kind(f"int{bits}", symmetric=symmetric)
    for make in DATA.values():
        x = make(rng).astype(np.float32)
        found = choose_encoding(x, dtype=f"int{bits}", symmetric=symmetric, ranges=name)
        # The error is not convex; at 8 bits and more, where nothing is clipped, it jumps by some percent with every
        # value that comes to lie nearer to a code (600 values: 1 / sqrt(600) = 4 %).
        assert error_of(x, float(found.scale), float(found.zero_point), kind, weight) <= 1.05 * least_error(
            x, kind, weight
        )


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("scheme", [SQNR, MSE], ids=lambda scheme: scheme.name)
def test_streamed_data_find_the_range_that_data_in_hand_find(
    scheme: RangeScheme, bits: int, rng: np.random.Generator
) -> None:
    weight = {"sqnr": 3.0, "mse": 1.0}[scheme.name]
    for symmetric in (False, True):
        kind = grid_kind(f"int{bits}", symmetric=symmetric)
        x = rng.laplace(size=(8, 3000)).astype(np.float32)
        best = choose_encoding(x, dtype=f"int{bits}", symmetric=symmetric, ranges=scheme.name)
        errors = [
            error_of(x, *grid, kind, weight)
            for grid in (streamed(scheme, [x], kind), (float(best.scale), float(best.zero_point)))
        ]
        # 16 bits: bins are wider than steps there, and their error that of values anywhere inside.
        assert errors[0] <= 1.05 * errors[1]


def test_a_greater_weight_of_clipping_clips_less(rng: np.random.Generator) -> None:
    x = rng.laplace(size=4000).astype(np.float32)
    for dtype in ("int2", "int4", "int8"):
        scales = [
            float(choose_encoding(x, dtype=dtype, symmetric=True, ranges=r).scale) for r in ("mse", "sqnr", "min-max")
        ]
        assert scales == sorted(scales)


# Percentiles


@pytest.mark.parametrize("percentage", ["51", "90", "99", "99.9", "99.99", "100"])
def test_a_percentile_in_hand_is_an_order_statistic(percentage: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=1000).astype(np.float32)
    ordered = np.sort(x)
    left_out = max(1, -(-(100 - Fraction(percentage)) * 1000 // 100))  # of 1000 values, exactly
    scale, zero_point = grid_of_range(ordered[left_out - 1], ordered[-left_out], grid_kind("int8"))
    found = choose_encoding(x, ranges=f"percentile:{percentage}")
    np.testing.assert_array_equal([found.scale, found.zero_point], [scale, zero_point])


@pytest.mark.parametrize("percentage", ["51", "90", "99", "99.9", "99.99"])
def test_a_streamed_percentile_is_off_by_less_than_a_bin(percentage: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 4000)).astype(np.float32)
    kind = grid_kind("int16")
    low, high = range_of(*streamed(find_scheme(f"percentile:{percentage}"), list(x[:, None]), kind), kind)
    ordered = np.sort(x.ravel())
    left_out = max(1, -(-(100 - Fraction(percentage)) * x.size // 100))
    bin_width = 2.0 ** float(histogram_of(x.reshape(1, -1)).exponent[0])
    step = (high - low) / 65535
    assert 0 <= ordered[left_out - 1] - low + step <= bin_width + 2 * step  # never inside of the value itself
    assert 0 <= high - ordered[-left_out] + step <= bin_width + 2 * step


@given(seed=st.integers(0, 2**31), percentage=st.floats(50.001, 100))
@settings(max_examples=30, deadline=None)
def test_a_percentile_is_never_wider_than_the_data(seed: int, percentage: float) -> None:
    x = np.random.default_rng(seed).standard_t(2, size=(3, 50)).astype(np.float32)
    kind, scheme = grid_kind("int16"), find_scheme(f"percentile:{percentage}")
    scale, zero_point = (float(found[0]) for found in scheme.in_hand([x.reshape(1, -1)], kind))
    for grid in (streamed(scheme, [x], kind), (scale, zero_point)):
        low, high = range_of(*grid, kind)
        step = (high - low) / 65535
        assert low >= min(x.min(), 0) - step
        assert high <= max(x.max(), 0) + step


def test_a_hundred_percent_is_the_whole_range(rng: np.random.Generator) -> None:
    x, kind = rng.normal(size=(4, 9000)).astype(np.float32), grid_kind("uint8")
    assert streamed(find_scheme("percentile:100"), [x], kind) == streamed(find_scheme("min-max"), [x], kind)


# Entropy


def divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """Returns the divergence by the definition, level by level."""
    p = counts[:kept].astype(np.float64)
    q = np.zeros(kept)
    for level in range(levels):
        part = slice(level * kept // levels, (level + 1) * kept // levels)
        filled = p[part] > 0
        q[part] = np.where(filled, p[part].sum() / max(filled.sum(), 1), 0)
    p[-1] += counts[kept:].sum()
    if np.any((p > 0) & (q == 0)):
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_entropy_finds_a_threshold_of_nearly_the_least_divergence(bits: int, rng: np.random.Generator) -> None:
    x = rng.laplace(size=(16, 4000)).astype(np.float32)
    kind = grid_kind(f"int{bits}", symmetric=True)
    histogram = histogram_of(x.reshape(1, -1))
    half = histogram.counts.shape[1] // 2
    counts = histogram.counts[0, half:] + histogram.counts[0, half - 1 :: -1]
    counts[0] = counts[1]
    width = 2.0 ** int(histogram.exponent[0])
    used, levels = int(np.ceil(np.abs(x).max() / width)), 2 ** (bits - 1)
    all_of_them = {kept: divergence(counts, kept, levels) for kept in range(levels + 1, used + 1)}
    scale, _ = streamed(ENTROPY, list(x[:, None]), kind)
    threshold = scale * (2 ** (bits - 1) - 1)
    if bits < 8:  # here every value counts: a step is 12 bins wide
        assert threshold < 0.9 * np.abs(x).max()
    kept = int(np.ceil(threshold / width * (1 - 1e-6)))  # the scale is rounded
    # Every sixteenth threshold is tried first: near the minimum the divergence is flat, up to counts of single bins.
    assert all_of_them[kept] <= 1.1 * min(all_of_them.values()) + 1e-6


def test_entropy_clips_nothing_where_steps_are_narrower_than_bins(rng: np.random.Generator) -> None:
    x = rng.laplace(size=(4, 4000)).astype(np.float32)
    kind = grid_kind("int16")
    assert streamed(ENTROPY, [x], kind) == streamed(find_scheme("min-max"), [x], kind)


def test_zeros_do_not_change_the_range_of_entropy(rng: np.random.Generator) -> None:
    x = np.abs(rng.laplace(size=(8, 2000))).astype(np.float32)  # all are counted
    with_zeros = np.concatenate([x, np.zeros_like(x)], axis=1)
    kind = grid_kind("uint8")
    assert streamed(ENTROPY, [x], kind) == streamed(ENTROPY, [with_zeros], kind)


def test_entropy_in_hand_is_that_of_the_stream(rng: np.random.Generator, monkeypatch) -> None:
    monkeypatch.setattr(schemes, "_ROWS_AT_ONCE", 2)
    x = rng.laplace(size=(5, 9, 1000)).astype(np.float32)
    found = choose_encoding(x, dtype="int4", ranges="entropy", axis=0)
    for row in range(5):
        scale, zero_point = streamed(ENTROPY, [x[row, :4], x[row, 4:]], grid_kind("int4"))
        assert (float(found.scale[row]), float(found.zero_point[row])) == (scale, zero_point)


def test_entropy_leaves_the_range_of_few_values_whole(rng: np.random.Generator) -> None:
    few = rng.laplace(size=(1, schemes.FEWEST_FOR_ENTROPY - 1)).astype(np.float32)
    many = np.concatenate([few, few[:, :1]], axis=1)
    for x, is_whole in ((few, True), (many, False)):
        whole = choose_encoding(x, dtype="int4", ranges="min-max")
        assert (choose_encoding(x, dtype="int4", ranges="entropy").scale == whole.scale) == is_whole
        assert (streamed(ENTROPY, [x[:, :4096], x[:, 4096:]], grid_kind("int4"))[0] == whole.scale) == is_whole


# Means of extremes


@given(seed=st.integers(0, 2**31), exponents=st.tuples(st.integers(-149, 127), st.integers(-149, 127)))
@settings(max_examples=40, deadline=None)
def test_means_are_exact_for_any_order_and_grouping(seed: int, exponents: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        x = np.ldexp(rng.uniform(-1, 1, size=(2, 40)), rng.integers(min(exponents), max(exponents) + 1, size=(2, 40)))
        x = x.astype(np.float32)
    forward = add_terms(empty_sums(2), jnp.asarray(x))
    backward = add_terms(empty_sums(2), jnp.asarray(x[:, :7])) + add_terms(
        empty_sums(2), jnp.asarray(x[:, 7:][:, ::-1])
    )
    np.testing.assert_array_equal(forward, backward)
    exact = [float(sum(map(Fraction, row.tolist()), Fraction(0)) / 40) for row in x]
    np.testing.assert_array_equal(means_of(forward, np.full(2, 40)), exact)


def test_the_moving_average_is_the_mean_of_the_extremes_of_samples(rng: np.random.Generator) -> None:
    x = (rng.normal(size=(6, 50)) * rng.uniform(0.1, 10, size=(6, 1))).astype(np.float32)
    kind = grid_kind("uint8")
    expected = grid_of_range(x.min(axis=1).astype(np.float64).mean(), x.max(axis=1).astype(np.float64).mean(), kind)
    for batches in ([x], [x[4:], x[:4]], list(x[:, None])):
        np.testing.assert_array_equal(streamed(MOVING_AVERAGE, batches, kind), expected)


# Compilations


def test_one_compiled_step_serves_four_schemes() -> None:
    assert {find_scheme(name).observer for name in ("sqnr", "mse", "entropy", "percentile:99", "percentile:90")} == {
        DISTRIBUTION
    }


# Floating-point formats and low-power blocks


@pytest.mark.parametrize("name", NAMES)
def test_short_floats_take_their_scale_from_the_largest_magnitude(name: str, rng: np.random.Generator) -> None:
    x = (rng.normal(size=(5, 40)) * 10).astype(np.float32)
    for dtype, largest in (("float8_e4m3fn", 448), ("float8_e5m2", 57344)):
        encoding = choose_encoding(x, dtype=dtype, ranges=name, axis=0)
        np.testing.assert_array_equal(encoding.scale, np.abs(x).max(axis=1) / np.float32(largest))
        assert not encoding.zero_point.any()
        assert encoding.dtype == dtype
    for dtype in ("float16", "bfloat16"):
        assert choose_encoding(x, dtype=dtype, ranges=name).scale == 1


def test_low_power_blocks_are_multiples_of_one_scale_per_channel(rng: np.random.Generator) -> None:
    w = (rng.normal(size=(4, 16, 3, 3)) * np.exp(rng.normal(size=(4, 16, 1, 1)))).astype(np.float32)
    settings = {"dtype": "int4", "symmetric": True, "ranges": "min-max", "axis": 1, "block_size": 4}
    blocks, low_power = choose_encoding(w, **settings), choose_encoding(w, **settings, scale_bits=4)
    parts = decompose(low_power)
    assert parts.per_channel.shape == (4, 1, 1, 1)
    assert set(np.unique(parts.per_block)) <= set(range(1, 17))
    np.testing.assert_array_equal(compose(parts), low_power.scale)
    step = parts.per_channel  # a block's scale is off by half of S, but where it is raised to 1 S
    assert np.all(np.abs(low_power.scale - blocks.scale) <= np.where(parts.per_block == 1, 1, 0.5001) * step)


def test_powers_of_two_hold_the_whole_range(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 40)).astype(np.float32)
    encoding = choose_encoding(x, ranges="min-max", symmetric=True, axis=0, power_of_two=True)
    assert np.all(np.frexp(encoding.scale)[0] == 0.5)
    assert np.all(encoding.scale * 127 >= np.abs(x).max(axis=1))
    assert np.all(encoding.scale * 127 < 2 * np.abs(x).max(axis=1))


def test_batches_count_one_by_one_only_for_aimet(rng: np.random.Generator) -> None:
    narrow, wide = rng.normal(size=(2, 500)).astype(np.float32), 100 * rng.normal(size=(1, 500)).astype(np.float32)
    ours = [choose_encoding(batches).scale for batches in ([narrow, wide], [wide, narrow])]
    theirs = [choose_encoding(batches, compatibility="aimet").scale for batches in ([narrow, wide], [wide, narrow])]
    assert ours[0] == ours[1]
    assert theirs[0] < 0.2 * theirs[1]  # the first batch fixes the bins


def test_the_codes_of_a_sixteen_bit_grid_are_used(rng: np.random.Generator) -> None:
    x = rng.normal(size=5000).astype(np.float32)
    for name in NAMES[:5]:
        codes = integers(x, choose_encoding(x, dtype="int16", ranges=name))
        assert int(codes.max()) - int(codes.min()) > 64000
