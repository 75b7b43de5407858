"""RNN, GRU and LSTM.

Sequences lie along the first axis, [t, b, i], or along the second where `layout` is 1. An output holds one slice per
direction. What the operators of opset 7 say without `layout` is what later ones say with 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.kernels.recurrent import Activation, Step, gru_step, lstm_step, run, simple_step
from ptqjax.ops.registry import lowers

_IS_REVERSE = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}

# Name -> (function of x, alpha and beta, default alpha, default beta); None: it takes none, and consumes none.
_ACTIVATIONS: dict[str, tuple[Callable[[Any, Any, Any], Any], float | None, float | None]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "elu": (lambda x, alpha, _: jnp.where(x >= 0, x, alpha * jnp.expm1(jnp.minimum(x, 0))), 1.0, None),
    "hardsigmoid": (lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1), 0.2, 0.5),
    "leakyrelu": (lambda x, alpha, _: jnp.where(x >= 0, x, alpha * x), 0.01, None),
    "relu": (lambda x, *_: jnp.maximum(x, 0), None, None),
    "scaledtanh": (lambda x, alpha, beta: alpha * jnp.tanh(beta * x), 1.0, 1.0),
    "sigmoid": (lambda x, *_: jax.nn.sigmoid(x), None, None),
    "softplus": (lambda x, *_: jax.nn.softplus(x), None, None),
    "softsign": (lambda x, *_: jax.nn.soft_sign(x), None, None),
    "tanh": (lambda x, *_: jnp.tanh(x), None, None),
    "thresholdedrelu": (lambda x, alpha, _: jnp.where(x > alpha, x, 0), 1.0, None),
}


@lowers("RNN", since=7)
def rnn(  # noqa: PLR0917 - ONNX's operands
    x: Any,
    w: Any,
    r: Any,
    bias: Any = None,
    sequence_lens: Any = None,
    initial_h: Any = None,
    /,
    *,
    activations: Sequence[str] = ("Tanh", "Tanh"),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Any, ...]:
    """Returns all outputs and the last one of h' = f(x W + W_b + h R + R_b), per direction."""
    del hidden_size  # the shape of `r` has it
    functions = _activations(activations, activation_alpha, activation_beta, clip)

    def step_of(at: int, recurrence: Any) -> Step:
        return simple_step(recurrence=recurrence, activation=functions[at])

    weights = (w, r, sum(_biases(bias, w)))
    return _along_directions(step_of, x, weights, sequence_lens, (initial_h,), direction=direction, layout=layout)


@lowers("GRU", since=7)
def gru(  # noqa: PLR0917 - ONNX's operands
    x: Any,
    w: Any,
    r: Any,
    bias: Any = None,
    sequence_lens: Any = None,
    initial_h: Any = None,
    /,
    *,
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Any, ...]:
    """Returns all outputs and the last one of `gru_step`, per direction; the gates lie in the order z, r, n."""
    del hidden_size  # the shape of `r` has it
    names = activations or ("Sigmoid", "Tanh") * w.shape[0]
    functions = _activations(names, activation_alpha, activation_beta, clip)
    of_input, of_state = _biases(bias, w)
    of_gates, of_candidate = jnp.split(of_state, [2 * r.shape[-1]], axis=1)
    outside = jnp.concatenate([of_gates, jnp.zeros_like(of_candidate) if linear_before_reset else of_candidate], axis=1)

    def step_of(at: int, recurrence: Any) -> Step:
        gate, candidate = functions[2 * at : 2 * at + 2]
        inside = of_candidate[at] if linear_before_reset else None
        return gru_step(recurrence=recurrence, bias=inside, gate=gate, candidate=candidate)

    weights = (w, r, of_input + outside)
    return _along_directions(step_of, x, weights, sequence_lens, (initial_h,), direction=direction, layout=layout)


