"""A recipe, run: every result in a folder that its content addresses, what is there already left as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from ptqjax.decoders import read_with_past
from ptqjax.errors import ConfigError, OutputError
from ptqjax.exporting import fingerprint
from ptqjax.places import RUN
from ptqjax.progress import Follow, nothing
from ptqjax.recipes import data as recipe_data
from ptqjax.recipes.recipe import Pictures, Recipe, located_in, read_recipe
from ptqjax.recipes.stages import STAGES, Task, metrics_of
from ptqjax.recipes.store import digest_of, file_digest, look, put, remove_abandoned, write_file
from ptqjax.versions import PACKAGES, device_class, source_digest, versions

RECIPE = "recipe.toml"
"""The file of a run with the recipe's text, beside `RUN` and the folders of the stages."""
_ADDRESS = 16  # hexadecimal digits of the hash in the folder's name


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRun:
    """A stage of a run."""

    name: str
    """The stage's name in `STAGES`."""
    folder: Path
    """Where its files are."""
    files: Mapping[str, str]
    """The SHA-256 of each."""
    is_new: bool
    """Whether it was computed now; else it was there."""
    note: str
    """Why what was there could not be used; "" where it could, or nothing was there."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a recipe gave."""

    folder: Path
    """Where everything is: out/<hash>."""
    identity: Mapping[str, Any]
    """What the hash is of: model, data, settings, versions, class of device."""
    stages: tuple[StageRun, ...]
    """In order."""
    metrics: Mapping[str, Any]
    """What was measured of the exported file: "num_samples", and those of the recipe's metrics that could be; with
    "sqnr_db" of several outputs (or parts of one) also "outputs", by name in dB, "worst_output" and "worst_sqnr_db"."""

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.folder / "export" / "model.onnx"


