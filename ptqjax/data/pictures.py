"""Pictures in a folder as ImageNet has them, `val/<class>/<picture>`, as arrays that networks take.

A class's index is its folder's position in alphabetical order, as everywhere with ImageNet. Where only some of the
classes are there, that is wrong, and a list file (path and index, separated by a tab) says which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from ptqjax.errors import ConfigError, DataError

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp"})
"""Endings of the files that are pictures, in lower case."""

Pixels = Float[np.ndarray, "*n h w 3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A file and the class that it shows."""

    path: Path
    """Where it lies."""
    label: int | None
    """The index of its class; None where that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What a network expects of its pictures."""

    crop: int | tuple[int, int]
    """Height and width of the network's input; one number where they are the same."""
    short_side: int
    """Length of the shorter side before the crop; a picture that has it already is not resampled."""
    normalize: Callable[[Pixels], Pixels]
    """From RGB in 0..255 to what the network expects."""
    channels: str = "rgb"
    """The order of the channels that `normalize` leaves: "rgb" as they are, "bgr" turned round."""
    is_channels_last: bool = False
    """Whether the network takes its channels last, as TensorFlow's do."""
    dtype: str = "float32"
    """The type of the network's input."""


def to_unit(rgb: Pixels) -> Pixels:
    """Returns RGB in 0..1."""
    return rgb / np.float32(255)


def to_symmetric(rgb: Pixels) -> Pixels:
    """Returns RGB in -1..1, as Keras's MobileNets take it."""
    return rgb / np.float32(127.5) - np.float32(1)


def to_standard(rgb: Pixels) -> Pixels:
    """Returns RGB less ImageNet's mean over its standard deviation, as torchvision's networks take it."""
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    return (to_unit(rgb) - mean) / std


def to_caffe(rgb: Pixels) -> Pixels:
    """Returns BGR in 0..255 less Caffe's mean, as SqueezeNet takes it."""
    return rgb[..., ::-1] - np.array([104, 117, 123], np.float32)


def as_is(rgb: Pixels) -> Pixels:
    """Returns RGB in 0..255."""
    return rgb


def normalization_of(mean: Sequence[float], std: Sequence[float]) -> Callable[[Pixels], Pixels]:
    """Returns the function x -> (x / 255 - mean) / std, channel by channel."""
    center, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return lambda rgb: (to_unit(rgb) - center) / spread


NORMALIZATIONS = MappingProxyType(
    {"none": as_is, "unit": to_unit, "tf": to_symmetric, "torch": to_standard, "caffe": to_caffe}
)
"""The usual ones, by name."""


def find_pictures(root: Path, *, split: str = "val") -> tuple[Picture, ...]:
    """Returns the pictures under `root/split`, sorted by class and name; a class's index is its folder's position.

    Raises:
        DataError: There is no such folder, or no picture in it.
    """
    if not (root / split).is_dir():
        raise DataError(f"'{root / split}' is no folder; expected {split}/<class>/<picture> under '{root}'")
    classes = sorted(folder for folder in (root / split).iterdir() if folder.is_dir())
    pictures = tuple(
        Picture(path=path, label=label)
        for label, folder in enumerate(classes)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES
    )
    if not pictures:
        raise DataError(f"'{root / split}' holds no picture; expected {split}/<class>/<picture>")
    return pictures


