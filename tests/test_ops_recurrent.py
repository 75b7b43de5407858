"""RNN, GRU and LSTM against ONNX Runtime, and the laws of their options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import ptqjax
from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops import find_lowering
from tests.single_node import assert_as_in_onnxruntime, by_us, feeds_of, single_node

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_TIME, _BATCH, _INPUT, _HIDDEN = 4, 3, 2, 5
_ROUNDING = 2e-6  # a few float32 sums of values around 1

_ALPHA_BETA = ("Affine", "ScaledTanh", "HardSigmoid")
_ALPHA = ("LeakyRelu", "ThresholdedRelu", "Elu")


def _operands(op_type, *, directions=1, lengths=None, initial=True, peepholes=False, seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    gates = _GATES[op_type] * _HIDDEN
    operands = [normal(_TIME, _BATCH, _INPUT), normal(directions, gates, _INPUT), normal(directions, gates, _HIDDEN)]
    operands += [normal(directions, 2 * gates), None if lengths is None else np.array(lengths, np.int32)]
    states = [normal(directions, _BATCH, _HIDDEN) for _ in range(2 if op_type == "LSTM" else 1)]
    operands += states if initial else [None] * len(states)
    return [*operands, normal(directions, 3 * _HIDDEN)] if peepholes else operands


def _types(op_type):
    return (np.float32,) * (3 if op_type == "LSTM" else 2)


def _compare(op_type, operands, *, opset=14, atol=_ROUNDING, **attributes):
    assert_as_in_onnxruntime(
        op_type, operands, atol=atol, opset=opset, outputs=_types(op_type), hidden_size=_HIDDEN, **attributes
    )


@pytest.mark.parametrize(
    ("opset", "direction", "lengths"),
    [
        (7, "forward", None),
        (14, "forward", (4, 1, 3)),
        (14, "reverse", (4, 1, 3)),
        (22, "reverse", None),
        (22, "bidirectional", (4, 1, 3)),
    ],
)
@pytest.mark.parametrize("op_type", _GATES)
def test_directions_and_lengths_are_the_runtimes(op_type, opset, direction, lengths):
    directions = 2 if direction == "bidirectional" else 1
    _compare(op_type, _operands(op_type, directions=directions, lengths=lengths), opset=opset, direction=direction)


@pytest.mark.parametrize("op_type", _GATES)
def test_without_states_biases_and_lengths_the_loop_starts_at_zero(op_type):
    operands = _operands(op_type, initial=False)[:3]
    _compare(op_type, operands)


@pytest.mark.parametrize("op_type", _GATES)
@pytest.mark.parametrize("initial", [True, False])
def test_an_empty_sequence_has_outputs_and_states_of_zero(op_type, initial):
    _compare(op_type, _operands(op_type, lengths=(0, 2, 4), initial=initial))


@pytest.mark.parametrize("op_type", _GATES)
def test_clip_bounds_what_activations_get(op_type):
    _compare(op_type, _operands(op_type), clip=0.3)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_linear_before_reset_multiplies_before_it_resets(clip):
    settings = {} if clip is None else {"clip": clip}
    for value in (0, 1):
        _compare("GRU", _operands("GRU"), linear_before_reset=value, **settings)
    results = [
        by_us(single_node("GRU", _operands("GRU"), opset=14, linear_before_reset=value), _operands("GRU"))[0]
        for value in (0, 1)
    ]
    assert np.abs(results[0] - results[1]).max() > 0.01


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("input_forget", [0, 1])
def test_peepholes_and_coupled_gates_are_the_runtimes(input_forget, clip):
    settings = {} if clip is None else {"clip": clip}
    for direction in ("forward", "bidirectional"):
        operands = _operands("LSTM", directions=2 if direction == "bidirectional" else 1, peepholes=True)
        _compare("LSTM", operands, input_forget=input_forget, direction=direction, **settings)


@pytest.mark.parametrize("name", ["Relu", "Sigmoid", "Tanh", "Softsign", "Softplus", *_ALPHA, *_ALPHA_BETA])
def test_activations_are_the_runtimes(name):
    attributes = {"activation_alpha": [0.6]} if name in (*_ALPHA, *_ALPHA_BETA) else {}
    attributes |= {"activation_beta": [0.3]} if name in _ALPHA_BETA else {}
    _compare("RNN", _operands("RNN"), activations=[name], atol=1e-5, **attributes)


@pytest.mark.parametrize("name", ["HardSigmoid", "LeakyRelu", "Elu"])
def test_activations_have_the_defaults_of_their_operators(name):
    """The runtime's ThresholdedRelu alone has another: 0, where ONNX's operator has 1."""
    _compare("RNN", _operands("RNN"), activations=[name], atol=1e-5)


def test_numbers_are_handed_to_those_activations_that_take_them():
    names = ["Sigmoid", "LeakyRelu", "HardSigmoid", "Tanh"]
    attributes = {"activations": names, "activation_alpha": [0.3, 0.15], "activation_beta": [0.4]}
    _compare("GRU", _operands("GRU", directions=2), direction="bidirectional", **attributes)


def test_an_unknown_activation_is_named():
    operands = _operands("RNN")
    with pytest.raises(UnsupportedOperatorError, match="activation 'Mish' is unknown"):
        by_us(single_node("RNN", operands, opset=14, activations=["Mish"]), operands)


@pytest.mark.parametrize("op_type", _GATES)
def test_layout_1_is_layout_0_with_the_batch_in_front(op_type):
    operands = _operands(op_type, directions=2, lengths=(4, 1, 3))
    in_front = [operands[0].swapaxes(0, 1), *operands[1:5], *(state.swapaxes(0, 1) for state in operands[5:])]
    settings = {"opset": 14, "direction": "bidirectional", "outputs": _types(op_type)}
    y, *states = by_us(single_node(op_type, operands, **settings), operands)
    y_in_front, *states_in_front = by_us(single_node(op_type, in_front, layout=1, **settings), in_front)
    np.testing.assert_array_equal(y_in_front, y.transpose(2, 0, 1, 3))
    for state, state_in_front in zip(states, states_in_front, strict=True):
        np.testing.assert_array_equal(state_in_front, state.swapaxes(0, 1))


@pytest.mark.parametrize("op_type", _GATES)
def test_types_stay_what_they_are(op_type):
    for dtype in (np.float16, np.float64):
        operands = [None if value is None else value.astype(dtype) for value in _operands(op_type)]
        for value in by_us(single_node(op_type, operands, opset=14, outputs=(dtype, dtype)), operands):
            assert value.dtype == dtype


def test_under_jit_lengths_may_be_data():
    operands = _operands("LSTM", lengths=(4, 1, 3))
    model = {"opset": 14, "outputs": _types("LSTM"), "hidden_size": _HIDDEN}
    assert_as_in_onnxruntime("LSTM", operands, atol=_ROUNDING, jit=True, **model)


@pytest.mark.parametrize("op_type", _GATES)
def test_the_gradient_is_that_of_the_unrolled_loop(op_type):
    """Central differences along one direction of the input, in float64."""
    operands = [None if value is None else value.astype(np.float64) for value in _operands(op_type, directions=2)]
    model = ptqjax.read(single_node(op_type, operands, opset=14, outputs=(np.float64,), direction="bidirectional"))

    def total(x):
        return jnp.sum(jnp.square(ptqjax.apply(model.graph, model.params, feeds_of(operands) | {"x0": x})["y0"]))

    along = np.random.default_rng(1).normal(size=operands[0].shape)
    with jax.enable_x64(True):
        slope = jnp.sum(jax.grad(total)(jnp.asarray(operands[0])) * along)
        step = 1e-5
        expected = (total(operands[0] + step * along) - total(operands[0] - step * along)) / (2 * step)
    np.testing.assert_allclose(slope, expected, rtol=1e-7)


def test_the_input_is_projected_once_before_the_loop():
    """Inside the loop there is the product with the state alone."""
    lowering = find_lowering("LSTM", opset=14)
    program = jax.make_jaxpr(lowering.function)(*_operands("LSTM")[:3])
    loops = [equation for equation in program.eqns if equation.primitive is lax.scan_p]
    assert len(loops) == 1
    inside = [equation for equation in loops[0].params["jaxpr"].eqns if equation.primitive is lax.dot_general_p]
    assert len(inside) == 1


def test_names_of_activations_may_be_in_any_case():
    operands = _operands("RNN")
    found = [
        by_us(single_node("RNN", operands, opset=14, activations=[name]), operands)[0] for name in ("Tanh", "tanh")
    ]
    np.testing.assert_array_equal(*found)
