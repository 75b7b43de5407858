"""Trains a small depthwise-separable network on scikit-learn's digits and writes it as ONNX, with data to quantize it.

    python examples/train_digits.py --out examples

writes `digits.onnx` (batch norms kept, ReLU6 as Clip), `digits_calibration.npz` (128 of the training pictures, without
labels) and `digits_evaluation.npz` (597 pictures that training never saw, with labels). It takes half a
minute of processor time, part of it compilation.

Why this network is hard to quantize per tensor, and why that is no trick. A batch norm before a depthwise layer decides
how large each channel is; the batch norm behind the depthwise layer divides that size out again. As long as ReLU6 does
not saturate, the network is therefore *invariant* to those scales: no gradient pulls them together, and how they start
is how they stay. Here they start spread over two and a half decades (`SPREAD`), where networks from the wild end up by
weight decay and dying channels. The float network is an ordinary one, and its accuracy is what one expects on these
digits. But folding the batch norms turns the spread into weights: rows of the layer before are as large as the scale,
depthwise filters as large as its inverse, and one step of 8 bits for a whole tensor is coarser than most of its
channels. Cross-layer equalization finds the scales that the training left free and makes the channels alike again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import optax
from jaxtyping import Array, Float, Int
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

EPSILON = 1e-5
"""What every batch norm adds to the variance."""
NUM_CLASSES = 10
BATCH = 64
NUM_CALIBRATION = 128
NUM_EVALUATION = 597


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One convolution with its batch norm and ReLU6."""

    name: str
    """The prefix of its tensors."""
    channels: int
    """How many channels it puts out."""
    kernel: int = 1
    """Height and width of its filters."""
    stride: int = 1
    """The step of its filters."""
    depthwise: bool = False
    """Whether each channel is filtered by itself."""
    spread: bool = False
    """Whether its batch-norm scales start spread: only where a depthwise layer with a batch norm follows."""


LAYERS = (
    Layer(name="stem", channels=16, kernel=3, spread=True),
    Layer(name="depthwise1", channels=16, kernel=3, depthwise=True),
    Layer(name="pointwise1", channels=32, spread=True),
    Layer(name="depthwise2", channels=32, kernel=3, stride=2, depthwise=True),
    Layer(name="pointwise2", channels=48, spread=True),
    Layer(name="depthwise3", channels=48, kernel=3, depthwise=True),
    Layer(name="pointwise3", channels=64),
)
SPREAD = (0.01, 4.0)
"""Smallest and largest starting value of a spread batch-norm scale, log-uniform in between."""


class DepthwiseConv(nn.Module):
    """A depthwise convolution as shifted products: on a CPU several times faster than XLA's grouped convolution."""

    layer: Layer
    """Size and stride."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n p q c"]:
        """Returns `x` filtered channel by channel, with zeros around it."""
        size, stride = self.layer.kernel, self.layer.stride
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1)), (size, size, 1, x.shape[-1]))
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
        shifted = [
            padded[:, i : i + height : stride, j : j + width : stride] * kernel[i, j][None, None]
            for i in range(size)
            for j in range(size)
        ]
        return sum(shifted[1:], shifted[0])


class ScaledBatchNorm(nn.Module):
    """A batch norm whose scale is learned as a logarithm, and whose shift is in units of the scale.

    The function is that of any batch norm: gamma = exp(log_scale), beta = gamma * shift. Adam moves every parameter by
    about the same amount, which in plain gammas would be nothing to the large ones and everything to the small.
    """

    spread: bool
    """Whether the scales start log-uniform in `SPREAD`, or at 1."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w c"]:
        """Returns `x` normalized per channel, scaled and shifted."""
        log_scale = self.param("log_scale", log_uniform if self.spread else nn.initializers.zeros, (x.shape[-1],))
        shift = self.param("shift", nn.initializers.zeros, (x.shape[-1],))
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=EPSILON, use_scale=False, use_bias=False, name="norm")
        return (norm(x) + shift[None, None, None]) * jnp.exp(log_scale)[None, None, None]


