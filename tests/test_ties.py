"""Laws of scaling between channels: any scales that the ties allow keep the function, and nothing is left silently."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from ptqjax.errors import ConfigError
from ptqjax.ir import Constant, Graph, Model, Node, Report, Statistics, TensorSpec, text, verify
from ptqjax.onnx_io import to_proto
from ptqjax.transforms import scale_channels
from ptqjax.transforms.balance import weight_balance
from ptqjax.transforms.relaxation import relax_bounds
from ptqjax.transforms.rescale import rescale
from ptqjax.transforms.ties import Ties, find_ties
from tests import models
from tests.models import Tensors, node, random_input

EXACT = {np.float64: 1e-12, np.float32: 1e-5}  # some ten layers of some fifty products, each rounded once


class Net(Tensors):
    """A graph under construction: methods add nodes behind `tensor`; a branch begins by setting `tensor`."""

    def __init__(
        self, *, rank: int = 2, channels: int = 4, size: int = 5, seed: int = 0, dtype: type = np.float64,
        opset: int = 17,
    ) -> None:  # fmt: skip
        self.nodes: list[Node] = []
        self.params: dict[str, np.ndarray] = {}
        self.constants: dict[str, Constant] = {}
        self.outputs: list[str] = []
        self.tensor, self.rank, self.channels, self.size = "x", rank, channels, size
        self.dtype, self.opset, self.random = dtype, opset, np.random.default_rng(seed)
        self.shape = ("N", channels, *(size,) * rank)

    def add(self, op_type: str, *others: str, **attributes: object) -> Self:
        output = f"t{len(self.nodes)}"
        self.nodes.append(node(op_type, (self.tensor, *others), output, **attributes))
        self.tensor = output
        return self

    def normal(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=shape)

    @property
    def here(self) -> tuple[str, int]:
        return self.tensor, self.channels

    def at(self, here: tuple[str, int]) -> Self:
        self.tensor, self.channels = here
        return self

    def per_channel(self, values: np.ndarray) -> str:
        return self.param(values.reshape((-1,) + (1,) * self.rank))

    # --- layers

    def conv(self, channels: int = 0, *, kernel: int = 3, group: int = 1, bias: bool = True, **more: object) -> Self:
        channels = channels or self.channels
        fan_in = self.channels // group * kernel**self.rank
        weight = self.normal(channels, self.channels // group, *(kernel,) * self.rank) / np.sqrt(fan_in)
        weight *= np.exp(self.normal(channels)).reshape((-1,) + (1,) * (self.rank + 1))
        names = [self.param(weight)] + ([self.param(self.normal(channels))] if bias else [])
        settings = {"pads": (kernel // 2,) * 2 * self.rank} | ({"group": group} if group > 1 else {}) | more
        self.channels = channels
        return self.add("Conv", *names, **settings)

    def conv_transpose(self, channels: int, *, group: int = 1) -> Self:
        weight = self.normal(self.channels, channels // group, *(3,) * self.rank) / np.sqrt(self.channels)
        self.channels = channels
        settings = {"group": group} if group > 1 else {}
        return self.add("ConvTranspose", self.param(weight), self.param(self.normal(channels)),
                        pads=(1,) * 2 * self.rank, **settings)  # fmt: skip

    def gemm(self, inputs: int, channels: int) -> Self:
        weight = self.normal(channels, inputs) / np.sqrt(inputs)
        self.channels = channels
        return self.add("Gemm", self.param(weight), self.param(self.normal(channels)), transB=1)

    def matmul(self, inputs: int, channels: int, *, bias: bool = True) -> Self:
        self.channels = channels
        self.add("MatMul", self.param(self.normal(inputs, channels) / np.sqrt(inputs)))
        return self.add("Add", self.param(self.normal(channels))) if bias else self

    # --- between them

    def clip(self, low: float | None, high: float | None) -> Self:
        if self.opset < 11:
            bounds = {"min": low, "max": high}
            return self.add("Clip", **{name: value for name, value in bounds.items() if value is not None})
        return self.add("Clip", *["" if limit is None else self.param(limit) for limit in (low, high)])

    def slices(self, starts: Sequence[int], stops: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> Self:
        return self.add("Slice", self.ints(*starts), self.ints(*stops), self.ints(*axes), self.ints(*steps))

    def pad(self, *, channels: tuple[int, int] = (0, 0), space: int = 0, value: float | None = None) -> Self:
        pads = (0, channels[0], *(space,) * self.rank, 0, channels[1], *(space,) * self.rank)
        self.channels, self.size = self.channels + sum(channels), self.size + 2 * space
        return self.add("Pad", self.ints(*pads), *([] if value is None else [self.param(value)]))

    def pool(self, op_type: str, kernel: int) -> Self:
        kernel = min(kernel, self.size)
        self.size -= kernel - 1
        return self.add(op_type, kernel_shape=(kernel,) * self.rank)

    def build(self) -> Model:
        names = (self.tensor, *dict.fromkeys(name for name in self.outputs if name != self.tensor))
        graph = Graph(
            name="test",
            inputs=(TensorSpec(name="x", dtype=np.dtype(self.dtype), shape=self.shape),),
            outputs=tuple(TensorSpec(name=name, dtype=np.dtype(self.dtype), shape=None) for name in names),
            nodes=tuple(self.nodes),
            constants=tuple(sorted(self.constants.items())),
            parameters=tuple(sorted(self.params)),
            opsets=(("", self.opset),),
        )
        return verify(Model(graph=graph, params=dict(self.params)))


def evaluate(model: Model, seed: int) -> dict[str, np.ndarray]:
    """What ONNX's own evaluator makes of the model, save where it fails: on grouped ConvTranspose."""
    if any(found.op_type == "ConvTranspose" and found.attribute("group", 1) > 1 for found in model.graph.nodes):
        return models.outputs(model, seed)
    names = [found.name for found in model.graph.outputs]
    with np.errstate(all="ignore"):
        values = ReferenceEvaluator(to_proto(model)).run(names, random_input(model, seed))
    return dict(zip(names, values, strict=True))


