"""What operators meant before opset 7: broadcasting had to be asked for, and aligned from an axis on."""

from __future__ import annotations

from typing import Any

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.registry import find_lowering, lowers

_ALIGNED = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Less", "Greater")


def _aligned(op_type: str) -> None:
    @lowers(op_type, since=6 if op_type in ("Add", "Sub", "Mul", "Div") else 1)
    def function(x: Any, y: Any, /, *, axis: int | None = None, broadcast: int = 0) -> Any:
        """Returns today's meaning on `y` aligned to the axes of `x` from `axis` on (None: to the last ones)."""
        if broadcast and axis is not None:
            y = y.reshape(y.shape + (1,) * (x.ndim - axis % x.ndim - y.ndim))
        return find_lowering(op_type, opset=7).function(x, y)


for _op_type in _ALIGNED:
    _aligned(_op_type)


@lowers("Gemm", since=6)
def gemm_6(
    a: Any,
    b: Any,
    c: Any,
    /,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    broadcast: int = 0,
    transA: int = 0,  # noqa: N803 (ONNX's name)
    transB: int = 0,  # noqa: N803
) -> Any:
    """Returns alpha A B + beta C; C of another shape broadcasts, as it does today."""
    del broadcast
    return find_lowering("Gemm", opset=7).function(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)


@lowers("BatchNormalization", since=6)
def batch_normalization_6(
    x: Any,
    scale: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    /,
    *,
    epsilon: float = 1e-5,
    is_test: int = 0,
    momentum: float = 0.9,
    spatial: int = 1,
) -> Any:
    """Returns the normalization by the given statistics.

    Raises:
        UnsupportedOperatorError: `is_test` is 0, which means training.
    """
    if not is_test:
        raise UnsupportedOperatorError("is_test = 0 means training before opset 7; export the model for inference")
    attributes = {"epsilon": epsilon, "momentum": momentum, "spatial": spatial}
    return find_lowering("BatchNormalization", opset=7).function(x, scale, bias, mean, variance, **attributes)


@lowers("PRelu", since=6)
def prelu_6(x: Any, slope: Any, /) -> Any:
    """Returns x where it is positive, else slope x; a vector of slopes is along axis 1."""
    if slope.ndim == 1 and x.ndim > 1:
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2))
    return find_lowering("PRelu", opset=7).function(x, slope)
