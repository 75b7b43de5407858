"""Values that mean "never": masks of every kind leave attention what it is, and the file equals the simulation."""

import jax.numpy as jnp
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ptqjax.agreement.runtime import session
from ptqjax.config import QuantizationConfig
from ptqjax.errors import DataError
from ptqjax.exporting import quantized_model
from ptqjax.ir import Model
from ptqjax.kernels.reach import reach_below, within_reach, without_never
from ptqjax.lowering import apply
from ptqjax.onnx_io import read, to_proto
from ptqjax.placement.never import find_nevers, mask_inputs
from ptqjax.placement.place import place
from ptqjax.ranges.calibrate import calibrate
from ptqjax.simulation import simulate

RNG = np.random.default_rng(0)
LOWEST = float(np.finfo(np.float32).min)
FLOAT = {"to": TensorProto.FLOAT}
N, T, D = 8, 6, 8
WEIGHTS = {name: RNG.normal(0, 0.6, (D, D)).astype(np.float32) for name in ("Wq", "Wk", "Wv", "Wo")}
SCORES = [("MatMul", "x Wq", "q"), ("MatMul", "x Wk", "k"), ("MatMul", "x Wv", "v")]
SCORES += [("Transpose", "k", "kt", {"perm": [0, 2, 1]}), ("MatMul", "q kt", "s")]
SOFTMAX = [("Softmax", "masked", "p", {"axis": -1})]
READ = [("MatMul", "p v", "o"), ("MatMul", "o Wo", "y")]
PIECES = [
    ("ReduceMax", "masked", "top", {"axes": [-1], "keepdims": 1}), ("Sub", "masked top", "below"),
    ("Exp", "below", "e"), ("ReduceSum", "e last", "sum"), ("Div", "e sum", "p"),
]  # fmt: skip
GUARD = [
    *SOFTMAX[:0],
    ("Softmax", "masked", "p0", {"axis": -1}),
    ("IsNaN", "p0", "isnan"),
    ("Where", "isnan zero p0", "p"),
]
CAUSAL = np.triu(np.ones((T, T), np.float32), 1)
EVERYWHERE = QuantizationConfig.for_target(  # scores as well; ranges as they are seen
    "generic-per-tensor", ranges="min-max", equalize=False, headroom=1.0
)


