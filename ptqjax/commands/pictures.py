"""Pictures as the data of commands: a folder of them or a list, and what the network expects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqjax.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from ptqjax.data.pictures import Picture, Preprocessing
    from ptqjax.ir import Graph, TensorSpec

LISTS = (".tsv", ".txt")
"""Endings of files that list pictures."""
_CROP, _SHORT_SIDE = 224, 256  # of ImageNet's usual preprocessing
_CHANNELS = 3
_MOST_HELD = 2**29  # bytes of decoded pictures that are kept, for data that are gone through often
_MEANINGS = {
    "torch": "torchvision's mean and deviation",
    "tf": "-1 to 1",
    "caffe": "BGR less its mean",
    "unit": "0 to 1",
    "none": "0 to 255",
}
_EXPECTED = ", ".join(f"{name} ({meaning})" for name, meaning in _MEANINGS.items())

preprocessing_option = click.option(
    "--preprocessing",
    metavar="NAME[:CROP[/SHORT]]",
    help=f"For a folder or list of pictures, what the network expects: {_EXPECTED}. The shorter side is "
    "resampled to SHORT (by default 256/224 of the crop), and the middle cut out: of the model's size, or CROP.",
)
"""The option of all commands that read samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Pictures that an option names."""

    found: tuple[Picture, ...]
    """Which."""
    num_classes: int | None
    """How many folders of classes their labels number; None where a list says the labels, or there are none."""
    place: str
    """Where they lie, as a message says it."""
    normalization: str
    """One of `images.NORMALIZATIONS`."""
    crop: int | None
    """Height and width of what the network takes; None: as the model says."""
    short_side: int | None
    """Length of the shorter side before; None: in ImageNet's usual proportion."""


def holds_pictures(path: Path) -> bool:
    """Tells whether a path is a list of pictures, or a folder of them without .npz files."""
    from ptqjax.data.pictures import pictures_in

    if path.is_dir():
        return not any(path.glob("*.npz")) and bool(pictures_in(path)[0])
    return path.suffix.lower() in LISTS and path.is_file()


def pictures_of(path: Path, preprocessing: str | None, option: str) -> Pictures:
    """Returns the pictures in a folder or list; `option` is what named it.

    Raises:
        ConfigError: What the network expects of them is not said, or unknown.
        DataError: The list is damaged.
    """
    from ptqjax.data.pictures import NORMALIZATIONS, pictures_in, read_list

    if preprocessing is None:
        what = "is a list of pictures" if path.is_file() else "holds pictures"
        raise ConfigError(
            f"{option} {path}: it {what}; say what the network expects of them: --preprocessing {_EXPECTED}, as in "
            "torch:224/256"
        )
    name, _, sizes = preprocessing.partition(":")
    crop, slash, short_side = sizes.partition("/")
    numbers = [int(each) if each.isdecimal() else 0 for each in (crop, short_side) if each]
    if (
        name not in NORMALIZATIONS
        or not all(numbers)
        or (slash and len(numbers) < len("12"))
        or numbers[::-1] < numbers
    ):
        raise ConfigError(
            f"--preprocessing {preprocessing}: expected {_EXPECTED}; then, where the model's input does not say it, "
            "the size of the crop and of the shorter side before, no smaller, as in torch:224/256"
        )
    found, num_classes = pictures_in(path) if path.is_dir() else (read_list(path.parent, path.name), None)
    return Pictures(
        found=found,
        num_classes=num_classes,
        place=str(path),
        normalization=name,
        crop=numbers[0] if numbers else None,
        short_side=numbers[1] if len(numbers) > 1 else None,
    )


def load_pictures(pictures: Pictures, graph: Graph, *, size: int) -> tuple[np.ndarray | None, Any]:
    """Returns the labels of pictures, where they are known, and the pictures in batches.

    Decoded ones are kept as long as they are few; labels by the position of a class's folder count where there are as
    many folders as the model has classes, else they are left out with a note.

    Raises:
        DataError: The model takes something else than one batch of pictures, or a number that does not divide these.
    """
    from ptqjax.data.pictures import PictureBatches

    spec = _image_input(graph, pictures.place)
    shape = spec.shape or (None, _CHANNELS, None, None)
    fixed = shape[0] if isinstance(shape[0], int) else None
    if fixed and len(pictures.found) % fixed:
        raise DataError(
            f"the model takes exactly {fixed} samples at a time, which does not divide the {len(pictures.found)} "
            f"pictures in '{pictures.place}'; leave {len(pictures.found) % fixed} out"
        )
    batches = PictureBatches(
        pictures=pictures.found, preprocessing=_preprocessing(pictures, spec), name=spec.name, size=fixed or size
    )
    first = next(iter(replace(batches, pictures=pictures.found[: batches.size])))[spec.name]
    is_few = first[:1].nbytes * len(pictures.found) <= _MOST_HELD
    return _labels(pictures, graph), tuple(batches) if is_few else batches


def _image_input(graph: Graph, place: str) -> TensorSpec:
    shapes = {spec.name: spec.shape for spec in graph.inputs}
    (spec, *others) = graph.inputs
    shape = spec.shape or (None, _CHANNELS, None, None)
    if others or len(shape) != len("nchw") or not {shape[1], shape[-1]} & {_CHANNELS, None, "C"}:
        listed = ", ".join(f"'{name}' {_text(shape)}" for name, shape in shapes.items())
        raise DataError(
            f"pictures in '{place}': the model takes {listed}; expected one input of pictures in color, n x 3 x h x w "
            "or n x h x w x 3: save arrays in a DATA.npz"
        )
    return spec


def _text(shape: Any) -> str:
    return "x".join(str(size or "?") for size in shape) if shape else "of any shape"


def _preprocessing(pictures: Pictures, spec: TensorSpec) -> Preprocessing:
    from ptqjax.data.pictures import NORMALIZATIONS, Preprocessing

    shape = spec.shape or (None, _CHANNELS, None, None)
    is_last = shape[-1] == _CHANNELS and shape[1] != _CHANNELS
    declared = shape[1:3] if is_last else shape[2:]
    sides = tuple(side if isinstance(side, int) else pictures.crop or _CROP for side in declared)
    if pictures.crop is not None and sides != (pictures.crop, pictures.crop):
        raise DataError(f"--preprocessing asks for a crop of {pictures.crop}, and the model takes {_text(declared)}")
    if spec.dtype not in ("float32", "uint8") or (spec.dtype == "uint8" and pictures.normalization != "none"):
        raise DataError(
            f"'{spec.name}' is of {spec.dtype}; pictures come as float32, or for --preprocessing none as uint8: save "
            "arrays in a DATA.npz"
        )
    short_side = pictures.short_side or round(min(sides) * _SHORT_SIDE / _CROP)
    return Preprocessing(
        crop=sides[0] if sides[0] == sides[1] else (sides[0], sides[1]),
        short_side=short_side,
        normalize=NORMALIZATIONS[pictures.normalization],
        is_channels_last=is_last,
        dtype=str(spec.dtype),
    )


def _labels(pictures: Pictures, graph: Graph) -> np.ndarray | None:
    import numpy as np

    from ptqjax.data.files import num_classes

    labels = [picture.label for picture in pictures.found]
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        return None
    found, expected = pictures.num_classes, num_classes(graph)
    if found is not None and expected is not None and found != expected:
        click.echo(
            f"Note: '{pictures.place}' has {found} folders of classes and the model {expected} classes: which is which "
            "is not known, and accuracy is left out; a list says it, lines of path, tab, index",
            err=True,
        )
        return None
    return np.array(known, np.int64)
