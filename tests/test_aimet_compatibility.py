"""AIMET's encodings, case by case as its own kernel computed them, and the laws of its schemes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ptqjax.errors import ConfigError
from ptqjax.kernels import aimet
from ptqjax.kernels.ranges import GridKind, Symmetry, grid_kind, stack_kinds
from ptqjax.ranges.aimet_schemes import BATCH_DENSITY, find_aimet_scheme, fixed_grid, in_batches, symmetry_in_use
from ptqjax.ranges.search import choose_encoding

SCHEMES = ("min-max", "sqnr", "percentile:99", "percentile:99.9", "percentile:100")
SYMMETRIES: tuple[Symmetry, ...] = (False, True, "strict", "unsigned", "strict unsigned")
NUM_CASES = 240


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers of this test alone."""
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Any]:
    """Encodings by aimet-onnx 2.42's kernel, with the data they belong to."""
    return _golden(shared / "reference" / "aimet242_golden_encodings.json")


@cache
def _golden(path: Path) -> dict[str, Any]:
    if not path.is_file():
        pytest.skip(f"no encodings by AIMET: {path} is missing")
    return json.loads(path.read_text(encoding="utf-8"))


def name_of(case: dict[str, Any]) -> str:
    """Returns what AIMET's scheme is called here."""
    names = {"min_max": "min-max", "tf_enhanced": "sqnr", "percentile": f"percentile:{case['percentile']}"}
    return names[case["scheme"]]


def symmetry_of(case: dict[str, Any]) -> Symmetry:
    if not case["symmetric"]:
        return False
    return {(False, False): True, (True, False): "strict", (False, True): "unsigned"}[case["strict"], case["unsigned"]]


def data_of(case: dict[str, Any], golden: dict[str, Any]) -> list[np.ndarray]:
    """Returns the batches of a case."""
    names = case["tensor"] if isinstance(case["tensor"], list) else [case["tensor"]]
    return [np.asarray(golden["tensors"][name], dtype=np.float32) for name in names]


def grid_of(scale: Any, zero_point: Any, kind: GridKind) -> np.ndarray:
    """Returns (min, max, delta, offset), as AIMET has them."""
    scale, zero_point, qmin, qmax = (
        np.float64(np.ravel(number)[0]) for number in (scale, zero_point, kind.qmin, kind.qmax)
    )
    return np.array([scale * (qmin - zero_point), scale * (qmax - zero_point), scale, qmin - zero_point])


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_encoding_is_that_of_aimet(golden: dict[str, Any], index: int) -> None:
    assert len(golden["cases"]) == NUM_CASES
    case = golden["cases"][index]
    batches, name, dtype = data_of(case, golden), name_of(case), f"int{case['bw']}"
    is_zero = not any(batch.any() for batch in batches)
    kind = grid_kind(dtype, symmetric=symmetry_in_use(name, symmetry_of(case), is_all_zero=is_zero))
    found = in_batches(name, [[batch.reshape(1, -1)] for batch in batches], kind)
    # scales are float32 here: half a unit in the last place
    np.testing.assert_allclose(grid_of(*found, kind), case["enc"], rtol=1e-7, atol=0)


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_choose_encoding_is_that_of_aimet(golden: dict[str, Any], index: int) -> None:
    case = golden["cases"][index]
    batches = data_of(case, golden)
    encoding = choose_encoding(
        batches if len(batches) > 1 else batches[0],
        dtype=f"int{case['bw']}",
        symmetric=symmetry_of(case),
        ranges=name_of(case),
        compatibility="aimet",
    )
    found = grid_of(encoding.scale, encoding.zero_point, GridKind(encoding.qmin, encoding.qmax, np.asarray(True)))
    np.testing.assert_allclose(found, case["enc"], rtol=1e-7, atol=0)


def kinds(dtype: str, symmetric: Symmetry, count: int) -> GridKind:
    return stack_kinds([grid_kind(dtype, symmetric=symmetric)] * count)


