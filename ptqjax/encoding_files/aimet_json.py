"""Encodings as AIMET's JSON, in one of its versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version as installed
from typing import Any

import numpy as np

from ptqjax.config import near_names
from ptqjax.encoding_files.aimet_schemas import SCHEMAS, Schema
from ptqjax.encoding_files.entries import Entry, encoding_of, entry_of
from ptqjax.encoding_files.fitting import UnfitError, check_fit
from ptqjax.encoding_files.located_json import Located, to_float32
from ptqjax.encoding_files.own_fields import fields_of, is_identical
from ptqjax.encodings.biases import bias_encoding, bias_sites
from ptqjax.encodings.encoding import Encoding, Encodings, concrete
from ptqjax.errors import ConfigError
from ptqjax.ir import Model
from ptqjax.placement.tensor_axes import TensorAxes, tensor_axes

OWN = "ptqjax"
"""The key of an entry under which all fields stand, where the entry's other keys do not tell them."""
OWN_SECTION = "ptqjax_encodings"
"""The key of a file under which the encodings stand that have no entry."""
SINGLE_LIST = "2.0.0"
"""The version that has one list for all tensors."""

_PLAIN_CASTS = ("float16", "bfloat16")
_NAMED_ENTRIES = "0.6.1"
_USUAL = "1.0.0"


def encodings_json(model: Model, encodings: Encodings, version: str | None = None) -> dict[str, Any]:
    """Returns the encodings as AIMET's JSON schema of that version has them; None: of the usual one that suffices.

    0.6.1 and 1.0.0 state neither an axis nor the shape of scales: for scales per channel, tools take the operator's
    output channel. For blocks (1.0.0), scales are the elements in C order of an array with the weight's axes, in which
    the summed axis is ceil(size / block_size) long, and the others are those of channels, else 1 or the weight's;
    transposed for matrices with channels on the second axis. Strictly symmetric grids have the offset one above the
    smallest. 2.0.0 also has an entry for each int32 bias, whose scale follows from the other encodings.

    What an entry cannot say (limits other than the type's, signed integers with a zero point, an unusual axis) stands
    beside it under the key "ptqjax": all fields of the encoding, which `read` prefers. An encoding that is not enabled,
    whose grid is found at run time, or in 2.0.0 a plain cast to 16 bits, has no entry, so that other tools leave the
    tensor in float: it stands in a section of its own, "ptqjax_encodings".

    Raises:
        ConfigError: There is no such version; it has no grid of that kind; or an encoding is no grid of its tensor
            (a scale of 0, or for other channels).
    """
    axes = tensor_axes(model)
    held = {name: _single(name, encoding, axes.get(name, TensorAxes())) for name, encoding in sorted(encodings.items())}
    schema = _sufficient_schema(held, axes) if version is None else find_schema(version)
    without = {name for name, encoding in held.items() if not _is_told(encoding) or _is_cast(encoding, schema)}
    entries = {
        name: _entry(name, encoding, schema, axes.get(name, TensorAxes()))
        for name, encoding in held.items()
        if name not in without
    }
    found = _head(schema) | _sections(model, entries, schema)
    if schema.version == SINGLE_LIST:
        found["encodings"] += _bias_entries(model, held, schema, axes)
    if schema.version == _NAMED_ENTRIES:
        found["quantizer_args"] = _quantizer_args(model, held)
    own = [{"name": name, **fields_of(held[name])} for name in sorted(without)]
    return found | ({OWN_SECTION: own} if own else {})


def _sufficient_schema(held: Encodings, axes: Mapping[str, TensorAxes]) -> Schema:
    """Returns the usual schema, or the one of a single list where the usual one has not all of the grids."""
    usual = find_schema(_USUAL)
    enabled = {name: encoding for name, encoding in held.items() if _is_told(encoding)}
    suffices = all(_has_entry(each, usual, axes.get(name, TensorAxes())) for name, each in enabled.items())
    return usual if suffices else find_schema(SINGLE_LIST)


def _has_entry(encoding: Encoding, schema: Schema, axes: TensorAxes) -> bool:
    try:
        schema.to_json(entry_of(encoding, axes), axes)
    except UnfitError:
        return False
    return True


