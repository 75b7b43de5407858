"""What each ONNX operator computes, by operator set version."""

from ptqjax.ops import (  # noqa: F401 (importing a family registers its operators)
    convolution,
    elementwise,
    linear,
    normalization,
    pooling,
    qlinear,
    quantization,
    reduction,
    shape,
)
from ptqjax.ops.registry import Lowering, find_lowering, is_static, known, lowers, lowers_channels_last, registered

__all__ = ["Lowering", "find_lowering", "is_static", "known", "lowers", "lowers_channels_last", "registered"]