def ragged_batches(rng: np.random.Generator) -> list[np.ndarray]:
    """Returns three batches of the same rows: of all signs, one-sided, constant, zero at first or always, and tiny."""
    batches = []
    for size in (40, 7, 300):
        rows = rng.normal(size=(7, size))
        rows[1], rows[2] = abs(rows[1]), -abs(rows[2])
        rows[3], rows[5], rows[6] = 0, rows[5] * 1e-7, -2.25
        batches.append(rows.astype(np.float32))
    batches[0][4] = 0
    return batches


@pytest.mark.parametrize("dtype", ["int4", "int8", "uint16"])
@pytest.mark.parametrize("symmetric", SYMMETRIES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_channel_has_the_encoding_it_has_alone(
    name: str, symmetric: Symmetry, dtype: str, rng: np.random.Generator
) -> None:
    batches = ragged_batches(rng)
    together = in_batches(name, [[batch[:3], batch[3:]] for batch in batches], kinds(dtype, symmetric, 7))
    for row in range(7):
        alone = in_batches(name, [[batch[row : row + 1]] for batch in batches], grid_kind(dtype, symmetric=symmetric))
        np.testing.assert_array_equal(np.stack(together)[:, row], np.stack(alone)[:, 0])


@pytest.mark.parametrize("symmetric", SYMMETRIES)
@pytest.mark.parametrize("name", SCHEMES)
def test_streamed_batches_give_what_they_give_in_hand(name: str, symmetric: Symmetry, rng: np.random.Generator) -> None:
    batches = ragged_batches(rng)
    scheme = find_aimet_scheme(name)
    state = scheme.observer.init(7)
    update = jax.jit(scheme.observer.update, static_argnums=2)
    for batch in batches:
        state = update(state, list(batch), 1)
    kind = kinds("int8", symmetric, 7)
    for streamed, in_hand in zip(
        scheme.finish(state, kind), in_batches(name, [[b] for b in batches], kind), strict=True
    ):
        np.testing.assert_array_equal(streamed, in_hand)


def test_values_outside_the_bins_of_the_first_batch_are_dropped(rng: np.random.Generator) -> None:
    """AIMET's weakness, kept: ten times wider, half of the second batch and more is gone, and with it the range."""
    narrow, wide = (rng.uniform(-1, 1, size=(1, 1000)).astype(np.float32) * size for size in (1, 10))
    mass = aimet.density_of([narrow, wide]).mass.sum(axis=1)
    inside = np.mean(np.abs(wide) < 3)
    np.testing.assert_allclose(mass, (1 + inside) / 2, atol=2e-3)  # bins end up to one bin beyond 3
    scale, _ = in_batches("percentile:100", [[narrow], [wide]], grid_kind("int8", symmetric=True))
    assert 2.9 < scale[0] * 127 < 3.1
    whole, _ = in_batches("min-max", [[narrow], [wide]], grid_kind("int8", symmetric=True))
    assert whole[0] * 127 > 9.5


def test_every_batch_weighs_the_same_however_many_values_it_has() -> None:
    many, few = np.full((1, 999), 1.0, np.float32), np.full((1, 1), 2.0, np.float32)
    first = np.array([[1.0, 2.0]], np.float32)
    mass = aimet.density_of([first, many, few]).mass[0]
    np.testing.assert_allclose(mass[mass > 0], [0.5, 0.5], rtol=1e-15)


def test_a_share_that_is_reached_exactly_ends_the_range() -> None:
    """The share up to the third of four values is 75 %: the range ends where its bin begins (as by AIMET's kernel)."""
    scale, zero_point = in_batches("percentile:75", [[np.array([[1, 2, 3, 4]], np.float32)]], grid_kind("uint8"))
    np.testing.assert_allclose(scale[0] * 255, 3, rtol=1e-6)
    assert zero_point[0] == 0


@pytest.mark.parametrize("symmetric", SYMMETRIES)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_all_zero_data_has_a_grid_of_one_on_both_sides(bits: int, symmetric: Symmetry) -> None:
    zeros, kind = np.zeros((3, 5), np.float32), grid_kind(f"int{bits}", symmetric=symmetric)
    for name in ("sqnr", "percentile:99"):
        scale, zero_point = find_aimet_scheme(name).in_hand([zeros], kind)
        assert np.all(zero_point == 0)
        is_strict = name != "sqnr" and "strict" in str(symmetric)
        np.testing.assert_allclose(scale, 2 / (2**bits - 1 - is_strict), rtol=1e-7)
    scale, _ = find_aimet_scheme("min-max").in_hand([zeros], kind)
    assert np.all(scale == np.float32(aimet.SMALLEST_STEP))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("value", [1e5, -3e5, 1e12, 1e38, -3e38, 1e-38, 1e-44])
def test_constants_of_any_size_have_a_finite_grid(name: str, value: float) -> None:
    """AIMET's step is -1 where 0.01 is lost beside a constant, and there is no histogram."""
    data = np.full((1, 9), value, np.float32)
    for symmetric in SYMMETRIES:
        kind = grid_kind("int8", symmetric=symmetric)
        low, high, scale, _ = grid_of(*find_aimet_scheme(name).in_hand([data], kind), kind)
        assert 0 < scale < np.inf
        assert -3.5e38 < low <= 0 <= high < 3.5e38
        if abs(value) > 1e5:
            assert low - scale <= data[0, 0] <= high + scale


def test_a_histogram_merges_with_one_of_the_same_bins_only(rng: np.random.Generator) -> None:
    first, second, other = (jnp.asarray(rng.normal(size=50), np.float32) for _ in range(3))
    update, start = BATCH_DENSITY.update, BATCH_DENSITY.init(1)
    one = update(start, [first], 1)
    both = update(update(one, [second], 1), [first], 1)
    merged = BATCH_DENSITY.merge(update(one, [second], 1), one)
    assert int(merged.batches[0]) == int(both.batches[0]) == 3
    for scheme in map(find_aimet_scheme, SCHEMES[1:]):
        kind = kinds("int8", True, 1)
        np.testing.assert_array_equal(scheme.finish(merged, kind), scheme.finish(both, kind))
    for pair in ((one, start), (start, one)):
        np.testing.assert_array_equal(np.asarray(BATCH_DENSITY.merge(*pair).mass), np.asarray(one.mass))
    with pytest.raises(ConfigError, match="different bins"):
        BATCH_DENSITY.merge(one, update(start, [other], 1))


@pytest.mark.parametrize("name", ["mse", "entropy", "moving-average", "percentile", "percentile:x", "percentile:101"])
def test_a_scheme_that_aimet_lacks_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"compatibility='aimet'; expected 'min-max', 'sqnr'"):
        find_aimet_scheme(name)


@pytest.mark.parametrize("name", SCHEMES)
def test_powers_of_two_are_refused(name: str) -> None:
    kind = grid_kind("int8", power_of_two=True)
    with pytest.raises(ConfigError, match="power_of_two=True"):
        find_aimet_scheme(name).in_hand([np.ones((1, 3), np.float32)], kind)


def test_fixed_ranges_have_aimets_older_formula() -> None:
    """Numbers by aimet-onnx 2.42."""
    low, high = np.array([0.0, -1.0, -2.0]), np.array([0.003, 1.0, -1.0])
    scale, zero_point = fixed_grid(low, high, kinds("int8", False, 3))
    np.testing.assert_allclose(scale, [0.01 / 255, 2 / 255, 2 / 255], rtol=1e-7)
    np.testing.assert_array_equal(zero_point, [-128, 0, 127])
    strict, _ = fixed_grid(low, high, kinds("int8", "strict", 3))
    np.testing.assert_allclose(strict, [0.01 / 127, 1 / 127, 0.015625], rtol=1e-7)
