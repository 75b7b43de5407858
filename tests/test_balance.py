"""Laws of scales in closed form: what sets ask for is never raised, and no scale leaves its bounds, on any graph."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqjax.ir import Model
from ptqjax.kernels.equalization import FARTHEST
from ptqjax.transforms import scale_channels
from ptqjax.transforms.balance import asked_for, balanced, weight_balance
from ptqjax.transforms.ties import find_ties
from tests.test_ties import BLOCKS, Net, grown


def damaged(model: Model, share: float, seed: int) -> Model:
    """The model with so many rows of its weights, and as many columns, at zero, near it, or far beyond the others."""
    random, params = np.random.default_rng(seed), dict(model.params)
    for name, array in params.items():
        value = array
        if array.ndim < 2:
            continue
        for axis in (0, 1):
            factors = random.choice([0.0, 1e-30, 1e-6, 1e8], size=value.shape[axis])
            factors = np.where(random.random(value.shape[axis]) < share, factors, 1.0)
            value = value * factors.reshape((-1, *(1,) * (value.ndim - 1 - axis)))
        params[name] = value
    return model.replace(params=params)


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.2, 0.6]),
    seed=st.integers(0, 10_000),
    limit=st.sampled_from([None, 1.0, 2.0]),
)
def test_balance_never_raises_what_sets_ask_for_and_scales_are_bounded(
    blocks: list[str], share: float, seed: int, limit: float | None
) -> None:
    model = damaged(grown(blocks, "GlobalAveragePool and Flatten", rank=1, seed=seed), share, seed)
    ties, random = find_ties(model), np.random.default_rng(seed)
    balance = weight_balance(model, ties)
    sizes = [
        None
        if limit is None
        else np.exp(5 * random.normal(size=len(found.scales))) * (random.random(len(found.scales)) > share / 2)
        for found in ties.sets
    ]
    scales = balanced(balance, sizes, limit or 1.0)
    assert np.isfinite(scales).all()
    before, after = (asked_for(balance, sizes, limit or 1.0, each) for each in (0 * scales, scales))
    assert after <= before
    for index in range(len(ties.sets)):
        own = balance.own(scales, index)
        assert np.ptp(own) <= 4 * FARTHEST  # twice that to each side: steps are longer than what is asked for
        assert abs(own.mean()) <= FARTHEST * (1 + 1e-6)


def trunk(blocks: int, seed: int = 0) -> Model:
    """A residual trunk of inverted bottlenecks, each of another magnitude."""
    net = Net(rank=1, channels=6, seed=seed).conv(6)
    for index in range(blocks):
        start = net.tensor
        net.conv(12, kernel=1).add("Relu").conv(group=12).add("Relu").conv(6, kernel=1)
        net.params[net.nodes[-1].inputs[1]] *= 4.0 ** (index % 3 - 1)
        net.add("Add", start)
    return net.conv(4).add("Relu").conv(2).build()


@pytest.mark.parametrize("blocks", [2, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_common_factors_are_found_whichever_layer_of_a_residual_trunk_is_the_largest(blocks: int, seed: int) -> None:
    model = trunk(blocks, seed)
    ties = find_ties(model)
    balance = weight_balance(model, ties)
    scales = balanced(balance, [None] * len(ties.sets), 1.0)
    assert asked_for(balance, [None] * len(ties.sets), 1.0, scales) < 1e-3
    assert max(abs(balance.level(scales, index)) for index in range(len(ties.sets))) < 3e-4
    _, report = scale_channels(model, limit=None)
    assert max(record.after.get("largest |log scale|", 0.0) for record in report) < 8