def pictures_in(folder: Path) -> tuple[tuple[Picture, ...], int | None]:
    """Returns the pictures in a folder, and the number of classes that they are labelled by; None where by none.

    Pictures that lie in it have no label; those in folders of it have these folders' position in alphabetical order for
    a label; else those in its folder "val" are taken in the same way.
    """
    own = tuple(Picture(path=path, label=None) for path in sorted(folder.iterdir()) if _is_picture(path))
    classes = [child for child in sorted(folder.iterdir()) if child.is_dir() and any(map(_is_picture, child.iterdir()))]
    if own or classes:
        labelled = [
            Picture(path=path, label=label)
            for label, child in enumerate(classes)
            for path in sorted(child.iterdir())
            if _is_picture(path)
        ]
        return own or tuple(labelled), None if own else len(classes)
    return pictures_in(folder / "val") if (folder / "val").is_dir() else ((), None)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def read_list(root: Path, listing: str) -> tuple[Picture, ...]:
    """Returns the pictures that the file `root/listing` names: a path under `root`, a tab, the index of the class.

    Raises:
        DataError: The file cannot be read, or a line is of another form.
    """
    try:
        lines = (root / listing).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"list '{root / listing}' cannot be read: {error}; expected lines of path, tab, index"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        path, tab, label = line.rpartition("\t")
        if line.strip() and not (tab and label.strip().isdecimal()):
            raise DataError(
                f"list '{root / listing}', line {number} is {line!r}; expected a path under '{root}', a tab, and the "
                "index of the class"
            )
        found += [Picture(path=root / path, label=int(label))] if line.strip() else []
    if not found:
        raise DataError(f"list '{root / listing}' names no picture; expected lines of path, tab, index of the class")
    return tuple(found)


def drawn(pictures: Sequence[Picture], *, seed: int) -> tuple[Picture, ...]:
    """Returns the pictures in an order that `seed` decides."""
    return tuple(pictures[i] for i in np.random.default_rng(seed).permutation(len(pictures)))


def decode(path: Path, *, crop: int | tuple[int, int], short_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the picture's centre as RGB: resampled, then the middle cut out.

    A square crop: the shorter side becomes `short_side`. Another: the smallest size that covers the crop, with the
    crop's shorter side in that proportion.

    Raises:
        ConfigError: Pillow is missing.
        DataError: The file cannot be read as a picture.
    """
    try:
        from PIL import Image  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ConfigError("pictures are read by Pillow, which is not installed; pip install ptqjax[images]") from error
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"picture '{path}' cannot be read: {error}; expected a JPEG, PNG, BMP or WebP file") from error
    height, width = (crop, crop) if isinstance(crop, int) else crop
    least = [round(side * short_side / min(height, width)) for side in (width, height)]
    scale = max(least[0] / rgb.width, least[1] / rgb.height)
    if scale != 1:
        size = (max(least[0], round(rgb.width * scale)), max(least[1], round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.BILINEAR)
    left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
    return np.asarray(rgb.crop((left, top, left + width, top + height)))


def to_input(pictures: UInt8[np.ndarray, "n h w 3"], preprocessing: Preprocessing) -> Shaped[np.ndarray, "n _ _ _"]:
    """Returns decoded pictures as a network takes them: normalized, channels first unless it takes them last."""
    normalized = preprocessing.normalize(pictures.astype(np.float32))
    turned = normalized[..., ::-1] if preprocessing.channels == "bgr" else normalized
    laid_out = turned if preprocessing.is_channels_last else turned.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(laid_out, dtype=preprocessing.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureBatches:
    """Pictures in order, some at a time, decoded as they come; can be gone through again and again."""

    pictures: tuple[Picture, ...]
    """Which."""
    preprocessing: Preprocessing
    """What the network expects of them."""
    name: str = "input"
    """The network's input."""
    size: int = 16
    """How many at a time; the last batch may be smaller."""

    def __len__(self) -> int:
        """Returns the number of batches."""
        return (len(self.pictures) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches."""
        crop, short_side = self.preprocessing.crop, self.preprocessing.short_side
        for start in range(0, len(self.pictures), self.size):
            some = self.pictures[start : start + self.size]
            decoded = [decode(picture.path, crop=crop, short_side=short_side) for picture in some]
            yield {self.name: to_input(np.stack(decoded), self.preprocessing)}

    @property
    def labels(self) -> np.ndarray:
        """The pictures' classes, all of which are known."""
        return np.array([picture.label for picture in self.pictures], np.int64)