class DigitsNet(nn.Module):
    """The layers of `LAYERS`, the mean over the picture, and a dense layer."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 1"], *, train: bool) -> Float[Array, "n classes"]:
        """Returns the logits."""
        for layer in LAYERS:
            name, size = f"{layer.name}_conv", (layer.kernel, layer.kernel)
            dense = partial(nn.Conv, layer.channels, size, layer.stride, layer.kernel // 2, use_bias=False)
            conv = DepthwiseConv(layer, name=name) if layer.depthwise else dense(name=name)
            x = ScaledBatchNorm(layer.spread, name=f"{layer.name}_norm")(conv(x), train=train)
            x = jnp.clip(x, 0.0, 6.0)
        return nn.Dense(NUM_CLASSES, name="classifier")(x.mean((1, 2)))


def log_uniform(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, " c"]:
    """Returns logarithms, uniform between those of the two ends of `SPREAD`: a flax initializer."""
    low, high = np.log(SPREAD)
    return jax.random.uniform(key, shape, dtype, low, high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Digits:
    """Scikit-learn's digits, split: NCHW float32 in 0..1, and labels."""

    train: np.ndarray
    """Pictures to learn from."""
    train_labels: np.ndarray
    """Their classes."""
    evaluation: np.ndarray
    """Pictures that training never sees."""
    evaluation_labels: np.ndarray
    """Their classes."""


def load(*, seed: int = 0) -> Digits:
    """Returns the 1,797 digits, a third of them held out, the classes in equal parts."""
    pictures, labels = load_digits(return_X_y=True)
    pictures = (pictures / 16.0).reshape(-1, 1, 8, 8).astype(np.float32)
    chosen = train_test_split(np.arange(len(labels)), test_size=NUM_EVALUATION, random_state=seed, stratify=labels)
    train, held_out = (np.asarray(part) for part in chosen)
    labels = labels.astype(np.int64)
    return Digits(
        train=pictures[train],
        train_labels=labels[train],
        evaluation=pictures[held_out],
        evaluation_labels=labels[held_out],
    )


def train(
    pictures: Float[np.ndarray, "n 1 h w"], labels: Int[np.ndarray, " n"], *, epochs: int = 40, seed: int = 0
) -> dict[str, Any]:
    """Returns the trained variables (`params`, `batch_stats`): Adam, cosine decay, cross-entropy, batches of 64."""
    batch = min(BATCH, len(pictures))
    num_steps = len(pictures) // batch
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(len(pictures))[: num_steps * batch] for _ in range(epochs)])
    x = jnp.asarray(pictures.transpose(0, 2, 3, 1))
    # XLA compiles this generator in a fraction of the time that it takes for the default one.
    variables = _init(jax.random.key(seed, impl="rbg"), x[:1])
    return _fit(variables, x, jnp.asarray(labels), order.reshape(-1, batch))


@jax.jit
def _init(key: Array, x: Float[Array, "1 h w 1"]) -> dict[str, Any]:
    return dict(DigitsNet().init(key, x, train=False))


@jax.jit
def _fit(
    variables: dict[str, Any], x: Float[Array, "n h w 1"], y: Int[Array, " n"], order: Int[Array, "steps batch"]
) -> dict[str, Any]:
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, len(order)))

    def step(state: tuple[Any, Any, Any], chosen: Array) -> tuple[tuple[Any, Any, Any], None]:
        params, stats, momenta = state
        gradient, stats = jax.grad(_loss, has_aux=True)(params, stats, x[chosen], y[chosen])
        updates, momenta = optimizer.update(gradient, momenta)
        return (optax.apply_updates(params, updates), stats, momenta), None

    params, stats = variables["params"], variables["batch_stats"]
    (params, stats, _), _ = jax.lax.scan(step, (params, stats, optimizer.init(params)), order)
    return {"params": params, "batch_stats": stats}


