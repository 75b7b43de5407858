"""The errors that ptqjax raises on purpose: one family, so that a caller can catch them all.

Every message names the place (file, node, tensor, key), what was found, what was expected and the remedy.
"""

from __future__ import annotations


class PtqjaxError(Exception):
    """The root of all errors that ptqjax raises on purpose."""


class ModelError(PtqjaxError):
    """A model file or graph that is damaged, inconsistent, or already quantized where it may not be."""


class UnsupportedOperatorError(PtqjaxError):
    """An operator, or a use of one, that has no lowering."""


class DataDependentError(UnsupportedOperatorError):
    """A value that decides a shape, or a path through the graph, and is not known while tracing."""

    tensor: str = ""
    """What the node writes that cannot be computed."""


class DataError(PtqjaxError):
    """Data (calibration, evaluation, call arguments) that does not fit the model."""


class ConfigError(PtqjaxError):
    """A configuration with an unknown or contradictory setting."""


class OutputError(PtqjaxError):
    """An output place that cannot be written."""


class PtqjaxWarning(UserWarning):
    """Something that works, but less well than the caller may expect; the message says what would help."""
