"""From AIMET's JSON to encodings of a model, and what of it does not fit the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ptqjax.config import near_names
from ptqjax.encoding_files.aimet_json import OWN, OWN_SECTION, SINGLE_LIST
from ptqjax.encoding_files.aimet_schemas import SCHEMAS, Schema
from ptqjax.encoding_files.entries import encoding_of
from ptqjax.encoding_files.fitting import UnfitError, fitting
from ptqjax.encoding_files.located_json import Located
from ptqjax.encoding_files.own_fields import encoding_of_fields
from ptqjax.encodings.biases import BiasSite, bias_encoding, bias_sites
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import DataError
from ptqjax.ir import Model
from ptqjax.placement.tensor_axes import TensorAxes, tensor_axes

_BIAS = "int32"
_BIAS_TOLERANCE = 1e-6  # relative; float32 rounds the two scales and their product by 6e-8 each


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """Something in a file of encodings that does not fit the model, or that the model misses in it."""

    tensor: str
    """The tensor's name, as the file or the model has it."""
    found: str
    """What was found."""
    expected: str
    """What was expected."""

    def __str__(self) -> str:
        return f"'{self.tensor}': found {self.found}, expected {self.expected}"


def encodings_of_json(document: Located, model: Model) -> tuple[Encodings, tuple[Mismatch, ...]]:
    """Returns the encodings of the model that a file's JSON holds, and what of it does not fit.

    int32 biases of 2.0.0 are left out: their scale follows from those of input and weight (beside weights by blocks,
    biases stay in float). One that says otherwise is a mismatch.

    Raises:
        DataError: The JSON is not of a known version, keys are missing, or values are of another type.
    """
    schema, known = _schema(document), tensor_axes(model)
    encodings: Encodings = {}
    mismatches: list[Mismatch] = []
    biases: dict[str, Located] = {}
    sites = {site.bias: site for site in bias_sites(model)}
    for name, found in _unique(document, schema):
        if name in known and _is_bias(found):
            biases[name] = found
            continue
        result = _encoding(name, found, schema, known)
        if isinstance(result, Mismatch):
            mismatches.append(result)
        else:
            encodings[name] = result
    mismatches += _biases_that_differ(biases, encodings, sites)
    return encodings, tuple(mismatches)


def _schema(document: Located) -> Schema:
    stated = document.item("version")
    schema = next((schema for schema in SCHEMAS if schema.version == stated.value), None)
    if schema is None:
        raise stated.wrong(f"one of the versions {', '.join(schema.version for schema in SCHEMAS)}")
    return schema


def _unique(document: Located, schema: Schema) -> Iterator[tuple[str, Located]]:
    seen: dict[str, str] = {}
    for name, found in _entries(document, schema):
        if name in seen:
            raise DataError(f"{found.place}: '{name}' has an entry already, {seen[name]}; expected one for each tensor")
        seen[name] = found.place
        yield name, found


def _entries(document: Located, schema: Schema) -> Iterator[tuple[str, Located]]:
    sections = ["encodings"] if schema.version == SINGLE_LIST else ["activation_encodings", "param_encodings"]
    for section in map(document.item, sections):
        if schema.version == "0.6.1":
            yield from section.members()
        else:
            yield from ((found.item("name").text(), found) for found in section.elements())
    if document.has(OWN_SECTION):
        own = document.item(OWN_SECTION).elements()
        yield from ((found.item("name").text(), Located({OWN: found.value}, found.place)) for found in own)


def _is_bias(found: Located) -> bool:
    return not found.has(OWN) and found.has("output_dtype") and found.item("output_dtype").value == _BIAS


def _encoding(name: str, found: Located, schema: Schema, known: Mapping[str, TensorAxes]) -> Encoding | Mismatch:
    if name not in known:
        return of_unknown(name, known)
    holder = found.elements()[0] if isinstance(found.value, list) and found.value else found
    try:
        if holder.has(OWN):
            return fitting(encoding_of_fields(holder.item(OWN)), known[name])
        return encoding_of(schema.from_json(found, known[name]), known[name])
    except UnfitError as error:
        return Mismatch(tensor=name, found=error.found, expected=error.expected)


def of_unknown(name: str, known: Mapping[str, TensorAxes]) -> Mismatch:
    """Returns what says that the model has no such tensor."""
    expected = f"a floating tensor of the model of this name{near_names(name, known)}"
    return Mismatch(tensor=name, found="an encoding", expected=expected)


def _biases_that_differ(
    biases: Mapping[str, Located], encodings: Encodings, sites: Mapping[str, BiasSite]
) -> Iterator[Mismatch]:
    for name, found in biases.items():
        site = sites.get(name)
        weight = None if site is None else encodings.get(site.weight)
        if weight is not None and weight.block_size is not None:
            continue
        follows = None if site is None else bias_encoding(encodings, site)
        scale = found.item("y_scale").numbers()
        if follows is None:
            yield Mismatch(
                tensor=name,
                found="an int32 entry",
                expected="none, or the bias of a layer whose input and weight have entries: it follows from these",
            )
        elif scale.size != np.size(follows.scale) or not np.allclose(
            scale.reshape(-1), np.ravel(follows.scale), rtol=_BIAS_TOLERANCE, atol=0
        ):
            yield Mismatch(
                tensor=name,
                found=f"an int32 entry with the scale {float(scale.reshape(-1)[0])}, ...",
                expected=f"that of its layer's input times that of its weight, {float(np.ravel(follows.scale)[0])}",
            )