def random_scales(ties: Ties, seed: int) -> np.ndarray:
    scales = np.random.default_rng(seed).normal(size=ties.num_scales)
    scales[0] = 0.0
    return scales


def assert_free(model: Model, tolerance: float = 1e-12, seed: int = 0, wide: Model | None = None) -> Ties:
    """Random scales keep the function, the caller's model stays; every fixed layer has a reason. Returns the ties.

    With `wide`, the model in float64, the difference may also be ten times what rounding does to the model itself.
    """
    before, values = text(model), {name: value.copy() for name, value in model.params.items()}
    ties = find_ties(model)
    scaled = rescale(model, ties, random_scales(ties, seed))
    expected, found = evaluate(model, seed), evaluate(scaled, seed)
    exact = expected if wide is None else evaluate(wide, seed)
    for name, value in expected.items():
        assert np.isfinite(value).all()
        assert found[name].dtype == value.dtype
        own = float(np.abs(value - exact[name]).max(initial=0.0))
        allowed = tolerance * float(np.abs(value).max(initial=1e-30)) + 10 * own
        np.testing.assert_allclose(found[name], value, rtol=0, atol=allowed, err_msg=name)
    assert text(model) == before
    for name, value in values.items():
        np.testing.assert_array_equal(model.params[name], value)
    fixed = {output for output, tied in ties.layers.items() if not tied.outputs.any()}
    assert fixed == set(ties.reasons)
    assert all(ties.reasons.values())
    return ties


# --- graphs from a grammar: blocks of images, then a head

Block = Callable[[Net], object]


def relu(net: Net) -> Net:
    return net.add("Relu")


def identity_shortcut(net: Net) -> None:
    tensor = net.tensor
    net.conv().add("Relu").conv().add("Add", tensor).add("Relu")


def projection_shortcut(net: Net) -> None:
    start = net.here
    net.conv(6).add("LeakyRelu", alpha=0.1).conv(6, kernel=1)
    main = net.tensor
    net.at(start).conv(6, kernel=1, bias=False).add("Sum", main).add("Relu")


def slice_and_pad_shortcut(net: Net) -> None:  # as in ResNet-20
    start, size = net.here, net.size
    net.conv(net.channels + 3, strides=(2,) * net.rank).add("Relu").conv()
    main, halved = net.here, (net.size + 1) // 2
    axes = range(2, 2 + net.rank)
    net.at(start).slices([0] * net.rank, [size] * net.rank, list(axes), [2] * net.rank).pad(channels=(1, 2))
    net.size = halved
    net.add("Add", main[0]).add("Relu")


def joined_branches(net: Net) -> None:
    start = net.here
    first = net.conv(3, kernel=1).add("Relu").tensor
    net.at(start).conv(2).add("LeakyRelu", alpha=0.3).add("Concat", first, axis=1)
    net.channels = 5


def joined_with_a_fixed_branch(net: Net) -> None:
    start = net.here
    first = net.conv(3, kernel=1).add("Sigmoid").conv(3, kernel=1).tensor
    net.outputs.append(first)
    net.at(start).conv(3).add("Relu").add("Concat", first, axis=-1 - net.rank)
    net.channels = 6


def joined_along_space(net: Net) -> None:
    start = net.here
    first = net.conv(3, kernel=1).tensor
    net.at(start).conv(3).add("Concat", first, axis=2)
    net.slices([0], [net.size], [2], [1])


def split_and_swapped(net: Net) -> None:
    net.conv(6)
    names = [f"{net.tensor}_a", f"{net.tensor}_b"]
    sizes = net.ints(2, 4)
    net.nodes.append(Node(op_type="Split", inputs=(net.tensor, sizes), outputs=tuple(names), attributes=(("axis", 1),)))
    first = net.at((names[0], 2)).add("Relu").tensor
    net.at((names[1], 4)).conv(3, kernel=1).add("Concat", first, axis=1)
    net.channels = 5


