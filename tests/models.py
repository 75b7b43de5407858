"""Small models for tests, built by hand: chains of layers with every setting that transforms must heed."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
from onnx.reference import ReferenceEvaluator

from ptqjax.ir import Constant, Graph, Model, Node, TensorSpec, verify
from ptqjax.lowering import apply
from ptqjax.onnx_io import to_proto


def build(
    nodes: Sequence[Node],
    params: Mapping[str, np.ndarray],
    *,
    input_shape: tuple[int | str | None, ...],
    outputs: Sequence[str],
    dtype: type = np.float32,
    opset: int = 17,
) -> Model:
    """A model with one input, `x`."""
    graph = Graph(
        name="test",
        inputs=(TensorSpec(name="x", dtype=np.dtype(dtype), shape=input_shape),),
        outputs=tuple(TensorSpec(name=name, dtype=np.dtype(dtype), shape=None) for name in outputs),
        nodes=tuple(nodes),
        parameters=tuple(sorted(params)),
        opsets=(("", opset),),
    )
    return verify(Model(graph=graph, params=dict(params)))


def node(op_type: str, inputs: Sequence[str], output: str, **attributes: object) -> Node:
    """An unnamed node with one output; attributes that are not given are absent."""
    return Node(op_type=op_type, inputs=tuple(inputs), outputs=(output,), attributes=tuple(sorted(attributes.items())))


class Tensors:
    """Parameters and constants of a graph under construction, named in their order."""

    params: dict[str, np.ndarray]
    constants: dict[str, Constant]
    dtype: type

    def param(self, value: object) -> str:
        name = f"p{len(self.params)}"
        self.params[name] = np.asarray(value, self.dtype)
        return name

    def ints(self, *values: int) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = Constant(np.array(values, np.int64))
        return name


def random_input(model: Model, seed: int) -> dict[str, np.ndarray]:
    spec = model.graph.inputs[0]
    shape = [2 if size == "N" else size for size in spec.shape]
    return {spec.name: np.random.default_rng(seed).normal(size=shape).astype(spec.dtype)}


def outputs(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """What ONNX's own evaluator makes of the model for a random input: an oracle that compiles nothing."""
    names = [found.name for found in model.graph.outputs]
    # In onnx 1.23 it fails on grouped ConvTranspose, and mistakes the batch norms of operator sets before 14.
    if any(found.op_type == "ConvTranspose" for found in model.graph.nodes) or model.graph.opset() < 14:
        return {name: np.asarray(y) for name, y in apply(model.graph, model.params, random_input(model, seed)).items()}
    with np.errstate(all="ignore"):
        values = ReferenceEvaluator(to_proto(model)).run(names, random_input(model, seed))
    return dict(zip(names, values, strict=True))


