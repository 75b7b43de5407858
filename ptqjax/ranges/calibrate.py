"""From a model and calibration data to encodings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptqjax.config import RUN_TIME, QuantizationConfig, load_target, near_names
from ptqjax.encodings.bias_resolution import resolve_biases
from ptqjax.encodings.biases import float_bias, guard_biases, sums_in_fixed_point
from ptqjax.encodings.encoding import Encoding, Encodings, dynamic_encoding
from ptqjax.encodings.taken import check_taken
from ptqjax.errors import ConfigError, DataError
from ptqjax.ir import Model, Report
from ptqjax.kernels.ranges import stack_kinds
from ptqjax.placement.place import ACTIVATION, Placement, Site, kind_of, place
from ptqjax.placement.sites import scheme_of
from ptqjax.placement.tables import as_shared
from ptqjax.placement.unlike import Joints, find_joints, give_up
from ptqjax.ranges.data_free import encode_from_statistics
from ptqjax.ranges.headroom import widened
from ptqjax.ranges.observers import Extremes, RangeScheme
from ptqjax.ranges.observing import Axes, Means, Observed, Seen, Wanted, Watched, observe
from ptqjax.ranges.schemes import MIN_MAX, find_scheme
from ptqjax.ranges.search import encode_constants
from ptqjax.ranges.site_encodings import (
    Ranged,
    as_aimet_has_it,
    cast_encoding,
    encoding_of_grid,
    encoding_of_range,
    fixed_encoding,
    is_float,
    needs_range,
)


def calibrate(
    model: Model,
    batches: Iterable[Any] | None,
    config: QuantizationConfig | None = None,
    *,
    frozen: Mapping[str, Encoding] | None = None,
) -> Encodings:
    """Returns the encodings of all tensors that `place` plans to round; see `calibrate_and_report`."""
    return calibrate_and_report(model, batches, config, frozen=frozen)[0]


def calibrate_and_report(
    model: Model,
    batches: Iterable[Any] | None,
    config: QuantizationConfig | None = None,
    *,
    frozen: Mapping[str, Encoding] | None = None,
) -> tuple[Encodings, Report]:
    """Returns the encodings, and a record for each weight whose scale was raised so that its bias fits into int32.

    Activations are those of the float model; without batches, they are as batch norms tell, see
    `data_free.encode_from_statistics`, and weights as with data. Batches are read once, one at a time, in any order and
    of any sizes (each new size is compiled anew); memory does not grow with their number. Extremes are those of all
    values; schemes that look at more count `observers.SAMPLES` values of each tensor and sample, always at the same
    places. With `config.compatibility`, batches count one by one and in their order. Ranges of
    activations are what was seen, times `config.headroom`; where that is None, wider where a tensor had few values, see
    `headroom.widened`.

    Args:
        model: The model; nothing in it changes.
        batches: An iterable of {input name: array}, first axis samples; None where there is no data.
        config: Types, granularity, scheme, headroom, target; None: the defaults.
        frozen: Encodings that are kept as they are, by tensor, and shared by the tensors that are tied to it. A tensor
            with an encoding of its own keeps that, whatever it is tied to.

    Raises:
        DataError: The batches do not fit the model, a tensor takes a value that is not finite, or an observer has no
            room for more samples (after half a million or more); the message names the tensor or input and the batch.
            Without batches: nothing is known of some activations; it names them.
        ConfigError: A pattern of `config.exclude` matches nothing, the target cannot be read, a frozen tensor is none
            that is rounded, or the target does not take its grid.
        ModelError: The model is quantized already, or a tensor to be rounded is not float32.
        UnsupportedOperatorError: A node has no lowering.
    """
    config = QuantizationConfig() if config is None else config
    return calibrate_each(model, batches, [config], frozen=frozen, labels=[""])[0]


def calibrate_each(
    model: Model,
    batches: Iterable[Any] | None,
    configs: Sequence[QuantizationConfig],
    *,
    frozen: Mapping[str, Encoding] | None = None,
    labels: Sequence[str] | None = None,
) -> tuple[tuple[Encodings, Report], ...]:
    """Returns what `calibrate_and_report` returns for each configuration, in order, from one pass over the data.

    One program observes what any of them needs, and each grid that several ask for is searched once: many
    configurations cost about as much as one.

    Args:
        model: The model; nothing in it changes.
        batches: As `calibrate_and_report` takes them.
        configs: The configurations.
        frozen: Encodings that all of them keep.
        labels: What a message about each of them begins with; None: "configuration 0: " and so on.

    Raises:
        PtqjaxError: As `calibrate_and_report` does; a ConfigError's message says which configuration it is about.
    """
    found = calibrate_and_measure(model, batches, configs, frozen=frozen, labels=labels)
    each = []
    for config, (encodings, report) in zip(configs, found.each, strict=True):
        wide = widened(model, encodings, config.headroom or 1.0, config, found.num_values)
        each.append((wide | {name: encodings[name] for name in frozen or {}}, report))
    return tuple(each)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What one pass over the data gave."""

    each: tuple[tuple[Encodings, Report], ...]
    """For each configuration the encodings, and a record for each weight whose scale was raised."""
    means: Means | None
    """Channel means of the tensors that were to be measured, batch by batch; None where they were not kept."""
    num_values: Mapping[str, int]
    """How many values each activation had in all batches, counted up to `observing.MANY`; none without data."""


