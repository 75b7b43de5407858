"""A batch norm that is written out as Mul and Add is rounded where it was rounded before."""

import numpy as np

from ptqjax.config import QuantizationConfig
from ptqjax.placement.place import place
from ptqjax.transforms import fold_batch_norms
from tests.models import Chain, assert_same_function


def test_an_affine_per_channel_is_rounded_like_the_norm_that_it_was() -> None:
    model = Chain(4, dtype=np.float32).add("Sigmoid").norm().add("Relu").conv(4, pad=1).build()
    folded, (record,) = fold_batch_norms(model)
    assert record.what == "became a per-channel affine"
    assert_same_function(folded, model, 1e-5)
    before, after = place(model), place(folded)
    assert [site.tensor for site in after.sites] == [site.tensor for site in before.sites]
    assert {entry.tensor for entry in after.skipped} >= set(record.where[1:])


def test_a_scale_alone_and_a_shift_of_another_shape_are_rounded_each() -> None:
    chain = Chain(4, dtype=np.float32).add("Sigmoid")
    chain.add("Mul", chain.param("k", np.ones((4, 1, 1)) * 2))
    chain.add("Add", chain.param("shift", np.ones((1, 4, 1, 1)) * 3))
    model = chain.build()
    assert {"t1", "t2", "k1", "shift2"} <= {
        site.tensor for site in place(model, QuantizationConfig(target="generic-per-channel")).sites
    }
