"""The ways to scale a model, and how much time each effort gives to choosing one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ptqjax.config import FLOAT_DTYPES, QuantizationConfig, load_target
from ptqjax.data.regroup import Batch, can_be_regrouped, first_samples, grouped, joined, of_few_shapes
from ptqjax.fit.behaviour import observe_behaviour, observe_shares_beyond
from ptqjax.fit.forking import Forked, forked
from ptqjax.fit.learned_scales import Learning, learn_scales
from ptqjax.ir import Model, Record, Report
from ptqjax.kernels.grid import integer_range
from ptqjax.placement.rules import num_bits
from ptqjax.transforms.behaviour import Behaviour, implied_behaviour
from ptqjax.transforms.centring import centre_channels
from ptqjax.transforms.equalize import unscaled
from ptqjax.transforms.noise import Steps, scale_for_noise
from ptqjax.transforms.scaling import scale_channels
from ptqjax.transforms.ties import find_ties

BATCH = 8
"""Samples that a backward pass holds."""
BEHAVIOUR_SHAPES = 2
"""Shapes of batches that cannot be regrouped (text of unlike lengths) that behaviour is measured on. Each is compiled
for, four times as long as for one that runs the model; what it predicts is off by 1 to 3 dB."""

TRIAL_SHAPES = 4
"""Shapes of batches that cannot be regrouped that ways are tried on; each is compiled for."""
PREDICTED = "predicted SQNR, dB"
"""The figure that `scale_for_noise` records."""
_CLEARLY = 0.25  # dB that factors which cost a product of their own must be predicted to gain
# How far a channel may reach above the median one: chosen on calibration pictures alone (MobileNetV1-0.25: 15.7 dB from
# statistics at 2, 17.8 from data at 1.5; MobileNetV2: 17.4 both).
_LIMIT = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What an effort buys."""

    trial_samples: int
    """Samples that ways are tried on, half of them held back; 0: nothing is tried."""
    behaviour_samples: int
    """Samples that channels' behaviour is measured on, at most: in trials, half of theirs."""
    tries_all: bool
    """Whether also what is not predicted to win is tried."""
    learning_steps: int
    """Steps of learning, where a weight has one scale for all channels; 0: nothing is learned."""
    rounding_samples: int
    """Samples that roundings of weights are solved on, half of them held back."""
    rounding_steps: int
    """Steps of learning the roundings of a block, where they are learned."""


POLICIES = {
    "fast": Policy(
        trial_samples=0,
        behaviour_samples=16,
        tries_all=False,
        learning_steps=0,
        rounding_samples=32,
        rounding_steps=50,
    ),
    "balanced": Policy(
        trial_samples=64,
        behaviour_samples=64,
        tries_all=False,
        learning_steps=0,
        rounding_samples=128,
        rounding_steps=100,
    ),
    "thorough": Policy(
        trial_samples=128,
        behaviour_samples=128,
        tries_all=True,
        learning_steps=100,
        rounding_samples=256,
        rounding_steps=300,
    ),
}
"""What each effort buys, by its name in `QuantizationConfig.effort`."""


def steps_of(config: QuantizationConfig) -> Steps:
    """Returns how fine the grids of `config` are."""
    return Steps(
        weights=_steps_of_type(config.weights) // 2,
        activations=_steps_of_type(config.activation_steps),
        per_channel=config.granularity != "tensor",
    )


def _steps_of_type(dtype: str) -> int:
    """Returns how many steps a grid of `dtype` has from end to end; floating-point codes count as integers as wide."""
    low, high = integer_range(f"int{num_bits(dtype)}" if dtype in FLOAT_DTYPES else dtype)
    return high - low


def bounds_of(config: QuantizationConfig) -> str:
    """Returns what becomes of bounds: "exact" needs a target that takes them per channel."""
    if config.bounds in {"exact", "auto"}:
        return "exact" if load_target(config.target).bounds_per_channel else "auto"
    return config.bounds


