"""Validation finds what differs between the runtime and the simulation, from a file alone."""

import importlib
import json

import ml_dtypes
import numpy as np
import pytest

from ptqjax import apply, calibrate, export, fold_batch_norms, onnx_io, read, validate
from ptqjax.agreement import decibels, run, session
from ptqjax.agreement.fusions import Fusions, otherwise_fused
from ptqjax.agreement.totals import NO_DISTANCE, with_elements
from ptqjax.config import QuantizationConfig
from ptqjax.errors import ConfigError, DataError, ModelError
from ptqjax.qdq.fuse_quantized import fuse_quantized
from ptqjax.qdq.insert import insert_qdq
from tests.models import Chain, build, node

MIN_MAX = QuantizationConfig(ranges="min-max")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network():
    chain = Chain(3, dtype=np.float32)
    chain.conv(6, pad=1, bias=True).clip().depthwise(pad=1, bias=True).add("Relu").conv(4, kernel=1)
    model = chain.build()
    return model, {"x": normal(4, 3, 8, 8)}


@pytest.fixture(scope="module")
def quantized():
    model, batch = network()
    return insert_qdq(model, calibrate(model, [batch], MIN_MAX)), batch


def test_resnet20_equals_onnx_runtime_group_by_group(shared, tmp_path):
    """From the exported file alone. The bar: 1 step at most, and equal in 99.99 %; found: all equal (x86 with FMA)."""
    data = np.load(shared / "data" / "cifar10" / "calibration.npz")
    model, _ = fold_batch_norms(read(shared / "models" / "resnet20_cifar10.onnx"))
    batch = {"input": data["input"][:16]}
    export(model, calibrate(model, [batch], MIN_MAX), tmp_path, "model")
    found = validate(tmp_path, [batch])
    assert found.num_samples == 16
    assert sum(group.integer for group in found.groups) >= 30
    assert found.largest <= 1
    assert found.equal >= 0.9999
    assert found.integer.agreement == 1
    assert found.integer.sqnr > found.float.sqnr
    assert not [warning for warning in found.warnings if "VNNI" not in warning]


def test_the_number_of_kernels_is_no_warning_where_all_integers_are_equal(quantized):
    model = quantized[0]
    foreseen = fuse_quantized(model)[0].graph
    fusions = Fusions(plain=model.graph, exposed=model.graph, foreseen=foreseen)  # as if the runtime fused nothing
    (warning,) = otherwise_fused(fusions, [])
    assert "computes 0 groups by QLinearConv, and the simulation 3: there the two may differ by single steps" in warning
    assert otherwise_fused(fusions, [], is_equal=True) == []


def test_batches_add_up(quantized):
    model, batch = quantized
    whole = validate(model, [batch])
    parts = validate(model, [{"x": batch["x"][:2]}, {"x": batch["x"][2:]}])
    assert parts.groups == whole.groups
    assert parts.num_samples == whole.num_samples == 4
    assert parts.integer.equal == whole.integer.equal


def test_the_float_program_is_left_out_where_it_is_not_asked_for(quantized):
    model, batch = quantized
    whole, without = validate(model, [batch]), validate(model, [batch], in_float=False)
    assert without.float is None
    assert (without.groups, without.integer) == (whole.groups, whole.integer)


def test_a_difference_is_found_where_it_is(quantized, monkeypatch):
    """The recomputation with another bias in one layer differs in that layer's group alone."""
    model, batch = quantized
    module = importlib.import_module("ptqjax.agreement.comparison")
    name = next(name for name in model.params if name.startswith("b") and name.endswith("_quantized"))
    apply = module.apply_few_times

    def wrong(graph, params, inputs):
        return apply(graph, {**params, name: params[name] + 500} if name in params else params, inputs)

    monkeypatch.setattr(module, "apply_few_times", wrong)
    groups = validate(model, [batch]).groups
    differing = [i for i, group in enumerate(groups) if group.largest > 0]
    assert len(differing) == 1
    assert [group.end_to_end.largest > 0 for group in groups] == [i >= differing[0] for i in range(len(groups))]


