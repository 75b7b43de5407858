"""Laws of scales of nothing: the bias beside them keeps its resolution, and what holds values keeps its scale."""

import numpy as np
import onnxruntime
import pytest

from ptqjax import QuantizationConfig, apply, calibrate, choose_encoding, export, quantize
from ptqjax.encodings.bias_resolution import OF_A_STEP
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import dequantize
from ptqjax.encodings.encoding import quantize as to_codes
from ptqjax.ir import Model
from ptqjax.ranges.calibrate import calibrate_and_report
from tests.models import build, node

KINDS = ("Conv", "depthwise", "ConvTranspose", "Gemm", "MatMul")
ROUNDED = OF_A_STEP / 2 * 1.01  # half a step of the bias; scales are rounded to float32
BIAS = np.asarray([0.3, -0.2, 0.45, 0.05], np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def layer(kind: str, weight_of, reach: float) -> tuple[Model, dict[str, np.ndarray]]:
    """A layer with four results, its weight changed by `weight_of(weight, output axis)`, and a batch for it."""
    shapes = {
        "Conv": ((4, 3, 1, 1), 0, {}),
        "depthwise": ((4, 1, 3, 3), 0, {"group": 4}),
        "ConvTranspose": ((4, 2, 2, 2), 1, {"group": 2}),
        "Gemm": ((4, 5), 0, {"transB": 1}),
        "MatMul": ((5, 4), 1, {}),
    }
    shape, axis, attributes = shapes[kind]
    channels = {"Conv": 3, "depthwise": 4, "ConvTranspose": 4}.get(kind)
    size = (8, 5) if channels is None else (8, channels, 4, 4)
    params = {"w": weight_of(normal(*shape), axis), "b": BIAS}
    operator = "Conv" if kind == "depthwise" else kind
    nodes = [node(operator, ["x", "w", "b"], "y", **attributes)]
    if kind == "MatMul":
        nodes = [node("MatMul", ["x", "w"], "p"), node("Add", ["p", "b"], "y")]
    model = build(nodes, params, input_shape=("n", *size[1:]), outputs=["y"])
    return model, {"x": reach * np.random.default_rng(1).uniform(size=size).astype(np.float32)}


def all_zero(weight, _):
    return np.zeros_like(weight)


def first_channel_zero(weight, axis):
    """The others' weights are so large that their scale is none for the first one's bias; none is for the first input.

    So, where the first input alone is not zero, every output is its bias, and the output's step is small.
    """
    weight = np.moveaxis(weight * 50, axis, 0).copy()
    weight[0] = 0
    weight[:, 0] *= weight.shape[1] == 1
    return np.moveaxis(weight, 0, axis)


def as_it_is(weight, _):
    return weight


def in_runtime(folder, model, encodings, batch):
    export(model, encodings, folder, "q")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(folder / "q.onnx", options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, batch)[0])


