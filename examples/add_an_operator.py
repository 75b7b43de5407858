"""Give an operator of your own a meaning, then run, calibrate and quantize a model that holds it.

    python examples/add_an_operator.py

ONNX files may hold operators of any domain. `ptqjax.read` takes them as they are; to run one, ptqjax needs a lowering:
a function of arrays, its inputs positional and its attributes keyword-only, registered under the operator's name and
domain and the version from which on the function holds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper, numpy_helper

import ptqjax

DOMAIN = "org.example"
CHANNELS, CLASSES = 8, 3


def model() -> onnx.ModelProto:
    """Returns Conv, Squareplus (of our own domain), GlobalAveragePool, Flatten and Gemm with random weights."""
    random = np.random.default_rng(0)
    weights = {
        "conv.weight": random.normal(size=(CHANNELS, 3, 3, 3)) / 5,
        "conv.bias": random.normal(size=CHANNELS),
        "fc.weight": random.normal(size=(CLASSES, CHANNELS)),
        "fc.bias": random.normal(size=CLASSES),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight", "conv.bias"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Squareplus", ["conv"], ["activation"], name="smooth", domain=DOMAIN, b=4.0),
        helper.make_node("GlobalAveragePool", ["activation"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["features"]),
        helper.make_node("Gemm", ["features", "fc.weight", "fc.bias"], ["output"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "squareplus_net",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def register() -> None:
    """Gives Squareplus, (x + sqrt(x^2 + b)) / 2, its meaning: these three lines are all there is to it."""

    @ptqjax.lowers("Squareplus", since=1, domain=DOMAIN, elementwise=True)  # elementwise: any layout of x will do
    def squareplus(x: jax.Array, /, *, b: float = 4.0) -> jax.Array:
        return (x + jnp.sqrt(x * x + b)) / 2


def main() -> None:
    """Runs the model, first without the lowering, then with it, and quantizes it."""
    network = ptqjax.read(model())
    images = np.random.default_rng(1).normal(size=(32, 3, 8, 8)).astype(np.float32)
    try:
        ptqjax.apply(network.graph, network.params, {"input": images})
    except ptqjax.UnsupportedOperatorError as error:
        print(f"without a lowering: {error}")

    register()
    logits = np.asarray(ptqjax.apply(network.graph, network.params, {"input": images})["output"])
    print(f"with it: logits of shape {logits.shape}")

    result = ptqjax.quantize(network, [{"input": images}], ptqjax.QuantizationConfig())
    simulate = ptqjax.simulate(result.model, result.encodings)
    quantized = np.asarray(simulate(result.model.params, result.encodings, {"input": images})["output"])
    noise = np.mean(np.square(quantized - logits))
    print(f"quantized to 8 bits: SQNR {10 * np.log10(np.mean(np.square(logits)) / noise):.1f} dB")


if __name__ == "__main__":
    main()