def test_from_the_inputs_to_the_end_all_integers_are_equal(quantized):
    """Found on x86 with fused multiply-add; elsewhere a sum may round the other way, and what follows it changes."""
    model, batch = quantized
    found = validate(model, [batch])
    assert all(group.end_to_end.num_elements == group.num_elements > 0 for group in found.groups)
    assert found.farthest.end_to_end.equal >= 0.99
    assert found.unverified == ()


def test_operators_as_onnx_defines_them_differ_by_single_steps_alone(quantized, monkeypatch):
    """Nothing is compiled for it."""
    model, batch = quantized
    simulated = validate(model, [batch])
    monkeypatch.setattr("ptqjax.agreement.comparison.apply_few_times", None)
    found = validate(model, [batch], in_float=False, by="definition")
    assert found.equal > 0.99
    assert found.largest <= 1
    assert found.integer.sqnr > 20
    assert [(each.tensor, each.operator) for each in found.groups] == [
        (each.tensor, each.operator) for each in simulated.groups
    ]
    with pytest.raises(ConfigError, match="by='hearsay'"):
        validate(model, [batch], by="hearsay")


def test_operators_sum_up_their_groups(quantized):
    model, batch = quantized
    found = validate(model, [batch])
    assert sum(each.num_groups for each in found.operators) == len(found.groups)
    assert sum(each.num_integer for each in found.operators) == sum(group.integer for group in found.groups)
    for each in found.operators:
        groups = [group for group in found.groups if group.operator == each.operator]
        assert each.alone.num_elements == sum(group.num_elements for group in groups)
        assert each.lowest_equal_alone == min(group.equal for group in groups) <= each.alone.equal
        assert each.lowest_equal_end_to_end == min(group.end_to_end.equal for group in groups)


def test_findings_are_plain_data(quantized):
    model, batch = quantized
    found = validate(model, [batch])
    plain = json.loads(json.dumps(found.as_dict()))
    assert [each["operator"] for each in plain["operators"]] == [each.operator for each in found.operators]
    assert plain["groups"][0]["end_to_end"]["num_elements"] == found.groups[0].num_elements
    assert [each["weight"] for each in plain["saturating"]] == [each.weight for each in found.saturating]


def test_every_quantized_tensor_is_a_group(quantized):
    model, batch = quantized
    found = validate(model, [batch])
    quantizers = [each for each in model.graph.nodes if each.op_type == "QuantizeLinear"]
    assert [group.tensor for group in found.groups] == [each.output for each in quantizers]
    assert found.groups[0].operator == "graph input"
    assert {key for key in found.as_dict() if key != "fusion"} >= {"groups", "integer", "float", "warnings"}


def test_groups_that_exposing_keeps_in_float_are_not_called_integer():
    """With int8 activations ONNX Runtime moves all to uint8, unless the int8 tensors are asked for: then it fuses none.

    End to end, the model as it is runs.
    """
    model, batch = network()
    signed = QuantizationConfig(ranges="min-max", activations="int8")
    quantized = insert_qdq(model, calibrate(model, [batch], signed))
    found = validate(quantized, [batch])
    assert any("exposing the integers changes how many QLinearConv" in warning for warning in found.warnings)
    assert not any(group.operator == "QLinearConv" or group.integer for group in found.groups)
    assert any(group.operator == "Conv" for group in found.groups)
    assert found.unverified == tuple(group.tensor for group in found.groups if group.is_foreseen)
    assert any(", ".join(found.unverified) in warning for warning in found.warnings)
    runtime = run(session(quantized), batch)
    (y,), (computed,) = runtime.values(), fuse_quantized_and_apply(quantized, batch).values()
    assert found.integer.equal == np.mean(y == computed)


def fuse_quantized_and_apply(model, batch):
    fused, _ = fuse_quantized(model)
    return apply(fused.graph, fused.params, batch)


