"""Says which biases have grids: those that follow from the grids of a layer's input and weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ptqjax.config import QuantizationConfig, Target
from ptqjax.encodings.biases import BiasSite
from ptqjax.errors import ConfigError
from ptqjax.placement.rules import Settings
from ptqjax.placement.shared import Decided
from ptqjax.placement.sites import ACTIVATION, WEIGHT, Site, Skipped


def has_grids(site: BiasSite, decided: Decided) -> bool:
    """Tells whether a bias's scale follows from those of its input and weight, one for each channel."""
    x, weight = decided.get(site.input), decided.get(site.weight)
    is_activation = isinstance(x, Site) and x.kind == ACTIVATION and not x.is_dynamic
    return is_activation and isinstance(weight, Site) and weight.kind == WEIGHT and weight.block_size is None


def float_biases_by(config: QuantizationConfig, target: Target) -> str:
    """Returns what leaves all biases in float, for people; "" where they are integers."""
    if (config.biases or target.biases) == "int32":
        return ""
    return "biases='float'" if config.biases else f"target {target.name!r}"


def check_biases(settings: Mapping[str, Settings], biases: set[str]) -> None:
    """Checks that nothing leaves biases alone in float: they follow their layers.

    Raises:
        ConfigError: A pattern or rule does.
    """
    others = {found.off for tensor, found in settings.items() if tensor not in biases}
    alone = {settings[name].off for name in biases} - others - {""}
    if alone:
        raise ConfigError(
            f"what is {min(alone)} matches only biases; a bias follows its layer: leave the layer's weight or input in "
            "float, or all biases by biases='float'"
        )


def biases_in_float(
    settings: Mapping[str, Settings], layers: Iterable[str], integers: set[str], by: str
) -> dict[str, Skipped]:
    """Returns the biases that stay in float, with the reason."""
    found: dict[str, Skipped] = {}
    for name in layers:
        if name in integers and not by:
            continue
        reason = f"bias, added in float by {by}" if name in integers else settings[name].off
        reason = reason or "bias of a layer whose input or weight stays in float"
        found[name] = Skipped(tensor=name, reason=reason)
    return found