def split_in_halves(net: Net) -> None:  # ShuffleNet's and GLU's: the halves meet again
    net.conv(6)
    names = (f"{net.tensor}_a", f"{net.tensor}_b")
    net.nodes.append(Node(op_type="Split", inputs=(net.tensor,), outputs=names, attributes=(("axis", 1),)))
    net.at((names[0], 3)).add("Relu").add("Add", names[1])


def sliced(net: Net) -> None:
    net.conv(6).slices([-1], [-100], [1], [-2])  # channels 5, 3, 1
    net.channels = 3


def squeeze_and_excite(net: Net) -> None:
    trunk = net.conv(4).add("Relu").here
    net.add("GlobalAveragePool").conv(2, kernel=1).add("Relu").conv(4, kernel=1).add("Sigmoid")
    net.add("Mul", trunk[0]).at((net.tensor, 4))


def gate_of_matrices(net: Net) -> None:  # as EfficientNets are exported from channels-last code
    trunk = net.conv(4).add("Relu").here
    net.add("GlobalAveragePool").add("Flatten").gemm(4, 2).add("Relu").gemm(2, 4).add("Sigmoid")
    net.add("Reshape", net.ints(-1, 4, *(1,) * net.rank)).add("Mul", trunk[0]).at((net.tensor, 4))


def product_of_branches(net: Net) -> None:
    start = net.here
    first = net.conv(4).add("LeakyRelu", alpha=0.1).tensor
    net.at(start).conv(4).add("Relu").add("Mul", first)


def hard_gate(net: Net) -> None:
    trunk = net.conv(4).add("Relu").here
    net.conv(4, kernel=1).clip(0.0, 1.0).add("Mul", trunk[0])


def shared_weight(net: Net) -> None:
    net.conv(4, kernel=1)
    weight, bias = net.nodes[-1].inputs[1:]
    other = net.add("Relu").conv(4, kernel=1).tensor
    net.nodes[-1] = replace(net.nodes[-1], inputs=(*net.nodes[-1].inputs[:2], bias))  # shares the bias
    net.tensor = other
    net.conv(4).add("Relu").add("Conv", weight)


def shared_bounds(net: Net) -> None:
    net.conv().clip(0.0, 0.75)
    bounds = net.nodes[-1].inputs[1:] if net.opset > 10 else ()
    net.conv()
    net.add("Clip", *bounds) if bounds else net.clip(0.0, 0.75)
    bound = net.per_channel(np.full(4, 0.5))
    net.conv(4).add("Min", bound).conv(4).add("Min", bound)


def shared_addend(net: Net) -> None:
    addend = net.per_channel(net.normal(4))
    net.conv(4).add("Add", addend).add("Relu").conv(4).add("Add", addend)


def read_by_a_branch_of_if(net: Net) -> None:
    net.conv()
    spec = TensorSpec(name="", dtype=np.dtype(net.dtype), shape=None)
    branches = [
        (f"{kind}_branch", Graph(name=kind, inputs=(), outputs=(replace(spec, name=f"{net.tensor}_{kind}"),),
         nodes=(node(op, [net.tensor], f"{net.tensor}_{kind}"),), opsets=(("", net.opset),)))
        for kind, op in (("else", "Neg"), ("then", "Exp"))
    ]  # fmt: skip
    condition = f"c{len(net.constants)}"
    net.constants[condition] = Constant(np.array(False))
    output = f"{net.tensor}_if"
    net.nodes.append(Node(op_type="If", inputs=(condition,), outputs=(output,), attributes=tuple(branches)))
    net.outputs.append(output)
    net.add("Relu").conv().add("Relu")


def shape_arithmetic(net: Net) -> None:
    tensor = net.conv().tensor
    shape = net.add("Shape").add("Cast", to=11 if net.dtype == np.float64 else 1).tensor
    net.outputs.append(shape)
    net.tensor = tensor


def output_in_the_middle(net: Net) -> None:
    net.conv(3).add("Relu")
    net.outputs.append(net.tensor)
    net.conv(4)


def padded_behind_an_output(net: Net) -> None:
    net.conv(3, kernel=1)
    net.outputs.append(net.tensor)
    net.pad(channels=(0, 1)).clip(0.25, 0.5).conv(3)


def grouped(net: Net) -> Net:
    return net.conv(4, kernel=1).add("Relu").conv(6, group=2)


