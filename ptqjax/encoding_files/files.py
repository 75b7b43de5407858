"""Encodings into a file and back, in the format that the file's suffix tells."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ptqjax.config import QuantizationConfig
from ptqjax.encoding_files.aimet_json import encodings_json
from ptqjax.encoding_files.aimet_reading import Mismatch, encodings_of_json, of_unknown
from ptqjax.encoding_files.fitting import UnfitError, check_fit, fitting
from ptqjax.encoding_files.located_json import read_json
from ptqjax.encoding_files.tensors import encodings_of_tensors, tensors_of_encodings
from ptqjax.encoding_files.whole_files import write_whole
from ptqjax.encodings.encoding import Encodings, concrete
from ptqjax.errors import ConfigError
from ptqjax.ir import Model
from ptqjax.placement.place import place
from ptqjax.placement.tensor_axes import tensor_axes

_TENSORS = ".safetensors"
_SHOWN = 5  # mismatches in a message


def write_encodings(
    path: str | os.PathLike[str], model: Model, encodings: Encodings, version: str | None = None
) -> None:
    """Writes the encodings as AIMET's JSON, or as tensors where the path ends in ".safetensors".

    `read_encodings` is the inverse, to the bit, in every format: where AIMET's entries have no word for a grid, its
    fields stand beside them (`encodings_json`). Nothing half-written is ever left under `path`.

    Args:
        path: The file.
        model: What the encodings are for.
        encodings: The grids by tensor, concrete.
        version: Of AIMET's schema: "0.6.1", "1.0.0" or "2.0.0"; None: "1.0.0", or "2.0.0" where that alone has all of
            the grids. Tensors have none.

    Raises:
        OutputError: The folder is missing or cannot be written.
        ConfigError: The version is unknown or has no grid of some kind (0.6.1 no blocks; 0.6.1 and 1.0.0 no floats but
            float16), or an encoding is for a tensor that the model has not, is no grid, or does not fit its tensor.
    """
    path = Path(path)
    axes = tensor_axes(model)
    missing = sorted(encodings.keys() - axes.keys())
    if missing:
        raise ConfigError(f"there is an encoding for '{missing[0]}', but the model has no such floating tensor")
    if path.suffix == _TENSORS:
        for name, encoding in encodings.items():
            check_fit(name, concrete(encoding), axes[name])
        write_whole(path, tensors_of_encodings(encodings))
        return
    text = json.dumps(encodings_json(model, encodings, version), indent=1, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def read_encodings(
    path: str | os.PathLike[str], model: Model, *, strict: bool = True, config: QuantizationConfig | None = None
) -> tuple[Encodings, tuple[Mismatch, ...]]:
    """Returns the encodings in a file, and what does not fit: entries and model.

    The file is AIMET's JSON (0.6.1, 1.0.0, 2.0.0; its scales, in float64, are rounded to float32), or one of tensors
    where its name ends in ".safetensors". Versions before 2.0.0 state no axis: it follows from the operator that reads
    a weight.

    Mismatches are: an entry for a tensor that the model has not; a wrong number of scales; an unknown type; an axis
    that does not fit; a scale of 0; a zero point off the grid; with `config`, a tensor to be rounded that the file has
    no entry for.

    Args:
        path: The file.
        model: What the encodings are for.
        strict: Whether mismatches are an error; else the entries are left out and the mismatches returned.
        config: The configuration that says which tensors have to have an entry, themselves or what they share it with;
            None: the file says which tensors are rounded.

    Raises:
        DataError: The file cannot be read, is no JSON, is of an unknown version, or has missing or wrong values; the
            message names the file and the keys.
        ConfigError: `strict`, and there are mismatches; the message names the first ones.
    """
    path = Path(path)
    if path.suffix == _TENSORS:
        encodings, mismatches = _fitting(encodings_of_tensors(path), model)
    else:
        encodings, mismatches = encodings_of_json(read_json(path), model)
    if config is not None:
        mismatches = (*mismatches, *_missing(model, encodings, config))
    if strict and mismatches:
        more = f"; and {len(mismatches) - _SHOWN} more" if len(mismatches) > _SHOWN else ""
        raise ConfigError(
            f"'{path}' does not fit the model in {len(mismatches)} places: "
            f"{'; '.join(map(str, mismatches[:_SHOWN]))}{more}; read it with strict=False to leave these out"
        )
    return encodings, mismatches


def _fitting(encodings: Encodings, model: Model) -> tuple[Encodings, tuple[Mismatch, ...]]:
    known = tensor_axes(model)
    kept: Encodings = {}
    mismatches = [of_unknown(name, known) for name in encodings if name not in known]
    for name in sorted(known.keys() & encodings.keys()):
        try:
            kept[name] = fitting(encodings[name], known[name])
        except UnfitError as error:
            mismatches.append(Mismatch(tensor=name, found=error.found, expected=error.expected))
    return kept, tuple(mismatches)


def _missing(model: Model, encodings: Encodings, config: QuantizationConfig) -> Iterator[Mismatch]:
    sites = place(model, config).sites
    covered = {site.root for site in sites if site.tensor in encodings}
    for site in sites:
        if site.tensor not in encodings and site.root not in covered:
            yield Mismatch(tensor=site.tensor, found="no entry", expected=f"one, because it is rounded: {site.reason}")
