"""Calibration: streams, any order, bounded memory, and errors that name tensor and batch."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.config import QuantizationConfig, Rule
from ptqjax.encodings.low_power import compose, decompose
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.ir import Model
from ptqjax.lowering import apply
from ptqjax.onnx_io import read
from ptqjax.placement.place import place
from ptqjax.qdq.insert import insert_qdq
from ptqjax.ranges.calibrate import calibrate, calibrate_and_report
from ptqjax.ranges.observers import DISTRIBUTION, EXTREMES, MEAN_EXTREMES, SAMPLES, Observer
from ptqjax.ranges.observing import channel_means
from ptqjax.ranges.schemes import find_scheme
from ptqjax.ranges.search import choose_encoding
from ptqjax.simulation import simulate
from tests.models import build, node

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    """Conv+Relu, MaxPool, Conv, Add, pool, Gemm, Softmax: ties, a group, a fixed range, three biases."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[1, 1]),
        helper.make_node("Conv", ["p1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "p1"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["y"]),
    ]
    arrays = {"w1": floats(8, 3, 3, 3), "b1": floats(8), "w2": floats(8, 8, 3, 3), "b2": floats(8)}
    arrays |= {"w3": floats(8, 5), "b3": floats(5)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


DATA = [{"x": floats(4, 3, 12, 12) * spread} for spread in (1, 3, 0.5)]
ROUNDED = Rule(tensors=("logits", "y"), enabled=True, optional=True)  # although no integer kernel needs it
MIN_MAX = QuantizationConfig(ranges="min-max", rules=(ROUNDED,))


@pytest.mark.parametrize("ranges", ["min-max", "moving-average", "sqnr", "percentile:99.5", "mse", "entropy"])
def test_order_and_grouping_of_batches_do_not_matter(model: Model, ranges: str) -> None:
    config = QuantizationConfig(ranges=ranges)
    expected = calibrate(model, DATA, config)
    joined = [{"x": np.concatenate([batch["x"] for batch in DATA[:2]])}, DATA[2]]  # sizes 8 and 4
    for found in (calibrate(model, DATA[::-1], config), calibrate(model, iter(joined), config)):
        assert set(found) == set(expected)
        for name, encoding in expected.items():
            # A batch of another size may be summed in another order: float32 rounding in the activations.
            np.testing.assert_allclose(found[name].scale, encoding.scale, rtol=1e-5, err_msg=name)
            np.testing.assert_allclose(found[name].zero_point, encoding.zero_point, atol=1, err_msg=name)
    reversed_order = calibrate(model, DATA[::-1], config)
    for name, encoding in expected.items():
        np.testing.assert_array_equal(reversed_order[name].scale, encoding.scale)


def test_encodings_are_those_of_the_float_activations(model: Model) -> None:
    found = calibrate(model, DATA, MIN_MAX)
    x = np.concatenate([batch["x"] for batch in DATA])
    np.testing.assert_array_equal(found["x"].scale, choose_encoding(x, dtype="uint8", ranges="min-max").scale)
    np.testing.assert_array_equal(
        found["w2"].scale, choose_encoding(model.params["w2"], ranges="min-max", symmetric=True, axis=0).scale
    )
    wide = model.params["w1"], model.params["b1"]
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    relu = np.maximum(np.einsum("nchwij,ocij->nohw", windows, wide[0]) + wide[1][:, None, None], 0)
    np.testing.assert_allclose(found["r1"].scale, relu.max() / 255, rtol=1e-5)
    assert found["r1"].zero_point == 0


def test_exactly_the_sites_have_encodings_and_ties_share_one(model: Model) -> None:
    found = calibrate(model, DATA, MIN_MAX)
    assert set(found) == {site.tensor for site in place(model, MIN_MAX).sites}
    assert found["p1"] is found["r1"]
    assert found["y"].scale == np.float32(1 / 255)
    assert not {"c1", "b1"} & set(found)
    assert all(isinstance(leaf, np.ndarray | np.generic) for leaf in jax.tree.leaves(found))


def test_types_follow_the_configuration(model: Model) -> None:
    config = QuantizationConfig(weights="int4", activations="int16", granularity="tensor", ranges="min-max")
    found = calibrate(model, DATA, config)
    assert {found["w1"].dtype, found["x"].dtype} == {"int4", "int16"}
    assert found["w1"].scale.shape == ()


def test_excluded_tensors_have_no_encoding(model: Model) -> None:
    found = calibrate(model, DATA, QuantizationConfig(ranges="min-max", exclude=("x", "a")))
    assert not {"x", "a"} & set(found)


def test_where_nothing_is_observed_weights_alone_have_encodings(model: Model) -> None:
    weights = calibrate(model, DATA, QuantizationConfig(exclude=("x", "r1", "c2", "a", "g", "logits", "y")))
    assert set(weights) == {"w1", "w2", "w3"}
    nothing = QuantizationConfig(exclude=("*",))
    assert calibrate(model, DATA, nothing) == {}
    with pytest.raises(DataError, match="batch 1 lacks the input 'x'"):
        calibrate(model, [DATA[0], {}], nothing)


def linear_model(kind: str, weight: np.ndarray, bias: np.ndarray | None = None) -> Model:
    """x [5, 8] times a weight, plus a bias where there is one."""
    arrays = {"w": weight} | ({} if bias is None else {"b": bias})
    nodes = [helper.make_node(kind, ["x", *arrays], ["y"])]
    if kind == "MatMul":
        nodes = [helper.make_node(kind, ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
        nodes = nodes if bias is not None else [helper.make_node(kind, ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def assert_runs_quantized(model: Model) -> None:
    """The float and integer programs are as close to the float model as 8 bits are."""
    inputs = {"x": np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)}
    encodings = calibrate(model, [inputs], MIN_MAX)
    exact = apply(model.graph, model.params, inputs)["y"]
    for arithmetic in ("float", "integer"):
        found = simulate(model, encodings, arithmetic=arithmetic)(model.params, encodings, inputs)["y"]
        # A product of 8 values, each half a step off at most, and a step or two of sum and result.
        np.testing.assert_allclose(found, exact, atol=0.05 * float(np.abs(exact).max()))


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (3,), (1, 3)])
def test_a_bias_of_any_shape_goes_through(kind: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    assert_runs_quantized(
        linear_model(kind, rng.normal(size=(8, 3)).astype(np.float32), np.asarray(rng.normal(size=shape), np.float32))
    )


def test_a_product_with_a_vector_goes_through() -> None:
    assert_runs_quantized(linear_model("MatMul", np.random.default_rng(3).normal(size=8).astype(np.float32)))


def test_a_quantized_model_is_refused(model: Model) -> None:
    quantized = insert_qdq(model, calibrate(model, DATA, MIN_MAX))
    with pytest.raises(ModelError, match=r"quantized already: it holds .* quantize its source"):
        calibrate(quantized, DATA, MIN_MAX)


def test_calibration_changes_nothing_and_repeats_to_the_bit(model: Model) -> None:
    before = jax.tree.map(np.copy, model.params)
    first, second = (calibrate(model, DATA) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_sqnr_clips_an_outlier_that_min_max_keeps(model: Model) -> None:
    outlier = model.params["w1"].copy()
    outlier[0, 0, 0, 0] = 8.0
    wide, narrow = (
        calibrate(
            model.replace(params=model.params | {"w1": outlier}),
            DATA,
            QuantizationConfig(weights="int4", granularity="tensor", ranges=ranges),
        )["w1"]
        for ranges in ("min-max", "sqnr")
    )
    # 3 (8 - c)^2 + 216 (c / 7)^2 / 12 is least where c is 0.9 of 8, if errors of rounding were uniform.
    assert 0.7 * wide.scale < narrow.scale < 0.97 * wide.scale


def test_a_bias_that_does_not_fit_raises_its_weight_and_is_reported(model: Model) -> None:
    params = model.params | {"w1": model.params["w1"] * np.float32(1e-9)}
    encodings, report = calibrate_and_report(model.replace(params=params), DATA, MIN_MAX)
    (record,) = report
    assert record.where == ("w1", "b1")
    assert np.abs(params["b1"] / (encodings["x"].scale * encodings["w1"].scale)).max() < 2**31


def test_batches_stream_and_each_size_is_compiled_once(model: Model, traces: list[None]) -> None:
    alive: list[int] = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for index in range(6):
            alive.append(index)
            yield DATA[index % 3] if index != 4 else {"x": DATA[0]["x"][:3]}

    calibrate(model, stream(), MIN_MAX)
    assert alive == list(range(6))
    assert len(traces) <= 2
    traces.clear()
    calibrate(model, DATA, QuantizationConfig(ranges="min-max", activations="uint16", weights="int4"))
    assert not traces  # widths are not part of the program


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"batches is empty; expected at least one mapping \{'x': array\}"),
        (None, "no range is known of 6 of 6 activations: the graph input 'x', Relu .*; the model has no batch norms"),
        ({"x": DATA[0]["x"]}, "batches is a dict; expected an iterable of mappings"),
        (DATA[0]["x"], "batches is a ndarray"),
        ([DATA[0]["x"]], r"batch 0 is a ndarray; expected a mapping \{'x': array\}"),
        ([DATA[0], {}], "batch 1 lacks the input 'x'"),
        ([DATA[0] | {"xs": 1}], "batch 0 has the input 'xs', which the model has not; .* near names: x"),
        (
            [DATA[0], {"x": DATA[0]["x"].astype(np.float64)}],
            "batch 1: input 'x' has the type float64; expected float32",
        ),
        ([{"x": DATA[0]["x"][0]}], "batch 0: input 'x' has the shape 3x12x12; expected nx3x12x12"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "batch 0: input 'x' is no array"),
        ([{"x": floats(4, 3, 12, 13)}], "shape 4x3x12x13; expected nx3x12x12"),
        ([{"x": floats(0, 3, 12, 12)}], "has no elements"),
        ([DATA[0], {"x": np.full((4, 3, 12, 12), np.inf, np.float32)}], "batch 1: input 'x' holds inf at "),
        ([DATA[0], DATA[1], {"x": np.full((4, 3, 12, 12), np.nan, np.float32)}], "batch 2: input 'x' holds nan at "),
    ],
)
def test_bad_batches_are_an_error_that_names_the_place(model: Model, batches, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(model, batches, MIN_MAX)


@pytest.mark.parametrize("ranges", ["min-max", "moving-average", "sqnr", "percentile:99", "mse", "entropy"])
def test_a_tensor_that_overflows_is_named_with_the_first_bad_batch(model: Model, ranges: str) -> None:
    huge = {"x": np.full((4, 3, 12, 12), 3e38, np.float32)}
    with pytest.raises(DataError, match="tensor 'r1' is NaN or infinite in batch 1"):
        calibrate(model, [DATA[0], huge, DATA[1]], QuantizationConfig(ranges=ranges))


def test_a_parameter_that_is_not_finite_is_named_with_what_it_makes() -> None:
    params = {"w": np.ones((2, 3, 1, 1), np.float32), "b": np.array([0, np.inf], np.float32)}
    nodes = [node("Conv", ["x", "w", "b"], "c"), node("Relu", ["c"], "r"), node("Conv", ["r", "v"], "y")]
    model = build(nodes, params | {"v": np.ones((1, 2, 1, 1), np.float32)}, input_shape=("N", 3, 4, 4), outputs=["y"])
    with pytest.raises(DataError, match="'r' is NaN or infinite in batch 0, as is the parameter 'b'"):
        calibrate(model, [{"x": np.ones((1, 3, 4, 4), np.float32)}], MIN_MAX)


@pytest.mark.parametrize("observer", [EXTREMES, MEAN_EXTREMES, DISTRIBUTION], ids=lambda each: each.name)
def test_one_nan_among_many_numbers_is_seen(observer: Observer) -> None:
    value = floats(4, 3, 12, 12)
    value[2, 1, 5, 7] = np.nan
    state = jax.jit(observer.update, static_argnums=2)(observer.init(1), [value], 4)
    ends = observer.extremes(state)
    assert not np.isfinite(ends.lowest)
    assert not np.isfinite(ends.highest)


@pytest.mark.parametrize("ranges", ["min-max", "moving-average", "sqnr"])
def test_more_samples_than_counters_hold_are_an_error(model: Model, ranges: str, monkeypatch) -> None:
    observer = find_scheme(ranges).observer
    scheme = replace(find_scheme(ranges), observer=replace(observer, most_samples=observer.most_samples and 10))
    monkeypatch.setattr(sys.modules["ptqjax.ranges.calibrate"], "find_scheme", lambda *_: scheme)
    config = QuantizationConfig(ranges=ranges)
    if observer.most_samples is None:
        assert calibrate(model, DATA, config)
        return
    with pytest.raises(DataError, match=f"batch 2: 12 samples so far, and the scheme '{ranges}' has room for 10"):
        calibrate(model, DATA, config)


def test_no_counter_overflows_before_the_most_samples() -> None:
    assert (DISTRIBUTION.most_samples or 0) * SAMPLES < 2**31
    state = MEAN_EXTREMES.init(1)  # a term adds to a part what its byte holds
    assert (MEAN_EXTREMES.most_samples or 0) * 255 < np.iinfo(state.sums.dtype).max


def test_nan_in_a_parameter_is_named(model: Model) -> None:
    bad = model.params["w1"].copy()
    bad[1, 2, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"'w1' holds nan at \(1, 2, 0, 0\)"):
        calibrate(model.replace(params=model.params | {"w1": bad}), DATA, MIN_MAX)


def test_one_compiled_step_serves_schemes_parameters_widths_and_symmetries(model: Model, traces: list[None]) -> None:
    calibrate(model, DATA, QuantizationConfig(ranges="sqnr"))
    traces.clear()
    for ranges in ("mse", "entropy", "percentile:99", "percentile:99.9"):
        for symmetric in (False, True, "unsigned"):
            calibrate(
                model, DATA, QuantizationConfig(ranges=ranges, activations_symmetric=symmetric, activations="int6")
            )
    assert not traces


def test_tensors_may_have_schemes_of_their_own(model: Model, traces: list[None]) -> None:
    rules = (Rule(tensors=("r1",), ranges="min-max"), Rule(tensors=("w2",), ranges="min-max"))
    rules += (Rule(tensors=("a",), ranges="percentile:90"),)
    found = calibrate(model, DATA, QuantizationConfig(ranges="mse", rules=rules))
    assert len(traces) == 1  # all observers in one program
    alone = {
        name: calibrate(model, DATA, QuantizationConfig(ranges=name)) for name in ("min-max", "mse", "percentile:90")
    }
    schemes = {"r1": "min-max", "p1": "min-max", "w2": "min-max", "a": "percentile:90", "w1": "mse", "x": "mse"}
    for tensor, name in schemes.items():
        np.testing.assert_array_equal(found[tensor].scale, alone[name][tensor].scale, err_msg=tensor)
    assert np.all(found["a"].scale < alone["min-max"]["a"].scale)


def test_weights_and_activations_may_have_different_schemes(model: Model) -> None:
    config = QuantizationConfig(ranges="mse", weight_ranges="min-max", activation_ranges="percentile:99")
    found = calibrate(model, DATA, config)
    for tensor, name in {"w1": "min-max", "r1": "percentile:99"}.items():
        expected = calibrate(model, DATA, QuantizationConfig(ranges=name))[tensor]
        np.testing.assert_array_equal(found[tensor].scale, expected.scale)


@pytest.mark.parametrize("batches", [DATA, None], ids=["data", "no data"])
def test_frozen_encodings_stay_and_their_ties_follow(model: Model, batches) -> None:
    config = QuantizationConfig(ranges="min-max", exclude=() if batches else ("x", "a", "c2", "g", "logits"))
    wide = choose_encoding(np.asarray([0.0, 99.0], np.float32), dtype="uint8", ranges="min-max")
    coarse = choose_encoding(model.params["w2"], symmetric=True, dtype="int4", axis=0)
    found = calibrate(model, batches, config, frozen={"r1": wide, "w2": coarse})
    assert found["r1"] is found["p1"] is wide
    np.testing.assert_array_equal(found["w2"].qmax, coarse.qmax)
    if batches:
        free = calibrate(model, batches, config)
        for name in set(found) - {"r1", "p1", "w2"}:
            np.testing.assert_array_equal(found[name].scale, free[name].scale)
        again = calibrate(model, [DATA[0]], config, frozen=free)  # nothing is left to calibrate
        jax.tree.map(np.testing.assert_array_equal, again, free)


def test_a_frozen_tensor_that_is_not_rounded_is_an_error_with_near_names(model: Model) -> None:
    encoding = choose_encoding(np.ones(3, np.float32))
    with pytest.raises(ConfigError, match=r"frozen: 'logit' is none of the \d+ tensors .*; near names: logits"):
        calibrate(model, DATA, MIN_MAX, frozen={"logit": encoding})


def test_short_floats_need_extremes_or_nothing(model: Model, traces: list[None]) -> None:
    short = QuantizationConfig(weights="float8_e4m3fn", activations="float8_e5m2", biases="float")
    found = calibrate(model, DATA, short)
    largest = max(float(np.abs(batch["x"]).max()) for batch in DATA)
    np.testing.assert_array_equal(found["x"].scale, np.float32(largest) / np.float32(57344))
    w1 = np.abs(model.params["w1"]).max(axis=(1, 2, 3))
    np.testing.assert_array_equal(found["w1"].scale, w1 / np.float32(448))
    traces.clear()
    half = calibrate(model, DATA, QuantizationConfig(weights="bfloat16", activations="float16", biases="float"))
    assert not traces
    assert {float(np.max(encoding.scale)) for encoding in half.values()} == {1.0}


def test_low_power_blocks_come_out_of_calibration(model: Model) -> None:
    config = QuantizationConfig(weights="int4", granularity="lpbq:4", biases="float", ranges="min-max")
    weight = calibrate(model, DATA, config)["w2"]
    assert weight.scale_bits == 4
    assert weight.block_size == 4
    parts = decompose(weight)
    np.testing.assert_array_equal(compose(parts), weight.scale)


@pytest.mark.parametrize("ranges", ["min-max", "sqnr", "percentile:99.9"])
def test_aimet_ranges_come_out_of_calibration(model: Model, ranges: str) -> None:
    found = calibrate(model, DATA, QuantizationConfig(ranges=ranges, compatibility="aimet"))
    batches = [batch["x"] for batch in DATA]
    expected = choose_encoding(batches, dtype="uint8", ranges=ranges, compatibility="aimet")
    np.testing.assert_array_equal(found["x"].scale, expected.scale)
    np.testing.assert_array_equal(found["x"].zero_point, expected.zero_point)


@pytest.mark.parametrize("shape", [(2, 112, 112, 5), (1, 400, 402, 3), (2, 9000, 4), (3, 40, 40, 2), (4, 7)])
def test_channel_means_of_large_maps_are_those_of_a_lattice_that_meets_what_alternates(shape: tuple[int, ...]) -> None:
    """Means over a lattice are those over all positions of what varies slowly, and of a checkerboard."""
    places = np.indices(shape[1:-1], dtype=np.float32)
    board, slow = places.sum(0) % 2, np.sin(places / 20).sum(0)
    value = np.broadcast_to((3 * board + slow)[None, ..., None], shape) * (1 + np.arange(shape[-1], dtype=np.float32))
    found = channel_means(jnp.asarray(value), len(shape) - 1, None)
    np.testing.assert_allclose(found, value.reshape(-1, shape[-1]).mean(0), rtol=0.03, atol=0.02)