BLOCKS: dict[str, Block] = {
    "Conv": lambda net: net.conv(5).add("Relu"),
    "grouped": grouped,
    "depthwise": lambda net: net.conv(group=net.channels).add("Relu"),
    "depthwise with multiplier": lambda net: net.conv(2 * net.channels, group=net.channels).conv(3, kernel=1),
    "ConvTranspose": lambda net: net.conv_transpose(4).add("Relu"),
    "identity shortcut": identity_shortcut,
    "projection shortcut": projection_shortcut,
    "slice and pad shortcut": slice_and_pad_shortcut,
    "Concat": joined_branches,
    "Concat with a fixed branch": joined_with_a_fixed_branch,
    "Concat along space": joined_along_space,
    "Split": split_and_swapped,
    "Split in halves": split_in_halves,
    "Slice": sliced,
    "gate": squeeze_and_excite,
    "gate of matrices": gate_of_matrices,
    "Mul of branches": product_of_branches,
    "hard gate": hard_gate,
    "MaxPool": lambda net: net.pool("MaxPool", 2),
    "AveragePool": lambda net: net.pool("AveragePool", 2),
    "LeakyRelu": lambda net: net.conv().add("LeakyRelu", alpha=-0.2),
    "PRelu of one number": lambda net: net.conv().add("PRelu", net.param([0.3])),
    "PRelu per channel": lambda net: net.conv().add("PRelu", net.per_channel(net.normal(net.channels))),
    "Clip": lambda net: net.conv().clip(0.0, 0.75).conv(),
    "Clip from below zero": lambda net: net.conv().clip(-0.25, 0.5).conv(),
    "Clip from above zero": lambda net: net.conv().clip(0.25, 0.5).conv(),
    "Clip on one side": lambda net: net.conv().clip(None, 0.5).conv().clip(0.25, None).conv(),
    "Min": lambda net: net.conv().add("Min", net.per_channel(net.random.uniform(0.1, 1, net.channels))).conv(),
    "Max": lambda net: net.conv().add("Max", net.per_channel(net.normal(net.channels))).conv(),
    "Max of one number": lambda net: net.conv().add("Max", net.param(0.25)).conv(),
    "Pad with zeros": lambda net: net.conv().pad(space=1).pool("MaxPool", 3),
    "Pad with a constant": lambda net: net.conv().pad(channels=(0, 1), value=0.5).conv(3, kernel=1),
    "Pad of a fixed tensor": padded_behind_an_output,
    "Mul per channel": lambda net: net.conv().add("Mul", net.per_channel(net.normal(net.channels))),
    "Mul by one number": lambda net: net.conv().add("Mul", net.param(0.5)).add("Div", net.param([2.0])),
    "Add per channel": lambda net: net.conv(bias=False).add("Add", net.per_channel(net.normal(net.channels))),
    "Add of one number": lambda net: net.conv(bias=False).add("Add", net.param(0.5)),
    "Sub per channel": lambda net: net.conv(bias=False).add("Sub", net.per_channel(net.normal(net.channels))),
    "Dropout": lambda net: net.conv().add("Dropout").add("Relu"),
    "Identity": lambda net: net.conv().add("Identity").add("Neg"),
    "Softmax": lambda net: net.conv(3).add("Softmax", axis=1),
    "If": read_by_a_branch_of_if,
    "Shape": shape_arithmetic,
    "output": output_in_the_middle,
    "shared addend": shared_addend,
    "shared weight": shared_weight,
    "shared bounds": shared_bounds,
}


def resized(net: Net) -> None:
    name = f"s{len(net.constants)}"
    net.constants[name] = Constant(np.array([1.0, 1.0, *(2.0,) * net.rank], np.float32))
    net.conv(3, kernel=1).add("Relu").add("Resize", "", name, mode="nearest")
    net.conv(3, kernel=1).add("Relu")


def pooled_and_flattened(net: Net) -> None:
    net.add("GlobalAveragePool").add("Flatten").gemm(net.channels, 5).clip(0.0, 0.5).gemm(5, 3)


def flattened(net: Net) -> None:
    positions = net.size**net.rank
    net.conv(3).add("Relu").add("Flatten").add("Dropout").gemm(3 * positions, 4).add("Relu").gemm(4, 3)


def reshaped(net: Net) -> None:
    positions = net.size**net.rank
    net.conv(3).add("Relu").add("Reshape", net.ints(0, -1)).matmul(3 * positions, 4).add("Relu").matmul(4, 3)


def squeezed(net: Net) -> None:
    net.conv(3).add("Relu").add("GlobalAveragePool").add("Squeeze", net.ints(*range(-net.rank, 0))).gemm(3, 3)


def averaged(net: Net) -> None:
    axes = tuple(range(2, 2 + net.rank))
    net.conv(3).add("Relu").add("ReduceMean", axes=axes, keepdims=0).gemm(3, 4).add("Relu").gemm(4, 3)


def unsqueezed(net: Net) -> None:
    net.conv(3).add("Relu").add("GlobalAveragePool").add("Unsqueeze", net.ints(-1)).add("Squeeze", net.ints(-1))
    net.conv(3, kernel=1).add("Relu").conv(2, kernel=1)


def transformed(net: Net) -> None:  # channels last, rank 3
    first = net.add("Relu").channels
    if net.rank == 1:
        net.add("Transpose", perm=(0, 2, 1))
    else:
        net.add("Reshape", net.ints(0, first, -1)).add("Transpose", perm=(0, 2, 1))
    net.matmul(first, 5).add("Relu")
    trunk = net.tensor
    net.matmul(5, 6).add("LeakyRelu", alpha=0.1).matmul(6, 5, bias=False).add("Add", trunk).matmul(5, 3)