def run_recipe(
    recipe: str | Path | Recipe,
    out: str | Path = "runs",
    *,
    follow: Follow | None = None,
    told: Callable[[StageRun], object] | None = None,
    place: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> Run:
    """Returns what a recipe gives, stored under `out` in a folder named by a hash of all that decides it.

    The hash is of the model, the data (their contents, wherever they lie), the settings, the versions of packages and
    the class of the device (`versions.device_class`): the same hash, the same bytes of every file of the stages up to
    the export. A stage that is there already, with all its files as they were written, is not computed again; one that
    is half there or damaged is. A run may be killed at any moment, and several may work in the same folder at once.

    Args:
        recipe: The recipe, or its file.
        out: Where the folder goes; made where it does not exist.
        follow: Shows how far each pass over samples is; None: nothing does.
        told: Is given each stage as it is done, or found.
        place: Puts the calibration batches where ranges and mean errors are computed, such as
            `lambda batches: shard_batches(batches, mesh)`. None: where JAX puts them.

    Raises:
        ConfigError: The recipe is wrong, or asks for a device that is not there.
        ModelError, DataError, UnsupportedOperatorError: The model or the data are at fault.
        OutputError: `out` cannot be written.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    with computing_on(recipe.device):
        task = task_of(recipe, follow=follow or nothing, place=place or _as_they_are)
        identity = identity_of(task)
        folder = prepared(Path(out), task, identity)
        with located_in(recipe):
            stages = run_stages(task, folder, digest_of(identity), told or (lambda _: None))
    return Run(folder=folder, identity=identity, stages=stages, metrics=metrics_of(folder))


def run_stages(
    task: Task,
    root: Path,
    address: str,
    told: Callable[[StageRun], object],
    *,
    names: Sequence[str] = tuple(STAGES),
    is_due: Callable[[str, bool], bool] = lambda _, is_missing: is_missing,
) -> tuple[StageRun, ...]:
    """Returns the stages in the folder `root`, those that are missing or damaged computed.

    Args:
        task: What is worked on.
        root: The folder.
        address: The hash of all that decides the results.
        told: Is given each stage as it is done, or found.
        names: The stages: all, or the first ones.
        is_due: (stage, whether it is missing here) -> whether it is computed: what other processes lack may be, too.
    """
    done: list[StageRun] = []
    key = address
    for name in names:
        compute = STAGES[name]
        key = digest_of([key, name, done[-1].files if done else {}])
        begin = time.monotonic()
        found = look(root / name, key)
        files = found.files
        if is_due(name, files is None) or files is None:
            files = put(root, name, key, lambda half, compute=compute: compute(task, root, half))
        seconds = time.monotonic() - begin
        stage = StageRun(
            name=name,
            folder=root / name,
            files=files,
            is_new=found.files is None,
            note=found.note,
            seconds=seconds,
        )
        told(stage)
        done.append(stage)
    return tuple(done)


def task_of(recipe: Recipe, *, follow: Follow, place: Callable[[Iterable[Any]], Iterable[Any]]) -> Task:
    """Returns what a recipe is to be done on: model and data, read and checked; of merged branches that with past."""
    model = read_with_past(recipe.model)
    device = device_of(recipe.device)

    def loaded(source: Path | Pictures | None, *, keep: bool) -> recipe_data.Data | None:
        if source is None:
            return None
        axes = dict(recipe.batch_axes)
        return recipe_data.load(source, model.graph, batch=recipe.batch, keep=keep, axes=axes, decoder=model)

    return Task(
        recipe=recipe,
        model=model,
        calibration=loaded(recipe.calibration, keep=True),
        evaluation=loaded(recipe.evaluation, keep=False),
        device=f"{device.platform}: {device.device_kind}",
        follow=follow,
        place=place,
    )


def identity_of(task: Task) -> dict[str, Any]:
    """Returns all that decides a run's results, as plain data: what its address is the hash of."""
    recipe, target = task.recipe, task.recipe.config.target
    data = {"calibration": task.calibration, "evaluation": task.evaluation}
    sources = {"calibration": recipe.calibration, "evaluation": recipe.evaluation}
    pictured = any(isinstance(source, Pictures) for source in sources.values())
    return {
        "model": {"file": file_digest(recipe.model), "content": fingerprint(task.model)},
        "data": {name: each and each.digest for name, each in data.items()},
        "settings": {
            "config": task.settings,
            "target": file_digest(Path(target)) if target.endswith(".toml") else None,
            "preprocessing": {name: recipe_data.settings_of(source) for name, source in sources.items()},
            "batch": recipe.batch,
            "metrics": list(recipe.metrics),
            "report": recipe.report,
        },
        "versions": versions((*PACKAGES, *(["pillow"] if pictured else []))) | {"ptqjax source": source_digest()},
        "device": device_class(device_of(recipe.device)),
    }


def device_of(name: str) -> Any:
    """Returns the device that a recipe's `device` means.

    Raises:
        ConfigError: There is none.
    """
    if name == "auto":
        return jax.devices()[0]
    try:
        return jax.local_devices(backend=name)[0]
    except RuntimeError as error:
        raise ConfigError(
            f"device={name!r}: JAX sees none; install ptqjax[cuda12] on a machine with an NVIDIA GPU, or choose 'auto'"
        ) from error


def computing_on(name: str) -> AbstractContextManager[Any]:
    """Returns a context in which JAX computes on the device that a recipe's `device` means."""
    return jax.default_device(None if name == "auto" else device_of(name))


def _as_they_are(batches: Iterable[Any]) -> Iterable[Any]:
    return batches


def prepared(out: Path, task: Task, identity: Mapping[str, Any]) -> Path:
    """Returns the run's folder, with what it takes to run it again."""
    folder = out / digest_of(identity)[:_ADDRESS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be made: {error.strerror}; name another folder") from error
    remove_abandoned(folder)
    recipe = task.recipe
    files = {
        "base": str(recipe.base),
        "model": str(recipe.model.resolve()),
        "calibration": _absolute(recipe.calibration),
        "evaluation": _absolute(recipe.evaluation),
        "target": _absolute(Path(recipe.config.target)) if recipe.config.target.endswith(".toml") else "",
    }
    stored = {"address": digest_of(identity), "identity": identity, "files": files}
    write_file(folder / RECIPE, recipe.text)
    write_file(folder / RUN, json.dumps(stored, indent=1) + "\n")
    return folder


def _absolute(source: Path | Pictures | None) -> str:
    place = recipe_data.place_of(source)
    return place and str(Path(place).resolve())
