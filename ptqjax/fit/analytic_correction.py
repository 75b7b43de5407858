"""The mean error that quantization leaves in a layer's output, from batch norms instead of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ptqjax.encodings.encoding import Encodings, concrete, fake_quantize
from ptqjax.errors import DataError
from ptqjax.ir import Model
from ptqjax.kernels.grouped import respond_to_constant
from ptqjax.transforms.linear import Linear, linear_layers, weight_view
from ptqjax.transforms.moments import layer_inputs

_SHOWN = 3  # names in an error


def expected_errors(
    model: Model, encodings: Encodings, outputs: Sequence[str], *, weights: Mapping[str, Any] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns E[y_q - y] per channel of the layers that produce `outputs`, and for the others why it is unknown.

    E[y_q - y][o] = sum_{i, k} (Q(W) - W)[o, i, k] E[x_i]: E[x] is the mean that statistics imply for each input channel
    (`transforms.moments`). Earlier layers are taken to be corrected. Where a layer pads, that is the error away from
    the border. What the activations' own quantizers shift is left out: rounding has mean zero, and what clipping cuts
    off lies in the tails, where the normal model is wrong (with it, MobileNetV2 at 8 bits per channel fell from 19.9 to
    11.9 dB on calibration pictures; the empirical correction has 19.6).

    Args:
        model: The float model.
        encodings: Its grids.
        outputs: What the layers produce.
        weights: Parameters, by name, that are rounded in place of the model's; None: the model's.

    Raises:
        DataError: There are layers, and nothing is known of any; the message names the first three.
    """
    model = model.replace(params=jax.tree.map(np.asarray, dict(model.params)))
    layers, inputs = linear_layers(model), layer_inputs(model)
    found = [output for output in outputs if output in inputs]
    if outputs and not found:
        more = f" and {len(outputs) - _SHOWN} more" if len(outputs) > _SHOWN else ""
        named = ", ".join(f"'{output}'" for output in outputs[:_SHOWN])
        raise DataError(
            f"analytic bias correction: the mean of the inputs of the layers that produce {named}{more} is unknown, "
            "because the model has no batch norms in front of them; give the model with its batch norms, or samples "
            "for an empirical correction (correct='empirical'; on the command line --calibration DATA.npz)"
        )
    errors = {
        output: _expected_error(model, encodings, layers[output], inputs[output].moments.mean, weights or {})
        for output in found
    }
    reason = "the mean of its input does not follow from batch norms; an empirical correction would measure it"
    return errors, {output: reason for output in outputs if output not in errors}


def _expected_error(
    model: Model, encodings: Encodings, layer: Linear, mean: Any, weights: Mapping[str, Any]
) -> np.ndarray:
    weight = np.asarray(weights.get(layer.weight, model.params[layer.weight]))
    rounded = fake_quantize(weight, concrete(encodings[layer.weight]))
    quantized = model.replace(params=model.params | {layer.weight: rounded})
    difference = weight_view(quantized, layer) - weight_view(model, layer)
    return np.asarray(respond_to_constant(difference, np.asarray(mean)))
