"""The function that a graph denotes: what it equals, what goes through it, what it refuses."""

from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from ptqjax.errors import DataDependentError, DataError, ModelError, UnsupportedOperatorError
from ptqjax.ir import Constant, Graph, Model, Node, TensorSpec
from ptqjax.lowering import apply, interpret
from ptqjax.lowering.partition import cut_before
from ptqjax.onnx_io import read
from ptqjax.ops import find_lowering, lowers

_NETWORKS = (
    "mobilenet_v2_1.0_224",
    "mobilenet_v1_0.25_224",
    "squeezenet_v1.1",
    "resnet20_cifar10",
    "mlperf_resnet8_cifar10",
    "mlperf_vww_mobilenet_v1_0.25_96",
    "mlperf_ad01_autoencoder",
    "tiny_vit_cifar10",
)


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _spec(name, *shape, dtype="float32"):
    return TensorSpec(name=name, dtype=np.dtype(dtype), shape=shape)


def _graph(nodes, inputs, outputs, *, parameters=(), constants=None, opset=17):
    return Graph(
        name="g",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        nodes=tuple(nodes),
        constants=tuple(sorted((name, Constant(value)) for name, value in (constants or {}).items())),
        parameters=tuple(sorted(parameters)),
        opsets=(("", opset),),
    )


def _node(op_type, inputs, outputs, domain="", **attributes):
    return Node(
        op_type=op_type,
        inputs=tuple(inputs.split(",")),
        outputs=tuple(outputs.split(",")),
        attributes=tuple(sorted(attributes.items())),
        domain=domain,
    )


def _separable_model():
    """A network in which every kind of value meets: both layouts, broadcasts in front, skips, a flat tail."""
    params = {
        "stem": _random(6, 3, 3, 3, seed=1),
        "bias": _random(6, seed=2),
        "depthwise": _random(6, 1, 3, 3, seed=3),
        "point": _random(8, 6, 1, 1, seed=4),
        "bound": np.abs(_random(8, 1, 1, seed=5)),
        "gamma": _random(8, seed=6),
        "beta": _random(8, seed=7),
        "mean": _random(8, seed=8),
        "variance": np.abs(_random(8, seed=9)),
        "head": _random(16, 5, seed=10),
        "front": _random(2, 1, 8, 1, 1, seed=11),
    }
    nodes = (
        _node("Conv", "x,stem,bias", "a", pads=(1, 0, 1, 2), strides=(2, 1)),
        _node("Conv", "a,depthwise", "b", pads=(1, 1, 1, 1), group=6),
        _node("Add", "a,b", "c"),
        _node("Conv", "c,point", "d"),
        _node("BatchNormalization", "d,gamma,beta,mean,variance", "e", epsilon=1.0),
        _node("Relu", "e", "f"),
        _node("Min", "f,bound", "h"),
        _node("Mul", "h,front", "v"),
        _node("Pad", "h,pads", "i"),
        _node("Concat", "i,i", "j", axis=1),
        _node("MaxPool", "j", "k", kernel_shape=(2, 2), ceil_mode=1, strides=(2, 2)),
        _node("Transpose", "k", "t", perm=(0, 2, 3, 1)),
        _node("GlobalAveragePool", "k", "l"),
        _node("Flatten", "l", "m", axis=1),
        _node("MatMul", "m,head", "y"),
    )
    pads = {"pads": np.array([0, 0, 1, 0, 0, 0, 0, 1])}
    outputs = (
        _spec("y", "N", 5),
        _spec("t", "N", None, None, 16),
        _spec("h", "N", 8, None, None),
        _spec("v", 2, "N", 8, None, None),
    )
    graph = _graph(nodes, [_spec("x", "N", 3, 9, 7)], outputs, parameters=params, constants=pads)
    return Model(graph=graph, params=params)