def errors(model, encodings) -> np.ndarray:
    """How far each bias of the only layer is from the multiple of s_x s_w that it becomes, in steps of the output."""
    (site,) = bias_sites(model)
    grid = bias_encoding(encodings, site)
    assert grid is not None
    return np.abs(np.asarray(dequantize(to_codes(BIAS, grid), grid)) - BIAS) / float(encodings["y"].scale)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_beside_nothing_is_within_a_small_part_of_an_output_step(tmp_path, kind, granularity):
    """In the encodings, and in the file as ONNX Runtime runs it."""
    config = QuantizationConfig(granularity=granularity, ranges="min-max", headroom=1.0)
    for reach, weight_of in ((255, all_zero), (1e-3, all_zero), (0, all_zero), (0, as_it_is)):
        model, batch = layer(kind, weight_of, reach)
        encodings, report = calibrate_and_report(model, [batch], config)
        assert errors(model, encodings).max() <= ROUNDED
        assert reach == 1e-3 or [record.transform for record in report] == ["resolve_biases"]
        found = in_runtime(tmp_path, model, encodings, batch)
        expected = BIAS if found.ndim == 2 else BIAS[:, None, None]
        assert np.abs(found - expected).max() <= 0.51 * float(encodings["y"].scale)  # half a step is the output's own


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_of_zeros_is_resolved_and_the_others_keep_their_scales(kind):
    model, batch = layer(kind, first_channel_zero, 255)
    batch["x"][:, 1:] = 0
    encodings = calibrate(model, [batch], QuantizationConfig(ranges="min-max"))
    scale = np.asarray(encodings["w"].scale)
    is_zero = np.tile(np.arange(len(scale)) == 0, len(BIAS) // len(scale))
    assert errors(model, encodings)[is_zero].max() <= ROUNDED
    own = choose_encoding(model.params["w"], symmetric=True, ranges="min-max", axis=encodings["w"].axis)
    np.testing.assert_array_equal(scale[1:], np.asarray(own.scale)[1:])
    assert scale[0] < scale[1:].min() / 100


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_is_lowered_without_a_bias_or_where_it_is_frozen(frozen):
    model, batch = layer("Conv", all_zero, 255)
    config = QuantizationConfig(ranges="min-max", granularity="tensor")
    one = choose_encoding(model.params["w"], symmetric=True)
    if not frozen:
        model = model.replace(params={**model.params, "b": np.zeros_like(BIAS)})
    encodings = calibrate(model, [batch], config, frozen={"w": one} if frozen else None)
    assert float(encodings["w"].scale) == float(one.scale) == 1


def test_what_shares_the_encoding_of_an_input_of_zeros_has_its_new_scale():
    """The grid of `x` is that of what a MaxPool moves; the layer reads the moved one."""
    nodes = [node("MaxPool", ["x"], "p", kernel_shape=(2, 2)), node("Conv", ["p", "w", "b"], "y")]
    params = {"w": normal(4, 3, 1, 1), "b": BIAS}
    model = build(nodes, params, input_shape=("n", 3, 4, 4), outputs=["y"])
    encodings = calibrate(model, [{"x": np.zeros((2, 3, 4, 4), np.float32)}], QuantizationConfig(ranges="min-max"))
    assert errors(model, encodings).max() <= ROUNDED
    assert float(encodings["x"].scale) == float(encodings["p"].scale) < 1


@pytest.mark.parametrize("settings", [{"equalize": False}, {"scaling": "weights"}, {"scaling": "noise"}])
def test_pruned_channels_keep_their_bias_through_the_whole_pipeline(tmp_path, settings):
    """Batch norms with gamma 0, folded: of a layer, of single channels of a depthwise one, of the last."""
    model, gone = build_pruned(), slice(0, 2)
    batches = [{"x": normal(16, 3, 6, 6)}]
    result = quantize(model, batches, QuantizationConfig(ranges="min-max", correct="none", **settings))
    wanted = np.asarray(apply(model.graph, model.params, batches[0])["y"])
    found = in_runtime(tmp_path, result.model, result.encodings, batches[0])
    step = float(result.encodings["y"].scale)
    assert np.abs(found - wanted)[:, gone].max() <= 0.51 * step  # the last layer's channels without weights
    assert np.abs(found - wanted).max() <= 4 * step


def build_pruned() -> Model:
    """Conv, depthwise Conv and Conv, each with a batch norm and all but the last with a Relu."""

    def norm(tensor, result, gamma, beta):
        params = {
            f"{result}.s": gamma,
            f"{result}.b": beta,
            f"{result}.m": normal(4),
            f"{result}.v": 1 + normal(4) ** 2,
        }
        return node("BatchNormalization", [tensor, *params], result), params

    nodes, params = [], {"w0": normal(4, 3, 1, 1), "w1": normal(4, 1, 3, 3), "w2": normal(4, 4, 1, 1)}
    gammas = (np.asarray([0, 1, 1, 0]), np.asarray([1, 0, 1, 1]), np.asarray([0, 0, 1, 1]))
    tensor = "x"
    for i, gamma in enumerate(gammas):
        beta = np.asarray([0.4, 0.3, -0.2, 0.7], np.float32)
        last = "y" if i == 2 else f"n{i}"
        nodes.append(node("Conv", [tensor, f"w{i}"], f"c{i}", **({"group": 4} if i == 1 else {})))
        batch_norm, more = norm(f"c{i}", last, gamma.astype(np.float32), beta)
        nodes.append(batch_norm)
        params |= more
        tensor = last
        if i < 2:
            nodes.append(node("Relu", [last], f"r{i}"))
            tensor = f"r{i}"
    return build(nodes, params, input_shape=("n", 3, 6, 6), outputs=["y"])
