"""Encodings in files: AIMET's schemas by hand-written examples, round trips to the bit, and what does not fit."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import ptqjax
from ptqjax.commands.cli import commands
from ptqjax.config import QuantizationConfig
from ptqjax.encoding_files import Mismatch, encodings_json
from ptqjax.encoding_files.own_fields import fields_of, is_identical
from ptqjax.encoding_files.tensors import tensors_of_encodings
from ptqjax.encodings.encoding import make_encoding
from ptqjax.errors import ConfigError, DataError, OutputError
from ptqjax.kernels.grid import FLOAT_FORMATS
from ptqjax.ranges.observers import DISTRIBUTION
from tests.models import build, node

VERSIONS = ("0.6.1", "1.0.0", "2.0.0")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network():
    """A weight of each kind: Conv, ConvTranspose, both ways of Gemm, MatMul, none of them square."""
    params = {"w": normal(4, 6, 3, 3), "b": normal(4), "wt": normal(4, 6, 2, 2), "g": normal(6, 8), "gb": normal(8)}
    params |= {"m": normal(8, 12), "gt": normal(5, 12)}
    nodes = [
        node("Conv", ["x", "w", "b"], "c"),
        node("Relu", ["c"], "r"),
        node("ConvTranspose", ["r", "wt"], "t"),
        node("GlobalAveragePool", ["t"], "p"),
        node("Flatten", ["p"], "f"),
        node("Gemm", ["f", "g", "gb"], "h"),
        node("MatMul", ["h", "m"], "mm"),
        node("Gemm", ["mm", "gt"], "y", transB=1),
    ]
    return build(nodes, params, input_shape=("N", 6, 6, 6), outputs=["y"])


def scales(*shape, seed=3):
    return np.exp(normal(*shape, seed=seed))


def entries(document):
    """The entries of a document by tensor."""
    if document["version"] == "0.6.1":
        return document["activation_encodings"] | document["param_encodings"]
    sections = [document.get(key, []) for key in ("activation_encodings", "param_encodings", "encodings")]
    return {entry["name"]: entry for section in sections for entry in section}


def wrapped(version, activations, params):
    """A document of a version from entries without names."""
    if version == "0.6.1":
        return {"version": version, "activation_encodings": activations, "param_encodings": params}
    lists = [[{"name": name, **entry} for name, entry in part.items()] for part in (activations, params)]
    if version == "2.0.0":
        return {"version": version, "encodings": [*lists[0], *lists[1]]}
    return {"version": version, "activation_encodings": lists[0], "param_encodings": lists[1]}


def stored(tmp_path, document):
    path = tmp_path / "file.encodings"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def round_trip(tmp_path, model, encodings, version):
    path = tmp_path / ("state.safetensors" if version == "tensors" else "round.encodings")
    ptqjax.write_encodings(path, model, encodings, *([] if version == "tensors" else [version]))
    return ptqjax.read_encodings(path, model)


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, encoding in expected.items():
        assert is_identical(found[name], encoding), f"{name}: {found[name]} is not {encoding}"


def per_tensor_0_6_1(*values):
    keys = ("bitwidth", "is_symmetric", "min", "max", "offset", "scale")
    return [{"dtype": "int", **dict(zip(keys, values, strict=True))}]


# As AIMET 2.42 wrote them, with shorter numbers: version 0.6.1, 1.0.0, 2.0.0, and what it is.
UINT8 = (
    per_tensor_0_6_1(8, "False", -29.75, 34.0, -119.0, 0.25),
    {"bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "offset": [-119.0], "scale": [0.25]},
    {"output_dtype": "uint8", "y_scale": 0.25, "y_zero_point": 119},
    make_encoding(np.float32(0.25), 119, dtype="uint8"),
)
UINT16_AT_ZERO = (
    per_tensor_0_6_1(16, "False", 0.0, 65535 / 65536, 0.0, 2**-16),
    {"bw": 16, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False, "offset": [0.0], "scale": [2**-16]},
    {"output_dtype": "uint16", "y_scale": 2**-16},
    make_encoding(np.float32(2**-16), 0, dtype="uint16"),
)
STRICT = (  # of a quantizer with use_strict_symmetric
    per_tensor_0_6_1(8, "True", -127.0, 127.0, -127.0, 1.0),
    {"bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": True, "offset": [-127.0], "scale": [1.0]},
    {"output_dtype": "int8", "y_scale": 1.0, "y_zero_point": -1},
    make_encoding(np.float32(1), 0, dtype="int8", symmetric="strict"),
)


def per_channel(count, axis, usual):
    scale = [0.5 + i for i in range(count)]
    parts = [
        {"bitwidth": 4, "dtype": "int", "is_symmetric": "True", "max": 7 * s, "min": -8 * s, "offset": -8.0, "scale": s}
        for s in scale
    ]
    return (
        parts,
        {"bw": 4, "dtype": "INT", "enc_type": "PER_CHANNEL", "is_sym": True, "offset": [-8.0] * count, "scale": scale},
        {"axis": axis, "output_dtype": "int4", "y_scale": scale},
        make_encoding(np.asarray(scale, np.float32), 0, dtype="int4", symmetric=True, axis=usual),
    )


# By tensor; MatMul's axis is -1 in a placement and 1 in AIMET's files.
EXAMPLES = {
    "x": UINT8,
    "r": UINT16_AT_ZERO,
    "t": STRICT,
    "w": per_channel(4, 0, 0),
    "wt": per_channel(6, 1, 1),
    "g": per_channel(8, 1, 1),
    "m": per_channel(12, 1, -1),
    "gt": per_channel(5, 0, 0),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tensor", EXAMPLES)
def test_entries_that_aimet_wrote_are_read(tmp_path, version, tensor):
    entry, expected = EXAMPLES[tensor][VERSIONS.index(version)], EXAMPLES[tensor][-1]
    model = network()
    sections = ({}, {tensor: entry}) if tensor in model.params else ({tensor: entry}, {})
    found, mismatches = ptqjax.read_encodings(stored(tmp_path, wrapped(version, *sections)), model)
    assert mismatches == ()
    assert_identical(found, {tensor: expected})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("tensor", EXAMPLES)
def test_entries_are_written_as_aimet_writes_them(version, tensor):
    found = entries(encodings_json(network(), {tensor: EXAMPLES[tensor][-1]}, version))[tensor]
    expected = EXAMPLES[tensor][VERSIONS.index(version)]
    if version == "0.6.1":  # a strict range ends at 127 in AIMET's files, whose codes end at 128
        ends = [{key: part[key] for key in part.keys() - {"max"}} for part in expected]
        assert [{key: part[key] for key in part.keys() - {"max"}} for part in found] == ends
    else:
        assert {key: value for key, value in found.items() if key != "name"} == expected


def blocks(model, name, axis, count, *, block_size, scale_bits=None, seed=5, full=False):
    shape = model.params[name].shape
    summed, others = axis % len(shape), {0, 1}
    shape = tuple(count if i == summed else size if full or i in others else 1 for i, size in enumerate(shape))
    scale = scales(*shape, seed=seed)
    if scale_bits is not None:  # multiples of one scale per channel, the largest 2^bits
        most, multiples = 2**scale_bits, np.random.default_rng(seed).integers(1, 2**scale_bits, size=shape)
        np.put_along_axis(multiples, np.zeros_like(multiples.take([0], summed)), most, summed)
        scale = scale.max(axis=summed, keepdims=True) * multiples.astype(np.float32)
    return make_encoding(
        scale, 0, dtype="int4", symmetric=True, axis=axis, block_size=block_size, scale_bits=scale_bits
    )


def by_blocks(model, scale_bits=None):
    """Blocks on each operator's summed axis; the last of `m` and `gt` are partial."""
    return {
        "w": blocks(model, "w", 1, 3, block_size=2, scale_bits=scale_bits),
        "wt": blocks(model, "wt", 0, 2, block_size=2, scale_bits=scale_bits, full=True),
        "g": blocks(model, "g", 0, 3, block_size=2, scale_bits=scale_bits),
        "m": blocks(model, "m", -2, 3, block_size=3, scale_bits=scale_bits),
        "gt": blocks(model, "gt", 1, 3, block_size=5, scale_bits=scale_bits),
    }


