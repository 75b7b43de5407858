"""Many configurations quantized together: what several of them need is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

from ptqjax.config import QuantizationConfig
from ptqjax.config.checks import check_choice
from ptqjax.drafts import Result, alike, drafted
from ptqjax.encodings.encoding import Encoding
from ptqjax.errors import ConfigError
from ptqjax.ir import Model
from ptqjax.pipeline import STAGES
from ptqjax.placement.rules import num_bits

CHOICES = ("each", "shared")
"""Whether each of many configurations chooses its scales by itself."""


def quantize_each(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    configs: Sequence[QuantizationConfig],
    *,
    choose: str | Sequence[QuantizationConfig] = "each",
    names: Sequence[str] | None = None,
    frozen: Mapping[str, Encoding] | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Result, ...]:
    """Returns what `quantize` returns for each configuration, in order; what several need is made once.

    The model is folded once, prepared once for each way to absorb biases, scaled once for each way that configurations
    ask for; one pass over the data calibrates all that have the same scaled model, and one corrects their biases.

    What `scaling` "auto" and "learned" choose depends on all settings, and takes a search each. With `choose="shared"`
    one search serves all configurations that are alike in `equalize`, `scaling`, `bounds`, `absorb`, `correct`,
    `headroom`, `effort`, `seed`, `target`, and in whether a weight has one scale or several. The search runs for the
    median configuration, ordered by weight bits + activation bits (ties: by `repr`; of an even number the lower one).

    Args:
        model: A float model, as `read` returns it.
        batches: Calibration data, as for `quantize`.
        configs: What to do.
        choose: "each": every configuration makes its own choice, as `quantize` does; "shared"; or for each of them the
            configuration whose choice it takes.
        names: What configurations are called in messages; None: by their position.
        frozen: As for `quantize`.
        stage: Entered around each stage, with its name in `pipeline.STAGES`.

    Raises:
        PtqjaxError: As `quantize` does; a ConfigError names the configuration that it is about.
        ConfigError: `choose` or `names` has not one element for each configuration.
    """
    parts = quantize_in_parts(
        model, batches, configs, size=len(configs), choose=choose, names=names, frozen=frozen, stage=stage
    )
    return tuple(result for part in parts for result in part)


def quantize_in_parts(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    configs: Sequence[QuantizationConfig],
    *,
    size: int,
    choose: str | Sequence[QuantizationConfig] = "each",
    names: Sequence[str] | None = None,
    frozen: Mapping[str, Encoding] | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Result, ...]]:
    """Yields what `quantize_each` returns, `size` results at a time, which are made when they are asked for.

    Nothing is checked or done before the first is asked for. Results are the same whatever the size. Scaled models
    serve all parts; each part has its own passes over the data, to calibrate and to correct. The other arguments and
    the errors are those of `quantize_each`.
    """
    sources = _sources(configs, choose)
    for what, found in (("choose", sources), ("names", configs if names is None else names)):
        if len(found) != len(configs):
            raise ConfigError(f"{what} has {len(found)} elements; expected {len(configs)}: one for each configuration")
    labels = [f"configuration {i}: " for i in range(len(configs))] if names is None else [f"'{n}': " for n in names]
    batches = tuple(batches) if isinstance(batches, Iterator) else batches
    begun = [
        drafted(model, config, source=source, label=label, frozen=frozen, has_data=batches is not None)
        for config, source, label in zip(configs, sources, labels, strict=True)
    ]
    if not begun:
        return
    with stage("fold"):
        folded = list(STAGES["fold"](begun, batches))
    scaled = iter(STAGES["equalize"](folded, batches))
    for _ in range(0, len(configs), max(size, 1)):
        with stage("equalize"):
            drafts = list(islice(scaled, size))
        for name in ("calibrate", "correct"):
            with stage(name):
                drafts = list(STAGES[name](drafts, batches))
        yield tuple(draft.result for draft in drafts)


def _sources(
    configs: Sequence[QuantizationConfig], choose: str | Sequence[QuantizationConfig]
) -> Sequence[QuantizationConfig]:
    if not isinstance(choose, str):
        return choose
    check_choice("choose", choose, CHOICES)
    return configs if choose == "each" else [configs[position] for position in middle_ones(configs)]


def middle_ones(configs: Sequence[QuantizationConfig]) -> tuple[int, ...]:
    """Returns for each configuration the position of the one whose choice of scales it shares; see `quantize_each`."""
    found = {}
    for positions in alike(configs, _what_choices_share).values():
        ranked = sorted(positions, key=lambda position: (_bits(configs[position]), repr(configs[position])))
        found |= dict.fromkeys(positions, ranked[(len(ranked) - 1) // 2])
    return tuple(found[position] for position in range(len(configs)))


def _what_choices_share(config: QuantizationConfig) -> Any:
    if not config.equalize or config.scaling not in {"auto", "learned"}:
        return config  # nothing is chosen: its own
    names = ("scaling", "bounds", "absorb", "correct", "headroom", "effort", "seed", "target")
    return (*(getattr(config, name) for name in names), config.granularity == "tensor")


def _bits(config: QuantizationConfig) -> int:
    return num_bits(config.weights) + num_bits(config.activations)