def find_schema(version: str) -> Schema:
    """Returns the schema of that version.

    Raises:
        ConfigError: There is none.
    """
    schema = next((schema for schema in SCHEMAS if schema.version == version), None)
    if schema is None:
        versions = [schema.version for schema in SCHEMAS]
        raise ConfigError(
            f"version={version!r} of encodings is unknown; expected one of {', '.join(versions)}"
            f"{near_names(str(version), versions)}"
        )
    return schema


def _head(schema: Schema) -> dict[str, Any]:
    return {"version": schema.version, "producer": {"package": "ptqjax", "version": installed("ptqjax")}}


def _sections(model: Model, entries: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    activations = {name: entry for name, entry in entries.items() if name not in model.params}
    params = {name: entry for name, entry in entries.items() if name in model.params}
    if schema.version == _NAMED_ENTRIES:
        return {"activation_encodings": activations, "param_encodings": params}
    if schema.version == SINGLE_LIST:
        return {"encodings": [*activations.values(), *params.values()]}
    return {"activation_encodings": [*activations.values()], "param_encodings": [*params.values()]}


def _entry(name: str, encoding: Encoding, schema: Schema, axes: TensorAxes) -> Any:
    try:
        entry = entry_of(encoding, axes)
        written = schema.to_json(entry, axes)
    except UnfitError as error:
        raise ConfigError(
            f"the encoding of '{name}' cannot be written in version {schema.version}: {error}, or a .safetensors file"
        ) from error
    try:
        is_told = is_identical(encoding_of(schema.from_json(Located(written, name), axes), axes), encoding)
    except UnfitError:
        is_told = False
    # A grid of 32 bits without fields of its own is that of a bias, which follows from the other encodings.
    own = {} if is_told and encoding.num_bits < 32 else {OWN: fields_of(encoding)}  # noqa: PLR2004
    if schema.version == _NAMED_ENTRIES:
        return [written[0] | own, *written[1:]]
    return {"name": name} | written | own


def _bias_entries(model: Model, held: Encodings, schema: Schema, axes: Mapping[str, TensorAxes]) -> list[Any]:
    enabled = {name: encoding for name, encoding in held.items() if encoding.enabled}
    follow = ((site.bias, bias_encoding(enabled, site)) for site in bias_sites(model))
    return [
        {"name": name} | schema.to_json(_bias_entry(encoding, axes[name]), axes[name])
        for name, encoding in follow
        if encoding is not None
    ]


def _bias_entry(encoding: Encoding, axes: TensorAxes) -> Entry:
    scale = np.asarray(encoding.scale, np.float64)
    axis = None if encoding.axis is None else encoding.axis % len(axes.shape or (0,))
    return Entry(dtype="int32", scale=scale, zero_point=np.zeros(scale.shape), axis=axis)


def _quantizer_args(model: Model, held: Encodings) -> dict[str, Any]:
    """Returns what the oldest version says of all tensors together: the widths that most of them have."""
    params = [encoding for name, encoding in held.items() if name in model.params and encoding.enabled]
    activations = [encoding for name, encoding in held.items() if name not in model.params and _is_told(encoding)]
    return {
        "activation_bitwidth": _usual_bits(activations),
        "param_bitwidth": _usual_bits(params),
        "dtype": "int",
        "is_symmetric": all(encoding.qmin < 0 for encoding in params),
        "per_channel_quantization": any(encoding.axis is not None for encoding in params),
    }


def _usual_bits(encodings: list[Encoding]) -> int:
    counts = Counter(16 if encoding.float_format else encoding.num_bits for encoding in encodings)
    return max(counts, key=lambda bits: counts[bits], default=8)


def _is_told(encoding: Encoding) -> bool:
    """Tells whether there is a grid that an entry can say."""
    return bool(encoding.enabled) and not encoding.is_dynamic


def _is_cast(encoding: Encoding, schema: Schema) -> bool:
    return encoding.float_format in _PLAIN_CASTS and schema.version == SINGLE_LIST


def _single(name: str, encoding: Encoding, axes: TensorAxes) -> Encoding:
    """Returns the encoding with concrete leaves, in float32 as the record has them."""
    found = concrete(encoding)
    names = ("scale", "zero_point", "qmin", "qmax")
    found = found.replace(**{field: to_float32(getattr(found, field)) for field in names})
    check_fit(name, found, axes)
    return found