def kinds(model):
    """Sets of encodings that no version may lose a bit of; and the first version that has such grids."""
    of = lambda *values, **settings: make_encoding(np.float32(0.1), *values, **settings)  # noqa: E731
    examples = {name: example[-1] for name, example in EXAMPLES.items()}
    odd = {
        "x": of(-9, dtype="int8"),  # signed, with a zero point
        "r": of(-1, dtype="int8"),  # would be strict
        "t": of(128, dtype="uint8", symmetric="strict"),
        "p": of(-32768, dtype="int16"),
        "h": of(3, dtype="uint2"),
        "w": make_encoding(scales(4), 0, dtype="int8", symmetric="strict", axis=-4),  # spelled unusually
        "wt": make_encoding(scales(4), 0, dtype="int8", axis=0),  # not the operator's channels
        "g": make_encoding(scales(8), np.arange(8), dtype="uint4", axis=1),
        "b": of(0, dtype="int8"),
        "gb": of(0, dtype="int32"),  # a grid of its own, where biases have that of their layer
        "m": of(0, dtype="int8").replace(qmin=np.float32(-100), qmax=np.float32(99)),
    }
    learned = {"x": of(7.25, dtype="uint8"), "w": make_encoding(scales(4), normal(4), dtype="int8", axis=0)}
    off = {name: encoding.replace(enabled=np.asarray(False)) for name, encoding in examples.items()}
    wide = {"x": make_encoding(scales(6), 0, dtype="uint8", axis=1)}  # per channel of an activation
    casts = {"x": float_encoding("float16", np.float32(1)), "w": float_encoding("float16", np.float32(1))}
    floats = {"x": float_encoding("float8_e4m3fn", np.float32(0.3)), "r": float_encoding("bfloat16", np.float32(1))}
    floats |= {"w": float_encoding("float8_e5m2", scales(4), axis=0), "h": float_encoding("float16", np.float32(1))}
    return {
        "examples": (examples, "0.6.1"),
        "odd grids": (odd, "0.6.1"),
        "6 bits": ({"w": make_encoding(scales(4), 0, dtype="int6", symmetric=True, axis=0)}, "0.6.1"),
        "learned zero points": (learned, "0.6.1"),
        "half of them off": (examples | {"x": off["x"], "w": off["w"]}, "0.6.1"),
        "all off": (off, "0.6.1"),
        "none": ({}, "0.6.1"),
        "activation per channel": (wide, "0.6.1"),
        "powers of two": ({"w": make_encoding(2.0 ** np.arange(-70, -66), 0, dtype="int8", axis=0)}, "0.6.1"),
        "float16": (casts, "0.6.1"),
        "blocks": (by_blocks(model), "1.0.0"),
        "low-power blocks": (by_blocks(model, 4), "1.0.0"),
        "low-power blocks of 3 bits": (by_blocks(model, 3), "1.0.0"),
        "floats": (floats, "2.0.0"),
        "float16 per channel": ({"w": float_encoding("float16", np.ones(4, np.float32), axis=0)}, "2.0.0"),
    }


