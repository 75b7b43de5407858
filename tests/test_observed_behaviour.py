"""What is observed of channels is what ONNX's evaluator computes; gains are squares of the network's Jacobian."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from ptqjax.errors import DataError, ModelError
from ptqjax.fit.behaviour import observe_behaviour
from ptqjax.ir import Model, TensorSpec
from ptqjax.lowering import interpret
from ptqjax.onnx_io import to_proto
from tests.models import Chain, node

Arrays = dict[str, np.ndarray]


def samples(count: int, seed: int = 0) -> Arrays:
    return {"x": np.random.default_rng(seed).normal(size=(count, 3, 6, 6)).astype(np.float32)}


def nonlinear() -> Model:
    chain = Chain(3, dtype=np.float32, size=6).conv(5, pad=1, bias=True).clip(0.0, 2.0).depthwise(pad=1)
    return chain.prelu().add("GlobalAveragePool").add("Flatten").gemm(4).build()


def linear(num_outputs: int, *, factor: float = 1.0) -> Model:
    """Pads, a stride and groups, so that positions count differently; no bias, so that outputs scale with weights."""
    chain = Chain(3, dtype=np.float32, size=6).conv(4, pad=1, strides=(2, 2)).conv(6, group=2, pad=1)
    chain.add("AveragePool", kernel_shape=(2, 2)).conv(4, kernel=1).add("GlobalAveragePool").add("Flatten")
    return chain.gemm(num_outputs, alpha=factor, bias=False).build()


def intermediate(model: Model, batch: Arrays) -> Arrays:
    names = [name for found in model.graph.nodes for name in found.outputs]
    outputs = tuple(TensorSpec(name=name, dtype=np.dtype(np.float32), shape=None) for name in names)
    proto = to_proto(model.replace(graph=replace(model.graph, outputs=outputs)))
    return batch | dict(zip(names, ReferenceEvaluator(proto).run(names, batch), strict=True))


def joined(parts: Sequence[Arrays]) -> Arrays:
    return {"x": np.concatenate([part["x"] for part in parts])}


def test_ranges_means_and_powers_are_those_of_the_tensors() -> None:
    model, batches = nonlinear(), [samples(4), samples(3, seed=1)]
    expected = intermediate(model, joined(batches))
    found = observe_behaviour(model, batches)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        others = tuple(axis for axis in range(values.ndim) if axis != 1)
        wide = values.astype(np.float64)
        largest = float(np.abs(wide).max())
        close = {"rtol": 1e-5, "atol": 1e-5 * largest, "err_msg": name}  # two compilers of float32 sums
        np.testing.assert_allclose(found[name].low, wide.min(axis=others), **close)
        np.testing.assert_allclose(found[name].high, wide.max(axis=others), **close)
        np.testing.assert_allclose(found[name].mean, wide.mean(axis=others), **close)
        np.testing.assert_allclose(found[name].power, (wide**2).mean(axis=others), **close)


def squares_of_the_jacobian(model: Model, batch: Arrays, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Sum over outputs and places, per channel, of the squared derivatives with respect to one sample's tensor."""

    def outputs(injected: jax.Array) -> jax.Array:
        def intercept(tensor: str, value: jax.Array, channel_axis: int | None) -> tuple[jax.Array, None]:
            if tensor != name:
                return value, None
            # A convolution's output may lie channels last.
            placed = injected if channel_axis in {None, 1} else jnp.moveaxis(injected, 1, channel_axis)
            return value + placed, None

        found, _ = interpret(model.graph, model.params, batch, intercept=intercept)
        return next(iter(found.values()))

    slopes = np.asarray(jax.jit(jax.jacobian(outputs))(jnp.zeros(shape, jnp.float32)))[0]  # [outputs, 1, c, ...]
    axes = tuple(axis for axis in range(slopes.ndim) if axis != 2)
    return (slopes.astype(np.float64) ** 2).sum(axis=axes)


def test_the_gain_to_one_output_is_the_square_of_the_jacobian() -> None:
    model, batch = linear(1), samples(4)
    values = intermediate(model, batch)
    power = np.mean(values[model.graph.outputs[0].name].astype(np.float64) ** 2)
    found = observe_behaviour(model, [batch])
    one = {"x": batch["x"][:1]}
    for name in [each.output for each in model.graph.nodes if each.op_type in {"Conv", "AveragePool", "Gemm"}]:
        jacobian = squares_of_the_jacobian(model, one, name, (1, *values[name].shape[1:]))
        np.testing.assert_allclose(found[name].gain, jacobian / power, rtol=1e-4, err_msg=name)


