"""A draft is a quantized model in the making, and a `Result` is what it becomes: what the stages hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ptqjax.config import QuantizationConfig
from ptqjax.encodings.encoding import Encoding, Encodings
from ptqjax.errors import ConfigError
from ptqjax.fit.adapting import check_data
from ptqjax.fit.selection import Choice
from ptqjax.ir import Model, Report
from ptqjax.placement.tensors import check_not_quantized
from ptqjax.ranges.calibrate import Calibrated
from ptqjax.ranges.observing import Means

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model as one transform left it."""

    name: str
    """The transform, in the words of the table that is printed: "fold", "equalize", "correct"."""
    model: Model
    """The float model after it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A quantized model, and how it came about."""

    model: Model
    """The float model after all transforms: what `encodings` belong to."""
    encodings: Encodings
    """The grid of every quantized tensor."""
    reports: Mapping[str, Report]
    """What each transform did and left alone, by transform."""
    stages: tuple[Stage, ...]
    """The model after each transform, in order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Draft:
    """A quantized model in the making, as the last stage left it."""

    model: Model
    """The float model, as the last stage left it."""
    config: QuantizationConfig
    """The settings."""
    source: QuantizationConfig
    """The settings that scales, headroom and correction are chosen for: `config`, or those of a draft that shares."""
    label: str = ""
    """The words that messages about this draft begin with."""
    frozen: Mapping[str, Encoding] = field(default_factory=dict)
    """Encodings that are kept as they were given."""
    shared: Hashable = None
    """A key: drafts with equal keys have the same scaled model."""
    scaling: str | None = None
    """The value of `QuantizationConfig.scaling` that gives the same model again, where one was chosen and does."""
    absorbs: bool = True
    """Whether biases were absorbed as asked for; False: samples held back spoke against it."""
    headroom: float = 1.0
    """The factor by which ranges of activations are widened."""
    correct: str = "none"
    """How biases are corrected, one of `config.settings.CORRECTIONS`."""
    calibrated: tuple[QuantizationConfig, Calibrated] | None = None
    """A configuration and what calibrating under it gave, where the choice of scales did that on the way."""
    encodings: Encodings = field(default_factory=dict)
    """The grid of every quantized tensor, once the model is calibrated."""
    means: Means | None = None
    """Channel means of the float model's layers, where the pass that calibrated kept them."""
    reports: Mapping[str, Report] = field(default_factory=dict)
    """What each stage did and left alone, by stage; a stage that did not run has none."""
    stages: tuple[Stage, ...] = ()
    """The model after each stage that changed it."""

    def after(self, name: str, model: Model, report: Report, *, ran: bool = True) -> Draft:
        """Returns the draft with the model that a stage made; one that did not run leaves no trace."""
        if not ran:
            return replace(self, model=model)
        stages = (*self.stages, Stage(name=name, model=model))
        return replace(self, model=model, reports={**self.reports, name: report}, stages=stages)

    def chosen(self, choice: Choice, *, shared: Hashable) -> Draft:
        """Returns the draft with the headroom and the correction that were chosen."""
        return replace(
            self,
            headroom=choice.headroom,
            correct=choice.correct,
            scaling=choice.scaling,
            absorbs=choice.absorbs,
            calibrated=choice.calibrated,
            shared=shared,
        )

    def encoded(
        self, name: str, encodings: Encodings, report: Report | None = None, *, means: Means | None = None
    ) -> Draft:
        """Returns the draft with the encodings that a stage found."""
        reports = self.reports if report is None else {**self.reports, name: report}
        return replace(self, encodings=encodings, reports=reports, means=means)

    @property
    def known(self) -> Calibrated | None:
        """What calibrating this draft alone gives, where the choice of scales did it on the way."""
        if self.calibrated is None or self.frozen or self.calibrated[0] != self.config:
            return None
        return self.calibrated[1]

    @property
    def config_as_chosen(self) -> QuantizationConfig:
        """The settings that give the same scaled model without a search, where there are such."""
        scaling = self.config.scaling if self.scaling is None else self.scaling
        return replace(self.config, scaling=scaling, absorb=self.config.absorb if self.absorbs else "off")

    @property
    def result(self) -> Result:
        """The draft as a result."""
        return Result(model=self.model, encodings=self.encodings, reports=self.reports, stages=self.stages)


def drafted(
    model: Model,
    config: QuantizationConfig,
    *,
    source: QuantizationConfig | None = None,
    label: str = "",
    frozen: Mapping[str, Encoding] | None = None,
    has_data: bool,
) -> Draft:
    """Returns the draft that the first stage takes.

    Raises:
        ModelError: The model is quantized already.
        ConfigError: Encodings are frozen, and equalization is on; or roundings are to be solved for without data.
    """
    check_not_quantized(model)
    if frozen and config.equalize:
        raise ConfigError(
            f"{label}equalize=True: it scales the tensors that frozen encodings are for; choose equalize=False"
        )
    check_data(config, has_data=has_data, label=label)
    return Draft(model=model, config=config, source=source or config, label=label, frozen=frozen or {})


def alike(elements: Iterable[_T], key: Callable[[_T], Any]) -> dict[Any, list[int]]:
    """Returns the positions of the elements by what `key` says of them, in order of appearance."""
    found: dict[Any, list[int]] = {}
    for position, element in enumerate(elements):
        found.setdefault(key(element), []).append(position)
    return found
