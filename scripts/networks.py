"""Networks with random weights, for benches: nothing has to be downloaded, and time does not depend on the values.

Batch norms are folded, as exporters do it. Weights have He's scale, so that activations neither vanish nor overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = 17
_IR_VERSION = 8
_SHRINK_RESIDUAL = 0.25  # the last layer of a branch: sums over many blocks stay of one magnitude


def resnet18(*, size: int = 224, classes: int = 1000) -> onnx.ModelProto:
    """Returns ResNet-18 for images of `size`."""
    return _resnet((2, 2, 2, 2), _basic_block, size=size, classes=classes, name="resnet18")


def resnet50(*, size: int = 224, classes: int = 1000) -> onnx.ModelProto:
    """Returns ResNet-50 (stride in the 3x3 convolution) for images of `size`."""
    return _resnet((3, 4, 6, 3), _bottleneck, size=size, classes=classes, name="resnet50")


def resnext50(*, size: int = 224, classes: int = 1000) -> onnx.ModelProto:
    """Returns ResNeXt-50 32x4d for images of `size`."""

    def block(net: _Network, x: str, width: int, channels: int, stride: int) -> str:
        return _bottleneck(net, x, 2 * width, channels, stride, group=32)

    return _resnet((3, 4, 6, 3), block, size=size, classes=classes, name="resnext50")


def mobilenet_v2(*, size: int = 224, classes: int = 1000) -> onnx.ModelProto:
    """Returns MobileNetV2 of width 1 for images of `size`."""
    net = _Network("mobilenet_v2")
    x, channels = net.conv("input", 3, 32, kernel=3, stride=2, act="relu6"), 32
    for expansion, out, repeats, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for position in range(repeats):
            stride = first_stride if position == 0 else 1
            hidden = expansion * channels
            y = x if expansion == 1 else net.conv(x, channels, hidden, act="relu6")
            y = net.conv(y, hidden, hidden, kernel=3, stride=stride, group=hidden, act="relu6")
            y = net.conv(y, hidden, out, gain=_SHRINK_RESIDUAL if position else 1.0)
            x = net.add("Add", x, y) if position else y
            channels = out
    x = net.conv(x, channels, 1280, act="relu6")
    return net.classifier(x, 1280, size=size, classes=classes)


def vit_s16(*, size: int = 224, classes: int = 1000) -> onnx.ModelProto:
    """Returns ViT-S/16 (12 blocks of width 384 with 6 heads; the mean of its places is classified) for images."""
    net, width = _Network("vit_s16"), 384
    patches = net.conv("input", 3, width, kernel=16, stride=16, pad=0)
    x = net.add("Transpose", net.add("Reshape", patches, net.integers(0, width, -1)), perm=[0, 2, 1])
    x = net.add("Add", x, net.weight(net.random.normal(0.0, 0.02, (1, (size // 16) ** 2, width))))
    for _ in range(12):
        x = net.add("Add", x, _attention(net, net.norm(x, width), width, 6))
        hidden = _gelu(net, net.linear(net.norm(x, width), width, 4 * width))
        x = net.add("Add", x, net.linear(hidden, 4 * width, width, gain=_SHRINK_RESIDUAL))
    x = net.add("Transpose", net.norm(x, width), perm=[0, 2, 1])
    return net.classifier(x, width, size=size, classes=classes)


def every_kind(*, size: int = 32, classes: int = 10) -> onnx.ModelProto:
    """Returns a network of a few layers of each kind: dense, pointwise, depthwise, grouped, a sum, fully connected."""
    net = _Network("every_kind")
    x = net.conv("input", 3, 32, kernel=3, stride=2, act="relu6")
    y = net.conv(x, 32, 64, act="relu6")
    y = net.conv(y, 64, 64, kernel=3, group=64, act="relu6")
    x = net.add("Add", net.conv(y, 64, 32, gain=_SHRINK_RESIDUAL), x)
    x = net.conv(x, 32, 64, kernel=3, group=8, stride=2, act="relu")
    x = net.conv(x, 64, 64, kernel=3, group=2, act="relu")
    x = net.conv(net.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), 64, 64, kernel=3, act="relu")
    return net.classifier(x, 64, size=size, classes=classes)


NETWORKS: dict[str, Callable[..., onnx.ModelProto]] = {
    "every_kind": every_kind,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnext50": resnext50,
    "vit_s16": vit_s16,
}
"""The networks by name."""


class _Network:
    """A graph that grows node by node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def weight(self, value: np.ndarray) -> str:
        """Adds an initializer and returns its name."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def conv(
        self,
        x: str,
        channels: int,
        out: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        group: int = 1,
        act: str = "",
        gain: float = 1.0,
        pad: int | None = None,
    ) -> str:
        """Adds a convolution with a bias, "same" padding unless told, and an activation ("relu", "relu6" or none)."""
        fan_in = channels // group * kernel**2
        w = self.random.normal(0.0, gain * (2 / fan_in) ** 0.5, (out, channels // group, kernel, kernel))
        b = self.random.normal(0.0, 0.1, out)
        pads = [kernel // 2 if pad is None else pad] * 4
        y = self.add("Conv", x, self.weight(w), self.weight(b), pads=pads, strides=[stride] * 2, group=group)
        if act == "relu6":
            return self.add("Clip", y, self.weight(np.array(0)), self.weight(np.array(6)))
        return self.add("Relu", y) if act else y

    def integers(self, *values: int) -> str:
        """Adds an initializer of integers and returns its name."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def linear(self, x: str, channels: int, out: int, *, gain: float = 1.0) -> str:
        """Adds a product with a matrix, and a bias."""
        w = self.random.normal(0.0, gain * channels**-0.5, (channels, out))
        return self.add("Add", self.add("MatMul", x, self.weight(w)), self.weight(np.zeros(out)))

    def norm(self, x: str, channels: int) -> str:
        """Adds a LayerNormalization over the last axis."""
        ones, zeros = self.weight(np.ones(channels)), self.weight(np.zeros(channels))
        return self.add("LayerNormalization", x, ones, zeros, axis=-1)

    def classifier(self, x: str, channels: int, *, size: int, classes: int) -> onnx.ModelProto:
        """Returns the model that ends in a global average pool and a fully connected layer."""
        x = self.add("Flatten", self.add("GlobalAveragePool", x))
        w = self.random.normal(0.0, channels**-0.5, (classes, channels))
        x = self.add("Gemm", x, self.weight(w), self.weight(np.zeros(classes)), transB=1)
        self.nodes[-1].output[0] = "output"
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, size, size])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", classes])],
            self.weights,
        )
        opset = helper.make_opsetid("", _OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="ptqjax-bench")


