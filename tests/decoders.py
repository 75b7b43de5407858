"""Small decoders as exporters write them: past inputs, grouped queries, rotary positions, branches merged by an If."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, WIDTH, HEADS, GROUPS, DEPTH = 13, 16, 4, 2, 4  # heads of queries; of keys and values; the width of a head
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64
_CACHE = ["n", GROUPS, "past_sequence_length", DEPTH]
_GROWN = ["n", GROUPS, "past_sequence_length + t", DEPTH]
_MASK_OF_FLOAT = -1e4


def _rng():
    return np.random.default_rng(0)


def weights():
    """All constants by name."""
    rng = _rng()
    sizes = {"wq": HEADS * DEPTH, "wk": GROUPS * DEPTH, "wv": GROUPS * DEPTH, "wo": WIDTH, "wu": 2 * WIDTH}
    found = {name: rng.normal(0, 0.4, (WIDTH, size)).astype(np.float32) for name, size in sizes.items()}
    found["wd"] = rng.normal(0, 0.3, (2 * WIDTH, WIDTH)).astype(np.float32)
    found["table"] = rng.normal(0, 1, (VOCABULARY, WIDTH)).astype(np.float32)
    found["head"] = rng.normal(0, 0.5, (WIDTH, VOCABULARY)).astype(np.float32)
    found["frequencies"] = np.array([1.0, 0.1], np.float32)  # of rotary positions
    found["scale"] = np.array(DEPTH**-0.5, np.float32)
    found["lowest"] = np.array(_MASK_OF_FLOAT, np.float32)
    found["one"] = np.array(1.0, np.float32)
    integers = {
        "to_q": [0, 0, HEADS, DEPTH], "to_kv": [0, 0, GROUPS, DEPTH], "to_flat": [0, 0, WIDTH], "axis_1": [1],
        "axis_2": [2], "axis_last": [-1], "axes_mask": [1, 2], "zero": 0, "one_int": 1,
        "repeats": [1, 1, HEADS // GROUPS, 1, 1],
        "to_heads": [0, HEADS, -1, DEPTH], "first": [0], "half": [DEPTH // 2], "end": [DEPTH],
    }  # fmt: skip
    return found | {name: np.array(value, np.int64) for name, value in integers.items()}


def _node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def _rotary(x, prefix):
    """x cos + rotated(x) sin, on [n, heads, t, depth]."""
    return [
        _node("Slice", f"{x} first half axis_last", f"{prefix}_a"),
        _node("Slice", f"{x} half end axis_last", f"{prefix}_b"),
        _node("Neg", f"{prefix}_b", f"{prefix}_nb"),
        _node("Concat", f"{prefix}_nb {prefix}_a", f"{prefix}_r", axis=-1),
        _node("Mul", f"{x} cos", f"{prefix}_c"),
        _node("Mul", f"{prefix}_r sin", f"{prefix}_s"),
        _node("Add", f"{prefix}_c {prefix}_s", f"{prefix}_out"),
    ]


def _body(*, has_past):
    """The nodes from ids to logits; keys that go on are present.0.key and present.0.value."""
    nodes = [
        _node("Gather", "table input_ids", "x"),
        _node("Cast", "position_ids", "places", to=FLOAT),
        _node("Unsqueeze", "places axis_last", "places_1"),
        _node("Mul", "places_1 frequencies", "angles"),
        _node("Concat", "angles angles", "angles_2", axis=-1),
        _node("Unsqueeze", "angles_2 axis_1", "angles_3"),
        _node("Cos", "angles_3", "cos"),
        _node("Sin", "angles_3", "sin"),
    ]
    for name, shape in (("q", "to_q"), ("k", "to_kv"), ("v", "to_kv")):
        nodes += [
            _node("MatMul", f"x w{name}", f"{name}_flat"),
            _node("Reshape", f"{name}_flat {shape}", f"{name}_split"),
            _node("Transpose", f"{name}_split", f"{name}_heads", perm=[0, 2, 1, 3]),
        ]
    nodes += [*_rotary("q_heads", "q"), *_rotary("k_heads", "k")]
    if has_past:
        nodes += [
            _node("Concat", "past_key_values.0.key k_out", "present.0.key", axis=2),
            _node("Concat", "past_key_values.0.value v_heads", "present.0.value", axis=2),
        ]
    else:
        nodes += [_node("Identity", "k_out", "present.0.key"), _node("Identity", "v_heads", "present.0.value")]
    for name in ("key", "value"):
        nodes += [
            _node("Unsqueeze", f"present.0.{name} axis_2", f"{name}_5"),
            _node("Expand", f"{name}_5 repeats", f"{name}_many"),
            _node("Reshape", f"{name}_many to_heads", f"{name}_all"),
        ]
    nodes += [
        _node("Transpose", "key_all", "key_t", perm=[0, 1, 3, 2]),
        _node("MatMul", "q_out key_t", "scores"),
        _node("Mul", "scores scale", "scaled"),
        # what a query at place p may see: keys at places up to p, where the mask has a one
        _node("CumSum", "attention_mask one_int", "counted"),
        _node("Sub", "counted one_int", "key_places"),
        _node("Unsqueeze", "key_places axes_mask", "key_row"),
        _node("Unsqueeze", "position_ids axis_1", "query_1"),
        _node("Unsqueeze", "query_1 axis_last", "query_column"),
        _node("Greater", "key_row query_column", "is_hidden"),
        _node("Cast", "is_hidden", "hidden_float", to=FLOAT),
        _node("Mul", "hidden_float lowest", "mask"),
        _node("Add", "scaled mask", "masked"),
        _node("Softmax", "masked", "attention", axis=-1),
        _node("MatMul", "attention value_all", "mixed"),
        _node("Transpose", "mixed", "mixed_t", perm=[0, 2, 1, 3]),
        _node("Reshape", "mixed_t to_flat", "joined"),
        _node("MatMul", "joined wo", "projected"),
        _node("Add", "x projected", "x_1"),
        _node("MatMul", "x_1 wu", "up"),
        _node("Relu", "up", "up_relu"),
        _node("MatMul", "up_relu wd", "down"),
        _node("Add", "x_1 down", "x_2"),
        _node("MatMul", "x_2 head", "logits"),
    ]
    return nodes


def _info(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def _inputs():
    return [
        _info("input_ids", INT, ["n", "t"]),
        _info("attention_mask", INT, ["n", "past_sequence_length + t"]),
        _info("position_ids", INT, ["n", "t"]),
        _info("past_key_values.0.key", FLOAT, _CACHE),
        _info("past_key_values.0.value", FLOAT, _CACHE),
    ]


def _outputs():
    return [
        _info("logits", FLOAT, ["n", "t", VOCABULARY]),
        _info("present.0.key", FLOAT, _GROWN),
        _info("present.0.value", FLOAT, _GROWN),
    ]


def _model(graph):
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(found)
    return found


def decoder():
    """A decoder with past."""
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    return _model(helper.make_graph(_body(has_past=True), "decoder", _inputs(), _outputs(), tensors))


def merged_decoder():
    """The same with a branch that takes no past, picked by `use_cache_branch`."""
    tensors = [numpy_helper.from_array(value, name) for name, value in weights().items()]
    kinds = [(info.name, FLOAT) for info in _outputs()]
    branches = {
        name: helper.make_graph(_body(has_past=has), name, [], [_info(each, kind, None) for each, kind in kinds])
        for name, has in (("then_branch", True), ("else_branch", False))
    }
    nodes = [helper.make_node("If", ["use_cache_branch"], [name for name, _ in kinds], **branches)]
    inputs = [*_inputs(), _info("use_cache_branch", TensorProto.BOOL, [1])]
    return _model(helper.make_graph(nodes, "merged", inputs, _outputs(), tensors))