def float_encoding(dtype, scale, axis=None):
    return make_encoding(scale, 0, dtype=dtype, axis=axis)


@pytest.mark.parametrize("version", [*VERSIONS, "tensors"])
@pytest.mark.parametrize("kind", kinds(network()))
def test_a_round_trip_keeps_every_bit_or_is_refused(tmp_path, version, kind):
    model = network()
    encodings, first = kinds(model)[kind]
    if VERSIONS.index(first) > ([*VERSIONS, "tensors"].index(version)):
        with pytest.raises(ConfigError, match=f"cannot be written in version {version}"):
            ptqjax.write_encodings(tmp_path / "no.encodings", model, encodings, version)
        assert list(tmp_path.iterdir()) == []
        return
    found, mismatches = round_trip(tmp_path, model, encodings, version)
    assert mismatches == ()
    assert_identical(found, encodings)
    assert [path.name for path in tmp_path.iterdir()] == [next(tmp_path.iterdir()).name]  # nothing half-written


@pytest.mark.parametrize("kind", kinds(network()))
def test_the_version_is_the_usual_one_where_that_has_all_grids(tmp_path, kind):
    encodings, first = kinds(network())[kind]
    assert encodings_json(network(), encodings)["version"] == max("1.0.0", first)
    ptqjax.write_encodings(tmp_path / "some.encodings", network(), encodings)
    assert_identical(ptqjax.read_encodings(tmp_path / "some.encodings", network())[0], encodings)


@pytest.mark.parametrize("version", VERSIONS)
def test_fields_of_our_own_stand_only_where_the_schema_has_no_word(version):
    model = network()
    for kind, (encodings, first) in kinds(model).items():
        if VERSIONS.index(first) > VERSIONS.index(version):
            continue
        text = json.dumps(encodings_json(model, encodings, version))
        plain = kind in ("examples", "6 bits", "powers of two", "none", "blocks", "low-power blocks")
        plain |= kind == "float16" and version != "2.0.0"
        plain |= kind == "low-power blocks of 3 bits" and version == "1.0.0"
        plain |= kind == "activation per channel" and version == "2.0.0"
        assert ("ptqjax" not in text.replace('"package": "ptqjax"', "")) == plain, kind


def test_other_tools_leave_in_float_what_is_not_enabled():
    model = network()
    encodings, _ = kinds(model)["all off"]
    for version in VERSIONS:
        assert entries(encodings_json(model, encodings, version)) == {}


def test_blocks_of_matrices_with_channels_on_the_second_axis_are_transposed_in_1_0_0():
    """As AIMET 2.42 wrote them: (in, out) = (8, 12) in blocks of 4 is 12 rows of 2."""
    model, scale = network(), np.arange(1, 25, dtype=np.float32).reshape(2, 12)
    encoding = make_encoding(scale, 0, dtype="int4", symmetric=True, axis=-2, block_size=4)
    found = entries(encodings_json(model, {"m": encoding}))["m"]
    assert found["enc_type"] == "PER_BLOCK"
    assert found["scale"] == scale.T.ravel().tolist()
    later = entries(encodings_json(model, {"m": encoding}, "2.0.0"))["m"]
    assert later == {"name": "m", "output_dtype": "int4", "y_scale": scale.tolist(), "axis": 0, "block_size": 4}


