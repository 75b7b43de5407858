"""Quantized ONNX models, read as what they were made from."""

from __future__ import annotations

from typing import Any

from ptqjax import onnx_io
from ptqjax.encodings.encoding import Encodings
from ptqjax.ir import Model, Report
from ptqjax.qdq.unquantize import unquantize


def read_quantized(source: Any) -> tuple[Model, Encodings, Report]:
    """Returns the float model behind an ONNX model in QDQ form, the encodings of its tensors, and a report.

    `export` is its inverse: what it writes of the two is the file again, with the same codes, grids and outputs. Of a
    file that `export` wrote, the encodings are those that it was given, to the bit, except where scales of blocks serve
    several places (they are repeated), and of what equal nodes make once. Files of ONNX Runtime's `quantize_static` and
    AIMET's `to_onnx_qdq` are read as well; see `qdq.unquantize` for what becomes of each node, and what is left.
    Note that Relu and Clip are missing where grids imply them: with encodings the model computes what it did, without
    them it does not.

    Args:
        source: A path, the bytes of a file, a ModelProto, or a `Model` as `read` returns it.

    Raises:
        ModelError: The file cannot be read as a model, an operator in it works on integers (QLinearConv) or holds them
            packed (MatMulNBits, GatherBlockQuantized), or a tensor is quantized and dequantized on different grids.
    """
    return unquantize(source if isinstance(source, Model) else onnx_io.read(source))
