"""What each ONNX operator computes, by operator set version."""

from ptqjax.ops import (  # noqa: F401 (importing a family registers its operators)
    activation,
    bitwise,
    cast,
    control,
    convolution,
    elementwise,
    linear,
    logical,
    normalization,
    pooling,
    qlinear,
    quantization,
    recurrent,
    reduction,
    resize,
    sequence,
    shape,
)
from ptqjax.ops.registry import Lowering, find_lowering, is_concrete, is_static, known, lowers, lowers_channels_last, registered

__all__ = ["Lowering", "find_lowering", "is_concrete", "is_static", "known", "lowers", "lowers_channels_last", "registered"]