def test_low_power_blocks_state_widths_and_integers():
    model, multiples = network(), np.array([[16, 3], [1, 16], [16, 16], [2, 16], [16, 9]], np.float32)
    scale = scales(5, 1)
    encoding = make_encoding(scale * multiples, 0, dtype="int4", symmetric=True, axis=1, block_size=6, scale_bits=4)
    found = entries(encodings_json(model, {"gt": encoding}))["gt"]
    assert (found["enc_type"], found["bw"], found["compressed_bw"], found["block_size"]) == ("LPBQ", 8, 4, 6)
    assert found["scale"] == scale.ravel().tolist()
    assert found["offset"] == [-128] * 5
    assert found["per_block_int_scale"] == multiples.ravel().tolist()
    later = entries(encodings_json(model, {"gt": encoding}, "2.0.0"))["gt"]
    assert later["per_channel_float_scale"] == scale.tolist()
    assert later["per_block_int_scale"] == multiples.tolist()
    assert (later["output_dtype"], later["axis"], later["block_size"]) == ("int4", 1, 6)


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
def test_low_power_blocks_with_a_scale_at_each_place_of_a_kernel_come_back(tmp_path, version):
    """Calibration finds them so: one scale for each channel, and an integer for each block and place."""
    model = network()
    asked = ptqjax.Rule(tensors=("wt",), enabled=True)  # no kernel of ONNX Runtime needs it
    config = ptqjax.QuantizationConfig(weights="int4", granularity="lpbq:2", equalize=False, rules=(asked,))
    found = ptqjax.calibrate(model, [{model.graph.inputs[0].name: normal(2, 6, 6, 6)}], config)
    low_power = {name: each for name, each in found.items() if each.scale_bits is not None}
    assert {"w", "wt"} <= set(low_power)
    path = tmp_path / "m.encodings"
    ptqjax.write_encodings(path, model, low_power, version)
    back = ptqjax.read_encodings(path, model)[0]
    for name, encoding in low_power.items():
        np.testing.assert_array_equal(back[name].scale, encoding.scale)
        assert back[name].scale_bits == encoding.scale_bits


def test_scales_that_are_no_multiples_are_not_written_as_low_power_blocks(tmp_path):
    model = network()
    encoding = make_encoding(scales(5, 2), 0, dtype="int4", axis=1, block_size=6, scale_bits=4)
    with pytest.raises(ConfigError, match=r"'gt'.*multiples"):
        ptqjax.write_encodings(tmp_path / "m.encodings", model, {"gt": encoding})


def test_int32_biases_are_written_and_follow_when_they_are_read(tmp_path):
    model = network()
    encodings = {name: example[-1] for name, example in EXAMPLES.items()} | {"f": UINT8[-1]}
    path = tmp_path / "m.encodings"
    ptqjax.write_encodings(path, model, encodings, "2.0.0")
    document = json.loads(path.read_text())
    bias = entries(document)["b"]
    expected = (encodings["x"].scale * encodings["w"].scale).astype(float).tolist()
    assert bias == {"name": "b", "output_dtype": "int32", "y_scale": expected, "axis": 0}
    found, _ = ptqjax.read_encodings(path, model)
    assert_identical(found, encodings)
    bias["y_scale"][2] *= 1.01
    document["encodings"] = [bias if entry["name"] == "b" else entry for entry in document["encodings"]]
    with pytest.raises(ConfigError, match="'b': found an int32 entry"):
        ptqjax.read_encodings(stored(tmp_path, document), model)


def test_own_fields_win_over_the_entry_and_file_order_does_not_matter(tmp_path):
    model, (encodings, _) = network(), kinds(network())["odd grids"]
    document = encodings_json(model, encodings, "1.0.0")
    document["param_encodings"].reverse()
    assert_identical(ptqjax.read_encodings(stored(tmp_path, document), model)[0], encodings)


INT8 = {"bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": True, "offset": [-128], "scale": [0.5]}
CHANNELS = INT8 | {"enc_type": "PER_CHANNEL", "offset": [-128] * 3, "scale": [0.5] * 3}
BLOCKS = CHANNELS | {"enc_type": "PER_BLOCK", "block_size": 2}
LOW_POWER = INT8 | {"enc_type": "LPBQ", "compressed_bw": 4, "block_size": 2, "scale": [0.5] * 4}


