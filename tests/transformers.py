"""Small transformers for tests, built by hand: blocks that norm first or last, some with outliers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptqjax.ir import Constant, Graph, Model, Node, TensorSpec, verify
from tests.models import Tensors, node


class Blocks(Tensors):
    """A graph under construction: tensors are [samples, places, width]; methods return the tensor that they produce."""

    def __init__(
        self, inputs: Sequence[TensorSpec], *, width: int = 16, heads: int = 2, seed: int = 0, dtype: type = np.float32,
        norm: str = "operator",
    ) -> None:  # fmt: skip
        self.inputs, self.width, self.heads, self.dtype, self.norm = tuple(inputs), width, heads, dtype, norm
        self.nodes: list[Node] = []
        self.params: dict[str, np.ndarray] = {}
        self.constants: dict[str, Constant] = {}
        self.random = np.random.default_rng(seed)

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op_type}{len(self.nodes)}"
        self.nodes.append(node(op_type, inputs, output, **attributes))
        return output

    def linear(self, x: str, inputs: int, outputs: int, *, bias: bool = True) -> str:
        y = self.add("MatMul", x, self.param(self.random.normal(size=(inputs, outputs)) / np.sqrt(inputs)))
        return self.add("Add", y, self.param(self.random.normal(size=outputs) / 4)) if bias else y

    def normalized(self, x: str, outliers: float = 1.0) -> str:
        """A LayerNormalization, or root mean square in pieces; one channel of eight is `outliers` times as large."""
        gains = np.where(np.arange(self.width) % 8 == 3, outliers, 1.0) * np.exp(
            self.random.normal(size=self.width) / 4
        )
        shifts = self.random.normal(size=self.width) * gains
        if self.norm == "operator":
            return self.add("LayerNormalization", x, self.param(gains), self.param(shifts), axis=-1, epsilon=1e-5)
        mean = self.add("ReduceMean", self.add("Mul", x, x), axes=(-1,), keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, self.param(1e-5)))
        return self.add("Mul", self.add("Div", x, root), self.param(gains))

    def split(self, x: str) -> str:
        """[n, t, width] as [n, heads, t, width / heads]."""
        x = self.add("Reshape", x, self.ints(0, 0, self.heads, self.width // self.heads))
        return self.add("Transpose", x, perm=(0, 2, 1, 3))

    def attention(self, x: str, source: str, mask: str = "") -> str:
        q, k, v = (self.split(self.linear(each, self.width, self.width)) for each in (x, source, source))
        q = self.add("Mul", q, self.param((self.width / self.heads) ** -0.5))
        scores = self.add("MatMul", q, self.add("Transpose", k, perm=(0, 1, 3, 2)))
        scores = self.add("Add", scores, mask) if mask else scores
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), v)
        mixed = self.add("Transpose", mixed, perm=(0, 2, 1, 3))
        return self.linear(self.add("Reshape", mixed, self.ints(0, 0, self.width)), self.width, self.width)

    def gelu(self, x: str) -> str:
        erf = self.add("Add", self.add("Erf", self.add("Div", x, self.param(2**0.5))), self.param(1.0))
        return self.add("Mul", self.add("Mul", x, erf), self.param(0.5))

    def feed_forward(self, x: str) -> str:
        return self.linear(self.gelu(self.linear(x, self.width, 2 * self.width)), 2 * self.width, self.width)

    def gated(self, x: str) -> str:
        gate = self.linear(x, self.width, 2 * self.width, bias=False)
        gate = self.add("Mul", gate, self.add("Sigmoid", gate))
        return self.linear(
            self.add("Mul", gate, self.linear(x, self.width, 2 * self.width, bias=False)), 2 * self.width, self.width,
            bias=False,
        )  # fmt: skip

    def post_norm(self, x: str, mask: str = "", outliers: float = 1.0) -> str:
        x = self.normalized(self.add("Add", self.attention(x, x, mask), x), outliers)
        return self.normalized(self.add("Add", self.feed_forward(x), x), outliers)

    def pre_norm(self, x: str, source: str = "", mask: str = "", outliers: float = 1.0) -> str:
        y = self.normalized(x, outliers)
        x = self.add("Add", x, self.attention(y, y, mask))
        if source:
            x = self.add("Add", x, self.attention(self.normalized(x, outliers), source))
        return self.add("Add", x, self.gated(self.normalized(x, outliers)))

    def build(self, *outputs: str) -> Model:
        graph = Graph(
            name="test",
            inputs=self.inputs,
            outputs=tuple(TensorSpec(name=name, dtype=np.dtype(self.dtype), shape=None) for name in outputs),
            nodes=tuple(self.nodes),
            constants=tuple(sorted(self.constants.items())),
            parameters=tuple(sorted(self.params)),
            opsets=(("", 17),),
        )
        return verify(Model(graph=graph, params=dict(self.params)))


def _spec(name: str, shape: Sequence[int | str], dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec(name=name, dtype=np.dtype(dtype), shape=tuple(shape))


def encoder(*, outliers: float = 12.0, depth: int = 2, dtype: type = np.float32, norm: str = "operator") -> Model:
    """Blocks that norm last, as in BERT, over tensors [N, 6, 16], and a head."""
    blocks = Blocks([_spec("x", ("N", 6, 16), dtype)], dtype=dtype, norm=norm)
    x = blocks.normalized("x", outliers)
    for _ in range(depth):
        x = blocks.post_norm(x, outliers=outliers)
    pooled = blocks.add("ReduceMean", x, axes=(1,), keepdims=0)
    return blocks.build(blocks.linear(pooled, 16, 5, bias=False))


def speech_encoder(*, outliers: float = 12.0) -> Model:
    """Two convolutions over time of spectra [N, 8, 16], a GELU behind each, positions, and blocks that norm first."""
    blocks = Blocks([_spec("x", ("N", 8, 16))])
    x, channels = "x", 8
    for stride in (1, 2):
        weight = blocks.random.normal(size=(16, channels, 3)) / np.sqrt(3 * channels)
        names = blocks.param(weight), blocks.param(blocks.random.normal(size=16) / 4)
        x = blocks.gelu(blocks.add("Conv", x, *names, pads=(1, 1), strides=(stride,), kernel_shape=(3,)))
        channels = 16
    x = blocks.add("Transpose", x, perm=(0, 2, 1))
    x = blocks.add("Add", x, blocks.param(blocks.random.normal(size=(8, 16)) / 2))
    x = blocks.pre_norm(blocks.pre_norm(x, outliers=outliers), outliers=outliers)
    return blocks.build(blocks.normalized(x))


def decoder(*, outliers: float = 12.0) -> Model:
    """Token ids and an encoder's states; a causal mask of -1e4, cross attention, root mean squares, a head."""
    inputs = _spec("ids", ("N", 6), np.int64), _spec("states", ("N", 4, 16))
    blocks = Blocks(inputs, norm="pieces")
    x = blocks.add("Gather", blocks.param(blocks.random.normal(size=(40, 16))), "ids", axis=0)
    mask = blocks.param(np.triu(np.full((6, 6), -1e4), 1))
    for _ in range(2):
        x = blocks.pre_norm(x, "states", mask, outliers)
    return blocks.build(blocks.linear(blocks.normalized(x), 16, 40, bias=False))


def samples(model: Model, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: ids below 40, the others normal."""
    random, found = np.random.default_rng(seed), {}
    for spec in model.graph.inputs:
        shape = (count, *(int(size) for size in spec.shape[1:]))
        values = random.integers(0, 40, shape) if spec.dtype.kind == "i" else random.normal(size=shape)
        found[spec.name] = values.astype(spec.dtype)
    return found
