"""Arrays as safetensors files: encodings, and what calibration keeps, with nothing rounded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ptqjax.encoding_files.located_json import Located
from ptqjax.encoding_files.own_fields import ARRAYS, static_fields, static_of
from ptqjax.encoding_files.whole_files import write_whole
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import DataError

_FORMAT = "ptqjax.format"
_ENCODINGS, _STATE = "encodings 1", "state 1"
_STATIC_KEY = "ptqjax.encodings"

_LENGTH = 8  # bytes in front of the header, which say how long it is

_WIDTHS = (8, 16, 32, 64)
_TYPES = (
    "bool",
    *(f"{kind}{width}" for kind in ("int", "uint") for width in _WIDTHS),
    *("bfloat16", "float16", "float32", "float64", "complex64"),
)
"""Of arrays that safetensors writes and reads as NumPy's."""

Tree = TypeVar("Tree")


def tensors_of_encodings(encodings: Encodings) -> bytes:
    """Returns the encodings as the content of a safetensors file: a tensor a leaf, static fields in the metadata."""
    arrays = {
        f"{name}/{field}": np.asarray(getattr(encoding, field))
        for name, encoding in encodings.items()
        for field in ARRAYS
    }
    static = {name: static_of(encoding) for name, encoding in encodings.items()}
    return _content(arrays, {_FORMAT: _ENCODINGS, _STATIC_KEY: json.dumps(static)})


def encodings_of_tensors(path: Path) -> Encodings:
    """Returns the encodings of a safetensors file.

    Raises:
        DataError: The file cannot be read, or does not hold encodings.
    """
    arrays, metadata = _read(path, _ENCODINGS)
    try:
        static = Located(json.loads(metadata[_STATIC_KEY]), f"'{path}', metadata {_STATIC_KEY}")
        return {
            name: Encoding(**{field: arrays[f"{name}/{field}"] for field in ARRAYS}, **static_fields(fields))
            for name, fields in static.members()
        }
    except (KeyError, ValueError) as error:
        raise DataError(f"'{path}' is damaged: {error} is missing or wrong; write it again") from error


def write_state(path: str | os.PathLike[str], state: Any) -> None:
    """Writes the arrays of a pytree, such as what an observer keeps, as a safetensors file.

    So several machines calibrate apart, and one reads and merges what they saw. Nothing half-written is ever left.

    Raises:
        OutputError: The folder is missing or cannot be written.
        DataError: A leaf is no array of integers, booleans, or floats of 16 bits or more (complex64 too).
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in leaves}
    for keys, array in arrays.items():
        if array.dtype.name not in _TYPES:
            raise DataError(
                f"the state's leaf '{keys}' is of the type {array.dtype.name}; expected one of {', '.join(_TYPES)}"
            )
    write_whole(Path(path), _content(arrays, {_FORMAT: _STATE}))


def read_state(path: str | os.PathLike[str], like: Tree) -> Tree:
    """Returns the pytree that `write_state` wrote.

    Args:
        path: The file.
        like: A pytree of the same structure, shapes and types, such as the state before any data (`Observer.init`);
            where it has arrays of JAX, so has the result.

    Raises:
        DataError: The file cannot be read, or its arrays are not those of such a tree.
    """
    path = Path(path)
    arrays, _ = _read(path, _STATE)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {jax.tree_util.keystr(keys): (np.shape(leaf), np.asarray(leaf).dtype) for keys, leaf in leaves}
    found = {name: (value.shape, value.dtype) for name, value in arrays.items()}
    if wanted != found:
        name = next(name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name))
        raise DataError(
            f"'{path}': the array '{name}' is {found.get(name, 'missing')}, expected {wanted.get(name, 'none')}: "
            "the state of the same observer for as many tensors"
        )
    pairs = zip((arrays[name] for name in wanted), (leaf for _, leaf in leaves), strict=True)
    read = [jnp.asarray(array) if isinstance(leaf, jax.Array) else array for array, leaf in pairs]
    return jax.tree_util.tree_unflatten(structure, read)


def _content(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    # A file holds elements in C order; of scalars, `ascontiguousarray` makes vectors.
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    return _in_order(safetensors.numpy.save(contiguous, metadata))


def _in_order(content: bytes) -> bytes:
    """Returns the file with its metadata sorted: safetensors writes them in an order that changes from call to call."""
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    header = json.loads(content[_LENGTH:end])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)  # tensors begin at a multiple of it
    return len(text).to_bytes(_LENGTH, "little") + text + content[end:]


def _read(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}; expected a safetensors file") from error
    except safetensors.SafetensorError as error:
        raise DataError(f"'{path}' is not a safetensors file: {error}; expected one that ptqjax wrote") from error
    if metadata.get(_FORMAT) != kind:
        raise DataError(
            f"'{path}': its metadata have {_FORMAT}={metadata.get(_FORMAT)!r}, expected {kind!r}: a file of "
            f"{kind.split(maxsplit=1)[0]} that ptqjax wrote"
        )
    return arrays, metadata