@pytest.mark.parametrize(("magnitude", "warns"), [(127, True), (63, False)])
def test_weights_that_would_saturate_without_vnni_are_named(magnitude, warns):
    """Two products of uint8 and int8 in 16 bits hold while two weights together stay within 128."""
    model = build(
        [node("MatMul", ["x", "w"], "y")], {"w": np.eye(4, dtype=np.float32)}, input_shape=("n", 4), outputs="y"
    )
    batch = {"x": normal(3, 4)}
    encodings = calibrate(model, [batch], MIN_MAX)
    full = np.ones((4, 4), np.float32)
    encodings["w"] = encodings["w"].replace(scale=np.full(4, 1 / magnitude, np.float32))
    found = validate(insert_qdq(model.replace(params={"w": full}), encodings), [batch])
    assert any("VNNI" in warning and "w_quantized" in warning for warning in found.warnings) == warns


def test_a_float_model_is_an_error():
    model, batch = network()
    with pytest.raises(ModelError, match="no QuantizeLinear"):
        validate(model, [batch])


def test_no_samples_is_an_error(quantized):
    with pytest.raises(DataError, match="batches is empty"):
        validate(quantized[0], [])


def test_a_batch_that_does_not_fit_is_an_error(quantized):
    model, batch = quantized
    for value, message in (
        ({"y": batch["x"]}, "batch 0 has the input 'y'"),
        ({"x": batch["x"][:, :2]}, "input 'x' has the shape 4x2x8x8"),
        ({"x": batch["x"][:0]}, "no elements"),
        ({"x": batch["x"] * np.float32(np.nan)}, r"holds nan at \(0, 0, 0, 0\)"),
    ):
        with pytest.raises(DataError, match=message):
            validate(model, [value])
    with pytest.raises(DataError, match="the model takes"):
        run(session(model), {"y": batch["x"]})
    with pytest.raises(DataError, match="cannot run the batch"):
        run(session(model), {"x": batch["x"][:, :2]})


def test_a_file_that_the_runtime_does_not_accept_is_an_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not an ONNX file")
    with pytest.raises(ModelError, match=r"does not accept.*model\.onnx"):
        session(tmp_path / "model.onnx")
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        session(onnx_io.to_proto(network()[0]).SerializeToString(), device="tpu")


def test_sessions_are_exact_on_every_x86(monkeypatch):
    """Without VNNI uint8 x int8 saturates; the entry that prevents it is set."""
    runtime = session(network()[0])
    assert runtime.get_session_options().get_session_config_entry("session.x64quantprecision") == "1"
    assert list(run(runtime, network()[1]))


def test_codes_in_fp8_are_as_far_apart_as_their_places_in_order(tmp_path):
    nodes = [node("Conv", ["x", "w"], "c"), node("Relu", ["c"], "y")]
    model = build(nodes, {"w": normal(4, 3, 3, 3)}, input_shape=("N", 3, 8, 8), outputs=["y"])
    config = QuantizationConfig(weights="float8_e4m3fn", activations="float8_e4m3fn")
    batch = {"x": normal(2, 3, 8, 8)}
    encodings = calibrate(model, [batch], config)
    export(model, encodings, tmp_path, "m")
    found = validate(tmp_path / "m.onnx", [batch])
    assert found.equal > 0.99
    codes = np.arange(-3, 4).astype(ml_dtypes.float8_e4m3fn)  # -3, ..., 3: a zero, then fractions of 3 bits
    moved = with_elements(NO_DISTANCE, codes, np.zeros(7, codes.dtype))
    assert moved.largest == 68  # 3 = 1.5 * 2^1: exponent 8, fraction 4
    assert moved.num_equal == 1
    assert with_elements(NO_DISTANCE, -codes[3:4], codes[3:4]).largest == 0


def test_decibels():
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == float("inf")
    assert decibels(0.0, 1.0) == float("-inf")