def build(*nodes, outputs=("y",), opset=17, mask=None, shape=("N", T, D), **initializers) -> Model:
    """Returns a model of (operator, inputs, outputs, attributes) with the input x, and a mask of the given type."""
    made = [
        helper.make_node(op, ins.split(), outs.split(), **(rest[0] if rest else {})) for op, ins, outs, *rest in nodes
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    if mask is not None:
        inputs.append(helper.make_tensor_value_info("mask", mask, ["N", 1, T]))
    graph = helper.make_graph(
        made, "g", inputs, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in initializers.items()],
    )  # fmt: skip
    return read(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def attention(*mask_nodes, softmax=SOFTMAX, mask=None, **initializers) -> Model:
    """Attention whose scores s become masked by the nodes."""
    numbers = {"one": np.float32(1), "zero": np.float32(0), "last": np.asarray([-1])}
    read_names = {name for _, ins, *_ in (*mask_nodes, *softmax) for name in ins.split()}
    numbers = {name: value for name, value in numbers.items() if name in read_names}
    return build(*SCORES, *mask_nodes, *softmax, *READ, mask=mask, **WEIGHTS, **numbers, **initializers)


INT64, BOOL, FLOATS = TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT
BERT = [("Cast", "mask", "f", FLOAT), ("Sub", "one f", "not"), ("Mul", "not big", "mb"), ("Add", "s mb", "masked")]
FILLED = [("Where", "mask s big", "masked")]
CHOSEN = [("Where", "mask zero big", "mb"), ("Add", "s mb", "masked")]


def models() -> dict[str, Model]:
    found = {}
    for big in (LOWEST / 2, -1e9, -1e4):
        found[f"(1 - m) {big:.2g}"] = attention(*BERT, mask=INT64, big=np.float32(big))
    for big in (-np.inf, -1e4):
        found[f"Where {big:.2g}"] = attention(*FILLED, mask=BOOL, big=np.float32(big))
        found[f"chosen, then added {big:.2g}"] = attention(*CHOSEN, mask=BOOL, big=np.float32(big))
        matrix = np.where(CAUSAL > 0, np.float32(big), np.float32(0))
        found[f"constant {big:.2g}"] = attention(("Add", "s matrix", "masked"), matrix=matrix)
        found[f"in pieces {big:.2g}"] = attention(*FILLED, softmax=PIECES, mask=BOOL, big=np.float32(big))
    of_integers = [
        ("Sub", "unity mask", "not"),
        ("Mul", "not big", "mi"),
        ("Cast", "mi", "mb", FLOAT),
        ("Add", "s mb", "masked"),
    ]
    found["of integers"] = attention(*of_integers, mask=INT64, unity=np.int64(1), big=np.int64(-10000))
    multiplied = [("Mul", "s keep", "kept"), ("Sub", "kept drop", "masked")]
    found["multiplied"] = attention(*multiplied, keep=1 - CAUSAL, drop=1e4 * CAUSAL)
    found["scaled after"] = attention(*FILLED[:0], ("Where", "mask s big", "w"), ("Mul", "w half", "masked"), mask=BOOL,
                                      big=np.float32(-1e4), half=np.float32(0.5))  # fmt: skip
    bounded = [*BERT[:3], ("Add", "s mb", "sum"), ("Max", "sum big", "masked")]
    found["under a Max"] = attention(*bounded, mask=INT64, big=np.float32(LOWEST))
    moved = [*CHOSEN[:1], ("Add", "s mb", "sum"), ("Unsqueeze", "sum axis", "masked")]
    back = [("Softmax", "masked", "p1", {"axis": -1}), ("Squeeze", "p1 axis", "p")]
    found["moved before"] = attention(*moved, softmax=back, mask=BOOL, big=np.float32(-np.inf), axis=np.asarray([1]))
    found["an input"] = attention(("Add", "s mask", "masked"), mask=FLOATS)
    found["an input, expanded"] = attention(
        ("Expand", "mask size", "wide"), ("Add", "wide s", "masked"), mask=FLOATS, size=np.asarray([1, T, T])
    )
    found["Log of a mask"] = attention(
        ("Cast", "mask", "f", FLOAT), ("Log", "f", "mb"), ("Add", "s mb", "masked"), mask=INT64
    )
    found["guarded"] = attention(*CHOSEN, softmax=GUARD, mask=BOOL, big=np.float32(-np.inf))
    return found


MODELS = models()


def batch(model: Model, seed: int, *, is_masked: bool = True, samples: int = N) -> dict[str, np.ndarray]:
    """Returns a batch in which each sample has a tail that is masked."""
    rng = np.random.default_rng(seed)
    keep = (
        np.arange(T) < rng.integers(2, T + (not is_masked), (samples, 1, 1))
        if is_masked
        else np.ones((samples, 1, T), bool)
    )
    keep = np.broadcast_to(keep, (samples, 1, T))
    inputs = {"x": rng.normal(0, 1.5, (samples, T, D)).astype(np.float32)}
    for spec in model.graph.inputs[1:]:
        as_added = np.where(keep, np.float32(0), np.float32(-np.inf))
        inputs["mask"] = as_added if spec.dtype == np.float32 else keep.astype(spec.dtype)
    return inputs


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(expected.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / noise))


def file_and_simulation(model: Model, encodings, inputs) -> tuple[np.ndarray, np.ndarray]:
    ran = session(to_proto(quantized_model(model, encodings)).SerializeToString()).run(["y"], inputs)[0]
    simulated = simulate(model, encodings, arithmetic="integer")(model.params, encodings, inputs)["y"]
    return ran, np.asarray(simulated)


