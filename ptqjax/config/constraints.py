"""Whether a target takes a configuration: what it restricts, what was asked for, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ptqjax.config.checks import FLOAT_DTYPES, RUN_TIME, SettingError, Symmetry
from ptqjax.config.rules import Rule, described
from ptqjax.config.target import Target

KERNEL_BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of blocks that ONNX Runtime's kernels take for weights that floats are multiplied by."""

if TYPE_CHECKING:
    from ptqjax.config.settings import QuantizationConfig


def check_allowed(config: QuantizationConfig, target: Target) -> None:
    """Checks that `target` takes all settings of `config` and of its rules.

    Raises:
        ConfigError: It does not take one; the message names the setting, what is taken, and the remedy.
    """
    restricted = dict(target.allowed)
    if config.activations == "dynamic" and not target.dynamic_products and "activations" not in restricted:
        raise SettingError("activations", _without_dynamic(target))
    _check_blocks(config, target)
    _check_run_time(config)
    for key, value in _settings(config):
        if key in restricted and value not in restricted[key]:
            raise SettingError(key, _refusal(target, key, getattr(config, key), value, restricted[key]))
    for index, rule in enumerate(config.rules):
        for key, value in _settings_of_rule(rule):
            if key in restricted and value not in restricted[key]:
                taken = ", ".join(map(_text, restricted[key]))
                remedy = "; a rule for activations alone has of='activations'" if rule.of == "both" else ""
                message = f"{described(rule)}: target {target.name!r} does not take {_text(value)} ({key}); it takes "
                raise SettingError("rules", f"{message}{taken}{remedy}", rule=index)


def _check_blocks(config: QuantizationConfig, target: Target) -> None:
    """Checks that blocks have a size that the target's kernels take, where activations have no grid beforehand."""
    if config.activations not in RUN_TIME or target.exported_weights != "matmul-nbits":
        return
    for granularity in (config.granularity, *(rule.granularity or "" for rule in config.rules)):
        kind, _, size = granularity.partition(":")
        if kind in ("block", "lpbq") and int(size) not in KERNEL_BLOCKS:
            sizes = ", ".join(map(str, KERNEL_BLOCKS))
            raise SettingError(
                "granularity", f"granularity={granularity!r}: MatMulNBits has blocks of {sizes}; choose one"
            )


def _check_run_time(config: QuantizationConfig) -> None:
    """Checks that nothing is set that activations without a grid beforehand cannot obey."""
    if config.activations not in RUN_TIME:
        return
    remedies: dict[str, str] = dict.fromkeys(("activations_symmetric", "activation_ranges", "headroom"), "leave it out")
    if config.activations == "dynamic":
        remedies["power_of_two"] = "set it by a rule with of='weights' for weights alone"
    for key, remedy in remedies.items():
        value = getattr(config, key)
        if value and not (key == "headroom" and value == 1):  # once as wide as the data is what these are
            why = (
                "no grid" if config.activations == "float" else "grids that are found at run time, as the runtime does"
            )
            message = f"{key}={value!r}: with activations={config.activations!r} activations have {why}; {remedy}"
            raise SettingError(key, message)


def resolved_symmetry(symmetric: Symmetry | None, dtype: str, *, of_weights: bool) -> Symmetry:
    """Returns how 0 lies on a grid, where `symmetric` is None for the default.

    By default 0 is in the middle for signed weights and anywhere else for other integers. Floating-point codes have no
    zero point.
    """
    if dtype in FLOAT_DTYPES or dtype in RUN_TIME:
        return True
    if symmetric is not None:
        return symmetric
    return of_weights and not dtype.startswith("u")


def _settings(config: QuantizationConfig) -> Iterator[tuple[str, Any]]:
    yield "weights", config.weights
    yield "activations", config.activations
    yield "weights_symmetric", resolved_symmetry(config.weights_symmetric, config.weights, of_weights=True)
    yield "activations_symmetric", resolved_symmetry(config.activations_symmetric, config.activations, of_weights=False)
    yield "granularity", config.granularity.partition(":")[0]
    yield "power_of_two", config.power_of_two


def _settings_of_rule(rule: Rule) -> Iterator[tuple[str, Any]]:
    """Yields what a rule sets, under the names of a configuration; one for all kinds of tensors has to suit both."""
    roles = {"both": ("weights", "activations"), "weights": ("weights",)}.get(rule.of, ("activations",))
    for role in roles:
        if rule.dtype is not None:
            yield role, rule.dtype
        if rule.symmetric is not None:
            yield f"{role}_symmetric", rule.symmetric
    if rule.granularity is not None:
        yield "granularity", rule.granularity.partition(":")[0]
    if rule.power_of_two is not None:
        yield "power_of_two", rule.power_of_two


def _refusal(target: Target, key: str, given: Any, value: Any, allowed: tuple[Any, ...]) -> str:
    found = (
        f"{key}={given!r}"
        if given == value and type(given) is type(value)
        else f"{key}={given!r}, which is {_text(value)},"
    )
    default = dict(target.defaults).get(key, allowed[0])
    return (
        f"{found} is not what target {target.name!r} takes: {', '.join(map(_text, allowed))}; set "
        f"{key}={default!r}, or begin with QuantizationConfig.for_target({target.name!r}), with the target's settings"
    )


def _without_dynamic(target: Target) -> str:
    return (
        f"activations='dynamic': target {target.name!r} has no products that find grids at run time ("
        "dynamic_products); choose an integer type, activations='float', or the target 'ort-cpu'"
    )


def _text(value: Any) -> str:
    names = {"block": "block:N", "lpbq": "lpbq:N"}
    return names.get(value, value) if isinstance(value, str) else str(value)
