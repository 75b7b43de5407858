"""Ranges of activations without data: from what batch norms tell of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ptqjax.errors import DataError
from ptqjax.ir import Model, place_of
from ptqjax.placement.place import Site
from ptqjax.ranges.site_encodings import Ranged, encoding_of_range
from ptqjax.transforms.linear import linear_layers
from ptqjax.transforms.moments import channel_ranges

NUM_STD = 6.0
"""Standard deviations of each channel that a range holds. Activations alone quantized, on calibration pictures, SQNR in
dB at 4, 5, 6, 8 deviations: MobileNetV2 19.1, 20.0, 19.4, 17.2 (22.5 with ranges from the pictures), MobileNetV1-0.25
20.2, 20.0, 19.9, 19.7 (20.8), ResNet-20 20.0, 24.9, 26.6, 25.7 (30.7). The range with the least error of the mixture of
normals (the scheme "sqnr") has 16.9, 20.2, 18.4: real tails are heavier, so one rule serves all schemes."""
NUM_STD_OF_INPUTS = 3.0
"""The same for graph inputs, whose deviation is an estimate, on the wide side: pictures end at two or three."""
NUM_STD_OF_FEW = 8.0
"""The same behind depthwise layers: a sum over one channel's taps keeps that channel's heavy tails. MobileNetV2, W8A8
per tensor with scales of least predicted noise: 15.8 dB with 6, 17.5 dB with 8; MobileNetV1-0.25: 17.5 both."""
_SHOWN = 3  # names in an error
_ACTIVATIONS = frozenset({"Clip", "LeakyRelu", "Max", "Min", "PRelu", "Relu"})


def encode_from_statistics(model: Model, sites: Sequence[Site]) -> dict[str, Ranged]:
    """Returns the encodings of activations that have a range of their own, from `model.statistics`.

    A tensor's range is that of all its channels, each `NUM_STD` standard deviations to both sides of its mean (graph
    inputs: `NUM_STD_OF_INPUTS`, behind depthwise layers: `NUM_STD_OF_FEW`), through the activation function and within
    provable bounds; see `transforms.moments`.

    Raises:
        DataError: Nothing is known of a tensor. The message names the first three and says what helps.
    """
    if not sites:
        return {}
    model = model.replace(params=jax.tree.map(np.asarray, dict(model.params)))
    ranges = channel_ranges(model, num_std=NUM_STD)
    inputs = {spec.name for spec in model.graph.inputs}
    for names, deviations in ((inputs, NUM_STD_OF_INPUTS), (_behind_depthwise_layers(model), NUM_STD_OF_FEW)):
        own = channel_ranges(model, num_std=deviations)
        ranges |= {name: found for name, found in own.items() if name in names}
    _check_known(model, [site.tensor for site in sites], ranges)
    ends = {site: _ends(*ranges[site.tensor]) for site in sites}
    return {site.tensor: Ranged(encoding_of_range(site, *ends[site]), *ends[site]) for site in sites}


def _behind_depthwise_layers(model: Model) -> set[str]:
    """Returns the outputs of layers that sum over one channel each, and of the activations behind them."""
    layers = linear_layers(model)
    found = {name for name, layer in layers.items() if layer.num_inputs == layer.groups > 1}
    for node in model.graph.nodes:
        if node.op_type in _ACTIVATIONS and not found.isdisjoint(node.inputs):
            found.add(node.output)
    return found


def _ends(low: Any, high: Any) -> tuple[Any, Any]:
    return np.min(low), np.max(high)


def _check_known(model: Model, tensors: Sequence[str], known: Mapping[str, Any]) -> None:
    unknown = [name for name in tensors if name not in known]
    if not unknown:
        return
    producers = model.graph.producers
    named = [place_of(producers[name]) if name in producers else f"the graph input '{name}'" for name in unknown]
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    raise DataError(
        f"without data, no range is known of {len(unknown)} of {len(tensors)} activations: {', '.join(named[:_SHOWN])}"
        f"{more}; {_cause(model)}. Give samples (batches; on the command line --calibration DATA.npz: a hundred will "
        "do, no labels needed), or exclude these tensors"
    )


def _cause(model: Model) -> str:
    if model.statistics:
        return "batch norms do not tell what these operators make of their inputs"
    return "the model has no batch norms, or they were folded before it was saved (then it is best given with them)"
