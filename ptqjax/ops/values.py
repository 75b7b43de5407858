"""What flows through a graph besides tensors: sequences of tensors, and optionals that hold nothing."""

from __future__ import annotations

from typing import Any

from ptqjax.pytrees import PyTreeNode


class TensorSequence(PyTreeNode):
    """ONNX's sequence: tensors of one element type, of any shapes. Its length is static."""

    elements: tuple[Any, ...]
    """The tensors, in order."""


class Empty(PyTreeNode):
    """ONNX's optional without a value; one with a value is that value itself."""


EMPTY = Empty()
