"""Many variants of a quantized model, measured on the same data by as few compiled programs as possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ptqjax.config.checks import check_choice
from ptqjax.data.files import checked_labels
from ptqjax.data.parts import unspread
from ptqjax.encodings.alignment import aligned
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError, DataDependentError, DataError
from ptqjax.evaluation import first_output, require_alike, require_finite, require_samples
from ptqjax.experiments.batching import WAYS, Arguments, Inputs, Step, loop, put
from ptqjax.experiments.metrics import Metric, Seen, find_metrics
from ptqjax.ir import Graph, Model
from ptqjax.lowering import apply
from ptqjax.progress import Follow
from ptqjax.qdq.insert import check_tensors

BATCHINGS = ("auto", *WAYS)
"""How variants may be run."""

_SHORT = 5e-3  # seconds a step, above which vmap never gained more than a tenth (digits network, 1 to 128 images)
_WORTH_COMPILING = 2.0  # a program of several variants takes as long to compile as one, and may halve the time at best
_COMPILING = 1.5  # seconds that it takes at least: the first program may have been there already
_MANY = 128  # steps, below which nothing is measured: two steps for that would be more than a percent
_CLEARLY = 0.9  # of the loop's time: what is not faster than this is not taken


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Variant:
    """A quantized model among others."""

    name: str
    """What it is called in messages."""
    encodings: Encodings
    """Its encodings; what has none stays in float."""
    params: Mapping[str, Any] | None = None
    """Its parameters; None for the model's own."""
    graph: Graph | None = None
    """Its graph, of the same inputs and outputs; None for the model's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """How the variants of one program were run."""

    way: str
    """"loop": one by one; "vmap": several in one program; "shard": one on each device."""
    num_variants: int
    """How many variants the program serves."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What was measured to choose it: seconds for a variant and batch, by way; empty where nothing was compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """What the variants gave."""

    values: tuple[dict[str, float], ...]
    """The metrics of each variant by name, in the order of the variants."""
    seconds: Mapping[str, float]
    """What it took: "compile" (tracing included), and "evaluate", all else."""
    batching: tuple[Batching, ...]
    """How it was run, by program."""
    programs: tuple[int, ...]
    """The program that each variant was run by: an index of `batching`."""
    num_samples: int
    """How many samples were measured on."""

    @property
    def num_programs(self) -> int:
        """How many programs there were: one for each structure of graph, shapes and encodings."""
        return len(self.batching)


def switched(encodings: Encodings, is_on: Callable[[str], bool]) -> Encodings:
    """Returns the encodings with those alone enabled that were, and whose tensor `is_on`.

    Their structure stays, so that one compiled program serves all selections.
    """
    return {
        name: encoding.replace(enabled=np.logical_and(encoding.enabled, is_on(name)))
        for name, encoding in encodings.items()
    }


def evaluate_variants(
    model: Model,
    variants: Sequence[Variant],
    batches: Iterable[Mapping[str, Any]],
    *,
    metrics: Sequence[str | Metric] = ("sqnr_db", "agreement"),
    labels: np.ndarray | None = None,
    reference: Model | None = None,
    batching: str = "auto",
    follow: Follow | None = None,
) -> Evaluated:
    """Returns the metrics of every variant over all samples, as `evaluate` of its simulation gives them.

    Batches are the outer loop: each goes to the device once, and its reference is computed once. Variants of one
    structure (after `aligned`) share one compiled program. While the host measures one step, the next one runs.

    Args:
        model: The float model whose graph and parameters variants have where they have none of their own.
        variants: What is compared.
        batches: Inputs by name, samples along the first axis. Gone through once. The parts of one that lies on several
            devices are taken one after the other, by every process: there, variants are what devices share.
        metrics: Names ("sqnr_db", "agreement", "top1"), or records of one's own.
        labels: The index of the class of each sample, in the order of the batches.
        reference: The float model that variants are compared with; None for `model`.
        batching: "loop", "vmap" (variants side by side), "shard" (over the devices of this process), or "auto": what
            measures fastest. vmap is tried only where a step takes less than 5 ms and the loop would go on for twice
            as long as compiling took, since it gains nothing elsewhere.
        follow: Shows how far the pass over the batches is.

    Raises:
        DataError: The batches do not fit the model, there are none, or not as many as labels; the labels are not
            indices of classes; or a variant has other outputs than the reference.
        ModelError: An output is not finite, or the first is a single number.
        DataDependentError: A shape depends on data, and `batching` is "vmap" or "shard"; "auto" and "loop" take it.
        ConfigError: A metric or a way of batching is unknown, there are no variants, or an encoding is for a tensor
            that the variant has not; the message names the variant.
    """
    check_choice("batching", batching, BATCHINGS)
    measures = find_metrics(metrics, has_labels=labels is not None)
    groups, programs = _grouped(model, variants)
    session = _Session(groups, batching)
    states = [[metric.init() for metric in measures] for _ in variants]
    reference = model if reference is None else reference
    reference = reference.replace(params={name: put(value) for name, value in reference.params.items()})
    num_batches = len(batches) if isinstance(batches, Sized) else 1
    num_samples, start = 0, time.perf_counter()
    for number, batch in enumerate(unspread(follow(batches, "evaluate") if follow else batches)):
        require_samples(batch, number)
        inputs = {name: put(value) for name, value in batch.items()}
        wanted = session.started("reference", inputs, lambda x, at=number: _wanted(reference, x, at))
        wanted = _finite({name: np.asarray(value) for name, value in wanted.items()}, f"the reference, batch {number}")
        first = wanted[first_output(wanted, f"the reference, batch {number}")]
        size = len(first)
        taken = _labels_of(labels, first, num_samples)
        for position, found in session.outputs(inputs, num_batches - number):
            who = f"'{variants[position].name}'"
            require_alike(_finite(found, f"{who}, batch {number}"), wanted, f"the reference and {who}")
            seen = Seen(found={name: found[name] for name in wanted}, wanted=wanted, labels=taken)
            states[position] = [m.update(s, seen) for m, s in zip(measures, states[position], strict=True)]
        num_samples += size
    _check_count(num_samples, labels)
    seconds = {"compile": session.compiling, "evaluate": time.perf_counter() - start - session.compiling}
    values = ({m.name: float(m.finish(s)) for m, s in zip(measures, each, strict=True)} for each in states)
    return Evaluated(
        values=tuple(values),
        seconds=seconds,
        batching=session.report(),
        programs=programs,
        num_samples=num_samples,
    )


def _wanted(reference: Model, inputs: Inputs, number: int) -> dict[str, Any]:
    try:
        return apply(reference.graph, reference.params, inputs)
    except DataError as error:
        raise DataError(f"batch {number}: {error}") from error


def _finite(outputs: dict[str, np.ndarray], who: str) -> dict[str, np.ndarray]:
    for name, value in outputs.items():
        require_finite(value, f"{who}: output '{name}'")
    return outputs


def _labels_of(labels: np.ndarray | None, first: np.ndarray, start: int) -> np.ndarray | None:
    if labels is None:
        return None
    size, known = len(first), checked_labels(labels, num_classes=first[0].size, place="labels")
    if start + size > len(known):
        raise DataError(f"there are {len(known)} labels, and at least {start + size} samples; give each its label")
    return known[start : start + size]


def _check_count(num_samples: int, labels: np.ndarray | None) -> None:
    num_labels = num_samples if labels is None else len(labels)
    if not num_samples or num_labels != num_samples:
        raise DataError(
            f"there are {num_samples} samples and {num_labels} labels to evaluate on; "
            "expected at least one sample, and a label for each"
        )


# Programs


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Group:
    """The variants of one program."""

    graph: Graph
    """Their graph."""
    variants: Mapping[int, Arguments]
    """Their arrays, by position among all variants."""


def _grouped(model: Model, variants: Sequence[Variant]) -> tuple[list[_Group], tuple[int, ...]]:
    """Returns the variants by program, and the number of each one's program."""
    if not variants:
        raise ConfigError("variants is empty; expected at least one")
    kinds: dict[Any, list[int]] = {}
    for position, variant in enumerate(variants):
        own = _own_model(model, variant)
        shapes = tuple((np.shape(own.params[name]), str(own.params[name].dtype)) for name in own.graph.parameters)
        kinds.setdefault((own.graph, shapes), []).append(position)
    groups: dict[Any, dict[int, Arguments]] = {}
    for (graph, shapes), positions in kinds.items():
        own = [_own_model(model, variants[position]) for position in positions]
        found = aligned(own[0], [variants[position].encodings for position in positions])
        for position, each, encodings, number in zip(positions, own, found.encodings, found.structures, strict=True):
            params = {name: each.params[name] for name in graph.parameters}
            groups.setdefault((graph, shapes, number), {})[position] = Arguments(params, encodings)
    numbers = {position: number for number, group in enumerate(groups.values()) for position in group}
    found = [_Group(graph=graph, variants=group) for (graph, _, _), group in groups.items()]
    return found, tuple(numbers[position] for position in range(len(variants)))