def assert_same_function(after: Model, before: Model, tolerance: float, seed: int = 0) -> None:
    """Outputs agree to `tolerance` of the largest one."""
    expected, found = outputs(before, seed), outputs(after, seed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        scale = np.abs(value.astype(np.float64)).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


class Chain:
    """Layers one after another; each method adds a node that reads what the one before produced."""

    def __init__(
        self, channels: int, *, rank: int = 2, seed: int = 0, dtype: type = np.float64, size: int = 8, opset: int = 17
    ) -> None:
        self.nodes: list[Node] = []
        self.params: dict[str, np.ndarray] = {}
        self.tensor = "x"
        self.rank = rank
        self.channels = channels
        self.dtype = dtype
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.input_shape = (2, channels) + (size,) * rank

    def add(self, op_type: str, *others: str, **attributes: object) -> Self:
        output = f"t{len(self.nodes)}"
        self.nodes.append(node(op_type, (self.tensor, *others), output, **attributes))
        self.tensor = output
        return self

    def param(self, name: str, value: object) -> str:
        name = f"{name}{len(self.nodes)}"
        self.params[name] = np.asarray(value, self.dtype)
        return name

    def conv(
        self,
        channels: int,
        *,
        kernel: int = 3,
        group: int | None = None,
        pad: int = 0,
        bias: bool = False,
        **more: object,
    ) -> Self:
        """A convolution whose output channels differ in range by orders of magnitude."""
        spread = np.exp(self.random.normal(size=(channels,) + (1,) * (self.rank + 1)))
        shape = (channels, self.channels // (group or 1), *(kernel,) * self.rank)
        names = [self.param("w", spread * self.random.normal(size=shape))]
        names += [self.param("b", self.random.normal(size=channels))] if bias else []
        settings = {"pads": (pad,) * 2 * self.rank} if pad else {}
        settings |= {"group": group} if group else {}
        self.channels = channels
        return self.add("Conv", *names, **settings, **more)

    def depthwise(self, **settings: object) -> Self:
        return self.conv(self.channels, group=self.channels, **settings)

    def conv_transpose(self, channels: int, *, kernel: int = 3, group: int = 1, bias: bool = False) -> Self:
        shape = (self.channels, channels // group, *(kernel,) * self.rank)
        names = [self.param("w", self.random.normal(size=shape))]
        names += [self.param("b", self.random.normal(size=channels))] if bias else []
        self.channels = channels
        return self.add("ConvTranspose", *names, group=group)

    def gemm(
        self, channels: int, *, trans_b: int = 1, alpha: float = 1.0, beta: float = 1.0, bias: bool = True
    ) -> Self:
        weight = self.random.normal(size=(channels, self.channels))
        weight *= np.exp(self.random.normal(size=(channels, 1)))
        names = [self.param("w", weight if trans_b else weight.T)]
        names += [self.param("b", self.random.normal(size=channels))] if bias else []
        self.channels = channels
        return self.add("Gemm", *names, alpha=alpha, beta=beta, transB=trans_b)

    def matmul(self, channels: int, *, bias: bool = False) -> Self:
        self.add("MatMul", self.param("w", self.random.normal(size=(self.channels, channels))))
        self.channels = channels
        return self.add("Add", self.param("b", self.random.normal(size=channels))) if bias else self

    def norm(self, *, epsilon: float = 1.0, **more: object) -> Self:
        """A batch norm in which every term matters: an epsilon as large as the variance, negative gammas."""
        c = self.channels
        gamma = self.param("gamma", self.random.normal(size=c))
        beta = self.param("beta", self.random.normal(size=c))
        mean = self.param("mean", self.random.normal(size=c))
        variance = self.param("variance", self.random.uniform(0.5, 1.5, size=c))
        return self.add("BatchNormalization", gamma, beta, mean, variance, epsilon=epsilon, **more)

    def clip(self, low: float | None = 0.0, high: float | None = 6.0) -> Self:
        """A Clip with its bounds as initializers, as after constant folding."""
        names = ["" if limit is None else self.param(name, limit) for name, limit in (("lo", low), ("hi", high))]
        return self.add("Clip", *names)

    def prelu(self) -> Self:
        return self.add("PRelu", self.param("slope", self.random.normal(size=(self.channels,) + (1,) * self.rank)))

    def build(self, *outputs: str) -> Model:
        """The model; its outputs are the last tensor and those named."""
        shape = ("N", *self.input_shape[1:])
        last = (self.tensor, *outputs)
        return build(self.nodes, self.params, input_shape=shape, outputs=last, dtype=self.dtype, opset=self.opset)


def mobile_block(*, dtype: type = np.float64, seed: int = 0, pad: int = 1, channels: int = 6) -> Model:
    """conv-bn-relu6, depthwise-bn-relu6, pointwise-bn: the block that per-tensor quantization breaks."""
    chain = Chain(3, dtype=dtype, seed=seed)
    chain.conv(channels, pad=pad).norm().clip().depthwise(pad=pad).norm().clip()
    return chain.conv(4, kernel=1).norm().build()
