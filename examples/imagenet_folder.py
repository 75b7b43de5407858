"""Batches from a folder of pictures as ImageNet has it: `val/<class>/<picture>`.

    pictures = find_pictures(Path("imagenet"))
    for batch in batches(pictures, PREPROCESSINGS["tf"]):
        logits = session.run(None, batch)

What reads and decodes pictures is `ptqjax.data.pictures`; recipes (docs/experiments.md) take such a folder by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ptqjax.data.pictures import (
    NORMALIZATIONS,
    SUFFIXES,
    Picture,
    PictureBatches,
    Preprocessing,
    decode,
    drawn,
    find_pictures,
    read_list,
    to_input,
)

__all__ = [
    "PREPROCESSINGS",
    "SUFFIXES",
    "Picture",
    "Preprocessing",
    "batches",
    "calibration_and_evaluation",
    "decode",
    "find_pictures",
    "labels",
    "read_list",
    "to_input",
]

PREPROCESSINGS = {
    name: Preprocessing(crop=crop, short_side=256, normalize=NORMALIZATIONS[name])
    for name, crop in (("unit", 224), ("tf", 224), ("torch", 224), ("caffe", 227))
}
"""The usual ones, by name."""


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
        found = drawn(find_pictures(root), seed=seed)
        calibration, evaluation = found[:num_calibration], found[num_calibration:]
    if len(calibration) < num_calibration or not evaluation:
        raise FileNotFoundError(
            f"'{root}' has {len(calibration)} pictures to calibrate with and {len(evaluation)} to evaluate on; "
            f"expected {num_calibration} and at least 1"
        )
    return calibration[:num_calibration], evaluation[:num_evaluation]


def batches(
    pictures: Sequence[Picture], preprocessing: Preprocessing, *, size: int = 16, name: str = "input"
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the pictures in order, `size` at a time, under the name of the network's input; decoded as they come."""
    return iter(PictureBatches(pictures=tuple(pictures), preprocessing=preprocessing, name=name, size=size))


def labels(pictures: Sequence[Picture]) -> np.ndarray:
    """Returns the pictures' classes."""
    return np.array([picture.label for picture in pictures], np.int64)