def calibrate_and_measure(
    model: Model,
    batches: Iterable[Any] | None,
    configs: Sequence[QuantizationConfig],
    *,
    frozen: Mapping[str, Encoding] | None = None,
    labels: Sequence[str] | None = None,
    measured: Axes = (),
) -> Calibrated:
    """Returns what `calibrate_each` returns, of ranges as they were seen, and more from the same pass.

    Nothing is widened: that is for whoever chooses a headroom, see `headroom.widened`. `measured` are tensors whose
    channel means are kept, see `observe`. The other arguments and the errors are those of `calibrate_each`.
    """
    labels = [f"configuration {index}: " for index in range(len(configs))] if labels is None else labels
    tasks = []
    for config, label in zip(configs, labels, strict=True):
        try:
            tasks.append(_task(model, config, frozen or {}))
        except ConfigError as error:
            if not label:
                raise
            raise ConfigError(f"{label}{error}") from error
    return _calibrated(model, batches, tasks, measured) if tasks else Calibrated(each=(), means=None, num_values={})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What one configuration asks for."""

    config: QuantizationConfig
    """The configuration."""
    frozen: Mapping[str, Encoding]
    """Encodings that are kept."""
    placement: Placement
    """What is rounded."""
    constants: Mapping[str, _Search]
    """How the encodings of constant tensors are found."""
    given: Mapping[str, Encoding]
    """Encodings that follow from the plan: fixed ranges and casts."""
    observed: Mapping[str, _Search]
    """How those of activations are found, and of those that might have their own."""
    joints: Joints
    """Tensors whose parts may be unlike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """What decides about an encoding, besides the data: what is equal is searched once."""

    scheme: str
    """The scheme's name; that of extremes for floating-point formats, whatever the configuration."""
    compatibility: str | None
    """Whose formulas are followed."""
    site: Site
    """The tensor and its grid, without what only tells of them."""

    @property
    def kind(self) -> tuple[str, str | None, bool, bool]:
        """What searches have in common that one program makes."""
        return self.scheme, self.compatibility, is_float(self.site), bool(self.site.symmetric)