@pytest.mark.parametrize(
    "case",
    [
        ("1.0.0", "conv1", INT8, "an encoding", "of this name"),
        ("1.0.0", "w", CHANNELS, r"shape \(3,\)", r"\(4,\)"),
        ("1.0.0", "w", BLOCKS, "3 scales", r"12, those of shape \(4, 3, 1, 1\)"),
        ("1.0.0", "w", LOW_POWER | {"per_block_int_scale": [16] * 9}, "9 scales", "12"),
        ("1.0.0", "w", LOW_POWER | {"per_block_int_scale": [16] * 11 + [17]}, "out of range", "1 to 16"),
        ("1.0.0", "w", LOW_POWER | {"per_block_int_scale": [16] * 9 + [15] * 3}, "largest scale", "16 in each"),
        ("1.0.0", "x", CHANNELS, "3 scales", "no operator tells the axis"),
        ("1.0.0", "x", BLOCKS, "scales by blocks", "one scale"),
        ("1.0.0", "x", INT8 | {"scale": [1, 2], "offset": [0, 0]}, "2 scales", "one scale"),
        ("1.0.0", "w", CHANNELS | {"scale": [1] * 4}, "4 scales and 3 offsets", "an offset for each"),
        ("1.0.0", "x", INT8 | {"bw": 40}, "'int40'", "2 to 32 bits"),
        ("1.0.0", "x", INT8 | {"dtype": "FLOAT"}, "8 bits", "float of 16 bits"),
        ("1.0.0", "x", INT8 | {"zero_point_shift": [0.5]}, "zero_point_shift", "an integer"),
        ("1.0.0", "x", INT8 | {"offset": [1]}, "zero point -129", "-128 to 127"),
        ("1.0.0", "x", INT8 | {"offset": [-128.5]}, "zero point 0.5", "an integer"),
        ("1.0.0", "x", INT8 | {"scale": [0]}, "scale 0.0", "more than 0"),
        ("1.0.0", "x", INT8 | {"scale": [1e39]}, "scale inf in float32", "finite"),
        ("1.0.0", "x", INT8 | {"offset": [-1e300]}, r"zero point 1e\+300|inf", "-128 to 127"),
        ("2.0.0", "x", {"output_dtype": "float8e5m2", "y_scale": 1.0, "y_zero_point": 3}, "zero points", "none"),
        ("1.0.0", "x", INT8 | {"scale": [1e-60]}, "scale 0.0 in float32", "more than 0"),
        ("2.0.0", "x", {"output_dtype": "float7", "y_scale": 1.0}, "'float7'", "float8_e4m3fn"),
        ("2.0.0", "w", {"output_dtype": "int8", "y_scale": [1.0] * 4, "axis": 4}, "axis 4", r"\(4, 6, 3, 3\)"),
        ("2.0.0", "w", {"output_dtype": "int8", "y_scale": [1.0] * 4, "axis": 1}, r"\(4,\)", r"\(6,\)"),
        ("2.0.0", "w", {"output_dtype": "int8", "y_scale": [1.0] * 4}, "4 scales", "one scale"),
        ("2.0.0", "b", {"output_dtype": "int32", "y_scale": [1.0] * 4, "axis": 0}, "int32", "follows from"),
    ],
)
def test_what_does_not_fit_is_told_or_an_error(tmp_path, case):
    version, tensor, entry, found, expected = case
    model = network()
    good = EXAMPLES["r"][VERSIONS.index(version)]
    path = stored(tmp_path, wrapped(version, {"r": good}, {tensor: entry}))
    with pytest.raises(ConfigError, match=f"'{tensor}'.*found .*{found}.*expected.*{expected}.*strict=False"):
        ptqjax.read_encodings(path, model)
    encodings, mismatches = ptqjax.read_encodings(path, model, strict=False)
    assert_identical(encodings, {"r": EXAMPLES["r"][-1]})
    assert [mismatch.tensor for mismatch in mismatches] == [tensor]
    assert isinstance(mismatches[0], Mismatch)


def test_a_strict_error_names_the_first_mismatches_and_their_number(tmp_path):
    path = stored(tmp_path, wrapped("1.0.0", {f"no{i}": INT8 for i in range(9)}, {}))
    with pytest.raises(ConfigError, match=r"in 9 places.*'no0'.*'no4'.*4 more") as error:
        ptqjax.read_encodings(path, network())
    assert "no5" not in str(error.value)


def test_with_a_configuration_every_tensor_to_be_rounded_needs_an_entry(tmp_path):
    model = network()
    encodings = ptqjax.calibrate(model, [{"x": normal(2, 6, 6, 6)}], QuantizationConfig(ranges="min-max"))
    path = tmp_path / "m.encodings"
    ptqjax.write_encodings(path, model, encodings)
    assert ptqjax.read_encodings(path, model, config=QuantizationConfig())[1] == ()
    without = {name: encoding for name, encoding in encodings.items() if name not in ("g", "r")}
    without.pop("f", None)  # moves the values of another: shares its encoding
    ptqjax.write_encodings(path, model, without)
    assert ptqjax.read_encodings(path, model)[1] == ()
    _, mismatches = ptqjax.read_encodings(path, model, strict=False, config=QuantizationConfig())
    assert sorted(mismatch.tensor for mismatch in mismatches) == ["g", "r"]


def test_what_a_file_holds_is_frozen_and_the_rest_is_calibrated(tmp_path):
    """Read, freeze, calibrate: what the file holds stays to the bit; the rest is what calibration alone finds."""
    model, batches = network(), [{"x": normal(3, 6, 6, 6, seed=i)} for i in range(2)]
    config = QuantizationConfig(
        ranges="min-max", equalize=False, correct="none", headroom=1.0, target="generic-per-channel"
    )
    free = ptqjax.calibrate(model, batches, config)
    held = {"w": EXAMPLES["w"][-1], "r": UINT8[-1], "p": STRICT[-1]}
    ptqjax.write_encodings(tmp_path / "some.encodings", model, held, "2.0.0")
    frozen, _ = ptqjax.read_encodings(tmp_path / "some.encodings", model)
    found = ptqjax.calibrate(model, batches, config, frozen=frozen)
    moved = {"f": held["p"]}  # a Flatten moves the values of `p`
    assert_identical(found, free | held | moved)
    through_all = ptqjax.quantize(model, batches, config, frozen=frozen)
    assert_identical(through_all.encodings, found)
    kept = ptqjax.quantize(model, batches, replace(config, target="ort-cpu"), frozen=frozen).encodings
    assert_identical({name: kept[name] for name in held}, held)  # where scales are raised for kernels as well
    with pytest.raises(ConfigError, match="equalize=False"):
        ptqjax.quantize(model, batches, replace(config, equalize=True), frozen=frozen)
    wide = ptqjax.quantize(model, batches, replace(config, headroom=2.0), frozen=frozen).encodings
    assert_identical({name: wide[name] for name in held}, held)
    assert wide["x"].scale == 2 * free["x"].scale