def _own_model(model: Model, variant: Variant) -> Model:
    """Returns the float model of a variant.

    Raises:
        ConfigError: It lacks a tensor that has an encoding.
    """
    graph = model.graph if variant.graph is None else variant.graph
    try:
        check_tensors(graph, variant.encodings)
    except ConfigError as error:
        raise ConfigError(f"'{variant.name}': {error}") from error
    return Model(graph=graph, params=dict(model.params if variant.params is None else variant.params))


class _Session:
    """What is kept from batch to batch: how each program's variants are run, and what compiling took."""

    def __init__(self, groups: Sequence[_Group], way: str) -> None:
        self.compiling = 0.0
        self._groups = groups
        self._way = way
        self._plans: list[tuple[Batching, list[Step]]] = []
        self._compiled: set[Any] = set()

    def report(self) -> tuple[Batching, ...]:
        """Returns how each program's variants were run."""
        return tuple(plan for plan, _ in self._plans)

    def outputs(self, inputs: Inputs, num_batches: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields each variant's position and outputs; the next step is under way while the caller measures one.

        Args:
            inputs: The batch.
            num_batches: How many are still to come, this one included.
        """
        self._plans = self._plans or [self._planned(group, inputs, num_batches) for group in self._groups]
        pending: tuple[Step, dict[str, Any]] | None = None
        for number, (plan, steps) in enumerate(self._plans):
            for step in steps:
                running = (step, self.started((number, plan.way), inputs, step.run))
                if pending is not None:
                    yield from _read(*pending)
                pending = running
        if pending is not None:
            yield from _read(*pending)

    def started(self, program: Any, inputs: Inputs, run: Callable[[Inputs], dict[str, Any]]) -> dict[str, Any]:
        """Returns the outputs to be; of a program's first run at a shape, what passes until then is compiling."""
        key = (program, tuple((name, np.shape(value)) for name, value in inputs.items()))
        start = time.perf_counter()
        outputs = run(inputs)
        if key not in self._compiled:
            self._compiled.add(key)
            self.compiling += time.perf_counter() - start
        return outputs

    def _planned(self, group: _Group, inputs: Inputs, num_batches: int) -> tuple[Batching, list[Step]]:
        size = len(group.variants)
        if self._way != "auto":
            return Batching(way=self._way, num_variants=size), WAYS[self._way](group.graph, group.variants)
        steps, number = loop(group.graph, group.variants), self._groups.index(group)
        num_devices = jax.local_device_count()
        if size == 1 or (num_devices == 1 and size * num_batches < _MANY):
            return Batching(way="loop", num_variants=size), steps
        before = self.compiling
        seconds = {"loop": self._timed(steps[0], inputs, (number, "loop"))}
        is_long = seconds["loop"] * size * num_batches > _WORTH_COMPILING * max(self.compiling - before, _COMPILING)
        other = "shard" if num_devices > 1 else "vmap"
        if not is_long or (other == "vmap" and seconds["loop"] > _SHORT):
            return Batching(way="loop", num_variants=size, seconds=seconds), steps
        others = WAYS[other](group.graph, group.variants)
        try:
            seconds[other] = self._timed(others[0], inputs, (number, other)) / len(others[0].positions)
        except DataDependentError:  # variants side by side are traced, and do not tell the values that decide shapes
            return Batching(way="loop", num_variants=size, seconds=seconds), steps
        if seconds[other] < _CLEARLY * seconds["loop"]:
            return Batching(way=other, num_variants=size, seconds=seconds), others
        return Batching(way="loop", num_variants=size, seconds=seconds), steps

    def _timed(self, step: Step, inputs: Inputs, program: tuple[int, str]) -> float:
        """Returns the seconds of a step's second run."""
        jax.block_until_ready(self.started(program, inputs, step.run))
        start = time.perf_counter()
        jax.block_until_ready(step.run(inputs))
        return time.perf_counter() - start


def _read(step: Step, outputs: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    yield from zip(step.positions, step.outputs(outputs), strict=True)
