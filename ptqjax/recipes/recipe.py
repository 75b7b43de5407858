"""A recipe: a TOML file that says what is quantized, on which data, how, and what is measured."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ptqjax.config import QuantizationConfig, config_from_table, located, near_names
from ptqjax.config.checks import read_text
from ptqjax.config.files import line_of
from ptqjax.data.pictures import NORMALIZATIONS
from ptqjax.errors import ConfigError

NO_DATA = "none"
"""What stands in place of calibration data where there are none."""
METRICS = ("sqnr_db", "agreement", "top1")
"""What can be measured of the exported file."""
DEVICES = ("auto", "cpu", "cuda")
"""Where a recipe may compute."""
REPORTS = ("full", "short", "none")
"""What the report holds: all that `explain` finds, the table of stages and what was done, or nothing (no report)."""
TRANSFORMS = ("equalize", "absorb", "scaling", "bounds", "correct", "headroom")
"""Settings of `QuantizationConfig` that stand in [transforms]; all may stand in [config]."""

_TOP = ("model", "seed", "metrics", "report", "device", "data", "transforms", "config")
_SETTINGS = ("config", "transforms")
_DATA = ("calibration", "evaluation", "preprocessing", "batch", "batch_axes")
_HEAD = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Pictures as data: which, and what is done to them."""

    folder: Path
    """Where they lie."""
    split: str = "val"
    """The folder of the classes' folders in it, where no list names the pictures."""
    list: str | None = None
    """The file in `folder` that names them, lines of path, tab, index of the class; None: all of `split`."""
    count: int | None = None
    """How many are taken, the first ones; None: all."""
    skip: int = 0
    """How many are passed over before: so two parts of one order have no picture in common."""
    seed: int | None = None
    """The seed of the order in which pictures are taken; None: as they are listed, or by class and name."""
    crop: int = 224
    """Height and width of the network's input."""
    short_side: int = 256
    """Length of the shorter side before the crop."""
    normalization: str = "torch"
    """One of `images.NORMALIZATIONS`; "" where `mean` and `std` say it."""
    mean: tuple[float, ...] = ()
    """The mean that is subtracted from RGB in 0..1, a number a channel."""
    std: tuple[float, ...] = ()
    """The deviation that RGB in 0..1 is divided by, a number a channel."""
    channels: str = "rgb"
    """The order in which the network takes them, "rgb" or "bgr"; of "caffe" already BGR, "rgb" leaves it so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a run does; paths are absolute."""

    text: str
    """The file's text."""
    source: str
    """What errors call it."""
    base: Path
    """The folder that paths in it are relative to."""
    model: Path
    """The float model."""
    calibration: Path | Pictures | None
    """Data to calibrate with: a DATA.npz, or pictures; None: batch norms tell."""
    evaluation: Path | Pictures | None
    """Data to evaluate on; None: nothing is measured."""
    batch: int
    """Samples at a time."""
    batch_axes: tuple[tuple[str, int | None], ...]
    """The axis of the samples by input, where it is told; None: one array serves all samples."""
    metrics: tuple[str, ...]
    """What is measured of the exported file, of `METRICS`; "top1" where there are labels."""
    report: str
    """What the report holds, one of `REPORTS`."""
    device: str
    """Where to compute, one of `DEVICES`."""
    config: QuantizationConfig
    """How to quantize."""


def read_recipe(path: str | Path) -> Recipe:
    """Returns the recipe in a TOML file; paths in it are relative to the file.

    Raises:
        ConfigError: The file cannot be read, is not TOML, lacks the model or data, or holds an unknown key or a value
            that is not allowed; the message has the line.
    """
    path = Path(path)
    return recipe_of(read_text(path, f"recipe '{path}'"), source=str(path), base=path.resolve().parent)


