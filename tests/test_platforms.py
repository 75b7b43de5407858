"""The programs for CPUs and GPUs (channels last) against that for other devices, which is XLA's own convolutions."""

import jax
import numpy as np
import pytest

from ptqjax.lowering import interpret
from tests.models import Chain, build, node

_ROUNDING = 1e-5  # float32 sums of up to some hundred terms in another order


def _chain(channels, *, rank=2, size=9):
    return Chain(channels, rank=rank, dtype=np.float32, size=size)


_MODELS = {
    "stem": lambda: _chain(3, size=12).conv(6, kernel=7, pad=3, strides=(2, 2), bias=True).build(),
    "odd padding": lambda: _chain(3).conv(4, pads=(0, 2, 1, 0), strides=(2, 1)).build(),
    "dilated": lambda: _chain(3).conv(4, pad=2, dilations=(2, 2)).build(),
    "pointwise with a stride": lambda: _chain(3).conv(5, kernel=1, strides=(2, 3)).build(),
    "padded pointwise": lambda: _chain(3).conv(5, kernel=1, pad=1).build(),
    "depthwise": lambda: _chain(6).depthwise(pad=1, strides=(2, 1)).build(),
    "depthwise, dilated": lambda: _chain(6).depthwise(pad=2, dilations=(2, 2)).build(),
    "depthwise with two kernels a channel": lambda: _chain(6).conv(12, group=6, pad=1).build(),
    "a kernel larger than the image": lambda: _chain(4, size=2).conv(5, pad=1, bias=True).build(),
    "one group": lambda: _chain(6).conv(4, group=1, pad=1).build(),
    "two groups": lambda: _chain(6).conv(4, group=2, pad=1, bias=True).build(),
    "many groups": lambda: _chain(32).conv(64, group=8, pad=1, strides=(2, 2)).build(),
    "many groups of many channels": lambda: _chain(108).conv(108, group=12, pad=1).build(),
    "small groups with more kernels": lambda: _chain(8).conv(32, group=4, pad=1).build(),
    "small groups with fewer kernels": lambda: _chain(16).conv(4, group=2, pad=1, strides=(1, 2)).build(),
    "grouped pointwise": lambda: _chain(16).conv(8, group=4, kernel=1).build(),
    "one axis": lambda: _chain(4, rank=1).conv(6, pad=1).depthwise().build(),
    "three axes": lambda: _chain(4, rank=3, size=5).conv(6, group=2, pad=1).depthwise().build(),
    "transposed": lambda: _chain(4).conv(6).conv_transpose(4, group=2, bias=True).clip().build(),
    "normalized": lambda: _chain(4).conv(6, pad=1).norm().prelu().build(),
    "a flat tail": lambda: _chain(4).conv(6).add("GlobalAveragePool").add("Flatten", axis=1).gemm(3).build(),
}


@pytest.mark.parametrize("name", _MODELS)
def test_the_programs_for_cpus_and_gpus_compute_what_the_other_computes(name):
    model = _MODELS[name]()
    shape = [3 if size == "N" else size for size in model.graph.inputs[0].shape]
    inputs = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    elsewhere = interpret(model.graph, model.params, inputs, platform="tpu")[0]
    for platform in ("cpu", "cuda"):
        found = interpret(model.graph, model.params, inputs, platform=platform)[0]
        for tensor, value in elsewhere.items():
            np.testing.assert_allclose(found[tensor], value, rtol=0, atol=_ROUNDING * np.abs(value).max())


def _moved(model, shape, platform):
    """The transpositions of activations in the program: those of a value with the batch's size in front."""
    x = {"x": jax.ShapeDtypeStruct(shape, np.float32)}
    jaxpr = jax.make_jaxpr(lambda x: interpret(model.graph, model.params, x, platform=platform)[0])(x).jaxpr
    return [
        equation.params["permutation"]
        for equation in jaxpr.eqns
        if equation.primitive.name == "transpose" and equation.outvars[0].aval.shape[0] == shape[0]
    ]


def _exported_from_channels_last():
    """Convolutions between Transpose nodes, as converters write them for models whose channels are last."""
    random = np.random.default_rng(0)
    params = {
        "v": random.normal(size=(6, 3, 3, 3)).astype(np.float32),
        "w": random.normal(size=(6, 1, 3, 3)).astype(np.float32),
        "b": random.normal(size=6).astype(np.float32),
    }
    nodes = (
        node("Transpose", ("x",), "a", perm=(0, 3, 1, 2)),
        node("Conv", ("a", "v"), "c", pads=(1, 1, 1, 1)),
        node("Transpose", ("c",), "d", perm=(0, 2, 3, 1)),
        node("Add", ("d", "b"), "e"),
        node("Relu", ("e",), "f"),
        node("Transpose", ("f",), "g", perm=(0, 3, 1, 2)),
        node("Conv", ("g", "w"), "h", group=6),
        node("Transpose", ("h",), "y", perm=(0, 2, 3, 1)),
    )
    return build(nodes, params, input_shape=("N", 8, 8, 3), outputs=["y"])


def test_transpositions_around_convolutions_leave_no_trace():
    model = _exported_from_channels_last()
    assert _moved(model, (5, 8, 8, 3), "cpu") == []
    assert _moved(model, (5, 8, 8, 3), "gpu") == []
    assert len(_moved(model, (5, 8, 8, 3), "tpu")) == 4
    inputs = {"x": np.random.default_rng(1).normal(size=(5, 8, 8, 3)).astype(np.float32)}
    on_cpu, elsewhere = (interpret(model.graph, model.params, inputs, platform=p)[0]["y"] for p in ("cpu", "tpu"))
    np.testing.assert_allclose(on_cpu, elsewhere, rtol=0, atol=_ROUNDING * np.abs(elsewhere).max())


def test_a_network_is_brought_into_its_layout_once():
    chain = _chain(3).conv(8, pad=1).norm().clip().depthwise(pad=1).clip()
    chain.add("MaxPool", kernel_shape=(2, 2), strides=(2, 2)).conv(6, kernel=1).add("GlobalAveragePool")
    model = chain.add("Flatten", axis=1).gemm(5).build()
    assert _moved(model, (5, 3, 9, 9), "cpu") == [(0, 2, 3, 1)]  # the image