@pytest.mark.parametrize("name", MODELS)
def test_masked_attention_keeps_its_values(name) -> None:
    """Scores reach 20 and further, of which 8 bits hold no more: 24 dB; where masks count as data, 0 to 3 are left."""
    model = MODELS[name]
    encodings = calibrate(model, [batch(model, 1), batch(model, 2), batch(model, 3)], EVERYWHERE)
    inputs = batch(model, 2)
    ran, simulated = file_and_simulation(model, encodings, inputs)
    expected = np.asarray(apply(model.graph, model.params, inputs)["y"])
    assert sqnr(expected, ran) > 24
    np.testing.assert_array_equal(ran, simulated)


@pytest.mark.parametrize("name", ["(1 - m) -1e+09", "Where -inf", "of integers", "an input", "chosen, then added -inf"])
def test_masks_hold_that_no_calibration_sample_had(name) -> None:
    model = MODELS[name]
    encodings = calibrate(model, [batch(model, seed, is_masked=False, samples=32) for seed in (1, 2)], EVERYWHERE)
    inputs = batch(model, 2)
    expected = np.asarray(apply(model.graph, model.params, inputs)["y"])
    found = np.asarray(simulate(model, encodings)(model.params, encodings, inputs)["y"])
    assert sqnr(expected, found) > 15  # nothing else of these samples was seen, so that some of it is clipped


def test_a_row_of_which_nothing_counts_stays_what_its_guard_makes_of_it() -> None:
    model = MODELS["guarded"]
    inputs = batch(model, 1)
    inputs["mask"] = inputs["mask"].copy()
    inputs["mask"][0] = False
    encodings = calibrate(model, [inputs], EVERYWHERE)
    ran, simulated = file_and_simulation(model, encodings, inputs)
    assert not ran[0].any()
    np.testing.assert_array_equal(ran, simulated)


def test_pads_before_a_maximum_share_the_grid_of_what_they_pad() -> None:
    for value in (-np.inf, LOWEST, -1e4):
        model = build(
            ("Relu", "x", "r"), ("Sub", "r one", "a"), ("Pad", "a pads value", "wide"),
            ("MaxPool", "wide", "y", {"kernel_shape": [3], "strides": [2]}),
            pads=np.asarray([0, 0, 1, 0, 0, 1]), value=np.float32(value), one=np.float32(1),
        )  # fmt: skip
        placement = place(model, EVERYWHERE)
        sites = {site.tensor: site.root for site in placement.sites}
        assert sites["wide"] == sites["y"] == "a"
        inputs = {"x": RNG.normal(size=(N, T, D)).astype(np.float32)}
        encodings = calibrate(model, [inputs], EVERYWHERE)
        ran, simulated = file_and_simulation(model, encodings, inputs)
        assert sqnr(np.asarray(apply(model.graph, model.params, inputs)["y"]), ran) > 35
        np.testing.assert_array_equal(ran, simulated)


def test_pads_between_integer_kernels_keep_the_grid_of_what_they_pad() -> None:
    model = build(
        ("Conv", "x kernel", "a"), ("Pad", "a pads value", "wide"),
        ("MaxPool", "wide", "m", {"kernel_shape": [3], "strides": [2]}), ("MatMul", "m w", "y"),
        pads=np.asarray([0, 0, 1, 0, 0, 1]), value=np.float32(-np.inf), w=WEIGHTS["Wo"][:4],
        kernel=RNG.normal(size=(T, T, 1)).astype(np.float32),
    )  # fmt: skip
    config = QuantizationConfig(ranges="min-max")
    sites = {site.tensor: site.root for site in place(model, config).sites}
    assert sites["a"] == sites["wide"] == sites["m"] == "a"
    inputs = {"x": RNG.normal(size=(N, T, D)).astype(np.float32)}
    ran, simulated = file_and_simulation(model, calibrate(model, [inputs], config), inputs)
    assert sqnr(np.asarray(apply(model.graph, model.params, inputs)["y"]), ran) > 30
    np.testing.assert_array_equal(ran, simulated)