HEADS: dict[str, Block] = {
    "none": lambda net: net.conv(2, kernel=1),
    "Resize": resized,
    "GlobalAveragePool and Flatten": pooled_and_flattened,
    "Flatten": flattened,
    "Reshape": reshaped,
    "Squeeze": squeezed,
    "ReduceMean": averaged,
    "Unsqueeze": unsqueezed,
    "Transpose": transformed,
}


def grown(blocks: Sequence[str], head: str, *, rank: int = 2, seed: int = 0, dtype: type = np.float64) -> Model:
    net = Net(rank=rank, seed=seed, dtype=dtype, size=4 if rank == 3 else 5).conv(4).add("Relu")
    for name in blocks:
        if net.channels != 4:
            net.conv(4, kernel=1)
        BLOCKS[name](net)
    HEADS[head](net)
    return net.build()


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    head=st.sampled_from(sorted(HEADS)),
    rank=st.sampled_from([1, 2, 2, 3]),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([np.float64, np.float64, np.float32]),
)
def test_random_scales_keep_the_function_of_any_graph(
    blocks: list[str], head: str, rank: int, seed: int, dtype: type
) -> None:
    wide = grown(blocks, head, rank=rank, seed=seed)
    model = wide if dtype is np.float64 else grown(blocks, head, rank=rank, seed=seed, dtype=dtype)
    assert_free(model, EXACT[dtype], seed, wide)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_random_scales_keep_the_function_of_each_block(name: str) -> None:
    ties = assert_free(grown([name, "Conv"], "GlobalAveragePool and Flatten", seed=1))
    assert ties.num_scales > 1


@pytest.mark.parametrize("name", sorted(HEADS))
@pytest.mark.parametrize("rank", [1, 2])
def test_random_scales_keep_the_function_of_each_head(name: str, rank: int) -> None:
    assert assert_free(grown(["Conv"], name, rank=rank)).num_scales > 1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_random_scales_keep_the_function_at_each_rank(rank: int) -> None:
    blocks = ["grouped", "Clip", "slice and pad shortcut", "Concat", "gate"]
    assert_free(grown(blocks, "ReduceMean", rank=rank))


# --- nothing is left silently: how many scales are free


def num_free(block: Block, **settings: int) -> int:
    """Free scales of block between a layer of 4 channels and one that a graph output reads."""
    net = Net(**settings).conv(4)
    block(net)
    net.conv(2, kernel=1)
    return assert_free(net.build()).num_scales - 1


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Conv", 4 + 5),
        ("grouped", 4 + 4 + 6),
        ("depthwise", 4 + 4),
        ("depthwise with multiplier", 4 + 8 + 3),
        ("ConvTranspose", 4 + 4),
        ("identity shortcut", 4 + 4),  # trunk, and within
        ("projection shortcut", 4 + 6 + 6),
        ("slice and pad shortcut", 4 + 7 + 3),  # what is padded is tied to the branch, the middle to the trunk
        ("Concat", 4 + 3 + 2),
        ("Concat with a fixed branch", 4 + 3),
        ("Concat along space", 4 + 3),
        ("Split", 4 + 6 + 3),
        ("Split in halves", 4 + 3),
        ("Slice", 4 + 6),
        ("gate", 4 + 4 + 2),
        ("Mul of branches", 4 + 4),  # one of them is fixed
        ("hard gate", 4 + 4),
        ("MaxPool", 4),
        ("AveragePool", 4),
        ("PRelu of one number", 8),
        ("PRelu per channel", 8),
        ("Clip", 4 + 4 + 4),
        ("Clip from above zero", 4 + 4 + 4),
        ("Min", 4 + 4 + 4),
        ("Max", 4 + 4 + 4),
        ("Max of one number", 4 + 4),  # one bound for all channels cannot be divided by each one's scale
        ("Pad with zeros", 8),
        ("Pad with a constant", 4 + 3),
        ("Pad of a fixed tensor", 4 + 1 + 3),
        ("Mul per channel", 8),
        ("Mul by one number", 8),
        ("Add per channel", 8),
        ("Add of one number", 4),
        ("Sub per channel", 8),
        ("Dropout", 8),
        ("Identity", 8),
        ("Softmax", 4),
        ("If", 4 + 0 + 4),
        ("Shape", 8),
        ("output", 4 + 0 + 4),
        ("shared addend", 4),
        ("shared weight", 0),
        ("shared bounds", 4 + 4 + 4 + 4 - 4),
    ],
)
def test_as_many_scales_are_free_as_can_be(name: str, count: int) -> None:
    assert num_free(BLOCKS[name]) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Resize", 3),
        ("GlobalAveragePool and Flatten", 5),
        ("Flatten", 3 + 4),
        ("Reshape", 3 + 4),
        ("Squeeze", 3),
        ("ReduceMean", 3 + 4),
        ("Transpose", 5 + 6),
    ],
)
def test_as_many_scales_are_free_as_can_be_up_to_the_head(name: str, count: int) -> None:
    net = Net(rank=1).conv(4)
    HEADS[name](net)
    assert assert_free(net.build()).num_scales - 1 == 4 + count