class Ways:
    """The ways to scale a model; what they need to know of the data is measured once, when one first asks."""

    def __init__(self, model: Model, batches: Iterable[Mapping[str, Any]]) -> None:
        self.model = model
        self.batches = batches
        self._behaviour: dict[tuple[Any, ...], dict[str, Behaviour]] = {}
        self._left_out: dict[int, int] = {}
        self._beyond: dict[str, float] | None = None
        self._halves: dict[int, Ways] = {}

    def on_half(self, num_samples: int) -> Ways:
        """Returns the ways on the half of the first samples that trials of so many find scales on."""
        if num_samples not in self._halves:
            self._halves[num_samples] = Ways(self.model, divided(self.model, self.batches, num_samples).used)
        return self._halves[num_samples]

    def scaled(self, name: str, config: QuantizationConfig) -> tuple[Model, Report]:
        """Returns the model scaled in one of the ways, and what that did."""
        if name == "off":
            return self.model, unscaled(self.model, "left as they are")
        bounds = bounds_of(config)
        how = {"bounds": bounds, "beyond": self._shares_beyond() if bounds == "auto" else None}
        if name == "weights":
            return scale_channels(self.model, limit=None, **how)
        num_samples = POLICIES[config.effort].behaviour_samples
        if name == "ranges":
            behaviour = self.behaviour(config.seed, num_samples)
            reach = {tensor: np.maximum(abs(found.low), abs(found.high)) for tensor, found in behaviour.items()}
            return scale_channels(self.model, limit=_LIMIT, magnitudes=reach, **how)
        scaled, report = self.of_least_noise(config, num_samples, **how)
        if name == "noise":
            return scaled, report
        learned, more = learn_scales(scaled, self.batches, config, Learning(seed=config.seed), bounds=bounds)
        return learned, (*report, *more)

    def of_least_noise(
        self, config: QuantizationConfig, num_samples: int, *, is_implied: bool = False, **how: Any
    ) -> tuple[Model, Report]:
        """Returns the model with scales of least predicted noise, and what that did.

        Layers may read tensors through factors of their own (`forked`); where a factor costs a product, only if these
        are predicted to gain clearly.

        Args:
            config: The settings.
            num_samples: Samples that behaviour is measured on.
            is_implied: Whether batch norms tell instead.
            how: What `scale_for_noise` takes of bounds.

        Raises:
            ConfigError: See `scale_for_noise`.
        """
        found = self._scaled_for_noise(forked(self.model, config), config, num_samples, is_implied=is_implied, **how)
        cheap = forked(self.model, config, at_any_cost=False)
        if len(cheap.forks) < len(found[2].forks):
            other = self._scaled_for_noise(cheap, config, num_samples, is_implied=is_implied, **how)
            found = found if _predicted(found[1]) > _predicted(other[1]) + _CLEARLY else other
        scaled, report, ready = found
        return scaled, (*_fork_records(ready), *report)

    def _scaled_for_noise(
        self, ready: Forked, config: QuantizationConfig, num_samples: int, *, is_implied: bool, **how: Any
    ) -> tuple[Model, Report, Forked]:
        measured = None if is_implied else self.behaviour(config.seed, num_samples, ready.model)
        behaviour = implied_behaviour(ready.model) if measured is None else measured
        model, behaviour, centred = centre_channels(ready.model, find_ties(ready.model), behaviour)
        scaled, report = scale_for_noise(model, behaviour, steps=steps_of(config), rounded=ready.rounded, **how)
        return scaled, (*centred, *report), ready

    def behaviour(self, seed: int, num_samples: int, model: Model | None = None) -> dict[str, Behaviour]:
        """Returns how channels behave on the first samples, a few at a time: a backward pass holds much.

        Of batches of unlike shapes, those of the two shapes that hold most of the first samples.

        Args:
            seed: Of the signs that are sent back.
            num_samples: How many samples.
            model: The model, or the same with forks; None: the model.
        """
        model = self.model if model is None else model
        key = seed, num_samples, model.graph
        if key not in self._behaviour:
            found = first_samples(self.model.graph, self.batches, num_samples)
            if can_be_regrouped(self.model.graph, found):
                samples = joined(found)
                count = min(len(next(iter(samples.values()))), num_samples)
                found = grouped(samples, np.arange(count), min(BATCH, count))
            else:
                few = of_few_shapes(found, BEHAVIOUR_SHAPES)
                self._left_out[num_samples], found = len(found) - len(few), few
            self._behaviour[key] = observe_behaviour(model, found, seed=seed)
        return self._behaviour[key]

    def left_out(self, num_samples: int) -> int:
        """Returns how many of the batches of the first samples `behaviour` did not look at, for their shapes."""
        return self._left_out.get(num_samples, 0)

    def _shares_beyond(self) -> dict[str, float]:
        if self._beyond is None:
            self._beyond = observe_shares_beyond(self.model, self.batches)
        return self._beyond


class Divided(NamedTuple):
    """Samples in two parts."""

    used: list[Batch]
    """The samples to work with."""
    held: list[Batch]
    """The samples held back."""
    left_out: int
    """How many batches are in neither."""


def divided(model: Model, batches: Iterable[Mapping[str, Any]], num_samples: int) -> Divided:
    """Returns two halves of the first `num_samples` samples; a single sample is in both.

    In batches as large as those given where there are enough samples, since programs are compiled for a size. Of
    batches of unlike shapes, which stay whole, those of the four shapes that hold most of these samples.
    """
    found = first_samples(model.graph, batches, num_samples)
    if not can_be_regrouped(model.graph, found):
        few = of_few_shapes(found, TRIAL_SHAPES)
        return Divided(few[::2], few[1::2] or few, len(found) - len(few))
    samples = joined(found)
    count = min(len(next(iter(samples.values()))), num_samples)
    if count == 1:
        return Divided(found, found, 0)
    size = min(max(len(next(iter(batch.values()))) for batch in found), count // 2)
    used, held = (grouped(samples, np.arange(start, count, 2), size) for start in range(2))
    return Divided(used, held, 0)


def _predicted(report: Report) -> float:
    """Returns the predicted signal-to-noise ratio after scaling, in dB; nan where nothing is predicted."""
    return next((record.after[PREDICTED] for record in report if PREDICTED in record.after), float("nan"))


def _fork_records(ready: Forked) -> Report:
    return tuple(
        Record(
            transform="scale_channels",
            done=True,
            what="layers read it through a factor per channel",
            where=(fork.tensor, fork.result, *(layer.weight for layer in fork.layers)),
            reason="what makes it takes no scales"
            if fork.merged is not None or ready.model.graph.num_readers(fork.tensor) <= 1
            else "others read it, unrounded then",
        )
        for fork in ready.forks
    )


def without(left_out: int, num_shapes: int) -> str:
    """Returns what is said of batches that were left out; "" where none was."""
    return f", without {left_out} batches of other shapes than the {num_shapes} that hold most" if left_out else ""