def test_the_command_line_keeps_what_a_file_holds(tmp_path):
    model = network()
    (output,) = model.graph.outputs
    model = model.replace(graph=replace(model.graph, outputs=(replace(output, shape=("N", 5)),)))
    held = {"w": EXAMPLES["w"][-1], "r": UINT8[-1]}
    ptqjax.write(model, tmp_path / "m.onnx")
    ptqjax.write_encodings(tmp_path / "some.encodings", model, held)
    np.savez(tmp_path / "data.npz", x=normal(4, 6, 6, 6))
    arguments = ["quantize", str(tmp_path / "m.onnx"), "--calibration", str(tmp_path / "data.npz"), "--out"]
    arguments += [str(tmp_path / "out"), "--encodings", str(tmp_path / "some.encodings")]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    found, _ = ptqjax.read_encodings(tmp_path / "out" / "model.encodings", model)
    assert len(found) > len(held)
    assert_identical({name: found[name] for name in held}, held)
    refused = CliRunner().invoke(commands, [*arguments, "--equalize"])
    assert refused.exit_code != 0
    assert "--equalize with --encodings" in refused.output


OWN_FIELDS = fields_of(make_encoding(np.float32(1), 0, dtype="int8"))


def damaged(**changes):
    return json.dumps(wrapped("1.0.0", {"x": {k: v for k, v in (INT8 | changes).items() if v is not None}}, {}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "an object"),
        ("{}", "the key 'version' is missing"),
        ('{"version": "3.0.0"}', 'version: found "3.0.0", expected one of the versions 0.6.1, 1.0.0, 2.0.0'),
        ('{"version": ["1.0.0"]}', "version: found"),
        ('{"version": "1.0.0", "activation_encodings": []}', "'param_encodings' is missing"),
        ('{"version": "1.0.0", "activation_encodings": {}, "param_encodings": []}', "activation_encodings: .*a list"),
        (
            '{"version": "0.6.1", "activation_encodings": [], "param_encodings": {}}',
            "activation_encodings: .*an object",
        ),
        ('{"version": "0.6.1", "activation_encodings": {"x": []}, "param_encodings": {}}', r"\.x: found \[\]"),
        ('{"version": "2.0.0", "encodings": [{"name": "x"}]}', r"encodings\[0\]: the key 'output_dtype' is missing"),
        (damaged(scale=None), r"activation_encodings\[0\]: the key 'scale' is missing"),
        (damaged(scale="much"), r"\[0\].scale: found \"much\", expected finite numbers"),
        (damaged(scale=[[1], [1, 2]]), r"scale: found .* equal length"),
        (damaged(scale=[float("nan")]), "scale: found .*finite"),
        (damaged(scale=[]), "scale: found .*finite"),
        (damaged(scale=[True]), "scale: found .*finite"),
        (damaged(bw=float("inf")), "bw: found Infinity, expected an integer"),
        (damaged(bw=float("nan")), "bw: found NaN, expected an integer"),
        (json.dumps(wrapped("0.6.1", {"x": [UINT8[0][0] | {"scale": [1, 2]}]}, {})), "scale: found .*one number"),
        (json.dumps(wrapped("0.6.1", {}, {"w": [UINT8[0][0], *STRICT[0]]})), r"w\[1\].is_symmetric: .*'False'"),
        ('{"version": "1.0.0", "version": "2.0.0"}', "the key 'version' stands in an object twice"),
        (damaged(ptqjax=OWN_FIELDS | {"axis": "x"}), r"ptqjax.axis: found \"x\", expected an integer"),
        (
            damaged(ptqjax=OWN_FIELDS | {"float_format": 3}),
            "float_format: found 3, expected null or one of",
        ),
        (damaged(bw="8"), 'bw: found "8", expected an integer'),
        (damaged(bw=8.5), "bw: found 8.5, expected an integer"),
        (damaged(is_sym="perhaps"), 'is_sym: found "perhaps", expected true or false'),
        (damaged(enc_type="VECTOR"), 'enc_type: found "VECTOR", expected one of PER_TENSOR'),
        (damaged(name=3), "name: found 3, expected a string"),
        (damaged(ptqjax={"scale": 1.0}), r"\[0\].ptqjax: the key 'zero_point' is missing"),
        (json.dumps(wrapped("2.0.0", {"x": UINT8[2]}, {"x": UINT8[2]})), "'x' has an entry already"),
        (json.dumps(wrapped("2.0.0", {}, {"w": {"output_dtype": "int8", "y_scale": 1.0, "block_size": 2}})), "an axis"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_file_and_key(tmp_path, text, message):
    path = stored(tmp_path, text)
    with pytest.raises(DataError, match=message) as error:
        ptqjax.read_encodings(path, network(), strict=False)
    assert str(path) in str(error.value)


def test_a_file_that_is_missing_or_binary_is_an_error(tmp_path):
    for name in ("no.encodings", "no.safetensors"):
        with pytest.raises(DataError, match=name):
            ptqjax.read_encodings(tmp_path / name, network())
    (tmp_path / "a.encodings").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.safetensors").write_bytes(b"\xff\xfe\x00")
    for name in ("a.encodings", "a.safetensors"):
        with pytest.raises(DataError, match=name):
            ptqjax.read_encodings(tmp_path / name, network())


def test_what_cannot_be_written_is_an_error_that_leaves_the_old_file(tmp_path):
    model, path = network(), tmp_path / "m.encodings"
    path.write_text("old")
    with pytest.raises(ConfigError, match=r"'1\.0' of encodings is unknown"):
        ptqjax.write_encodings(path, model, {}, "1.0")
    with pytest.raises(ConfigError, match="'nowhere'"):
        ptqjax.write_encodings(path, model, {"nowhere": UINT8[-1]})
    with pytest.raises(ConfigError, match=r"'x' cannot be written: found the scale inf.*more than 0"):
        ptqjax.write_encodings(path, model, {"x": make_encoding(np.float32(np.inf), 0, dtype="int8")})
    assert path.read_text() == "old"
    with pytest.raises(OutputError, match="missing"):
        ptqjax.write_encodings(tmp_path / "missing" / "m.encodings", model, {})


def test_tensors_hold_leaves_on_jax_and_encodings_that_are_off(tmp_path):
    model = network()
    encodings = {
        "x": make_encoding(jax.numpy.float32(0.1), 0, dtype="int8"),
        "w": make_encoding(scales(4), 0, dtype="int8", axis=0).replace(enabled=np.asarray(False)),
    }
    found, _ = round_trip(tmp_path, model, encodings, "tensors")
    assert_identical(found, encodings)


NO_GRIDS = [
    ({"scale": np.float32(0)}, "found the scale 0.0"),
    ({"scale": np.float32(-1)}, "found the scale -1.0"),
    ({"scale": np.float32(np.inf)}, "found the scale inf"),
    (
        {"scale": scales(3), "zero_point": np.zeros(3, np.float32), "axis": 0},
        r"scales of shape \(3,\), expected \(4,\)",
    ),
    ({"scale": scales(4), "zero_point": np.zeros(4)}, "found 4 scales without an axis"),
    ({"axis": 0}, r"scales of shape \(\), expected \(4,\)"),
    ({"axis": 4}, "the axis 4"),
    ({"axis": 1, "block_size": 2}, r"scales of shape \(\), expected \(4, 3, 3, 3\)"),
    ({"scale_bits": 4}, "without a block_size"),
    ({"zero_point": np.zeros(2, np.float32)}, r"zero points of shape \(2,\)"),
    ({"zero_point": np.float32(200)}, "zero point 200.0, expected one from -128 to 127"),
    ({"zero_point": np.float32(np.nan)}, "zero point nan"),
    ({"qmin": np.zeros(2, np.float32)}, "the limits"),
    ({"qmin": np.float32(127)}, "the limits 127.0 and 127.0"),
    ({"float_format": "float16", "scale": np.float32(2)}, "scale 2.0 beside float16, expected 1"),
    ({"float_format": "float8_e5m2", "zero_point": np.float32(3)}, "zero points beside float8_e5m2"),
]


@pytest.mark.parametrize("version", ["1.0.0", "tensors"])
@pytest.mark.parametrize(("fields", "found"), NO_GRIDS)
def test_what_is_no_grid_is_neither_written_nor_read(tmp_path, version, fields, found):
    """No file of another hand brings in what the writer refuses."""
    model, good = network(), make_encoding(np.float32(0.1), 0, dtype="int8")
    bad = good.replace(**fields)
    path = tmp_path / ("m.safetensors" if version == "tensors" else "m.encodings")
    with pytest.raises(ConfigError, match=f"'w' cannot be written.*{found}"):
        ptqjax.write_encodings(path, model, {"w": bad}, "1.0.0")
    assert not path.exists()
    if version == "tensors":
        path.write_bytes(tensors_of_encodings({"w": bad}))
    else:
        own = [{"name": "w"} | fields_of(bad)]
        path.write_text(json.dumps(wrapped("1.0.0", {}, {}) | {"ptqjax_encodings": own}))
    if version == "1.0.0" and found.endswith(("nan", "inf")):
        with pytest.raises(DataError, match=r"(scale|zero_point): found (NaN|Infinity), expected finite numbers"):
            ptqjax.read_encodings(path, model)
        return
    with pytest.raises(ConfigError, match=f"'w': .*{found}"):
        ptqjax.read_encodings(path, model)
    assert ptqjax.read_encodings(path, model, strict=False)[0] == {}


def test_tensors_that_do_not_fit_are_mismatches(tmp_path):
    path = tmp_path / "m.safetensors"
    ptqjax.write_encodings(path, network(), {"x": UINT8[-1], "w": EXAMPLES["w"][-1], "g": EXAMPLES["g"][-1]})
    nodes = [node("Conv", ["x", "w"], "y")]
    other = build(nodes, {"w": normal(5, 6, 3, 3)}, input_shape=("N", 6, 6, 6), outputs=["y"])
    encodings, mismatches = ptqjax.read_encodings(path, other, strict=False)
    assert list(encodings) == ["x"]
    assert sorted(mismatch.tensor for mismatch in mismatches) == ["g", "w"]


def test_machines_calibrate_apart_and_merge(tmp_path):
    """What an observer keeps goes through files; merged, it is to the bit what one machine keeps of all batches."""
    batches = [[jnp.asarray(normal(2, size, seed=i)) * size for size in (5, 7)] for i in range(4)]
    whole, parts = DISTRIBUTION.init(2), [DISTRIBUTION.init(2), DISTRIBUTION.init(2)]
    for i, batch in enumerate(batches):
        whole = DISTRIBUTION.update(whole, batch, 2)
        parts[i % 2] = DISTRIBUTION.update(parts[i % 2], batch, 2)
    for i, part in enumerate(parts):
        ptqjax.write_state(tmp_path / f"{i}.safetensors", part)
    read = [ptqjax.read_state(tmp_path / f"{i}.safetensors", DISTRIBUTION.init(2)) for i in range(2)]
    merged = DISTRIBUTION.merge(*read)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    for found, expected in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(DataError, match="as many tensors"):
        ptqjax.read_state(tmp_path / "0.safetensors", DISTRIBUTION.init(3))
    with pytest.raises(DataError, match="encodings"):
        ptqjax.read_encodings(tmp_path / "0.safetensors", network())


@pytest.mark.parametrize("leaf", ["text", jnp.ones(2, jnp.float8_e5m2), jnp.ones(2, jnp.int4), np.array([None])])
def test_a_state_of_what_a_file_cannot_hold_is_refused(tmp_path, leaf):
    with pytest.raises(DataError, match=r"leaf '\['a'\]' is of the type"):
        ptqjax.write_state(tmp_path / "s.safetensors", {"a": leaf})
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_leaves_too(tmp_path):
    state = {"count": 3, "share": 0.5, "mean": jnp.ones((), jnp.bfloat16)}
    ptqjax.write_state(tmp_path / "s.safetensors", state)
    assert ptqjax.read_state(tmp_path / "s.safetensors", state) == state


def test_float_formats_have_aimets_names():
    assert {name.replace("_", "") for name in FLOAT_FORMATS} >= {"float8e4m3fn", "float8e5m2", "float16", "bfloat16"}
    written = encodings_json(network(), {"x": float_encoding("float8_e5m2", np.float32(0.5))}, "2.0.0")
    assert entries(written)["x"] == {"name": "x", "output_dtype": "float8e5m2", "y_scale": 0.5}


@pytest.mark.parametrize("version", VERSIONS)
def test_export_writes_the_version_that_is_asked_for(tmp_path, version):
    model = network()
    encodings = {"r": make_encoding(np.float32(0.5), 0, dtype="uint8"), "w": EXAMPLES["w"][-1]}
    ptqjax.export(model, encodings, tmp_path, "m", encodings_version=version)
    assert json.loads((tmp_path / "m.encodings").read_text()) == encodings_json(model, encodings, version)
    assert_identical(ptqjax.read_encodings(tmp_path / "m.encodings", model)[0], encodings)


def test_without_a_version_it_is_the_usual_one_that_suffices():
    model = network()
    for dtype, version in (("float16", "1.0.0"), ("float8_e4m3fn", "2.0.0"), ("int8", "1.0.0")):
        assert encodings_json(model, {"x": make_encoding(np.float32(1), 0, dtype=dtype)})["version"] == version
    with pytest.raises(ConfigError, match=r"version='3' .*0\.6\.1, 1\.0\.0, 2\.0\.0"):
        encodings_json(model, {}, "3")


def test_a_shared_weight_has_its_axis_only_where_readers_agree(tmp_path):
    nodes = [node("MatMul", ["x", "w"], "y"), node("Gemm", ["y", "w"], "z", transB=1)]
    model = build(nodes, {"w": normal(6, 6)}, input_shape=("N", 6), outputs=["z"])
    encodings = {"w": make_encoding(scales(6), 0, dtype="int8", axis=1)}
    assert_identical(round_trip(tmp_path, model, encodings, "1.0.0")[0], encodings)
    document = wrapped("1.0.0", {}, {"w": CHANNELS | {"scale": [1.0] * 6, "offset": [-128] * 6}})
    with pytest.raises(ConfigError, match="no operator tells"):
        ptqjax.read_encodings(stored(tmp_path, document), model)
    alike = model.replace(graph=replace(model.graph, nodes=(nodes[0], node("MatMul", ["y", "w"], "z"))))
    assert ptqjax.read_encodings(stored(tmp_path, document), alike)[0]["w"].axis == -1


def test_the_same_content_is_the_same_bytes():
    """safetensors itself writes its metadata, of which there are two, in an order of chance: 1 in 2 to the 30th."""
    encodings = {name: make_encoding(np.float32(0.5), np.float32(0), dtype="int8") for name in ("b", "a", "é")}
    assert len({tensors_of_encodings(encodings) for _ in range(31)}) == 1


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block:2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_that_are_cast_have_no_scales_and_are_exported(tmp_path, granularity, dtype):
    """Where a version of the file has no scales beside casts, export would fail after all the work."""
    model = network()
    config = ptqjax.QuantizationConfig(weights=dtype, granularity=granularity, equalize=False, correct="none")
    encodings = ptqjax.calibrate(model, [{"x": np.ones((1, 6, 6, 6), np.float32)}], config)
    assert {encodings[name].axis for name in encodings if encodings[name].float_format == dtype} == {None}
    ptqjax.export(model, encodings, tmp_path, "q")
    assert_identical(ptqjax.read_encodings(tmp_path / "q.encodings", model)[0], encodings)