def test_a_residual_trunk_is_one_set_and_concatenated_parts_are_apart() -> None:
    net = Net().conv(4).add("Relu")
    stem, ends = net.nodes[0].output, []
    for _ in range(2):
        trunk = net.tensor
        net.conv(3).add("Relu").conv(4)
        ends.append(net.tensor)
        net.add("Add", trunk).add("Relu")
    trunk, inner_before, inner_behind = find_ties(net.conv(2).build()).sets
    assert trunk.producers == (stem, *ends)
    assert len(trunk.consumers) == 3
    assert {len(found.scales) for found in (inner_before, inner_behind)} == {3}

    net = Net()
    first = net.conv(3).tensor
    second = net.at(("x", 4)).conv(2).tensor
    net.add("Concat", first, axis=1)
    net.channels = 5
    ties = find_ties(net.conv(2).build())
    assert [found.producers for found in ties.sets] == [(first,), (second,)]
    assert ties.layers[net.tensor].inputs.tolist() == [4, 5, 1, 2, 3]


def test_a_residual_sum_with_the_input_is_fixed_and_says_so() -> None:
    ties = find_ties(Net().conv(4).add("Add", "x").conv(2).build())
    assert ties.num_scales == 1
    assert ties.reasons["t0"] == "Add (producing 't1') adds 'x', whose scale is fixed"


def test_a_product_of_itself_and_its_gate_is_fixed() -> None:  # swish
    net = Net().conv(4)
    tensor = net.tensor
    ties = assert_free(net.add("Sigmoid").add("Mul", tensor).conv(2).build())
    assert ties.num_scales == 1
    assert "Sigmoid" in ties.reasons[tensor]


def test_sizes_of_a_split_that_are_computed_are_not_guessed() -> None:
    net = Net().conv(4)
    net.nodes.append(node("Identity", [net.ints(1, 3)], "sizes"))
    net.nodes.append(Node(op_type="Split", inputs=(net.tensor, "sizes"), outputs=("a", "b"), attributes=(("axis", 1),)))
    net.at(("b", 4)).add("Concat", "a", axis=1).conv(2)
    assert_free(net.build())


@pytest.mark.parametrize("op_type", ["Add", "Max"])
def test_a_parameter_that_adds_axes_in_front_moves_the_channels(op_type: str) -> None:
    values = np.zeros((1, 1, 1, 1, 1)) if op_type == "Add" else np.zeros((1, 1, 2, 1, 1))
    net = Net().conv(2)
    net.add(op_type, net.param(values))  # [1, N, 2, 5, 5], and N is 2
    net.rank = 3
    assert_free(net.conv(3, kernel=1).build())


def test_old_operators_with_attributes_are_followed() -> None:
    net = Net(opset=9, dtype=np.float32).conv(4).clip(-0.25, 0.5).conv(6)
    net.add("Slice", starts=(1,), ends=(6,), axes=(1,)).add("Pad", pads=(0, 1, 0, 0, 0, 0, 0, 0))
    names = (f"{net.tensor}_a", f"{net.tensor}_b")
    attributes = (("axis", 1), ("split", (2, 4)))
    net.nodes.append(Node(op_type="Split", inputs=(net.tensor,), outputs=names, attributes=attributes))
    net.at((names[1], 4)).conv(3, kernel=1).add("Concat", names[0], axis=1)
    net.channels = 5
    net.add("ReduceMean", axes=(3,)).add("Squeeze", axes=(3,))
    net.rank = 1
    model = net.conv(2, kernel=1).build()
    ties = find_ties(model)
    assert ties.num_scales - 1 == 4 + 6 + 1 + 3
    scaled = rescale(model, ties, random_scales(ties, 0))
    models.assert_same_function(scaled, model, EXACT[np.float32])


def test_bounds_per_channel_are_read_from_the_text() -> None:
    model = Net(seed=0).conv(3).clip(0.0, 6.0).conv(2).build()
    ties = find_ties(model)
    lines = text(rescale(model, ties, random_scales(ties, 0))).splitlines()
    before = text(model).splitlines()
    assert [line for line in before if line not in lines] == [
        "  param p2: float64[]",
        "  param p3: float64[]",
        "  t1 = Clip(t0, p2, p3)",
    ]
    assert [line for line in lines if line not in before] == [
        "  param t1_high: float64[3,1,1]",
        "  t1_above = Relu(t0)",
        "  t1 = Min(t1_above, t1_high)",
    ]


