"""What can be told before the work: whether the model, quantized as the settings say, can be written in the end."""

from __future__ import annotations

import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import make_encoding
from ptqjax.exporting import check_opset
from ptqjax.ir import Model
from ptqjax.placement.place import place
from ptqjax.placement.tensors import check_not_quantized
from ptqjax.transforms import fold_batch_norms


def check_exportable(model: Model, config: QuantizationConfig) -> None:
    """Checks that `export` can bring the model, quantized as `config` says, to an opset that has its grids.

    Costs no pass over data: what is rounded to which types follows from the graph and the settings.

    Raises:
        ModelError, ConfigError: It cannot, as `export` would say in the end; or nothing can be placed.
    """
    check_not_quantized(model)
    lean, _ = fold_batch_norms(model)
    one, zero = np.float32(1), np.float32(0)
    grids = {
        site.tensor: make_encoding(one, zero, dtype=site.dtype, axis=site.axis, block_size=site.block_size)
        for site in place(lean, config).sites
    }
    check_opset(lean, grids)
