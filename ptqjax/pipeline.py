"""The whole flow as one function: a line per stage, no other logic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptqjax.config import QuantizationConfig
from ptqjax.errors import ConfigError
from ptqjax.fit import correct_biases, scale_as_configured
from ptqjax.ir import Model, Report
from ptqjax.quantize import Encoding, Encodings, calibrate_and_report, check_not_quantized, guard_biases, widened
from ptqjax.quantize.bias import sums_in_fixed_point
from ptqjax.transforms import fold_batch_norms, prepare


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model as one transform left it."""

    name: str
    """The transform, in the words of the table that is printed: "fold", "equalize", "correct"."""
    model: Model
    """The float model after it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A quantized model, and how it came about."""

    model: Model
    """The float model after all transforms: what `encodings` belong to."""
    encodings: Encodings
    """The grid of every quantized tensor."""
    reports: Mapping[str, Report]
    """What each transform did and left alone, by transform."""
    stages: tuple[Stage, ...]
    """The model after each transform, in order."""


def quantize(
    model: Model,
    batches: Iterable[Mapping[str, Any]] | None,
    config: QuantizationConfig | None = None,
    *,
    frozen: Mapping[str, Encoding] | None = None,
) -> Result:
    """Returns the quantized model: folded, equalized, calibrated and corrected as `config` says.

    `export` writes it; where the target has weights written in float, `export` has to be told
    (`weights=load_target(config.target).exported_weights`).

    Args:
        model: A float model, as `read` returns it; it stays as it is.
        batches: Calibration data: arrays by input name, samples along the first axis. Gone through several times; an
            iterator, which can be gone through only once, is kept in memory. None: batch norms tell.
        config: What to do; None for the defaults.
        frozen: Encodings that are kept, by tensor of the model with folded batch norms; the others are found. Where a
            bias would not fit into int32 otherwise, its weight's scale is raised all the same.

    Raises:
        DataError: The batches do not fit the model.
        ConfigError: A setting does not fit the model or the data; or encodings are frozen, and equalization, which
            scales what they are for, is on.
        ModelError: The model is quantized already, is not in float32, or its parameters are not finite.
    """
    config = config or QuantizationConfig()
    batches = tuple(batches) if isinstance(batches, Iterator) else batches
    check_not_quantized(model)
    if frozen and config.equalize:
        raise ConfigError("equalize=True: it scales the tensors that frozen encodings are for; choose equalize=False")
    folded, fold_report = fold_batch_norms(model)
    prepared, prepare_report = prepare(folded, config.absorb) if config.equalize else (folded, ())
    choice = scale_as_configured(prepared, batches, config)
    equalized, equalize_report = choice.model, (*prepare_report, *choice.report)
    calibrated, calibrate_report = calibrate_and_report(equalized, batches, config, frozen=frozen)
    kept = {name: calibrated[name] for name in frozen or {}}
    encodings = widened(equalized, calibrated, choice.headroom, config) | kept
    corrects = choice.correct != "none"
    corrected, correct_report = (
        correct_biases(equalized, encodings, batches, method=choice.correct) if corrects else (equalized, ())
    )
    # Corrected biases may have grown.
    encodings, guard_report = guard_biases(corrected, encodings, fixed_point=sums_in_fixed_point(config))
    reports = {"fold": fold_report, "equalize": equalize_report}
    reports |= {"calibrate": calibrate_report, "correct": (*correct_report, *guard_report)}
    stages = {"fold": folded, "equalize": equalized, "correct": corrected}
    left_out = {name for name, done in (("equalize", config.equalize), ("correct", corrects)) if not done}
    return Result(
        model=corrected,
        encodings=encodings,
        reports={name: report for name, report in reports.items() if name not in left_out},
        stages=tuple(Stage(name=name, model=after) for name, after in stages.items() if name not in left_out),
    )