def _task(model: Model, config: QuantizationConfig, frozen: Mapping[str, Encoding]) -> _Task:
    placement = place(model, config)
    _check_frozen(frozen, placement.sites)
    check_taken(model, {**frozen}, load_target(config.target))
    has_no_joints = config.compatibility or config.activations in RUN_TIME
    joints = Joints() if has_no_joints else find_joints(model, placement, load_target(config.target))
    sites = (*placement.sites, *(site for site in joints.untied if site.tensor not in frozen))
    free = [site for site in sites if site.root not in frozen and site.tensor not in frozen]
    searched = [site for site in free if site.fixed_range is None and (site.kind != ACTIVATION or needs_range(site))]
    kinds = {site.tensor for site in searched}
    return _Task(
        config=config,
        frozen=frozen,
        placement=placement,
        constants={
            site.tensor: _search(site, config)
            for site in searched
            if site.kind != ACTIVATION and site.root == site.tensor
        },
        given={site.tensor: _given(site, config) for site in free if site.tensor not in kinds},
        observed={
            site.tensor: _search(site, config)
            for site in searched
            if site.kind == ACTIVATION and site.root == site.tensor
        },
        joints=joints,
    )


def _check_frozen(frozen: Mapping[str, Encoding], sites: Sequence[Site]) -> None:
    known = [site.tensor for site in sites]
    surplus = next((name for name in frozen if name not in known), None)
    if surplus is not None:
        raise ConfigError(
            f"frozen: '{surplus}' is none of the {len(known)} tensors that are rounded under this configuration"
            f"{near_names(surplus, known)}"
        )


def _given(site: Site, config: QuantizationConfig) -> Encoding:
    if site.is_dynamic:
        return dynamic_encoding(site.block_size)
    if site.fixed_range is not None:
        return fixed_encoding(site, compatibility=config.compatibility)
    return cast_encoding(site)


def _search(site: Site, config: QuantizationConfig) -> _Search:
    bare = replace(site, root="", reason="", ranges="")
    if is_float(site):
        return _Search(scheme=MIN_MAX.name, compatibility=None, site=bare)
    return _Search(scheme=scheme_of(site, config), compatibility=config.compatibility, site=bare)


def _calibrated(model: Model, batches: Iterable[Any] | None, tasks: Sequence[_Task], measured: Axes = ()) -> Calibrated:
    constants = _encode_constants(model, [search for task in tasks for search in task.constants.values()])
    means, num_values = None, {}
    if batches is None:
        observed = [_encoded_without_data(model, task) for task in tasks]
    else:
        searches = [search for task in tasks for search in task.observed.values()]
        found, seen = _encode_observed(model, batches, searches, measured)
        means, num_values = seen.means, seen.num_values
        observed = [{name: found[search] for name, search in task.observed.items()} for task in tasks]
    each = tuple(_result(model, task, constants, after) for task, after in zip(tasks, observed, strict=True))
    return Calibrated(each=each, means=means, num_values=num_values)


def _encoded_without_data(model: Model, task: _Task) -> dict[str, Ranged]:
    """Returns the encodings that batch norms tell; where they tell too little of parts, of roots alone."""
    roots = [site for site in task.placement.sites if site.tensor in task.observed and site.root == site.tensor]
    try:
        return encode_from_statistics(model, [*roots, *task.joints.untied])
    except DataError:
        return encode_from_statistics(model, roots)


def _result(
    model: Model, task: _Task, constants: Mapping[_Search, Encoding], observed: Mapping[str, Ranged]
) -> tuple[Encodings, Report]:
    own = {**task.frozen, **{name: constants[search] for name, search in task.constants.items()}}
    own |= {**task.given, **{name: ranged.encoding for name, ranged in observed.items()}}
    placement, given_up = _without_unlike_parts(model, task, own, observed)
    sites = placement.sites
    encodings = {
        site.tensor: own[site.tensor] if site.tensor in task.frozen else as_shared(own[site.root], site)
        for site in sites
    }
    encodings |= {name: float_bias() for name in placement.float_biases}
    resolved: Report = ()
    if task.config.compatibility is None:
        dead = [_with_root(name, sites) for name, ranged in observed.items() if ranged.is_nothing]
        encodings, resolved = resolve_biases(model, encodings, filter(None, dead), task.frozen)
    encodings, guarded = guard_biases(model, encodings, fixed_point=sums_in_fixed_point(task.config))
    return encodings, (*given_up, *resolved, *guarded)