def test_gains_to_several_outputs_are_so_in_the_mean() -> None:
    model, batch = linear(3), samples(400)
    values = intermediate(model, {"x": batch["x"][:1]})
    outputs = intermediate(model, batch)[model.graph.outputs[0].name].astype(np.float64)
    power = np.mean((outputs**2).sum(axis=1))
    found = observe_behaviour(model, [batch])
    one = {"x": batch["x"][:1]}
    for name in [each.output for each in model.graph.nodes if each.op_type == "Conv"]:
        jacobian = squares_of_the_jacobian(model, one, name, (1, *values[name].shape[1:]))
        # The relative variance over signs is 2 at most for each of 400 samples: 7 % is a standard deviation.
        np.testing.assert_allclose(found[name].gain, jacobian / power, rtol=0.25, err_msg=name)
        np.testing.assert_allclose(found[name].gain.sum(), jacobian.sum() / power, rtol=0.15, err_msg=name)


def test_gains_do_not_depend_on_the_size_of_the_outputs() -> None:
    one, ten = (observe_behaviour(linear(3, factor=factor), [samples(2)]) for factor in (1.0, 10.0))
    for name in one:
        if name != linear(3).graph.outputs[0].name:
            np.testing.assert_allclose(one[name].gain, ten[name].gain, rtol=1e-5, err_msg=name)


def test_a_channel_that_no_output_reads_has_no_gain() -> None:
    model = linear(1)
    weight = model.graph.nodes[3].inputs[1]
    cut = model.params[weight].copy()
    cut[:, 2] = 0.0
    found = observe_behaviour(model.replace(params=model.params | {weight: cut}), [samples(2)])
    gain = found[model.graph.nodes[2].output].gain
    assert gain[2] == 0.0
    assert (np.delete(gain, 2) > 0.0).all()


def test_any_split_into_batches_gives_the_same_means() -> None:
    model, whole = nonlinear(), samples(8)
    parts = [{"x": whole["x"][:3]}, {"x": whole["x"][3:]}]
    one, two = observe_behaviour(model, [whole]), observe_behaviour(model, parts)
    for name, known in one.items():
        largest = max(np.abs(known.low).max(), np.abs(known.high).max())
        for field, scale in (("low", 1), ("high", 1), ("mean", 1), ("power", largest)):
            a, b = getattr(known, field), getattr(two[name], field)
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * largest * scale, err_msg=f"{field} of {name}")


def test_gains_are_the_same_for_the_same_seed_alone() -> None:
    model, batches = nonlinear(), [samples(2)]
    first, second, other = (observe_behaviour(model, batches, seed=seed) for seed in (0, 0, 1))
    name = model.graph.nodes[0].output
    for field in ("low", "high", "mean", "power", "gain"):
        np.testing.assert_array_equal(getattr(first[name], field), getattr(second[name], field))
    assert not np.array_equal(first[name].gain, other[name].gain)
    np.testing.assert_array_equal(first[name].mean, other[name].mean)


def test_integers_inside_do_not_disturb() -> None:
    chain = Chain(3, dtype=np.float32, size=6).conv(4, pad=1)
    tensor = chain.tensor
    chain.add("ArgMax", axis=1, keepdims=1).add("Cast", to=1)
    chain.nodes.append(node("Add", [tensor, chain.tensor], "sum"))
    chain.tensor = "sum"
    found = observe_behaviour(chain.conv(2).build(), [samples(2)])
    assert np.isfinite(found[tensor].gain).all()
    assert (found[tensor].gain > 0).all()


def test_a_model_without_floating_outputs_is_refused() -> None:
    model = Chain(3, dtype=np.float32, size=6).conv(4, pad=1).add("ArgMax", axis=1).build()
    outputs = tuple(replace(spec, dtype=np.dtype(np.int64)) for spec in model.graph.outputs)
    with pytest.raises(ModelError, match="none of the outputs holds floating numbers"):
        observe_behaviour(model.replace(graph=replace(model.graph, outputs=outputs)), [samples(2)])


@pytest.mark.parametrize("batches", [None, []])
def test_without_data_there_is_nothing_to_observe(batches: list[Arrays] | None) -> None:
    with pytest.raises(DataError):
        observe_behaviour(nonlinear(), batches)