def test_statistics_of_all_tensors_follow() -> None:
    model = Net().conv(3).add("Relu").conv(2).build()
    known = {"t0": Statistics(mean=np.array([1.0, -2.0, 3.0]), std=np.array([1.0, 0.0, 2.0]))}
    model = model.replace(statistics=known)
    ties = find_ties(model)
    scales = random_scales(ties, 3)
    found = rescale(model, ties, scales).statistics["t0"]
    divisor = np.exp(scales[ties.channels["t0"].scales])
    np.testing.assert_allclose(found.mean, known["t0"].mean / divisor, rtol=1e-15)
    np.testing.assert_allclose(found.std, known["t0"].std / divisor, rtol=1e-15)


# --- what the reference system gets wrong (AIMET 2.42), as laws


def test_a_convolution_without_the_attribute_group_is_scaled() -> None:
    model = Net().conv(3).add("Relu").conv(2).build()
    assert not any("group" in dict(found.attributes) for found in model.graph.nodes)
    assert assert_free(model).num_scales == 4


def test_nodes_need_no_names() -> None:
    model = Net().conv(3).add("Relu").conv(2).build()
    assert {found.name for found in model.graph.nodes} == {""}
    assert len(find_ties(model).sets) == 1


def test_a_second_reader_of_what_a_clip_bounds_reads_the_same_values() -> None:
    net = Net().conv(4)
    tensor = net.tensor
    first = net.clip(0.0, 0.5).conv(3).here
    second = net.at((tensor, 4)).conv(3).tensor
    model = net.at(first).add("Add", second).conv(2).build()
    assert assert_free(model).num_scales - 1 == 4 + 3
    relaxed, _, _ = relax_bounds(model, bounds="relu")
    reader = relaxed.graph.producers[second]
    assert reader.inputs[0] == tensor


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_depthwise_transposed_convolution_in_a_triple_is_scaled(dtype: type) -> None:
    net = Net(dtype=dtype).conv(4).add("Relu").conv_transpose(4, group=4).add("Relu").conv(2)
    assert assert_free(net.build(), EXACT[dtype]).num_scales - 1 == 4 + 4


@pytest.mark.parametrize(
    "between",
    [
        [("MaxPool", {"kernel_shape": (2, 2)})],
        [("AveragePool", {"kernel_shape": (2, 2)})],
        [("Identity", {}), ("LeakyRelu", {"alpha": 0.1}), ("Dropout", {})],
    ],
)
def test_what_lies_between_does_not_end_scaling(between: list[tuple[str, dict[str, object]]]) -> None:
    net = Net().conv(4)
    for op_type, attributes in between:
        net.add(op_type, **attributes)
    after, report = scale_channels(net.conv(2).build(), limit=None)
    assert [record.done for record in report] == [True, False]
    assert after.graph == net.build().graph


# --- scale_channels


def branched(seed: int = 0, dtype: type = np.float64) -> Model:
    net = Net(seed=seed, dtype=dtype).conv(4).clip(0.0, 0.75)
    identity_shortcut(net)
    joined_branches(net)
    return net.conv(3).add("Relu").conv(2, kernel=1).build()


def ranges_around(model: Model, index: int) -> tuple[np.ndarray, np.ndarray]:
    ties = find_ties(model)
    return weight_balance(model, ties).around(np.zeros(ties.num_scales), index)


@pytest.mark.parametrize("seed", [0, 1])
def test_ranges_meet_on_both_sides_of_every_set(seed: int) -> None:
    model = branched(seed)
    after, _ = scale_channels(model, limit=None)
    models.assert_same_function(after, model, 1e-12)
    for index, found in enumerate(find_ties(after).sets):
        r1, r2 = ranges_around(after, index)
        before = np.log(np.divide(*ranges_around(model, index)))
        left = np.log(r1 / r2)
        if len(found.producers) == 1 == len(found.consumers):
            assert np.abs(left).max() < 4e-3  # where the sweeps stop
        # Of several layers each has a quantizer of its own: what each channel takes of them is to be alike.
        assert np.ptp(left) < 8e-3 < np.ptp(before)


@pytest.mark.parametrize("limit", [None, 1.0, 2.0])
def test_scaling_is_idempotent_and_touches_no_array_of_the_caller(limit: float | None) -> None:
    model = branched(dtype=np.float32)
    before, values = text(model), {name: value.copy() for name, value in model.params.items()}
    after, report = scale_channels(model, limit=limit)
    again, second = scale_channels(after, limit=limit)
    assert any(record.done for record in report)
    assert not any(record.done for record in second)
    assert again.graph == after.graph
    for name, value in after.params.items():
        np.testing.assert_array_equal(again.params[name], value)
    assert text(model) == before
    for name, value in values.items():
        np.testing.assert_array_equal(model.params[name], value)


