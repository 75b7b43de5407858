"""Encodings as AIMET's JSON."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from ptqjax.ir import Model
from ptqjax.quantize.encodings import Encoding, Encodings, concrete

_SCHEMA = "1.0.0"


def encodings_json(model: Model, encodings: Encodings) -> dict[str, Any]:
    """Returns the encodings as AIMET's JSON schema 1.0.0 has them: offsets are those of unsigned integers, negated.

    The schema states neither an axis nor the shape of the scales. For scales per channel, tools take the operator's
    output channel. For blocks, scales and offsets are the elements in C order of an array with the weight's axes, in
    which the axis that is summed is ceil(size / block_size) long; without the weight, they cannot be told apart.
    """
    entries = {name: _entry(name, concrete(encoding)) for name, encoding in sorted(encodings.items())}
    enabled = {name: entry for name, entry in entries.items() if bool(encodings[name].enabled)}
    return {
        "version": _SCHEMA,
        "producer": {"package": "ptqjax", "version": version("ptqjax")},
        "activation_encodings": [entry for name, entry in enabled.items() if name not in model.params],
        "param_encodings": [entry for name, entry in enabled.items() if name in model.params],
    }


def _entry(name: str, encoding: Encoding) -> dict[str, Any]:
    qmin = int(encoding.qmin)
    blocks = encoding.block_size is not None
    kind = "PER_TENSOR" if encoding.axis is None else "PER_BLOCK" if blocks else "PER_CHANNEL"
    zero_points = np.asarray(encoding.zero_point, np.int64).ravel()
    entry = {
        "name": name,
        "enc_type": kind,
        "dtype": "INT",
        "bw": encoding.num_bits,
        "is_sym": bool(qmin < 0 and np.all(zero_points == 0)),
        "scale": [float(scale) for scale in np.asarray(encoding.scale).ravel()],
        "offset": [int(qmin - zero_point) for zero_point in zero_points],
    }
    return entry | ({"block_size": encoding.block_size} if blocks else {})
