"""Batches from a folder of pictures as ImageNet has it: `val/<class>/<picture>`.

    pictures = find_pictures(Path("imagenet"))
    for batch in batches(pictures, PREPROCESSINGS["tf"]):
        logits = session.run(None, batch)

A class's index is its folder's position in alphabetical order, as everywhere with ImageNet. Where only some of the
classes are there, that is wrong, and a list file (path and index, separated by a tab) says which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp"})
"""Endings of the files that are pictures, in lower case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A file and the class that it shows."""

    path: Path
    """Where it lies."""
    label: int
    """The index of its class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What a network expects of its pictures."""

    crop: int
    """Height and width of the network's input."""
    short_side: int
    """Length of the shorter side before the crop; a picture that has it already is not resampled."""
    normalize: Callable[[Float[np.ndarray, "*n h w 3"]], Float[np.ndarray, "*n h w 3"]]
    """From RGB in 0..255 to what the network expects."""


def to_unit(rgb: Float[np.ndarray, "*n h w 3"]) -> Float[np.ndarray, "*n h w 3"]:
    """Returns RGB in 0..1."""
    return rgb / np.float32(255)


def to_symmetric(rgb: Float[np.ndarray, "*n h w 3"]) -> Float[np.ndarray, "*n h w 3"]:
    """Returns RGB in -1..1, as Keras's MobileNets take it."""
    return rgb / np.float32(127.5) - np.float32(1)


def to_standard(rgb: Float[np.ndarray, "*n h w 3"]) -> Float[np.ndarray, "*n h w 3"]:
    """Returns RGB less ImageNet's mean over its standard deviation, as torchvision's networks take it."""
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    return (to_unit(rgb) - mean) / std


def to_caffe(rgb: Float[np.ndarray, "*n h w 3"]) -> Float[np.ndarray, "*n h w 3"]:
    """Returns BGR in 0..255 less Caffe's mean, as SqueezeNet takes it."""
    return rgb[..., ::-1] - np.array([104, 117, 123], np.float32)


PREPROCESSINGS = {
    "unit": Preprocessing(crop=224, short_side=256, normalize=to_unit),
    "tf": Preprocessing(crop=224, short_side=256, normalize=to_symmetric),
    "torch": Preprocessing(crop=224, short_side=256, normalize=to_standard),
    "caffe": Preprocessing(crop=227, short_side=256, normalize=to_caffe),
}
"""The usual ones, by name."""


def find_pictures(root: Path, *, split: str = "val") -> tuple[Picture, ...]:
    """Returns the pictures under `root/split`, sorted by class and name; a class's index is its folder's position.

    Raises:
        FileNotFoundError: There is no such folder, or no picture in it.
    """
    if not (root / split).is_dir():
        raise FileNotFoundError(f"'{root / split}' is no folder; expected {split}/<class>/<picture> under '{root}'")
    classes = sorted(folder for folder in (root / split).iterdir() if folder.is_dir())
    pictures = tuple(
        Picture(path=path, label=label)
        for label, folder in enumerate(classes)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in SUFFIXES
    )
    if not pictures:
        raise FileNotFoundError(f"'{root / split}' holds no picture; expected {split}/<class>/<picture>")
    return pictures


def read_list(root: Path, listing: str) -> tuple[Picture, ...]:
    """Returns the pictures that the file `root/listing` names: a path under `root`, a tab, the index of the class."""
    lines = (line.split("\t") for line in (root / listing).read_text(encoding="utf-8").splitlines() if line.strip())
    return tuple(Picture(path=root / path, label=int(label)) for path, label in lines)


def calibration_and_evaluation(
    root: Path, *, num_calibration: int, num_evaluation: int | None = None, seed: int = 0
) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
    """Returns pictures to calibrate with and others to evaluate on; no picture is in both.

    From `calibration.tsv` and `evaluation.tsv` where `root` has both (their first lines), else drawn from `val`.

    Raises:
        FileNotFoundError: There are fewer than `num_calibration` pictures, or none left to evaluate on.
    """
    if (root / "calibration.tsv").is_file() and (root / "evaluation.tsv").is_file():
        calibration, evaluation = read_list(root, "calibration.tsv"), read_list(root, "evaluation.tsv")
    else:
        found = find_pictures(root)
        drawn = [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
        calibration, evaluation = tuple(drawn[:num_calibration]), tuple(drawn[num_calibration:])
    if len(calibration) < num_calibration or not evaluation:
        raise FileNotFoundError(
            f"'{root}' has {len(calibration)} pictures to calibrate with and {len(evaluation)} to evaluate on; "
            f"expected {num_calibration} and at least 1"
        )
    return calibration[:num_calibration], evaluation[:num_evaluation]


def decode(path: Path, *, crop: int, short_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the picture's centre as RGB: the shorter side resampled to `short_side`, then the middle square."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    if min(rgb.size) != short_side:
        scale = short_side / min(rgb.size)
        size = (max(short_side, round(rgb.width * scale)), max(short_side, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.BILINEAR)
    left, top = (rgb.width - crop) // 2, (rgb.height - crop) // 2
    return np.asarray(rgb.crop((left, top, left + crop, top + crop)))


def to_input(pictures: UInt8[np.ndarray, "n h w 3"], preprocessing: Preprocessing) -> Float[np.ndarray, "n 3 h w"]:
    """Returns decoded pictures as a network takes them: normalized, channels first."""
    normalized = preprocessing.normalize(pictures.astype(np.float32))
    return np.ascontiguousarray(normalized.transpose(0, 3, 1, 2), dtype=np.float32)


def batches(
    pictures: Sequence[Picture], preprocessing: Preprocessing, *, size: int = 16, name: str = "input"
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the pictures in order, `size` at a time, under the name of the network's input; decoded as they come."""
    for start in range(0, len(pictures), size):
        decoded = [
            decode(picture.path, crop=preprocessing.crop, short_side=preprocessing.short_side)
            for picture in pictures[start : start + size]
        ]
        yield {name: to_input(np.stack(decoded), preprocessing)}


def labels(pictures: Sequence[Picture]) -> np.ndarray:
    """Returns the pictures' classes."""
    return np.array([picture.label for picture in pictures], np.int64)
