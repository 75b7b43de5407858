"""Laws of folding across what lies between: the function stays where channels stay apart, else the place is left."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.ir import Constant, Graph, Model, TensorSpec, verify
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms import fold_batch_norms
from ptqjax.transforms.sizes import ONE, Size, element_type, shapes_of
from tests.models import Chain, assert_same_function, outputs
from tests.test_fold import assert_becomes_affine, assert_folds, num_norms


class Moving(Chain):
    """A chain with operators that move values; the shapes that they read are constants of the graph."""

    def __init__(self, channels: int, **more: object) -> None:
        super().__init__(channels, **more)  # pyright: ignore[reportArgumentType]
        self.constants: dict[str, Constant] = {}

    def constant(self, *values: int) -> str:
        name = f"c{len(self.nodes)}"
        self.constants[name] = Constant(value=np.array(values, np.int64))
        return name

    def move(self, op_type: str, *values: int, channels: int | None = None, **attributes: object) -> Self:
        """An operator with a constant second input (none for no values); the next layer reads `channels`."""
        self.add(op_type, *([self.constant(*values)] if values else []), **attributes)
        self.channels = channels or self.channels
        return self

    def build(self, *more: str, input_shape: tuple[int | str, ...] | None = None) -> Model:
        dtype = np.dtype(self.dtype)
        graph = Graph(
            name="test",
            inputs=(TensorSpec(name="x", dtype=dtype, shape=input_shape or ("N", *self.input_shape[1:])),),
            outputs=tuple(TensorSpec(name=name, dtype=dtype, shape=None) for name in (self.tensor, *more)),
            nodes=tuple(self.nodes),
            constants=tuple(sorted(self.constants.items())),
            parameters=tuple(sorted(self.params)),
            opsets=(("", self.opset),),
        )
        return verify(Model(graph=graph, params=dict(self.params)))


def unsized(model: Model) -> Model:
    """The model with batch, height and width unknown, each axis under a name of its own."""
    (spec,) = model.graph.inputs
    shape = tuple(size if axis == 1 else f"d{axis}" for axis, size in enumerate(spec.shape or ()))
    return model.replace(graph=replace(model.graph, inputs=(replace(spec, shape=shape),)))


def assert_folds_unsized(model: Model) -> Model:
    """Folds the model with sizes known and unknown; runs it with those that it was built for."""
    folded = assert_folds(model)
    free, report = fold_batch_norms(unsized(model))
    assert num_norms(free) == 0
    assert all(record.done and "folded" in record.what for record in report)
    assert free.graph.nodes == folded.graph.nodes
    return folded


# Behind a layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_norm_behind_a_transposed_matmul_of_any_rank_folds(*, bias: bool, rank: int) -> None:
    chain = Moving(5, rank=rank, size=6)
    order = (0, 2, 1) if rank == 1 else (0, 3, 1, 2)
    back = tuple(int(axis) for axis in np.argsort(order))
    chain.move("Transpose", perm=back).matmul(7, bias=bias).add("Transpose", perm=order).norm()
    folded = assert_folds_unsized(chain.build())
    assert [found.op_type for found in folded.graph.nodes] == ["Transpose", "MatMul", "Add", "Transpose"]


def test_a_matmul_of_a_matrix_that_gets_a_bias_becomes_a_gemm_and_any_other_an_add() -> None:
    chain = Moving(5, rank=0).matmul(7).add("Unsqueeze", chain_axes := "axes").norm()
    chain.constants[chain_axes] = Constant(value=np.array([2]))
    folded = assert_folds(chain.build())
    assert [found.op_type for found in folded.graph.nodes] == ["Gemm", "Unsqueeze"]


@pytest.mark.parametrize(
    ("op_type", "values"),
    [("Reshape", (0, 0, 1, 1)), ("Reshape", (-1, 7, 1)), ("Unsqueeze", (2, 3)), ("Reshape", (2, 7, 1))],
)
def test_a_norm_behind_a_gemm_and_new_axes_of_size_1_folds(op_type: str, values: tuple[int, ...]) -> None:
    model = Moving(5, rank=0).gemm(7, alpha=0.5, beta=3.0).move(op_type, *values).norm().build()
    folded = assert_folds(model)
    norm = model.graph.nodes[-1]
    known = (folded.statistics[name] for name in (norm.output, model.graph.nodes[0].output))
    for found in known:
        np.testing.assert_array_equal(found.mean, model.params[norm.inputs[2]])


@pytest.mark.parametrize("trans_b", [0, 1])
def test_a_norm_behind_features_that_become_pictures_folds_position_by_position(trans_b: int) -> None:
    chain = Moving(5, rank=0).gemm(3 * 4 * 2, trans_b=trans_b).move("Reshape", -1, 3, 4, 2, channels=3).norm()
    assert_folds(chain.build())


def test_a_norm_behind_a_matmul_that_moved_its_channels_to_axis_1_folds() -> None:
    chain = Moving(4, rank=2, size=3).move("Transpose", perm=(0, 2, 3, 1)).matmul(6, bias=True)
    chain.move("Reshape", 0, -1, 6).move("Transpose", perm=(0, 2, 1)).norm()
    assert_folds_unsized(chain.build())


@pytest.mark.parametrize("settings_", [{"kernel_shape": (2, 2)}, {"kernel_shape": (3, 2), "strides": (2, 1)}])
def test_a_norm_behind_an_average_without_padding_folds(settings_: dict) -> None:
    assert_folds_unsized(Moving(4).conv(5).move("AveragePool", **settings_).norm().build())
    assert_folds_unsized(Moving(4).conv(5).move("GlobalAveragePool").norm().build())


@pytest.mark.parametrize("op_type", ["Identity", "Dropout"])
def test_a_norm_behind_what_does_nothing_folds(op_type: str) -> None:
    assert_folds_unsized(Moving(4).conv(5, pad=1).move(op_type).norm().build())


def test_transa_keeps_the_outputs_of_a_gemm_on_axis_1() -> None:
    chain = Moving(6, rank=0)  # reads [2, 6] as [6, 2]: two inputs
    chain.add("Gemm", chain.param("w", chain.random.normal(size=(2, 5))), transA=1)
    chain.channels = 5
    assert_folds(chain.norm().build(input_shape=(2, 6)))


# Ahead of a layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["gemm", "matmul", "matmul and add", "transposed gemm"])
@pytest.mark.parametrize("move", [("Flatten", ()), ("Reshape", (0, -1)), ("Reshape", (2, -1))])
def test_a_norm_ahead_of_flattened_features_folds_each_channel_repeated(layer: str, move: tuple) -> None:
    chain = Moving(3, size=4).norm().move(move[0], *move[1], channels=3 * 16)
    if "gemm" in layer:
        chain.gemm(5, alpha=0.5, beta=2.0, trans_b=int(layer == "gemm"))
    else:
        chain.matmul(5, bias="add" in layer)
    if move[1] == (2, -1):
        assert_folds(chain.build(input_shape=(2, 3, 4, 4)))
    else:
        assert_folds_unsized(chain.build())


def test_a_norm_ahead_of_pooled_features_folds() -> None:
    chain = Moving(3, size=4).norm().move("GlobalAveragePool").move("Flatten").gemm(5)
    assert_folds_unsized(chain.build())


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_ahead_of_a_matmul_along_moved_channels_folds(*, bias: bool) -> None:
    chain = Moving(3, rank=2, size=4).norm().move("Transpose", perm=(0, 2, 3, 1)).matmul(5, bias=bias)
    assert_folds_unsized(chain.build())


def test_channels_last_features_that_are_flattened_repeat_as_a_whole() -> None:
    chain = Moving(3, size=4).norm().move("Transpose", perm=(0, 2, 3, 1)).move("Flatten", channels=48).gemm(5)
    assert_folds(chain.build())


@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_right_ahead_of_a_matmul_folds(*, bias: bool) -> None:
    assert_folds(Chain(4, rank=0).norm().matmul(3, bias=bias).build())


def test_a_shift_of_zero_adds_no_bias() -> None:
    chain = Moving(3, rank=1, size=4).norm().move("Transpose", perm=(0, 2, 1)).matmul(5)
    model = chain.build()
    zeros = {model.graph.nodes[0].inputs[index]: np.zeros(3) for index in (2, 3)}
    folded = assert_folds(model.replace(params=model.params | zeros))
    assert [found.op_type for found in folded.graph.nodes] == ["Transpose", "MatMul"]


# What does not keep channels apart ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (Moving(4, size=4).norm().move("Reshape", -1, 8, channels=8).gemm(3), "axis 1 may not be"),
        (Moving(4, size=4).norm().move("Transpose", perm=(0, 2, 1, 3)).conv(3), "axis 1 may not be"),
        (Moving(4, size=4).norm().move("AveragePool", kernel_shape=(2, 2), pads=(1, 1, 1, 1)).conv(3), "one linear"),
        (
            Moving(4, size=4).norm().move("AveragePool", kernel_shape=(3, 3), auto_pad="SAME_UPPER").conv(3),
            "one linear",
        ),
        (Moving(4, size=4).norm().move("MaxPool", kernel_shape=(2, 2)).conv(3, kernel=1), "one linear"),
        (Moving(4, size=4).norm().move("Transpose", perm=(0, 1, 3, 2)).conv(3, pad=1), "pads with zeros"),
    ],
)
def test_a_norm_whose_channels_do_not_stay_apart_becomes_an_affine(chain: Moving, reason: str) -> None:
    assert_becomes_affine(chain.build(), reason)


def test_unknown_heights_are_not_guessed() -> None:
    """[-1, 64] of a [N, 4, 4, 4] is one row each, and of a [N, 4, 2, 4] half of one."""
    model = Moving(4, size=4).norm().move("Reshape", -1, 64, channels=64).gemm(3).build()
    assert_folds(model)
    _, report = fold_batch_norms(unsized(model))
    assert "keep the channels apart" in report[0].reason


def test_a_moved_tensor_that_is_read_elsewhere_is_left() -> None:
    chain = Moving(4, size=4).norm().move("Flatten", channels=64)
    flat = chain.tensor
    assert_becomes_affine(chain.gemm(3).build(flat), "one linear layer alone")
    chain = Moving(4).conv(5).move("Transpose", perm=(0, 1, 3, 2))
    moved = chain.tensor
    assert_becomes_affine(chain.norm().build(moved), "read elsewhere or is a graph output")


# Per-channel affines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_norm_alone_becomes_mul_and_add_in_the_tensors_type(rank: int, dtype: type) -> None:
    chain = Chain(4, rank=rank, dtype=dtype, size=4).add("Relu").norm().add("Relu")
    folded = assert_becomes_affine(chain.build(), "no linear layer", 4 * float(np.finfo(dtype).eps))
    assert [found.op_type for found in folded.graph.nodes] == ["Relu", "Mul", "Add", "Relu"]
    assert {(value.shape, value.dtype) for value in folded.params.values()} == {((4,) + (1,) * rank, np.dtype(dtype))}
    assert set(folded.statistics) == {chain.nodes[1].output}


def test_an_affine_without_shift_is_a_mul_alone() -> None:
    model = Chain(4).add("Relu").norm().build()
    zeros = {model.graph.nodes[1].inputs[index]: np.zeros(4) for index in (2, 3)}
    folded = assert_becomes_affine(model.replace(params=model.params | zeros), "no linear layer")
    assert [found.op_type for found in folded.graph.nodes] == ["Relu", "Mul"]


def test_parameters_that_two_norms_share_stay_for_the_other() -> None:
    chain = Chain(4).add("Relu").norm()
    chain.add("Sigmoid").add("BatchNormalization", *chain.nodes[1].inputs[1:], epsilon=0.25)
    model = chain.build()
    folded, report = fold_batch_norms(model)
    assert [record.what for record in report] == ["became a per-channel affine"] * 2
    assert_same_function(folded, model, 1e-12)


def test_a_norm_of_unknown_rank_stays() -> None:
    chain = Chain(4).add("Relu").norm()
    model = chain.build()
    spec = replace(model.graph.inputs[0], shape=None)
    model = model.replace(graph=replace(model.graph, inputs=(spec,)))
    folded, report = fold_batch_norms(model)
    assert folded.graph == model.graph
    assert not report[0].done
    assert "rank" in report[0].reason


def test_a_norm_of_an_old_operator_set_stays() -> None:
    model = Chain(4, opset=6).conv(4).norm().build()
    folded, report = fold_batch_norms(model)
    assert folded.graph == model.graph
    assert "too old" in report[0].reason


def test_a_norm_with_parameters_per_position_stays() -> None:
    model = Chain(4, opset=8).add("Relu").norm(spatial=0).build()
    folded, report = fold_batch_norms(model)
    assert folded.graph == model.graph
    assert "per position" in report[0].reason
    assert not folded.statistics


def test_the_type_of_an_affine_is_the_tensors_not_the_parameters() -> None:
    chain = Chain(4, dtype=np.float32).add("Cast", to=10).norm()
    model = chain.build()
    assert element_type(model, chain.nodes[0].output) is None
    folded, report = fold_batch_norms(model)
    assert folded.graph == model.graph
    assert "element type" in report[0].reason


# Every variant ------------------------------------------------------------------------------------------------------


EPSILONS = (0.0, 2.0**-10, 1.0)  # exact in float32, as ONNX stores them


def variant(draw: Callable[[st.SearchStrategy], Any], dtype: type) -> Model:
    """A norm beside a layer of any kind, before or behind it, with any passage between."""
    ahead, seed = draw(st.booleans()), draw(st.integers(0, 10**6))
    kind = draw(st.sampled_from(["Conv", "Depthwise", "ConvTranspose", "Gemm", "MatMul", "MatMul 3"]))
    bias, flag = draw(st.booleans()), draw(st.integers(0, 1))
    numbers = draw(st.sampled_from([(1.0, 1.0), (0.5, 3.0), (2.0, -1.0)]))
    group = draw(st.sampled_from([1, 2, 4]))
    is_flat = kind in {"Gemm", "MatMul"}
    rank = 2 if kind.startswith("MatMul 3") else draw(st.integers(1, 3))
    rank = 0 if is_flat and not ahead else rank
    chain = Moving(4, rank=rank, seed=seed, size=4, dtype=dtype)
    if ahead:
        chain.norm(epsilon=draw(st.sampled_from(EPSILONS)))
        if is_flat:
            chain.move("Flatten", channels=4 ** (rank + 1))
    if kind == "MatMul 3":
        chain.move("Transpose", perm=(0, 2, 3, 1)).matmul(6, bias=bias).move("Transpose", perm=(0, 3, 1, 2))
    elif kind == "Conv":
        chain.conv(8, group=group, bias=bias, pad=0 if ahead else flag)
    elif kind == "Depthwise":
        chain.conv(8, group=4, bias=bias, pad=0 if ahead else flag)
    elif kind == "ConvTranspose":
        chain.conv_transpose(8, group=group, bias=bias, kernel=1 if ahead else 3)
    elif kind == "Gemm":
        chain.gemm(6, alpha=numbers[0], beta=numbers[1], trans_b=flag, bias=bias)
    else:
        chain.matmul(6, bias=bias)
    if not ahead:
        chain.move("Reshape", 0, 6, 1) if is_flat and flag else chain.move("Identity")
        chain.norm(epsilon=draw(st.sampled_from(EPSILONS)))
    return chain.build()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_variant_keeps_the_function_in_float64(data: st.DataObject) -> None:
    assert_folds(variant(data.draw, np.float64), 1e-12)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_variant_keeps_the_function_in_float32(data: st.DataObject) -> None:
    assert_folds(variant(data.draw, np.float32), 1e-5)


# Under JAX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True])
def test_folding_across_a_passage_works_under_jit_vmap_and_grad(*, alone: bool) -> None:
    chain = Moving(3, size=4, dtype=np.float32).norm()
    model = (chain.add("Relu") if alone else chain.move("Flatten", channels=48).gemm(5)).build()
    expected, _ = fold_batch_norms(model)

    def folded(params: dict) -> dict:
        found, _ = fold_batch_norms(model.replace(params=params))
        assert all(is_traced(value) for value in found.params.values())
        return found.params

    found = jax.jit(folded)(model.params)
    assert found.keys() == expected.params.keys()
    for name, value in expected.params.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    batch = jax.tree.map(lambda value: np.stack([value, value]), model.params)
    for name, value in jax.vmap(folded)(batch).items():
        np.testing.assert_allclose(value[1], found[name], rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda params: sum(value.sum() for value in folded(params).values()))(model.params)
    assert all(np.isfinite(value).all() for value in gradient.values())


# Sizes --------------------------------------------------------------------------------------------------------------


def test_a_size_divides_by_what_is_in_it_alone() -> None:
    height, width = Size(1, (("h", -1),)), Size(1, (("w", -1),))
    area = Size(12) * height * width
    assert area.divided_by(Size(4) * width) == Size(3) * height
    assert area.divided_by(Size(5)) is None
    assert area.divided_by(height * height) is None
    assert area.divided_by(area) == ONE


@settings(max_examples=40, deadline=None)
@given(pads=st.tuples(*[st.integers(0, 2)] * 4), strides=st.tuples(*[st.integers(1, 3)] * 2), size=st.integers(5, 9))
def test_shapes_agree_with_what_is_computed(pads: tuple, strides: tuple, size: int) -> None:
    chain = Moving(4, size=size).conv(6, pads=pads, strides=strides)
    names = [chain.tensor]
    for step in (
        lambda: chain.move("AveragePool", kernel_shape=(1, 2), pads=(0, 1, 0, 0)),
        lambda: chain.move("Transpose", perm=(0, 2, 3, 1)),
        lambda: chain.matmul(5, bias=True),
        lambda: chain.move("Reshape", 0, -1, 5),
        lambda: chain.move("Unsqueeze", 1),
        lambda: chain.move("Squeeze", 1),
        lambda: chain.move("Flatten", axis=2),
    ):
        step()
        names.append(chain.tensor)
    model = chain.build(*names[:-1])
    shapes = shapes_of(model)
    computed = outputs(model)
    batch = {("N", -1): 2}
    for name in names:
        values = tuple(
            found.number * int(np.prod([batch[unknown] for unknown in found.unknown])) for found in shapes[name]
        )
        assert values == computed[name].shape
