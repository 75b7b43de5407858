"""Rules that change nothing: an error, with the reason why the tensors that they name do not take what they set."""

from __future__ import annotations

from collections.abc import Mapping

from ptqjax.config.checks import SettingError
from ptqjax.config.rules import described, set_fields
from ptqjax.placement.rules import Settled
from ptqjax.placement.sites import WEIGHT, Placement, Site


def check_effects(settled: Settled, placement: Placement) -> None:
    """Checks that each rule that sets a grid is for one tensor at least that has such a grid of its own.

    And that each rule that asks for tensors to be rounded is for one that is.
    """
    rounded = {*(site.tensor for site in placement.sites), *(site.bias for site in placement.biases)}
    own = {site.tensor: site for site in placement.sites if site.root == site.tensor}
    for index, (rule, matches) in enumerate(settled.matches):
        wanted = set(set_fields(rule)) - {"enabled"}
        has_effect = any(wanted & _settable(own[name]) for name in matches if name in own)
        has_effect |= not wanted and (not rule.enabled or not rounded.isdisjoint(matches))
        if rule.optional or has_effect:
            continue
        why = _why_without_effect(matches[-1], own, placement)  # results come after parameters
        raise SettingError("rules", f"rules: the {described(rule)} changes no grid, because {why}", rule=index)


def _settable(site: Site) -> set[str]:
    """Returns the fields of a rule that mean something for a site: none where the grid is found at run time."""
    if site.is_dynamic:
        return set()
    fields = {"dtype", "least_bits", "symmetric", "ranges", "power_of_two"}
    return fields | {"granularity" if site.kind == WEIGHT else "fixed_range"}


def _why_without_effect(tensor: str, own: Mapping[str, Site], placement: Placement) -> str:
    if tensor in own and own[tensor].is_dynamic:
        return f"the grid of '{tensor}' is found at run time (activations='dynamic'), as the runtime has it"
    if tensor in own:
        lacks = "known range; its values are in hand" if own[tensor].kind == WEIGHT else "granularity; it has one scale"
        return f"'{tensor}' ({own[tensor].kind}) has no {lacks}"
    site = placement.site(tensor)
    if site is not None:
        return f"'{tensor}' has the encoding of '{site.root}'; set it where the grid is"
    reasons = {entry.tensor: entry.reason for entry in placement.skipped}
    return f"'{tensor}' stays in float: {reasons.get(tensor, 'it is a bias, which follows its layer')}"