@lowers("LSTM", since=7)
def lstm(  # noqa: PLR0917 - ONNX's operands
    x: Any,
    w: Any,
    r: Any,
    bias: Any = None,
    sequence_lens: Any = None,
    initial_h: Any = None,
    initial_c: Any = None,
    peepholes: Any = None,
    /,
    *,
    activations: Sequence[str] = (),
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Any, ...]:
    """Returns all outputs, the last one and the last cell of `lstm_step`, per direction; gates lie as i, o, f, n."""
    del hidden_size  # the shape of `r` has it
    names = activations or ("Sigmoid", "Tanh", "Tanh") * w.shape[0]
    functions = _activations(names, activation_alpha, activation_beta, clip)
    unclipped = _activations(names, activation_alpha, activation_beta, None)  # ONNX Runtime clips the gates alone

    def step_of(at: int, recurrence: Any) -> Step:
        gate, candidate = functions[3 * at : 3 * at + 2]
        return lstm_step(
            recurrence=recurrence,
            peepholes=None if peepholes is None else jnp.reshape(peepholes[at], (3, -1)),
            gate=gate,
            candidate=candidate,
            output=unclipped[3 * at + 2],
            is_coupled=bool(input_forget),
        )

    weights, initial = (w, r, sum(_biases(bias, w))), (initial_h, initial_c)
    return _along_directions(step_of, x, weights, sequence_lens, initial, direction=direction, layout=layout)


def _along_directions(
    step_of: Callable[[int, Any], Step],
    x: Any,
    weights: tuple[Any, Any, Any],
    lengths: Any,
    initial: tuple[Any, ...],
    *,
    direction: str,
    layout: int,
) -> tuple[Any, ...]:
    """Returns the outputs [t, d, b, h] and the last states [d, b, h]; with `layout` 1 the batch comes first.

    Args:
        step_of: The step of a direction, with its recurrence [h, g].
        x: The sequences.
        weights: What projects the input onto the gates [d, g, i], the state [d, g, h], and what is added [d, g].
        lengths: The moments of each sequence; None: all.
        initial: The states before the first step, None for zeros.
        direction: ONNX's name of it.
        layout: 1: the batch is the first axis of `x`, `initial` and the results.
    """
    if layout:
        x, initial = jnp.swapaxes(x, 0, 1), tuple(None if h is None else jnp.swapaxes(h, 0, 1) for h in initial)
    lengths = _needed_lengths(lengths, x.shape[0])
    results = []
    for at, is_reverse in enumerate(_IS_REVERSE[direction]):
        w, r, bias = (jnp.asarray(weight[at]) for weight in weights)
        zeros = jnp.zeros((x.shape[1], r.shape[-1]), x.dtype)
        states = tuple(zeros if h is None else jnp.asarray(h[at]) for h in initial)
        gates = jnp.dot(x, w.T, precision=lax.Precision.HIGHEST) + bias[None, None]
        results.append(run(step_of(at, r.T), gates, states, lengths=lengths, reverse=is_reverse))
    y = jnp.stack([outputs for outputs, _ in results], axis=1)
    last = tuple(jnp.stack(states) for states in zip(*(final for _, final in results), strict=True))
    if layout:
        return jnp.moveaxis(y, 2, 0), *(jnp.swapaxes(h, 0, 1) for h in last)
    return y, *last


def _needed_lengths(lengths: Any, num_moments: int) -> Any:
    """Returns the lengths, or None where it is known that all sequences are whole."""
    if isinstance(lengths, np.ndarray) and np.all(lengths >= num_moments):
        return None
    return None if lengths is None else jnp.asarray(lengths)


def _biases(bias: Any, w: Any) -> tuple[Any, Any]:
    """Returns what is added to the gates [d, g] with the input and with the state; ONNX stores one behind the other."""
    if bias is None:
        zeros = jnp.zeros(w.shape[:2], w.dtype)
        return zeros, zeros
    of_input, of_state = jnp.split(jnp.asarray(bias), 2, axis=1)
    return of_input, of_state


def _activations(
    names: Sequence[str], alphas: Sequence[float], betas: Sequence[float], clip: float | None
) -> list[Activation]:
    """Returns the functions by ONNX's names, after bringing their argument into [-clip, clip].

    Numbers are handed out in order, to those functions that take one; the others get their defaults.

    Raises:
        UnsupportedOperatorError: A name is none of ONNX's.
    """
    alphas_left, betas_left = iter(alphas), iter(betas)
    return [_activation(name, alphas_left, betas_left, clip) for name in names]


def _activation(name: str, alphas: Iterator[float], betas: Iterator[float], clip: float | None) -> Activation:
    if name.lower() not in _ACTIVATIONS:
        raise UnsupportedOperatorError(f"activation '{name}' is unknown; expected one of {sorted(_ACTIVATIONS)}")
    function, alpha, beta = _ACTIVATIONS[name.lower()]
    alpha = alpha if alpha is None else next(alphas, alpha)
    beta = beta if beta is None else next(betas, beta)
    bound = np.inf if clip is None else clip
    return lambda x: function(x if np.isinf(bound) else jnp.clip(x, -bound, bound), alpha, beta)