def _resnet(
    repeats: tuple[int, ...], block: Callable[..., str], *, size: int, classes: int, name: str
) -> onnx.ModelProto:
    expansion = 1 if block is _basic_block else 4
    net = _Network(name)
    x = net.conv("input", 3, 64, kernel=7, stride=2, act="relu")
    x, channels = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), 64
    for stage, count in enumerate(repeats):
        width = 64 * 2**stage
        out = expansion * width
        for position in range(count):
            stride = 2 if stage and not position else 1
            shortcut = x if channels == out and stride == 1 else net.conv(x, channels, out, stride=stride)
            branch = block(net, x, width, channels, stride)
            x, channels = net.add("Relu", net.add("Add", branch, shortcut)), out
    return net.classifier(x, channels, size=size, classes=classes)


def _basic_block(net: _Network, x: str, width: int, channels: int, stride: int) -> str:
    y = net.conv(x, channels, width, kernel=3, stride=stride, act="relu")
    return net.conv(y, width, width, kernel=3, gain=_SHRINK_RESIDUAL)


def _bottleneck(net: _Network, x: str, width: int, channels: int, stride: int, *, group: int = 1) -> str:
    out = 4 * width if group == 1 else 2 * width
    y = net.conv(x, channels, width, act="relu")
    y = net.conv(y, width, width, kernel=3, stride=stride, group=group, act="relu")
    return net.conv(y, width, out, gain=_SHRINK_RESIDUAL)


def _attention(net: _Network, x: str, width: int, heads: int) -> str:
    """Adds attention of all places to all, over several heads."""
    query, key, value = (net.linear(x, width, width) for _ in range(3))
    shape = net.integers(0, 0, heads, width // heads)
    rows, columns, values = (
        net.add("Transpose", net.add("Reshape", each, shape), perm=perm)
        for each, perm in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
    )
    scores = net.add("Mul", net.add("MatMul", rows, columns), net.weight(np.array((width // heads) ** -0.5)))
    mixed = net.add("MatMul", net.add("Softmax", scores, axis=-1), values)
    joined = net.add("Reshape", net.add("Transpose", mixed, perm=[0, 2, 1, 3]), net.integers(0, 0, width))
    return net.linear(joined, width, width, gain=_SHRINK_RESIDUAL)


def _gelu(net: _Network, x: str) -> str:
    """Adds x (1 + erf(x / sqrt 2)) / 2 in the pieces that exporters write."""
    erf = net.add("Erf", net.add("Mul", x, net.weight(np.array(2**-0.5))))
    whole = net.add("Mul", x, net.add("Add", erf, net.weight(np.array(1.0))))
    return net.add("Mul", whole, net.weight(np.array(0.5)))
