"""Checks that a runtime takes the grids of a model: frozen ones before work begins, all before they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ptqjax.config.target import Target
from ptqjax.encodings.encoding import Encoding, Encodings, concrete
from ptqjax.errors import ConfigError
from ptqjax.ir import Model

_MIDDLE = {True, "strict"}


def check_taken(model: Model, encodings: Encodings, target: Target) -> None:
    """Checks that `target` takes each enabled grid: its type, where its zero lies, and the granularity of a weight's.

    Raises:
        ConfigError: It does not; the message names the tensor, what its grid is, what the target takes and the remedy.
    """
    for name, held in encodings.items():
        encoding = concrete(held)
        if not encoding.enabled:
            continue
        roles = ("weights", "activations") if name in model.params else ("activations",)
        refusals = [list(_refused(encoding, role, target)) for role in roles]
        found = refusals[0] if all(refusals) else []
        found += _refused_scales(encoding, target) if name in model.params else []
        if found:
            raise ConfigError(
                f"'{name}' has a grid of {found[0]} for {roles[0]}; calibrate for it, with "
                f"QuantizationConfig.for_target({target.name!r})"
            )


def _refused(encoding: Encoding, role: str, target: Target) -> Iterator[str]:
    allowed: dict[str, tuple[Any, ...]] = dict(target.allowed)
    types = allowed.get(role)
    if types is not None and encoding.dtype not in types:
        yield f"{encoding.dtype}; target {target.name!r} takes {', '.join(types)}"
    symmetries = allowed.get(f"{role}_symmetric")
    is_signed = not encoding.dtype.startswith("u")
    if symmetries is not None and set(symmetries) <= _MIDDLE and is_signed and np.any(encoding.zero_point):
        yield f"zero point {np.ravel(encoding.zero_point)[0]:g}; target {target.name!r} takes 0"


def _refused_scales(encoding: Encoding, target: Target) -> Iterator[str]:
    allowed = dict(target.allowed).get("granularity")
    if allowed is not None and encoding.granularity not in allowed:
        yield f"granularity {encoding.granularity!r}; target {target.name!r} takes {', '.join(allowed)}"