def _without_unlike_parts(
    model: Model, task: _Task, own: Mapping[str, Encoding], observed: Mapping[str, Ranged]
) -> tuple[Placement, Report]:
    """Returns the plan in which tensors of unlike parts stay in float, and a record for each of them."""
    known = {name: encoding for name, encoding in own.items() if name not in observed or not observed[name].is_nothing}
    kept = tuple(joint for joint in task.joints.each if task.frozen.keys().isdisjoint(joint.members))
    reasons, report = give_up(replace(task.joints, each=kept), known, load_target(task.config.target))
    return place(model, task.config, apart=reasons) if reasons else task.placement, tuple(report)


def _with_root(root: str, sites: Sequence[Site]) -> tuple[str, ...]:
    return tuple(site.tensor for site in sites if site.root == root)


def _alike(searches: Iterable[_Search]) -> Iterator[tuple[RangeScheme, list[_Search]]]:
    """Yields the searches, each once, with those that one program makes together, and what chooses their ranges."""
    groups: dict[tuple[Any, ...], list[_Search]] = {}
    for search in dict.fromkeys(searches):
        groups.setdefault(search.kind, []).append(search)
    for alike in groups.values():
        yield find_scheme(alike[0].scheme, alike[0].compatibility), alike


def _encode_constants(model: Model, searches: Iterable[_Search]) -> dict[_Search, Encoding]:
    found: dict[_Search, Encoding] = {}
    for scheme, alike in _alike(searches):
        for part in _parts(alike):
            compatibility = part[0].compatibility
            sites = [search.site for search in part]
            encodings = encode_constants(sites, model.params, scheme, compatibility=compatibility)
            found |= {search: encodings[search.site.tensor] for search in part}
    return found


def _parts(alike: Sequence[_Search]) -> list[list[_Search]]:
    """Returns the searches in parts in which a tensor occurs once: the n-th search of a tensor is in the n-th part."""
    parts: list[list[_Search]] = []
    seen: Counter[str] = Counter()
    for search in alike:
        nth = seen[search.site.tensor]
        seen[search.site.tensor] += 1
        parts.extend([[]] if nth == len(parts) else [])
        parts[nth].append(search)
    return parts


def _encode_observed(
    model: Model, batches: Iterable[Any], searches: Sequence[_Search], measured: Axes
) -> tuple[dict[_Search, Ranged], Seen]:
    groups = list(_alike(searches))
    wanted = [
        Wanted(observer=scheme.observer, tensors=tuple(map(_watched, alike)), scheme=scheme.name)
        for scheme, alike in groups
    ]
    seen = observe(model, batches, wanted, measured=measured)
    found: dict[_Search, Ranged] = {}
    for scheme, alike in groups:
        found |= dict(zip(alike, _finished(scheme, seen.observed[scheme.observer], alike), strict=True))
    return found, seen


def _watched(search: _Search) -> Watched:
    return search.site.tensor, search.site.counted


def _finished(scheme: RangeScheme, observed: Observed, alike: Sequence[_Search]) -> list[Ranged]:
    ends = observed.extremes([_watched(search) for search in alike])
    encodings = _grids_of(scheme, observed, alike, ends)
    return [Ranged(*each) for each in zip(encodings, ends.lowest, ends.highest, strict=True)]


def _grids_of(scheme: RangeScheme, observed: Observed, alike: Sequence[_Search], ends: Extremes) -> list[Encoding]:
    sites = [search.site for search in alike]
    watched = [_watched(search) for search in alike]
    if is_float(sites[0]):
        return [encoding_of_range(*each) for each in zip(sites, ends.lowest, ends.highest, strict=True)]
    grids = zip(*scheme.finish(observed.of(watched), stack_kinds([kind_of(site) for site in sites])), strict=True)
    if alike[0].compatibility is not None:
        is_zero = (ends.lowest == 0) & (ends.highest == 0)
        sites = [as_aimet_has_it(s, scheme.name, is_all_zero=bool(z)) for s, z in zip(sites, is_zero, strict=True)]
    return [encoding_of_grid(site, *grid) for site, grid in zip(sites, grids, strict=True)]
