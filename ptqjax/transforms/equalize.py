"""The rewrites that make a float network fit for one quantizer per tensor, in their order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ptqjax.errors import ConfigError, PtqjaxWarning
from ptqjax.ir import Model, Record, Report
from ptqjax.transforms.absorb import absorb_biases
from ptqjax.transforms.constant_channels import remove_constant_channels
from ptqjax.transforms.fold import fold_batch_norms
from ptqjax.transforms.interfaces import find_interfaces
from ptqjax.transforms.linear import linear_layers
from ptqjax.transforms.scaling import scale_channels

_ABSORPTIONS = ("exact", "off")


def equalize(
    model: Model,
    absorb: str = "exact",
    *,
    scale: bool = True,
    limit: float | None = 2.0,
    magnitudes: Mapping[str, Any] | None = None,
) -> tuple[Model, Report]:
    """Returns the equalized model, which computes what `model` computes, and what was done place by place.

    In this order: batch norms are folded (`fold_batch_norms`), channels that provably hold one value removed
    (`remove_constant_channels`), biases absorbed where that is exact (`absorb_biases`), and channels scaled between
    layers (`scale_channels`). Scaling is last because absorption changes how large activations become and scaling
    commutes with it. A second run changes nothing. The model that is passed stays as it is.

    Args:
        model: The float model, with its batch norms where possible.
        absorb: "exact" absorbs what provably keeps the function, "off" nothing.
        scale: Whether to scale channels. Where each channel of a weight has a quantizer of its own, their ranges need
            not be alike, and scaling costs activations their range: there it is best left out.
        limit: See `scale_channels`.
        magnitudes: See `scale_channels`.

    Raises:
        ConfigError: `absorb` is unknown or not available.
        ModelError: See `fold_batch_norms`.
    """
    if absorb == "statistics":
        raise ConfigError("absorb='statistics' is not available yet; expected 'exact' or 'off'")
    if absorb not in _ABSORPTIONS:
        raise ConfigError(f"absorb={absorb!r} is unknown; expected one of {', '.join(map(repr, _ABSORPTIONS))}")
    model, folded = fold_batch_norms(model)
    if scale:
        _warn_without_statistics(model, magnitudes or {})
    model, removed = remove_constant_channels(model)
    model, absorbed = absorb_biases(model) if absorb == "exact" else (model, ())
    model, scaled = scale_channels(model, limit=limit, magnitudes=magnitudes) if scale else (model, _unscaled(model))
    return model, (*folded, *removed, *absorbed, *scaled)


def _unscaled(model: Model) -> Report:
    interfaces, _ = find_interfaces(model, linear_layers(model))
    return tuple(
        Record(
            transform="scale_channels",
            done=False,
            what="left alone",
            where=(interface.tensors[-1], interface.producer.weight, interface.consumer.weight),
            reason="scaling is switched off: the ranges of channels need not be alike",
        )
        for interface in interfaces
    )


def _warn_without_statistics(model: Model, magnitudes: Mapping[str, Any]) -> None:
    """Warns where batch norms were folded before, so that nobody knows how large the activations become."""
    interfaces, _ = find_interfaces(model, linear_layers(model))
    unknown = [
        found.producer.output
        for found in interfaces
        if found.producer.output not in model.statistics and found.tensors[-1] not in magnitudes
    ]
    if not unknown:
        return
    warnings.warn(
        f"{len(unknown)} of {len(interfaces)} tensors between layers have no statistics ('{unknown[0]}', ...): their "
        "batch norms were folded before, or there were none. There, scaling looks at weights and bounds alone and no "
        "mean is absorbed; pass the model with its batch norms, or `magnitudes` observed on data",
        PtqjaxWarning,
        stacklevel=3,
    )
