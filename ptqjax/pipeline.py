"""The whole flow: `quantize` sends a draft through `STAGES`, and returns what it has become.

Each stage takes drafts and returns them further on. Several drafts of one model share what is the same for all: that is
how many configurations are quantized together (`experiments/many.py`), and `quantize` is the case of one. Recipes run
the same stages, and keep each draft on disk in between (`recipes/stages.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ptqjax.config import QuantizationConfig
from ptqjax.drafts import Draft, Result, alike, drafted
from ptqjax.encodings.encoding import Encoding
from ptqjax.fit.adapting import adapt_each
from ptqjax.fit.bias_correction import layer_axes
from ptqjax.fit.selection import scale_each
from ptqjax.placement.own_reads import with_own_reads
from ptqjax.ranges.calibrate import calibrate_and_measure
from ptqjax.ranges.headroom import widened
from ptqjax.transforms import fold_batch_norms, prepare, without_absorption

Batches = Iterable[Mapping[str, Any]] | None


def quantize(
    model: Any,
    batches: Batches,
    config: QuantizationConfig | None = None,
    *,
    frozen: Mapping[str, Encoding] | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Result:
    """Returns the quantized model: folded, equalized, calibrated and corrected as `config` says.

    `export(result.model, result.encodings, directory, name, target=config.target)` writes it.

    Args:
        model: A float model, as `read` returns it; it stays as it is.
        batches: Calibration data: arrays by input name, samples along the first axis. Gone through several times; an
            iterator, which can be gone through only once, is kept in memory. None: batch norms tell.
        config: What to do; None for the defaults.
        frozen: Encodings that are kept, by tensor of the model with folded batch norms; the others are found. Where a
            bias would not fit into int32 otherwise, its weight's scale is raised all the same.
        stage: Entered around each stage, with its name in `STAGES`.

    Raises:
        DataError: The batches do not fit the model.
        ConfigError: A setting does not fit the model or the data; encodings are frozen, and equalization, which
            scales what they are for, is on; or a frozen one is none that the target takes.
        ModelError: The model is quantized already, is not in float32, or its parameters are not finite.
    """
    batches = tuple(batches) if isinstance(batches, Iterator) else batches
    drafts = [drafted(model, config or QuantizationConfig(), frozen=frozen, has_data=batches is not None)]
    for name, work in STAGES.items():
        with stage(name):
            drafts = list(work(drafts, batches))
    return drafts[0].result


def folded(drafts: Sequence[Draft], batches: Batches) -> list[Draft]:
    """Returns the drafts, all of one model, with its batch norms folded into the layers before them."""
    del batches
    model, report = fold_batch_norms(drafts[0].model)
    return [draft.after("fold", model, report) for draft in drafts]


def equalized(drafts: Sequence[Draft], batches: Batches) -> Iterator[Draft]:
    """Yields the drafts, all of one folded model, prepared and scaled, each when it is asked for."""
    groups = {absorb: [drafts[position] for position in found] for absorb, found in alike(drafts, _absorbs).items()}
    sources = {absorb: _equalized(some, batches, absorb) for absorb, some in groups.items()}
    for draft in drafts:
        yield next(sources[_absorbs(draft)])


def _absorbs(draft: Draft) -> str | None:
    """Returns how biases are absorbed; None where the model is not prepared at all."""
    return draft.config.absorb if draft.config.equalize else None


def _equalized(drafts: Sequence[Draft], batches: Batches, absorb: str | None) -> Iterator[Draft]:
    model = drafts[0].model
    prepared, report = (model, ()) if absorb is None else prepare(model, absorb)
    plain = without_absorption(model, report)
    sources, labels = [draft.source for draft in drafts], [draft.label for draft in drafts]
    choices = scale_each(prepared, batches, sources, labels=labels, plain=plain and plain[0])
    for draft, choice in zip(drafts, choices, strict=True):
        first = report if choice.absorbs or plain is None else plain[1]
        own = with_own_reads(choice.model, draft.config)
        is_same = own is choice.model
        kept = choice if is_same else replace(choice, calibrated=None)  # was of the model without these reads
        chosen = draft.chosen(kept, shared=(absorb, choice.key, None if is_same else draft.config))
        yield chosen.after("equalize", own, (*first, *choice.report), ran=draft.config.equalize)


def calibrated(drafts: Sequence[Draft], batches: Batches) -> list[Draft]:
    """Returns the drafts with an encoding for every tensor that is rounded; one pass serves all of one scaled model."""
    found = dict(enumerate(drafts))
    for positions in alike(drafts, lambda draft: draft.shared).values():
        some = [drafts[position] for position in positions]
        model = some[0].model
        seen = (some[0].known if len(some) == 1 else None) or calibrate_and_measure(
            model,
            batches,
            [draft.config for draft in some],
            frozen=some[0].frozen,
            labels=[draft.label for draft in some],
            measured=layer_axes(model) if any(draft.correct == "empirical" for draft in some) else (),
        )
        for position, draft, (encodings, report) in zip(positions, some, seen.each, strict=True):
            wide = widened(model, encodings, draft.headroom, draft.config, seen.num_values)
            kept = wide | {name: encodings[name] for name in draft.frozen}
            found[position] = draft.encoded("calibrate", kept, report, means=seen.means)
    return [found[position] for position in range(len(drafts))]


def corrected(drafts: Sequence[Draft], batches: Batches) -> list[Draft]:
    """Returns the drafts with weights and biases adapted to the rounding; one pass serves all corrected alike."""
    found = dict(enumerate(drafts))
    for (_, method), positions in alike(drafts, lambda draft: (draft.shared, draft.correct)).items():
        some = [drafts[position] for position in positions]
        adapted = adapt_each(
            some[0].model,
            [draft.encodings for draft in some],
            [draft.config for draft in some],
            batches,
            method=method,
            means=some[0].means,
            frozen=some[0].frozen,
        )
        for position, draft, each in zip(positions, some, adapted, strict=True):
            after = draft.after("correct", each.model, each.report, ran=each.model is not draft.model)
            found[position] = after.encoded("correct", each.encodings)
    return [found[position] for position in range(len(drafts))]


STAGES: Mapping[str, Callable[[Sequence[Draft], Batches], Iterable[Draft]]] = MappingProxyType(
    {"fold": folded, "equalize": equalized, "calibrate": calibrated, "correct": corrected}
)
"""The stages by name, in order: each takes drafts of one model and calibration data, and returns them further on."""