def _loss(params: Any, stats: Any, x: Array, y: Array) -> tuple[Array, Any]:
    logits, updated = DigitsNet().apply(
        {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
    )
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated["batch_stats"]


def predict(variables: Mapping[str, Any], pictures: Float[np.ndarray, "n 1 h w"]) -> Float[np.ndarray, "n classes"]:
    """Returns the trained network's logits."""
    logits = jax.jit(DigitsNet().apply, static_argnames="train")
    return np.asarray(logits(variables, jnp.asarray(pictures.transpose(0, 2, 3, 1)), train=False))


def to_onnx(variables: Mapping[str, Any]) -> onnx.ModelProto:
    """Returns the trained network as an ONNX file: opset 17, batch norms kept, ReLU6 as Clip, logits out.

    The first axis of `input` and `output` is the dynamic batch `N`.
    """
    nodes: list[onnx.NodeProto] = []
    tensors = {"zero": np.float32(0.0), "six": np.float32(6.0)}
    x = "input"
    for layer in LAYERS:
        conv, norm = variables["params"][f"{layer.name}_conv"], variables["params"][f"{layer.name}_norm"]
        moments = variables["batch_stats"][f"{layer.name}_norm"]["norm"]
        gamma = np.exp(np.asarray(norm["log_scale"]))
        tensors |= {
            f"{layer.name}.weight": np.asarray(conv["kernel"]).transpose(3, 2, 0, 1),
            f"{layer.name}.gamma": gamma,
            f"{layer.name}.beta": gamma * np.asarray(norm["shift"]),
            f"{layer.name}.mean": np.asarray(moments["mean"]),
            f"{layer.name}.var": np.asarray(moments["var"]),
        }
        nodes += _layer_nodes(layer, x)
        x = f"{layer.name}.output"
    dense = variables["params"]["classifier"]
    tensors |= {
        "classifier.weight": np.asarray(dense["kernel"]).T,
        "classifier.bias": np.asarray(dense["bias"]),
    }
    nodes += [
        helper.make_node("GlobalAveragePool", [x], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "classifier.weight", "classifier.bias"], ["output"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", NUM_CLASSES])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="train_digits")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


def _layer_nodes(layer: Layer, x: str) -> list[onnx.NodeProto]:
    settings = {
        "kernel_shape": [layer.kernel] * 2,
        "strides": [layer.stride] * 2,
        "pads": [layer.kernel // 2] * 4,
        "group": layer.channels if layer.depthwise else 1,
    }
    conv, norm, output = (f"{layer.name}.{part}" for part in ("conv", "norm", "output"))
    statistics = [f"{layer.name}.{part}" for part in ("gamma", "beta", "mean", "var")]
    return [
        helper.make_node("Conv", [x, f"{layer.name}.weight"], [conv], **settings),
        helper.make_node("BatchNormalization", [conv, *statistics], [norm], epsilon=EPSILON),
        helper.make_node("Clip", [norm, "zero", "six"], [output]),
    ]


def write(directory: Path, *, epochs: int = 40, seed: int = 0) -> float:
    """Trains, writes the ONNX file and the two data files into `directory`; returns the held-out accuracy in 0..1."""
    digits = load(seed=seed)
    variables = train(digits.train, digits.train_labels, epochs=epochs, seed=seed)
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(to_onnx(variables), directory / "digits.onnx")
    np.savez_compressed(directory / "digits_calibration.npz", input=digits.train[:NUM_CALIBRATION])
    np.savez_compressed(directory / "digits_evaluation.npz", input=digits.evaluation, labels=digits.evaluation_labels)
    predicted = predict(variables, digits.evaluation).argmax(1)
    return float((predicted == digits.evaluation_labels).mean())


def main() -> None:
    """Reads the command line, trains and writes."""
    parser = argparse.ArgumentParser(description="Train a small network on digits and write it as ONNX.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory to write into")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    accuracy = write(arguments.out, epochs=arguments.epochs, seed=arguments.seed)
    print(f"{arguments.out / 'digits.onnx'}: {100 * accuracy:.1f} % of the held-out digits")


if __name__ == "__main__":
    main()