@pytest.mark.slow  # test_real_files has most of them, in batches too
@pytest.mark.parametrize("network", _NETWORKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_real_networks_compute_what_onnx_runtime_computes(shared, network, batch):
    path = str(shared / "models" / f"{network}.onnx")
    model = read(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (spec,) = model.graph.inputs
    x = _random(*(size if isinstance(size, int) else batch for size in spec.shape))
    outputs = apply(model.graph, model.params, {spec.name: x})
    for name, expected in zip(outputs, session.run(list(outputs), {spec.name: x}), strict=True):
        # float32 sums in another order: a few units in the last place per layer, far below 1e-4 of the largest
        np.testing.assert_allclose(outputs[name], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_program_for_cpus_computes_what_the_other_computes():
    model = _separable_model()
    inputs = {"x": _random(2, 3, 9, 7)}
    on_cpu, _ = interpret(model.graph, model.params, inputs, platform="cpu")
    elsewhere, _ = interpret(model.graph, model.params, inputs, platform="gpu")
    for name in on_cpu:
        np.testing.assert_allclose(on_cpu[name], elsewhere[name], rtol=1e-5, atol=1e-5)


def test_apply_goes_through_jit_and_vmap():
    model = _separable_model()
    x = _random(4, 3, 9, 7)
    at_once = apply(model.graph, model.params, {"x": x})
    jitted = jax.jit(apply, static_argnums=0)(model.graph, model.params, {"x": x})
    mapped = jax.vmap(lambda one: apply(model.graph, model.params, {"x": one[None]}))(x)
    for name in at_once:
        np.testing.assert_allclose(jitted[name], at_once[name], rtol=1e-5, atol=1e-5)
        one = mapped[name][:, 0] if name != "v" else np.moveaxis(mapped[name][:, :, 0], 0, 1)
        np.testing.assert_allclose(one, at_once[name], rtol=1e-5, atol=1e-5)


def test_apply_maps_over_parameters():
    model = _separable_model()
    inputs = {"x": _random(2, 3, 9, 7)}
    both = {name: np.stack([value, 2 * value]) for name, value in model.params.items()}
    mapped = jax.vmap(lambda params: apply(model.graph, params, inputs))(both)
    doubled = apply(model.graph, {name: value[1] for name, value in both.items()}, inputs)
    np.testing.assert_allclose(mapped["y"][1], doubled["y"], rtol=1e-4, atol=1e-4)


def test_gradients_of_both_programs_agree():
    model = _separable_model()
    inputs = {"x": _random(2, 3, 9, 7)}

    def loss(params, platform):
        outputs, _ = interpret(model.graph, params, inputs, platform=platform)
        return jnp.sum(jnp.square(outputs["y"])) + jnp.sum(jnp.square(outputs["v"]))

    on_cpu, elsewhere = (jax.grad(loss)(model.params, platform) for platform in ("cpu", "gpu"))
    for name in model.params:
        scale = np.abs(elsewhere[name]).max()
        assert scale > 0
        np.testing.assert_allclose(on_cpu[name], elsewhere[name], rtol=1e-4, atol=1e-5 * scale)


def test_gradients_go_through_apply():
    model = _separable_model()
    x = _random(2, 3, 9, 7)
    gradient = jax.grad(lambda x: jnp.sum(apply(model.graph, model.params, {"x": x})["y"]))(x)
    assert gradient.shape == x.shape
    assert np.any(gradient)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_intercept_sees_every_floating_tensor_once(platform):
    model = _separable_model()
    seen = Counter()

    def intercept(name, value, channel_axis):
        seen[name] += 1
        return value, (value, channel_axis)

    _, observed = interpret(
        model.graph, model.params, {"x": _random(2, 3, 9, 7)}, intercept=intercept, platform=platform
    )
    tensors = {"x", *model.params, *(output for node in model.graph.nodes for output in node.outputs)}
    assert seen == dict.fromkeys(tensors, 1)
    for name, channels in {"a": 6, "d": 8, "h": 8, "k": 16, "l": 16, "m": 16, "y": 5, "x": 3}.items():
        value, channel_axis = observed[name]
        assert value.shape[channel_axis] == channels
    assert all(observed[name][1] is None for name in model.params)
    assert all(observed[name][0].shape == model.params[name].shape for name in model.params)


def test_intercept_replaces_tensors_and_may_observe_nothing():
    model = _separable_model()
    inputs = {"x": _random(2, 3, 9, 7)}
    outputs, observed = interpret(
        model.graph, model.params, inputs, intercept=lambda name, value, _: (value * 0 if name == "m" else value, None)
    )
    assert not observed
    assert not np.any(outputs["y"])


def test_outputs_that_are_inputs_or_parameters_are_returned():
    graph = _graph([], [_spec("x", 2)], [_spec("x", 2), _spec("w", 3)], parameters=["w"])
    outputs = apply(graph, {"w": _random(3)}, {"x": _random(2)})
    np.testing.assert_array_equal(outputs["x"], _random(2))
    np.testing.assert_array_equal(outputs["w"], _random(3))


def test_outputs_come_in_the_graphs_order():
    nodes = [_node("Relu", "x", "z"), _node("Abs", "x", "a")]
    graph = _graph(nodes, [_spec("x", 2)], [_spec("z", 2), _spec("a", 2)])
    assert list(apply(graph, {}, {"x": _random(2)})) == ["z", "a"]


def test_shape_arithmetic_is_done_while_tracing():
    """Shape -> Gather -> Mul -> Abs -> Div -> Concat -> Reshape; the product needs more than 32 bits."""
    nodes = (
        _node("Shape", "x", "s", start=0),
        _node("Gather", "s,zero", "n", axis=0),
        _node("Mul", "n,large", "p"),
        _node("Abs", "p", "a"),
        _node("Div", "a,large", "q"),
        _node("Unsqueeze", "q,axes", "r"),
        _node("Concat", "r,rest", "t", axis=0),
        _node("Reshape", "x,t", "y", allowzero=1),
        _node("Slice", "y,starts,ends,axes_of_slice", "z"),
    )
    constants = {
        "zero": np.array(0),
        "large": np.array(2**40),
        "axes": np.array([0]),
        "rest": np.array([-1]),
        "starts": np.array([1]),
        "ends": np.array([2**63 - 1]),
        "axes_of_slice": np.array([1]),
    }
    graph = _graph(nodes, [_spec("x", "N", 2, 3)], [_spec("z", "N", 5)], constants=constants)
    x = _random(4, 2, 3)
    np.testing.assert_array_equal(apply(graph, {}, {"x": x})["z"], x.reshape(4, 6)[:, 1:])


def test_concrete_arrays_of_64_bits_are_computed_in_64_bits():
    graph = _graph([_node("Add", "x,x", "y")], [_spec("x", 2, dtype="int64")], [_spec("y", 2, dtype="int64")])
    x = np.array([2**40, -(2**40)])
    result = apply(graph, {}, {"x": x})["y"]
    assert result.dtype == np.int64
    np.testing.assert_array_equal(result, 2 * x)
    assert not jax.config.jax_enable_x64


def test_narrowing_under_the_callers_jit_is_said():
    graph = _graph([_node("Add", "x,x", "y")], [_spec("x", 2, dtype="int64")], [_spec("y", 2, dtype="int64")])
    with pytest.warns(UserWarning, match="'x' is of a 64-bit type"):
        jax.jit(lambda x: apply(graph, {}, {"x": x}))(np.array([1, 2]))


def test_a_graph_is_compiled_once():
    traced = []
    node = _node("Traced", "x", "y", domain="test.counting")

    @lowers("Traced", since=1, domain="test.counting")
    def traced_identity(x, /):
        traced.append(x.shape)
        return x

    for _ in range(3):  # equal, not the same
        graph = _graph([node], [_spec("x", "N", 3)], [_spec("y", "N", 3)])
        apply(graph, {}, {"x": _random(2, 3)})
    assert traced == [(2, 3)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'x' is missing"),
        ({"x": _random(1, 3, 9, 7), "z": _random(1)}, "input 'z' is unknown"),
        ({"x": _random(3, 9, 7)}, r"input 'x' has shape \[3, 9, 7\]; expected \[N, 3, 9, 7\]"),
        ({"x": _random(1, 4, 9, 7)}, r"input 'x' has shape \[1, 4, 9, 7\]; expected \[N, 3, 9, 7\]"),
        ({"x": _random(1, 3, 9, 7).astype(np.float64)}, "input 'x' is of type float64; expected float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    model = _separable_model()
    with pytest.raises(DataError, match=message):
        apply(model.graph, model.params, inputs)


def test_a_missing_parameter_is_named():
    model = _separable_model()
    params = {name: value for name, value in model.params.items() if name != "point"}
    with pytest.raises(DataError, match="parameter 'point' is missing"):
        apply(model.graph, params, {"x": _random(1, 3, 9, 7)})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (_node("Nothing", "x", "y"), r"Nothing \(producing 'y'\).*ai.onnx.Nothing of opset 17.*register one"),
        (_node("Relu", "x", "y", domain="custom"), r"custom.Relu of opset 1 .*domain=\"custom\""),
        (_node("Relu", "x", "y", slope=2), r"Relu \(producing 'y'\): attribute 'slope' = 2 .* opset 17"),
        (_node("Relu", "x", "y,mask"), "its output 'mask' has no lowering"),
    ],
)
def test_what_has_no_lowering_is_named(node, message):
    graph = _graph([node], [_spec("x", 2, 1, 3)], [_spec("y", 2, 1, 3)])
    with pytest.raises(UnsupportedOperatorError, match=message):
        apply(graph, {}, {"x": _random(2, 1, 3)})


@pytest.mark.filterwarnings("ignore:tensor 's' is of a 64-bit type")
def test_a_shape_that_depends_on_data_is_computed_on_concrete_arrays():
    graph = _graph([_node("Reshape", "x,s", "y")], [_spec("x", 2, 3), _spec("s", 2, dtype="int64")], [_spec("y", None)])
    x, shape = _random(2, 3), np.array([3, -1])
    outputs = apply(graph, {}, {"x": x, "s": shape})
    np.testing.assert_array_equal(outputs["y"], x.reshape(3, 2))
    known_while_tracing = jax.jit(lambda x: apply(graph, {}, {"x": x, "s": shape}))
    with pytest.raises(DataDependentError, match=r"Reshape \(producing 'y'\): the shape of Reshape depends on data"):
        jax.vmap(lambda s: apply(graph, {}, {"x": x, "s": s}))(np.stack([shape, shape]))
    with pytest.raises(DataDependentError, match="outside jit, vmap and grad"):
        known_while_tracing(x)


def test_a_node_that_cannot_be_computed_is_named_with_what_it_was_given():
    graph = _graph([_node("Add", "x,b", "y")], [_spec("x", 2, 3)], [_spec("y", 2, 3)], parameters=["b"])
    with pytest.raises(ModelError, match=r"Add \(producing 'y'\) cannot be computed on float32\[2, 3\], float32\[4\]"):
        apply(graph, {"b": _random(4)}, {"x": _random(2, 3)})


def test_what_does_not_depend_on_data_is_compiled_still():
    """A network, then a selection of its rows: the network's sums are those of one program, to the bit."""
    nodes = [
        _node("MatMul", "x,w", "a"),
        _node("Shape", "a", "sizes"),
        _node("Greater", "a,zero", "b"),
        _node("NonZero", "b", "i"),
        _node("Reshape", "a,sizes", "r"),
        _node("Cast", "i", "c", to=1),
        _node("ReduceSum", "c", "n", keepdims=0),
        _node("Mul", "r,n", "y"),
    ]
    graph = _graph(nodes, [_spec("x", 2, 3)], [_spec("y", 2, 4), _spec("a", 2, 4)], parameters=["w", "zero"], opset=17)
    params, x = {"w": _random(3, 4), "zero": np.float32(0)}, _random(2, 3, seed=1)
    outputs = apply(graph, params, {"x": x})
    rows, columns = np.nonzero(outputs["a"] > 0)
    np.testing.assert_array_equal(outputs["y"], outputs["a"] * np.float32(rows.sum() + columns.sum()))
    np.testing.assert_allclose(outputs["a"], x @ params["w"], rtol=1e-6)
    with mock.patch("ptqjax.lowering.interpreter.find_lowering", wraps=find_lowering) as looked_up:
        apply(graph, params, {"x": x})
    assert looked_up.call_count == 4  # what is not compiled; nothing is traced again
    first, second = cut_before(graph, frozenset({"i"}))
    assert [node.op_type for node in first.nodes] == ["MatMul", "Shape", "Greater", "Reshape"]
    assert [node.op_type for node in second.nodes] == ["NonZero", "Cast", "ReduceSum", "Mul"]
    assert [spec.name for spec in second.inputs] == ["b", "r", "a"]


def test_the_program_is_chosen_by_the_platform_it_is_compiled_for(monkeypatch):
    """A depthwise convolution pads within its loop on a GPU, and in front of it on the CPU beside."""
    monkeypatch.setattr("ptqjax.lowering.interpreter.backends", lambda: {"cpu": None, "cuda": None})
    nodes = [_node("Conv", "x,w", "y", group=6, pads=(1, 1, 1, 1))]
    graph = _graph(nodes, [_spec("x", 2, 6, 5, 5)], [_spec("y", 2, 6, 5, 5)], parameters=["w"])
    params, inputs = {"w": _random(6, 1, 3, 3)}, {"x": _random(2, 6, 5, 5, seed=1)}
    program = jax.jit(lambda params, inputs: interpret(graph, params, inputs)[0])
    traced = program.trace(params, inputs)
    on_gpu, on_cpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu"))
    assert on_gpu != on_cpu
    assert "stablehlo.convolution" not in on_cpu
    expected, _ = interpret(graph, params, inputs, platform="gpu")
    np.testing.assert_allclose(program(params, inputs)["y"], expected["y"], rtol=1e-5, atol=1e-5)


def test_an_operator_that_is_registered_again_has_its_new_meaning():
    graph = _graph([_node("Again", "x", "y", domain="test")], [_spec("x", 2)], [_spec("y", 2)])
    x = _random(2)
    for factor in (2, 3):
        lowers("Again", since=1, domain="test")(lambda x, factor=factor: x * factor)
        np.testing.assert_allclose(apply(graph, {}, {"x": x})["y"], factor * x, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:tensor 'x' is of a 64-bit type")
def test_a_constant_has_its_width_after_a_narrower_run():
    graph = _graph(
        [_node("Mul", "x,c", "y")],
        [_spec("x", dtype="int64")],
        [_spec("y", dtype="int64")],
        constants={"c": np.array(3)},
    )
    x = np.array(2**33)
    jax.jit(lambda x: apply(graph, {}, {"x": x}))(np.array(5))
    assert int(apply(graph, {}, {"x": x})["y"]) == 3 * 2**33
