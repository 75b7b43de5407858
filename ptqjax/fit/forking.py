"""Which tensors layers are to read through factors of their own: those whose rounding the plan then moves there."""

from __future__ import annotations

from typing import NamedTuple

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.ir import Model
from ptqjax.placement.place import place
from ptqjax.placement.sites import ACTIVATION, Placement
from ptqjax.transforms.forks import Fork, find_forks, with_forks
from ptqjax.transforms.ties import find_ties


class Forked(NamedTuple):
    """A model that is ready to be scaled for the least noise."""

    model: Model
    """The model; the one that was given where no tensor is forked."""
    forks: tuple[Fork, ...]
    """The tensors that layers read through factors of their own."""
    rounded: frozenset[str] | None
    """The activations that are rounded, each grid once; None: all, as where layers alone make scales."""


def forked(model: Model, config: QuantizationConfig, *, at_any_cost: bool = True) -> Forked:
    """Returns the model in which layers read tensors without scales of their own through factors, all of them one.

    A tensor is forked where the layers' integers are the only ones made of it: where what makes it, and all others that
    read it, compute in float, and no rule says how it is rounded.

    Args:
        model: The model.
        config: What is rounded, and the target.
        at_any_cost: Whether a new product is made for one layer alone as well; else only where factors cost nothing, or
            others read the tensor, which they then get unrounded.
    """
    ties = find_ties(model)
    is_own = config.compatibility is None and not load_target(config.target).fixed_point
    forks = find_forks(model, ties) if is_own else ()
    forks = tuple(fork for fork in forks if at_any_cost or _is_cheap(model, fork))
    if not forks and not ties.factors:
        return Forked(model, (), None)
    before = place(model, config)
    forks = tuple(fork for fork in forks if _is_rounded(before, fork.tensor))
    after = place(with_forks(model, forks), config)
    forks = tuple(fork for fork in forks if _is_rounded(after, fork.result) and not _is_rounded(after, fork.tensor))
    result = with_forks(model, forks)
    sites = place(result, config).sites
    return Forked(result, forks, frozenset(site.tensor for site in sites if site.root == site.tensor))


def _is_cheap(model: Model, fork: Fork) -> bool:
    return fork.merged is not None or model.graph.num_readers(fork.tensor) > len(fork.layers)


def _is_rounded(placement: Placement, tensor: str) -> bool:
    site = placement.site(tensor)
    return site is not None and site.kind == ACTIVATION and site.root == tensor
