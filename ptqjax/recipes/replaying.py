"""A run, run again from what its folder holds, and compared hash by hash."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptqjax.config.checks import read_text
from ptqjax.errors import DataError
from ptqjax.places import RUN
from ptqjax.progress import Follow, nothing
from ptqjax.recipes import data as recipe_data
from ptqjax.recipes.recipe import Recipe, read_recipe, recipe_of
from ptqjax.recipes.run import RECIPE, StageRun, computing_on, identity_of, run_stages, task_of
from ptqjax.recipes.stages import STAGES, Task
from ptqjax.recipes.store import digest_of, look

_PLACES = {"base", "model", "calibration", "evaluation"}  # that `run.json` tells


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A stage of a run, and the same computed again."""

    name: str
    """The stage's name in `stages.STAGES`."""
    differing: tuple[str, ...]
    """The files that differ, or that only one of the two has."""
    note: str = ""
    """What is wrong with what was stored; "" where it is as it was written."""

    @property
    def is_same(self) -> bool:
        """Whether all files are equal to the bit."""
        return not self.differing and not self.note


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """How a run compares with the same done again."""

    folder: Path
    """The run's."""
    stages: tuple[Compared, ...]
    """The stages up to the last one that the run has, in order."""
    reasons: tuple[str, ...]
    """What differs in what decides results: settings, versions, the class of the device; one line each."""

    @property
    def first(self) -> Compared | None:
        """The first stage that differs; None where none does."""
        return next((stage for stage in self.stages if not stage.is_same), None)

    @property
    def is_same(self) -> bool:
        """Whether every stage gave the same bytes."""
        return self.first is None

    @property
    def unfinished(self) -> tuple[str, ...]:
        """The stages that the run did not come to, which are not compared."""
        return tuple(STAGES)[len(self.stages) :]


def replay(
    folder: str | Path,
    *,
    recipe: str | Path | None = None,
    model: str | Path | None = None,
    calibration: str | Path | None = None,
    evaluation: str | Path | None = None,
    follow: Follow | None = None,
    told: Callable[[StageRun], object] | None = None,
) -> Replay:
    """Returns how a run compares with the same done again here, stage by stage.

    Everything is computed anew, in a temporary folder; the run's own is only read. Model and data are looked for where
    they were, and have to have the contents that they had.

    Args:
        folder: The run's, as `run_recipe` made it.
        recipe: Another recipe to run in place of the stored one, to see from which stage on it makes a difference.
        model: Where the model is now, if it was moved.
        calibration: The same of the data to calibrate with: a file, or the folder of pictures.
        evaluation: The same of the data to evaluate on.
        follow: Shows how far each pass over samples is; None: nothing does.
        told: Is given each stage as it is computed.

    Raises:
        DataError: The folder holds no run, or one that is damaged; or model or data are no longer what they were.
        ConfigError: The recipe is wrong.
    """
    folder = Path(folder)
    stored, now = _stored(folder), stored_recipe(folder, recipe)
    given = {"model": model, "calibration": calibration, "evaluation": evaluation}
    now = _moved(now, {name: Path(path) for name, path in given.items() if path is not None})
    with computing_on(now.device):
        task = task_of(now, follow=follow or nothing, place=lambda batches: batches)
        identity = identity_of(task)
        _require_same_contents(stored["identity"], identity, task)
        with tempfile.TemporaryDirectory(prefix="ptqjax-replay-") as place:
            done = run_stages(task, Path(place), digest_of(identity), told or (lambda _: None), names=_reached(folder))
            stages = tuple(_compared(folder, stage) for stage in done)
    return Replay(folder=folder, stages=stages, reasons=tuple(_differences(stored["identity"], identity)))


def _stored(folder: Path) -> dict[str, Any]:
    remedy = "name a folder that `ptqjax run` wrote, out/<hash>"
    try:
        stored = json.loads((folder / RUN).read_text(encoding="utf-8"))
        is_whole = stored["address"] == digest_of(stored["identity"]) and stored["files"].keys() >= _PLACES
    except OSError as error:
        raise DataError(f"'{folder / RUN}' cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{folder / RUN}' is damaged: {error}; run the recipe again") from error
    if not is_whole:
        raise DataError(f"'{folder / RUN}' is damaged: its hash is another; run the recipe again")
    if not _reached(folder):
        raise DataError(f"'{folder}' holds no stage of a run; {remedy}")
    return stored


def _reached(folder: Path) -> tuple[str, ...]:
    """Returns the stages up to the last one that a run has."""
    names = tuple(STAGES)
    return names[: max((i for i, name in enumerate(names, 1) if (folder / name).is_dir()), default=0)]


def stored_recipe(folder: Path, other: str | Path | None = None) -> Recipe:
    """Returns the recipe of a run, with model and data where they were; or the other one, if one is named.

    Raises:
        DataError: The folder holds no run, or one that is damaged.
        ConfigError: The recipe is wrong.
    """
    files = _stored(folder)["files"]
    if other is not None:
        return read_recipe(other)
    recipe = recipe_of(
        read_text(folder / RECIPE, f"recipe '{folder / RECIPE}'"),
        source=str(folder / RECIPE),
        base=Path(files["base"]),
    )
    return _moved(recipe, {name: Path(files[name]) for name in ("model", "calibration", "evaluation") if files[name]})


def _moved(recipe: Recipe, places: Mapping[str, Path]) -> Recipe:
    changed: dict[str, Any] = {"model": places["model"]} if "model" in places else {}
    for name in ("calibration", "evaluation"):
        source = getattr(recipe, name)
        if name in places and source is not None:
            changed[name] = recipe_data.moved(source, places[name])
    return replace(recipe, **changed)


def _require_same_contents(before: Mapping[str, Any], now: Mapping[str, Any], task: Task) -> None:
    """Refuses to compare runs on other models or data.

    Raises:
        DataError: One has another content; the message names it.
    """
    recipe = task.recipe
    places = {"model": str(recipe.model)}
    places |= {name: recipe_data.place_of(getattr(recipe, name)) for name in before["data"]}
    for part, place in places.items():
        was, found = (each["model"]["file"] if part == "model" else each["data"][part] for each in (before, now))
        if was != found:
            raise DataError(
                f"{part} '{place}' is not what the run read: its hash is {str(found)[:16]}, expected {str(was)[:16]}; "
                f"say where it is now (--{part}), or run the recipe anew"
            )


def _compared(folder: Path, stage: StageRun) -> Compared:
    found = look(folder / stage.name, None)
    if found.files is None:
        return Compared(name=stage.name, differing=(), note=found.note or "they are missing")
    names = sorted({*found.files, *stage.files})
    return Compared(
        name=stage.name,
        differing=tuple(name for name in names if found.files.get(name) != stage.files.get(name)),
    )


def _differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Yields a line for each place in which two pieces of plain data differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else key)
    elif _plain(before) != _plain(now):
        yield f"{place}: {_text(before)} then, {_text(now)} now"


def _plain(value: Any) -> Any:
    """Returns data as they are after JSON, which has lists in place of tuples."""
    return json.loads(json.dumps(value))


def _text(value: Any) -> str:
    return "absent" if value is None else str(value)
