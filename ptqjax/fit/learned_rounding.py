"""Rounding that is learned: from solved codes on, block by block, by gradient descent on what each block gives.

A block reads what the blocks before it, rounded, give, and is to give what it gives in float. Its weights' codes, its
biases and the steps of its activations are learned together. Samples held back decide what of a block is kept, and
whether the whole is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ptqjax.data.batches import num_samples
from ptqjax.data.regroup import Batch, can_be_regrouped, first_samples, grouped, joined
from ptqjax.encodings.encoding import Encodings
from ptqjax.errors import ConfigError, DataError
from ptqjax.fit.bias_correction import with_biases
from ptqjax.fit.block_problem import BlockProblem
from ptqjax.fit.block_steps import Draw, Progress, Sample, Variables, step
from ptqjax.fit.blocks import blocks, layers_of_blocks
from ptqjax.fit.rounding import Solving, solve_layer, solve_weights
from ptqjax.fit.walking import Pair, Walk, by_layout, layers_in, layers_to_round, run_part, values_of
from ptqjax.ir import Model, Record, Report
from ptqjax.lowering import Stretch, Value
from ptqjax.placement.tensors import floating_tensors
from ptqjax.transforms.linear import Linear

_NAME = "learn_rounding"
_CHUNK = 16  # samples that are run at a time
_HELD = 4  # one of so many chunks is held back
_ELEMENTS = 2**20  # of a block's inputs or outputs that a step looks at
_BATCH = (4, 32)  # fewest and most samples of a step
TRAVELS = (0.6, 0.1)
"""How far a weight may go in all, in steps of its grid, at the rate of the start; half as far with the cosine. Each is
tried: layers of few weights want the smaller one."""
_LOOKS = 4  # at the samples held back, while a block is learned


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundingLearning:
    """How roundings are learned, beside what `Solving` says."""

    num_steps: int = 100
    """Steps of Adam for each block. The rates fall along a cosine, and are such that a weight goes 0.3 steps of its
    grid at most; and as many again from the same start, where it goes 0.05 at most (half of each of `TRAVELS`)."""
    mixed: float = 0.0
    """Share of a block's input that is taken from the float network, element by element."""
    steps: frozenset[str] = frozenset()
    """Activations whose steps may be learned."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"num_steps={self.num_steps}: expected a number of steps, 1 or more")
        if not 0 <= self.mixed <= 1:
            raise ConfigError(f"mixed={self.mixed}: expected a share, from 0 to 1")


def learn_rounding(
    model: Model,
    encodings: Encodings,
    batches: Iterable[Mapping[str, Any]],
    solving: Solving | None = None,
    learning: RoundingLearning | None = None,
) -> tuple[Model, Encodings, Report]:
    """Returns the model with roundings that are solved for and then learned, and its encodings.

    Blocks come in the order of the graph. Where what comes before one has changed, its layers are solved for again;
    then all of it is learned. A quarter of the samples is held back: they decide at which step a block is taken, the
    first included, and in the end between the network that was learned and the one that was solved for.

    Args:
        model: The float model that `encodings` belong to.
        encodings: Of weights and activations, concrete.
        batches: Arrays by input name; samples along the first axis.
        solving: How to solve; None for the defaults.
        learning: How to learn; None for the defaults.

    Returns:
        The model, rounding to nearest changes nothing of its weights; its encodings, scales of weights chosen and some
        steps of activations changed;
        and a record per layer (see `solve_weights`), per block and of the whole: noise on samples held back, in dB
        below the signal, as it was solved for and as it is now.

    Raises:
        DataError: As `solve_rounding`; or a block gives NaN or infinite numbers.
        ConfigError: An encoding is for a tensor that the model has not.
        ModelError: The model is quantized already.

    Source:
        Nagel et al., "Up or Down?", ICML 2020, in blocks as Li et al., "BRECQ", ICLR 2021, inputs mixed as Wei et al.,
        "QDrop", ICLR 2022; codes move as in Cheng et al., "SignRound", 2023, by Adam.
    """
    solving, learning = solving or Solving(), learning or RoundingLearning()
    given = first_samples(model.graph, batches, solving.samples)
    solved, encodings, report = solve_weights(model, encodings, given, solving)
    solving = replace(solving, shrinks=())  # what was chosen stays
    exact = with_biases(model, encodings) if solving.corrects else model
    layers, _ = layers_to_round(exact, encodings, solving.kept)
    data = _chunks(exact, given)
    walk = Walk.through(exact, encodings, data, layers, layers_of_blocks)
    if len(walk.states) < 2 or not layers:  # noqa: PLR2004  (one to learn from, one to judge)
        reason = "there are too few samples to hold some back" if layers else "nothing was solved for"
        return solved, encodings, (*report, _record((), "left as it was solved for", reason=reason))
    learned = _Learner(walk=walk, solved=solved, solving=solving, learning=learning).learned()
    _, held = _split(data[: len(walk.states)])
    before, after = (
        _noise_of_all(exact, held, layers, *each)
        for each in ((solved.params, encodings), (learned.params, learned.encodings))
    )
    whole = _whole_record(before, after)
    if not whole.done:
        return solved, encodings, (*report, *learned.report, whole)
    return solved.replace(params=learned.params), learned.encodings, (*report, *learned.report, whole)


class _Learned(NamedTuple):
    """A network whose blocks were learned."""

    params: dict[str, Any]
    """The parameters of the model that was solved for, with the weights and biases that were learned."""
    encodings: Encodings
    """The grid of every quantized tensor, steps of activations as they were learned."""
    report: Report
    """A record for each block."""


@dataclass(frozen=True, kw_only=True)
class _Learner:
    """What is learned, and how."""

    walk: Walk
    """A pass through the network, at its beginning; its parts are `layers_of_blocks`."""
    solved: Model
    """The model with the roundings to begin at."""
    solving: Solving
    """How layers are solved for again, behind blocks that have changed."""
    learning: RoundingLearning
    """How blocks are learned."""

    def learned(self) -> _Learned:
        """Returns the network learned block by block."""
        walk, params = self.walk, {**self.walk.rounded, **self.solved.params}
        records = []
        for number, (block, parts) in enumerate(_blocks(walk)):
            entry = [{name: state[name] for name in block.inputs} for state in walk.states]
            has_changed = any(record.done for record in records)
            for part in parts:
                if has_changed:
                    for layer in layers_in(part, walk.layers):
                        solve_layer(walk, layer, walk.encodings[layer.weight], params, self.solving)
                walk.advance(part, params)
            if not layers_in(block, walk.layers):
                continue
            changed, activations, record = self.learned_block(walk, block, params, entry, number)
            records.append(record)
            params |= changed
            walk = replace(walk, activations=walk.activations | activations)
            if record.done:
                _run_again(walk, block, params, entry)
        names = [name for layer in walk.layers.values() for name in (layer.weight, layer.bias) if name]
        kept = {**self.solved.params, **{name: params[name] for name in names}}
        return _Learned(kept, walk.encodings | walk.activations, tuple(records))

    def learned_block(
        self, walk: Walk, block: Stretch, params: Mapping[str, Any], entry: Sequence[dict[str, Pair]], number: int
    ) -> tuple[dict[str, Any], Encodings, Record]:
        """Returns what a block's parameters and encodings become, nothing where no step is better, and a record."""
        layers = layers_in(block, walk.layers)
        after = [[state[name] for name in block.outputs] for state in walk.states]
        used, held = _split(list(zip(entry, after, strict=True)))
        judge = _Judge.of([outputs for _, outputs in held])
        first = judge.noise([[pair.quantized for pair in outputs] for _, outputs in held])
        _check_finite(block, layers, first)
        problem = BlockProblem.of(walk, block, params, layers, solving=self.solving, free=self.learning.steps)
        samples = [_sample(block, *each) for each in used]
        best, lowest = ({}, {}), first
        for variables in self.descended(problem, samples, (judge.powers, first), number):
            changed, activations = problem.hardened(variables)
            changed_walk = replace(walk, activations=walk.activations | activations)
            now = judge.noise([_quantized(changed_walk, block, {**params, **changed}, each) for each, _ in held])
            if now < lowest:
                best, lowest = (changed, activations), now
        return best[0], best[1], _block_record(layers, best[0], params, (first, lowest))

    def descended(
        self, problem: BlockProblem, used: Sequence[Sample], scales: tuple[tuple[float, ...], float], number: int
    ) -> Iterator[Variables]:
        """Yields the variables some times while they are learned, and at the end.

        Steps are calls of one program, not turns of a loop in it: inside of loops, XLA's CPU convolutions take 30 times
        as long and more (jaxlib 0.10).
        """
        seed, count = self.solving.seed, self.learning.num_steps
        plan, fixed = problem.plan(), problem.fixed(*scales, mixed=self.learning.mixed)
        sets = _joined(used)
        sizes = np.asarray([len(jax.tree.leaves(data)[0]) for data in sets])
        looks = {-(-count * (look + 1) // _LOOKS) for look in range(_LOOKS)}
        for travel in TRAVELS:
            progress, random = Progress.at(problem.start), np.random.default_rng((seed, number))
            for index in range(count):
                chosen = int(random.choice(len(sets), p=sizes / sizes.sum()))
                size = min(int(sizes[chosen]), _batch_size(sets[chosen]))
                rows = random.choice(sizes[chosen], size, replace=False)
                seeds = np.asarray([seed, number * count + index], np.uint32)
                falling = 0.5 + 0.5 * np.cos(np.pi * index / count)
                rates = problem.rates(travel / count, falling)
                progress = step(plan, progress, fixed, sets[chosen], Draw(rows, seeds, rates))
                if index + 1 in looks:
                    yield jax.device_get(progress.variables)


def _chunks(model: Model, batches: list[Batch]) -> list[Batch]:
    """Returns the samples in chunks of equal sizes where they can be regrouped, the batches as they are elsewhere."""
    if not can_be_regrouped(model.graph, batches):
        return batches
    count = sum(map(num_samples, batches))
    return grouped(joined(batches), np.arange(count), max(1, min(_CHUNK, count // _HELD)))


def _split(chunks: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Returns the chunks to learn from, and those held back: every fourth, of fewer the last."""
    first = min(_HELD, len(chunks)) - 1
    held = [index for index in range(len(chunks)) if index % _HELD == first]
    return [chunk for index, chunk in enumerate(chunks) if index not in held], [chunks[index] for index in held]


def _blocks(walk: Walk) -> list[tuple[Stretch, list[Stretch]]]:
    """Returns each block, and the walk's parts that it consists of."""
    found = blocks(walk.model.graph, walk.layers, floating_tensors(walk.model))
    written = [block.written for block in found]
    parts: list[list[Stretch]] = [[] for _ in found]
    for part in walk.parts:
        last = part.written[-1:]
        parts[next((index for index, names in enumerate(written) if set(last) & set(names)), 0)].append(part)
    return list(zip(found, parts, strict=True))


def _quantized(walk: Walk, block: Stretch, params: Mapping[str, Any], before: Mapping[str, Pair]) -> list[Value]:
    """Returns the outputs of a quantized block that reads `before`."""
    return values_of(block, run_part(*next(walk.arguments(block, params, before))))


def _run_again(walk: Walk, block: Stretch, params: Mapping[str, Any], entry: Sequence[Mapping[str, Pair]]) -> None:
    """Puts what the quantized block gives under these parameters into the states."""
    for state, before in zip(walk.states, entry, strict=True):
        values = _quantized(walk, block, params, before)
        state |= {
            name: Pair(value, state[name].exact)
            for name, value in zip(block.outputs, values, strict=True)
            if name in state
        }


class _Judge(NamedTuple):
    """The outputs in float of the samples held back, by chunk."""

    targets: list[list[np.ndarray]]
    """In float64."""
    powers: tuple[float, ...]
    """The mean of squares of each output; 1 where it is zero."""

    @staticmethod
    def of(outputs: Sequence[Sequence[Pair]]) -> _Judge:
        """Returns the judge of these outputs, by chunk."""
        targets = [[np.asarray(pair.exact.array, np.float64) for pair in each] for each in outputs]
        with np.errstate(over="ignore"):
            powers = [float(np.mean([np.mean(np.square(each[i])) for each in targets])) for i in range(len(targets[0]))]
        return _Judge(targets, tuple(power or 1.0 for power in powers))

    def noise(self, found: Sequence[Sequence[Value]]) -> float:
        """Returns the mean square of the error over the power, summed over the outputs."""
        total = 0.0
        for index, power in enumerate(self.powers):
            pairs = zip(found, self.targets, strict=True)
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is told by `_check_finite`
                errors = [np.mean(np.square(np.asarray(each[index].array) - wanted[index])) for each, wanted in pairs]
            total += float(np.mean(errors)) / power
        return total


def _check_finite(block: Stretch, layers: Sequence[Linear], noise: float) -> None:
    """Checks that what a block gives is finite.

    Raises:
        DataError: It is not.
    """
    if not np.isfinite(noise):
        ends = ", ".join(f"'{name}'" for name in block.outputs)
        raise DataError(
            f"the block from {layers[0].node.op_type} (producing '{layers[0].node.output}') to {ends} gives NaN or "
            "infinite numbers, or their squares are; check the model in float on these batches"
        )


def _noise_of_all(
    model: Model, held: Sequence[Batch], layers: Mapping[str, Linear], params: Mapping[str, Any], encodings: Encodings
) -> float:
    """Returns the noise of the network's floating outputs on samples held back, over their power."""
    walk = Walk.through(model, encodings, held, layers, layers_of_blocks)
    every = {**walk.rounded, **params}
    for part in walk.parts:
        walk.advance(part, every)
    names = [name for name in sorted(model.graph.output_names) if name in walk.states[0]]
    outputs = [[state[name] for name in names if _is_floating(state[name])] for state in walk.states]
    return _Judge.of(outputs).noise([[pair.quantized for pair in each] for each in outputs])


def _is_floating(pair: Pair) -> bool:
    return bool(jnp.issubdtype(pair.exact.array.dtype, jnp.floating))


def _sample(block: Stretch, before: Mapping[str, Pair], outputs: Sequence[Pair]) -> Sample:
    names = block.names
    return Sample(
        by_layout({names[name]: before[name].quantized for name in block.inputs}),
        by_layout({names[name]: before[name].exact for name in block.inputs}),
        tuple(pair.exact.array for pair in outputs),
    )


def _joined(used: Sequence[Sample]) -> list[Sample]:
    """Returns the samples in as few arrays as their shapes allow."""
    alike: dict[Any, list[Sample]] = {}
    for each in used:
        shapes = tuple(jnp.shape(leaf)[1:] for leaf in jax.tree.leaves(each))
        alike.setdefault(shapes, []).append(each)
    return [jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *some) for some in alike.values()]


def _batch_size(data: Sample) -> int:
    most = max(leaf.size // max(len(leaf), 1) for leaf in jax.tree.leaves(data))
    fewest, largest = _BATCH
    return int(np.clip(_ELEMENTS // max(most, 1), fewest, largest))


def _block_record(
    layers: Sequence[Linear], changed: Mapping[str, Any], params: Mapping[str, Any], noises: tuple[float, float]
) -> Record:
    where = tuple(layer.weight for layer in layers)
    if not changed:
        return _record(where, "left as it was solved for", reason="no step is better on samples held back", of=noises)
    moved = sum(int(np.sum(changed[name] != np.asarray(params[name]))) for name in where)
    total = sum(np.asarray(params[name]).size for name in where)
    return _record(where, f"learned: {moved} of {total} weights have other integers", done=True, of=noises)


def _whole_record(before: float, after: float) -> Record:
    is_better = after < before
    what = "the network that was learned" if is_better else "the network that was solved for"
    reason = "" if is_better else "what was learned is no better on samples held back"
    return _record(
        (), what, done=is_better, reason=reason, of=(before, after if is_better else before), place="network"
    )


def _record(
    where: tuple[str, ...],
    what: str,
    *,
    done: bool = False,
    reason: str = "",
    of: tuple[float, float] | None = None,
    place: str = "block",
) -> Record:
    figure = f"SQNR of the {place}'s output, dB"
    before, after = ({figure: _decibels(each)} for each in of) if of else ({}, {})
    return Record(transform=_NAME, done=done, what=what, where=where, reason=reason, before=before, after=after)


def _decibels(noise: float) -> float:
    return float(-10 * np.log10(max(noise, np.finfo(float).tiny)))
