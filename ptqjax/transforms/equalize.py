"""The rewrites that make a float network fit for one quantizer per tensor, in their order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ptqjax.errors import ConfigError, PtqjaxWarning
from ptqjax.ir import Model, Record, Report
from ptqjax.transforms.absorb import NAME as ABSORPTION
from ptqjax.transforms.absorb import absorb_biases
from ptqjax.transforms.constant_channels import remove_constant_channels
from ptqjax.transforms.fold import fold_batch_norms
from ptqjax.transforms.linear import linear_layers
from ptqjax.transforms.noise import Steps, scale_for_noise
from ptqjax.transforms.scaling import scale_channels
from ptqjax.transforms.ties import find_ties

_ABSORPTIONS = ("exact", "statistics", "off")
_SCALINGS = ("off", "weights", "ranges", "noise")


def equalize(
    model: Model,
    absorb: str = "exact",
    *,
    scaling: str = "ranges",
    limit: float | None = 2.0,
    magnitudes: Mapping[str, Any] | None = None,
    steps: Steps | None = None,
    bounds: str = "exact",
) -> tuple[Model, Report]:
    """Returns the equalized model, which computes what `model` computes, and what was done place by place.

    In this order: batch norms are folded (`fold_batch_norms`), channels that provably hold one value removed
    (`remove_constant_channels`), biases absorbed (`absorb_biases`), and channels scaled between layers. Scaling is last
    because absorption changes how large activations become and scaling commutes with it. A second run changes nothing.
    The model that is passed stays as it is. Needs no data: what activations do is taken from batch norms.

    Args:
        model: The float model, with its batch norms where possible.
        absorb: "exact" absorbs what provably keeps the function; "statistics" mean - 3 std, which loses what falls
            below and is approximate by nature; "off" nothing.
        scaling: What channels are scaled for: equal weight ranges ("weights", the paper's), weight and activation
            ranges together ("ranges"), the least predicted output noise ("noise"), or not at all ("off"). Where each
            channel of a weight has a quantizer of its own, ranges need not be alike, and scaling gains little.
        limit: For "ranges": how far a channel may reach above the median one, see `scale_channels`; None: any distance.
        magnitudes: For "ranges": see `scale_channels`.
        steps: For "noise": the grids to come; None: 8 bits per tensor.
        bounds: What becomes of a Clip between scaled channels, see `relax_bounds`; "relu" changes the function.

    Raises:
        ConfigError: `absorb`, `scaling` or `bounds` is unknown, or the scaling needs data.
        ModelError: See `fold_batch_norms`.
    """
    _check(absorb, scaling)
    model, folded = fold_batch_norms(model)
    model, prepared = prepare(model, absorb)
    if scaling in {"ranges", "noise"}:
        _warn_without_statistics(model, magnitudes or {})
    if scaling == "off":
        scaled = unscaled(model, "scaling is switched off: the ranges of channels need not be alike")
    elif scaling == "noise":
        model, scaled = scale_for_noise(model, steps=steps, bounds=bounds)
    else:
        bound = limit if scaling == "ranges" else None
        model, scaled = scale_channels(model, limit=bound, magnitudes=magnitudes, bounds=bounds)
    return model, (*folded, *prepared, *scaled)


def prepare(model: Model, absorb: str = "exact") -> tuple[Model, Report]:
    """Returns a folded model without constant channels and with biases absorbed, as `equalize` makes it to scale it."""
    model, removed = remove_constant_channels(model)
    model, absorbed = absorb_biases(model, by=absorb) if absorb != "off" else (model, ())
    return model, (*removed, *absorbed)


def without_absorption(folded: Model, prepared: Report) -> tuple[Model, Report] | None:
    """Returns a folded model prepared without absorbing biases; None where `prepared` says that none was absorbed."""
    absorbed = any(record.done and record.transform == ABSORPTION for record in prepared)
    return prepare(folded, "off") if absorbed else None


def _check(absorb: str, scaling: str) -> None:
    if absorb not in _ABSORPTIONS:
        raise ConfigError(f"absorb={absorb!r} is unknown; expected one of {', '.join(map(repr, _ABSORPTIONS))}")
    if scaling in {"learned", "auto"}:
        raise ConfigError(
            f"scaling={scaling!r} needs data, and `equalize` takes none; expected one of {', '.join(_SCALINGS)}, or a "
            "call of `quantize` or `fit.learn_scales` with calibration batches"
        )
    if scaling not in _SCALINGS:
        raise ConfigError(f"scaling={scaling!r} is unknown; expected one of {', '.join(map(repr, _SCALINGS))}")


def unscaled(model: Model, reason: str) -> Report:
    """Returns a record for each set of tied channels that says why it was not scaled."""
    ties = find_ties(model)
    return tuple(
        Record(
            transform="scale_channels",
            done=False,
            what="left alone",
            where=(found.place, *(ties.layers[name].layer.weight for name in (*found.producers, *found.consumers))),
            reason=reason,
        )
        for found in ties.sets
    )


def _warn_without_statistics(model: Model, magnitudes: Mapping[str, Any]) -> None:
    """Warns where batch norms were folded before, so that nobody knows how large the activations become."""
    known = model.statistics.keys() | magnitudes.keys()
    if linear_layers(model).keys() <= known | model.graph.output_names:
        return
    sets = find_ties(model).sets
    unknown = [found for found in sets if known.isdisjoint(found.tensors)]
    if not unknown:
        return
    warnings.warn(
        f"{len(unknown)} of {len(sets)} tensors between layers have no statistics ('{unknown[0].tensors[0]}', ...): "
        "their batch norms were folded before, or there were none. There, scaling looks at weights and bounds alone "
        "and no mean is absorbed; pass the model with its batch norms, or `magnitudes` observed on data",
        PtqjaxWarning,
        stacklevel=3,
    )
