"""Calibration batches spread over the devices of several processes, and a recipe run by all of them together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ptqjax.data.parts import together
from ptqjax.errors import ConfigError
from ptqjax.progress import Follow, nothing
from ptqjax.recipes.recipe import Recipe, read_recipe
from ptqjax.recipes.run import Run, StageRun, computing_on, identity_of, prepared, run_stages, task_of
from ptqjax.recipes.stages import STAGES, metrics_of
from ptqjax.recipes.store import digest_of

_TOGETHER = ("calibrate", "correct")  # the stages that go through calibration data on all devices


def shard_batches(
    batches: Iterable[Mapping[str, Any]], mesh: jax.sharding.Mesh, *, axes: Sequence[str] | None = None
) -> ShardedBatches:
    """Returns the batches spread over a mesh: as many of one size as there are parts become one array, a part each.

    Calibration treats a part as a batch of its own: what it finds is what one device finds from `batches`, to the bit.
    Batches that do not fill the mesh, the last ones or those of another size, are computed on one device each. All
    processes go through all batches; each puts on its devices what belongs there.

    Args:
        batches: Arrays by input name, samples along the first axis; what can be gone through again can be again.
        mesh: The devices; all processes of it are to call this with the same batches.
        axes: The axes of the mesh that batches are spread over; the others hold copies. None: all of them.

    Raises:
        ConfigError: The mesh has no such axis.
    """
    names = tuple(mesh.axis_names) if axes is None else tuple(axes)
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise ConfigError(f"axes={list(names)}: the mesh has the axes {', '.join(map(str, mesh.shape))} alone")
    return ShardedBatches(batches=batches, mesh=mesh, axes=names)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedBatches:
    """Batches over a mesh; can be gone through again and again where those that it was made of can."""

    batches: Iterable[Mapping[str, Any]]
    """A part each."""
    mesh: jax.sharding.Mesh
    """The devices."""
    axes: tuple[str, ...]
    """The axes of the mesh that parts are spread over."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields arrays over the mesh."""
        num_parts = prod(self.mesh.shape[name] for name in self.axes)
        waiting: list[Mapping[str, Any]] = []
        for batch in self.batches:
            if waiting and not _are_alike(waiting[0], batch):
                yield from map(self._alone, waiting)
                waiting = []
            waiting.append(batch)
            if len(waiting) == num_parts:
                yield self._spread(waiting)
                waiting = []
        yield from map(self._alone, waiting)

    def _spread(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: self._joined([np.asarray(part[name]) for part in parts]) for name in parts[0]}

    def _joined(self, parts: Sequence[np.ndarray]) -> jax.Array:
        if not parts[0].ndim:
            return self._array(parts[0], PartitionSpec(), lambda _: parts[0])
        size = len(parts[0])
        whole = np.broadcast_to(parts[0][:1], (size * len(parts), *parts[0].shape[1:]))
        return self._array(whole, PartitionSpec(self.axes), lambda index: parts[(index[0].start or 0) // size])

    def _alone(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a batch that every device holds, and one computes."""
        arrays = {name: np.asarray(value) for name, value in batch.items()}
        return {name: self._array(a, PartitionSpec(), lambda _, a=a: a) for name, a in arrays.items()}

    def _array(self, like: np.ndarray, spec: PartitionSpec, part: Callable[[Any], np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(like.shape, NamedSharding(self.mesh, spec), part, dtype=like.dtype)


def _are_alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Tells whether two batches can be parts of one array: equal shapes, and equal numbers without samples."""
    if first.keys() != second.keys():
        return False
    pairs = [(np.asarray(value), np.asarray(second[name])) for name, value in first.items()]
    return all(a.shape == b.shape and (a.ndim > 0 or a == b) for a, b in pairs)


def run_recipe_together(
    recipe: str | Path | Recipe,
    out: str | Path = "runs",
    *,
    mesh: jax.sharding.Mesh | None = None,
    follow: Follow | None = None,
    told: Callable[[StageRun], object] | None = None,
) -> Run | None:
    """Returns what `run_recipe` returns, calibration spread over the devices of all processes; None but on the first.

    The first process, which has index 0, writes under `out` what a run of one process writes, byte for byte, provided
    that the machines are of one class. The others keep their stages up to the correction under `out/.process-<index>`,
    so that a run that was interrupted goes on, and remove them at the end. What a recipe's `batch` says is the part of
    one device.

    Args:
        recipe: The recipe, or its file; the same on all processes, with its model and its data.
        out: Where the folder goes.
        mesh: The devices; None: all of all processes.
        follow: Shows how far each pass over samples is; on the first process.
        told: Is given each stage as it is done, or found; on the first process.

    Raises:
        PtqjaxError: As `run_recipe`; what is wrong with a batch is raised on all processes.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    mesh = mesh or jax.make_mesh((jax.device_count(),), ("samples",), axis_types=(jax.sharding.AxisType.Auto,))
    is_first = jax.process_index() == 0
    place = Path(out) if is_first else Path(out) / f".process-{jax.process_index()}"
    names = tuple(STAGES) if is_first else tuple(STAGES)[: tuple(STAGES).index(_TOGETHER[-1]) + 1]
    with computing_on(recipe.device):
        follow = follow if follow and is_first else nothing
        task = task_of(recipe, follow=follow, place=partial(shard_batches, mesh=mesh))
        identity = identity_of(task)
        _check_same(digest_of(identity))
        folder = prepared(place, task, identity)
        told = told if told and is_first else (lambda _: None)
        stages = run_stages(task, folder, digest_of(identity), told, names=names, is_due=_is_due)
    if is_first:
        return Run(folder=folder, identity=identity, stages=stages, metrics=metrics_of(folder))
    shutil.rmtree(place, ignore_errors=True)
    return None


def _is_due(name: str, is_missing: bool) -> bool:  # noqa: FBT001 - as `run_stages` calls it
    """Tells whether a stage is computed here: one in which all work together, if any lacks it."""
    return any(together(lambda: is_missing, is_shared=name in _TOGETHER and jax.process_count() > 1))


def _check_same(address: str) -> None:
    addresses = together(lambda: address, is_shared=jax.process_count() > 1)
    other = next((i for i, found in enumerate(addresses) if found != addresses[0]), None)
    if other is not None:
        raise ConfigError(
            f"process {other} has another recipe, model, data, package or class of machine than process 0; give all of "
            "them the same"
        )