def test_a_masked_maximum_keeps_its_grid() -> None:
    model = build(
        ("Where", "mask x big", "w"), ("ReduceMax", "w", "y", {"axes": [2], "keepdims": 0}),
        mask=BOOL, shape=("N", D, T), big=np.float32(-np.inf),
    )  # fmt: skip
    assert {"w", "y"} <= {site.tensor for site in place(model, EVERYWHERE).sites}
    inputs = {"x": RNG.normal(size=(N, D, T)).astype(np.float32), "mask": batch(MODELS["Where -inf"], 1)["mask"]}
    encodings = calibrate(model, [inputs], EVERYWHERE)
    ran, simulated = file_and_simulation(model, encodings, inputs)
    assert sqnr(np.asarray(apply(model.graph, model.params, inputs)["y"]), ran) > 35
    np.testing.assert_array_equal(ran, simulated)


@pytest.mark.parametrize("operator", ["Identity", "LogSoftmax", "Sigmoid"])
def test_masked_outputs_stay_in_float(operator) -> None:
    model = build(*SCORES[:1], ("Where", "keep q big", "w"), (operator, "w", "y"), keep=np.arange(D) < 5,
                  big=np.float32(-1e4), Wq=WEIGHTS["Wq"])  # fmt: skip
    found = {entry.tensor: entry.reason for entry in place(model, EVERYWHERE).skipped}
    assert found["w" if "w" in found else "y"] == "carries values that mean never ('big' = -10000)"
    assert ("y" in found) == (operator != "Sigmoid")


def test_what_is_large_and_goes_elsewhere_is_data() -> None:
    """A waveform in 16 bits, times made finite: constants of their size are no masks where layers read them."""
    loud = build(("Mul", "x loud", "a"), ("MatMul", "a Wo", "y"), loud=np.float32(32768), Wo=WEIGHTS["Wo"])
    assert not find_nevers(loud).in_float
    assert {site.counted for site in place(loud).sites} == {None}
    finite = build(
        ("IsInf", "x", "i"),
        ("Where", "i big x", "a"),
        ("MatMul", "a Wo", "y"),
        big=np.float32(-LOWEST),
        Wo=WEIGHTS["Wo"],
    )
    assert {site.tensor for site in place(finite).sites if site.counted is not None} == {"a"}
    residual = build(("MatMul", "x Wo", "s"), ("Add", "x s", "r"), ("Softmax", "r", "y"), Wo=WEIGHTS["Wo"])
    assert not mask_inputs(residual.graph)


def test_minus_infinity_is_refused_where_it_means_nothing() -> None:
    model = MODELS["Where -inf"]
    inputs = batch(model, 1)
    inputs["x"][0, 0, 0] = -np.inf
    with pytest.raises(DataError, match="input 'x' holds -inf"):
        calibrate(model, [inputs])


def test_a_reach_leaves_out_a_share_that_exp_does_not_tell() -> None:
    x = jnp.asarray(RNG.normal(0, 30, (5, 64)), jnp.float32)
    found = within_reach(x, axes=(1,), never=np.inf, is_masked=False)
    parts = (jnp.exp(rows - x.max(axis=1, keepdims=True)).sum(axis=1) for rows in (x, found))
    before, after = parts
    assert (found >= x).all()
    assert (after - before <= 2.0**-12 * (1 + 1e-4)).all()  # rounding of float32 beside it
    assert (found.min(axis=1) >= x.max(axis=1) - np.float32(reach_below(64))).all()
    np.testing.assert_array_equal(within_reach(found, axes=(1,), never=np.inf, is_masked=False), found)


def test_rows_of_which_nothing_counts_do_not_count() -> None:
    x = jnp.asarray([[-np.inf, -np.inf], [1, -np.inf], [-9000, -9999]], jnp.float32)
    found = np.asarray(within_reach(x, axes=(1,), never=5000.0, is_masked=True))
    np.testing.assert_array_equal(found[[0, 2]], 0)
    np.testing.assert_array_equal(found[1], np.asarray([1, 1 - reach_below(2), 1 - reach_below(2)], np.float32))
    np.testing.assert_array_equal(np.asarray(without_never(x, 5000.0))[[0, 2]], 0)
    assert np.isnan(
        np.asarray(within_reach(jnp.asarray([[np.nan, 1]], jnp.float32), axes=(1,), never=1e3, is_masked=True))
    ).any()