def test_shared_parameters_stay() -> None:
    net = Net()
    shared_weight(net)
    shared_bounds(net)
    model = net.conv(3).add("Relu").conv(2).build()
    after, _ = scale_channels(model, limit=None)
    shared = {name for name in model.params if model.graph.num_readers(name) > 1}
    assert len(shared) == 5
    for name in shared & after.params.keys():  # bounds that nobody reads any more are gone
        np.testing.assert_array_equal(after.params[name], model.params[name])
    models.assert_same_function(after, model, 1e-12)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_set_and_every_fixed_layer_has_a_record(name: str) -> None:
    model = grown([name], "Flatten")
    ties = find_ties(model)
    after, report = scale_channels(model, limit=None)
    models.assert_same_function(after, model, 1e-11)
    of_sets, of_layers = report[: len(ties.sets)], report[len(ties.sets) :]
    figure = "largest |log(r1 / r2)|"
    for found, record in zip(ties.sets, of_sets, strict=True):
        assert record.where[0] == found.place
        assert {ties.layers[output].layer.weight for output in (*found.producers, *found.consumers)} == {
            *record.where[1:]
        }
        assert np.isfinite([record.before[figure], record.after[figure]]).all()
        assert record.done
    fixed = [output for output, tied in ties.layers.items() if not tied.outputs.any()]
    assert [record.where[0] for record in of_layers] == fixed
    assert all(record.reason and not record.done for record in of_layers)


# --- bounds that are not divided


def bounded(high: float, low: float = 0.0) -> Model:
    """A Clip of a tensor whose channels are known to be standard normal."""
    model = Net().conv(4).clip(low, high).conv(2).build()
    return model.replace(statistics={"t0": Statistics(mean=np.zeros(4), std=np.ones(4))})


def kinds(model: Model) -> list[str]:
    return [found.op_type for found in model.graph.nodes]


def scaled(report: Report) -> list[bool]:
    return [record.done for record in report if record.transform == "scale_channels"]


@pytest.mark.parametrize(
    ("bounds", "high", "expected"),
    [
        ("exact", 1.0, ["Conv", "Relu", "Min", "Conv"]),
        ("leave", 1.0, ["Conv", "Clip", "Conv"]),
        ("relu", 1.0, ["Conv", "Relu", "Conv"]),
        ("auto", 3.0, ["Conv", "Clip", "Conv"]),  # 0.13 % lie beyond
        ("auto", 3.2, ["Conv", "Relu", "Conv"]),  # 0.07 %
    ],
)
def test_bounds_become_what_was_asked_for(bounds: str, high: float, expected: list[str]) -> None:
    model = bounded(high)
    after, report = scale_channels(model, limit=None, bounds=bounds)
    assert kinds(after) == expected
    is_left = "Clip" in expected
    assert scaled(report) == ([False, False] if is_left else [True, False])
    if is_left:
        for name, value in model.params.items():
            np.testing.assert_array_equal(after.params[name], value)
        assert "bounds are to stay" in next(r.reason for r in report if r.transform == "scale_channels")
    if bounds in {"exact", "leave"} or is_left:
        models.assert_same_function(after, model, 1e-12)
    relaxed = [record for record in report if record.transform == "relax_bounds"]
    assert [record.done for record in relaxed] == ([] if bounds == "exact" else [not is_left])


def test_shares_that_were_observed_decide_before_statistics() -> None:
    assert "Relu" in kinds(scale_channels(bounded(1.0), bounds="auto", beyond={"t1": 1e-4})[0])
    assert "Clip" in kinds(scale_channels(bounded(9.0), bounds="auto", beyond={"t1": 2e-3})[0])
    assert "Clip" in kinds(scale_channels(bounded(9.0), bounds="auto", beyond={})[0])


def test_a_clip_that_does_not_begin_at_zero_is_no_relu() -> None:
    for bounds in ("relu", "auto"):
        after, report = scale_channels(bounded(9.0, low=-0.5), bounds=bounds)
        assert "Clip" in kinds(after)
        assert report[0].reason == "not a Clip from zero"


def test_unknown_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of exact"):
        scale_channels(bounded(1.0), bounds="off")


def test_a_gate_through_matrices_leaves_the_trunk_its_scales():
    net = Net()
    gate_of_matrices(net)
    ties = assert_free(net.conv(3).build())
    trunk = net.nodes[0].output
    assert trunk not in ties.reasons
    assert any(trunk in found.producers for found in ties.sets)


def test_an_activation_behind_a_flatten_of_single_places_passes_scales_on():
    net = Net()
    ties = assert_free(net.conv(4).add("GlobalAveragePool").add("Flatten").add("Relu").gemm(4, 3).build())
    assert net.nodes[0].output not in ties.reasons


def test_channels_of_zeros_have_scales_of_their_own():
    net = Net()
    ties = assert_free(net.conv(3, kernel=1).pad(channels=(1, 2)).conv(2, kernel=1).build())
    padded, conv = ties.channels[net.nodes[1].output].scales, ties.channels[net.nodes[0].output].scales
    np.testing.assert_array_equal(padded[1:4], conv)
    assert len({*padded.tolist(), *conv.tolist()} - {0}) == 6