def recipe_of(text: str, *, source: str, base: Path) -> Recipe:
    """Returns the recipe in a TOML text whose paths are relative to `base`; `source` is what errors call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    reader = _Reader(text=text, source=source, base=base)
    reader.check_keys("", table, _TOP)
    data = reader.table(table, "data")
    reader.check_keys("data", data, _DATA)
    calibration = reader.data(data, "calibration")
    evaluation = reader.data(data, "evaluation") if "evaluation" in data else None
    reader.check_preprocessing(data, (calibration, evaluation))
    return Recipe(
        text=text,
        source=source,
        base=base,
        model=base / reader.value("", table, "model", str, None),
        calibration=calibration,
        evaluation=evaluation,
        batch=reader.at_least("data", data, "batch", 1, 32),
        batch_axes=reader.batch_axes(data),
        metrics=reader.metrics(table),
        report=reader.choice("", table, "report", REPORTS, "full"),
        device=reader.choice("", table, "device", DEVICES, "auto"),
        config=reader.config(table, has_data=calibration is not None),
    )


def located_in(recipe: Recipe) -> AbstractContextManager[None]:
    """Returns what gives errors about settings, raised inside, their lines in the recipe."""
    reader = _Reader(text=recipe.text, source=recipe.source, base=recipe.base)
    return located(reader.part(_SETTINGS), recipe.source)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reader:
    """A recipe's text, in which errors find their lines."""

    text: str
    source: str
    base: Path

    def check_keys(self, head: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                raise self.error(head, key, f"unknown key {key!r}{near_names(key, known)}; known: {', '.join(known)}")

    def error(self, head: str, key: str, message: str) -> ConfigError:
        place = f", [{head}]" if head else ""
        line = line_of(self.part((head,)).splitlines(), key) or line_of(self.text.splitlines(), key)
        return ConfigError(f"{self.source}{f', line {line}' if line else ''}{place}: {message}")

    def part(self, heads: tuple[str, ...]) -> str:
        """Returns the text with all lines but those of these tables blank; their headings lose the table's name."""
        current, kept = "", []
        for line in self.text.splitlines():
            found = _HEAD.match(line)
            if found is None:
                kept.append(line if current in heads else "")
                continue
            current = found[2].replace(" ", "").replace('"', "")
            parent = next((head for head in heads if head and current.startswith(f"{head}.")), None)
            kept.append(line.replace(f"{parent}.", "", 1) if parent else "")
            current = parent or current
        return "\n".join(kept)

    def table(self, parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        found = parent.get(key, {})
        if not isinstance(found, Mapping):
            raise self.error("", key, f"{key} is {found!r}; expected a table, headed [{key}]")
        return found

    def value(self, head: str, table: Mapping[str, Any], key: str, kind: type, missing: Any) -> Any:
        if key not in table and missing is None:
            raise self.error(head, key, f"{key} is missing; expected {key} = ...")
        found = table.get(key, missing)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise self.error(head, key, f"{key} is {found!r}; expected {_KINDS[kind]}")
        return found

    def choice(self, head: str, table: Mapping[str, Any], key: str, allowed: tuple[str, ...], missing: str) -> str:
        found = self.value(head, table, key, str, missing)
        if found not in allowed:
            raise self.error(
                head,
                key,
                f"{key}={found!r} is unknown; expected one of {', '.join(allowed)}{near_names(found, allowed)}",
            )
        return found

    def at_least(self, head: str, table: Mapping[str, Any], key: str, least: int, missing: int) -> int:
        found = self.value(head, table, key, int, missing)
        if found < least:
            raise self.error(head, key, f"{key} is {found}; expected {least} or more")
        return found

    def metrics(self, table: Mapping[str, Any]) -> tuple[str, ...]:
        found = self.value("", table, "metrics", list, list(METRICS))
        for name in found:
            if name not in METRICS:
                near = near_names(str(name), METRICS)
                raise self.error("", "metrics", f"metrics holds {name!r}; expected some of {', '.join(METRICS)}{near}")
        return tuple(name for name in METRICS if name in found)

    def data(self, table: Mapping[str, Any], key: str) -> Path | Pictures | None:
        found = table.get(key)
        if isinstance(found, str) and found:
            return None if found == NO_DATA and key == "calibration" else self.base / found
        if isinstance(found, Mapping):
            return self.pictures(f"data.{key}", found, self.shared(table))
        expected = f"the path of an .npz file, or a table of pictures, headed [data.{key}]"
        none = f", or {NO_DATA!r}" if key == "calibration" else ""
        what = "missing" if found is None else repr(found)
        raise self.error("data", key, f"{key} is {what}; expected {expected}{none}")

    def batch_axes(self, table: Mapping[str, Any]) -> tuple[tuple[str, int | None], ...]:
        found = table.get("batch_axes", {})
        is_axis = isinstance(found, Mapping) and all(
            axis == NO_DATA or (type(axis) is int and axis >= 0) for axis in found.values()
        )
        if not is_axis:
            expected = f"a table of inputs, {{state = 1}}, each the axis that counts its samples, or {NO_DATA!r}"
            raise self.error("data", "batch_axes", f"batch_axes is {found!r}; expected {expected}")
        return tuple((name, None if axis == NO_DATA else axis) for name, axis in found.items())

    def shared(self, table: Mapping[str, Any]) -> Mapping[str, Any]:
        found = table.get("preprocessing", {})
        if not isinstance(found, Mapping):
            raise self.error("data", "preprocessing", f"preprocessing is {found!r}; expected a table")
        self.check_keys("data.preprocessing", found, _PREPROCESSING)
        return found

    def check_preprocessing(self, table: Mapping[str, Any], sources: Iterable[Path | Pictures | None]) -> None:
        """Refuses what would have no effect: preprocessing where no data are pictures."""
        if self.shared(table) and not any(isinstance(source, Pictures) for source in sources):
            raise self.error(
                "data",
                "preprocessing",
                "preprocessing is for pictures, and all data are arrays, which are taken as they are; take it out",
            )

    def pictures(self, head: str, own: Mapping[str, Any], shared: Mapping[str, Any]) -> Pictures:
        self.check_keys(head, own, tuple(field.name for field in fields(Pictures)))
        table = {**shared, **own}
        optional = {key: self.value(head, table, key, str, None) for key in ("split", "list") if key in table}
        numbers = {"count": 1, "skip": 0, "seed": 0, "crop": 1, "short_side": 1}
        given = {key: self.at_least(head, table, key, least, 0) for key, least in numbers.items() if key in table}
        folder = self.base / self.value(head, table, "folder", str, None)
        found = Pictures(folder=folder, **optional, **given, **self.normalization(head, table))
        if found.short_side < found.crop:
            raise self.error(head, "crop", f"crop={found.crop} is larger than short_side={found.short_side}")
        return found

    def normalization(self, head: str, table: Mapping[str, Any]) -> dict[str, Any]:
        channels = self.choice(head, table, "channels", ("rgb", "bgr"), "rgb")
        if "mean" not in table and "std" not in table:
            return {
                "normalization": self.choice(head, table, "normalization", tuple(NORMALIZATIONS), "torch"),
                "channels": channels,
            }
        if "normalization" in table:
            raise self.error(head, "normalization", "normalization beside mean and std; expected one or the other")
        return {
            "normalization": "",
            "channels": channels,
            "mean": self.three(head, table, "mean"),
            "std": self.three(head, table, "std"),
        }

    def three(self, head: str, table: Mapping[str, Any], key: str) -> tuple[float, ...]:
        found = self.value(head, table, key, list, None)
        least = 0.0 if key == "std" else -math.inf
        if len(found) != 3 or not all(type(each) in (int, float) and least < each < math.inf for each in found):  # noqa: PLR2004
            what = "three numbers above 0" if key == "std" else "three numbers"
            raise self.error(head, key, f"{key} is {found!r}; expected {what}, of red, green and blue in 0..1")
        return tuple(map(float, found))

    def config(self, table: Mapping[str, Any], *, has_data: bool) -> QuantizationConfig:
        transforms, config = self.table(table, "transforms"), self.table(table, "config")
        self.check_keys("transforms", transforms, TRANSFORMS)
        for key in [key for key in transforms if key in config]:
            raise self.error("config", key, f"{key} stands in [transforms] too, expected in one place; take it out")
        seed = self.at_least("", table, "seed", 0, 0)
        if "seed" in config and "seed" in table:
            raise self.error("config", "seed", "seed stands on top too, expected in one place; take it out")
        settings = {"seed": seed, **config, **transforms}
        target = settings.get("target")
        if isinstance(target, str) and target.endswith(".toml"):
            settings["target"] = str(self.base / target)
        if not has_data and settings.setdefault("correct", "analytic") == "empirical":
            head = "transforms" if "correct" in transforms else "config"
            raise self.error(
                head,
                "correct",
                f"correct='empirical' with calibration={NO_DATA!r}: the mean error is measured on samples; give some, "
                "or take 'analytic' as correct",
            )
        return config_from_table(settings, text=self.part(_SETTINGS), source=self.source)


_KINDS = {str: "a text", int: "a whole number", list: "a list"}
_PREPROCESSING = ("crop", "short_side", "normalization", "mean", "std", "channels")
