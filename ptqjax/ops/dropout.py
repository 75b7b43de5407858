"""Dropout, which drops nothing at inference."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.registry import known, lowers


@lowers("Dropout", since=6)
def dropout_6(x: Any, /, *, is_test: int = 0, ratio: float = 0.5) -> tuple[Any, Any]:
    """Returns `dropout_7`.

    Raises:
        UnsupportedOperatorError: `is_test` is 0, which means training.
    """
    _check_that_nothing_is_dropped(is_training=not is_test, ratio=ratio)
    return dropout_7(x)


@lowers("Dropout", since=7)
def dropout_7(x: Any, /, *, ratio: float = 0.5) -> tuple[Any, Any]:
    """Returns `x`, and a mask of ones of its type."""
    del ratio  # it speaks of training
    return x, np.ones(x.shape, x.dtype)


@lowers("Dropout", since=10)
def dropout_10(x: Any, /, *, ratio: float = 0.5) -> tuple[Any, Any]:
    """Returns `x`, and a mask that is true."""
    del ratio
    return x, np.ones(x.shape, bool)


@lowers("Dropout", since=12)
def dropout(x: Any, ratio: Any = None, training_mode: Any = None, /, *, seed: int | None = None) -> tuple[Any, Any]:
    """Returns `dropout_10`; what were attributes are inputs.

    Raises:
        UnsupportedOperatorError: The node is in training mode, and its ratio is not 0.
    """
    del seed
    if training_mode is not None and np.any(known(training_mode, "training_mode of Dropout")):
        given = 0.5 if ratio is None else known(ratio, "the ratio of Dropout in training mode")
        _check_that_nothing_is_dropped(is_training=True, ratio=float(np.reshape(given, ())))
    return dropout_10(x)


def _check_that_nothing_is_dropped(*, is_training: bool, ratio: float) -> None:
    if is_training and ratio:
        raise UnsupportedOperatorError(
            f"Dropout of {ratio:g} in training mode has no lowering, for it is random; export the model for inference"
        )
