"""What to do next, in words that follow from the facts of a report: a pure function for each reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ptqjax.fit.trials import JUDGED
from ptqjax.report.advice import MOST_NAMED, Recommendation, count_of
from ptqjax.report.grid_advice import never_values, saturating_sums, unlike_parts
from ptqjax.report.options import exact_option, quoted, rule_text, wider_type
from ptqjax.report.plots import spread

_GOOD_DB, _GOOD_AGREEMENT = 30.0, 0.99  # from which on nothing more is asked of the quantized model
_LEAST_GAIN_DB = 0.5  # that one tensor alone must promise
_TIMES_ITS_PART = 2.0  # of the noise, if all groups caused as much: the least that one tensor is named for
_LEAST_GAIN_OF_KIND_DB = 1.0
_LEAST_SPREAD = 16.0  # of a weight's channels under one grid: four bits less for the narrowest
_MUCH_CLIPPED = 0.5  # of what a tensor's rounding adds
_NEAR_DB = 6.0  # of the accumulated noise: a tensor that adds less is none of the causes
_FEW_SAMPLES = 32
_SAME_FUNCTION_DB = 60.0  # float32 leaves a hundred
_LOST_DB = 0.5
_WEAKER_DB = 10.0  # than the best output
_WIDE = 8  # bits, from which on a weight is not widened but left out
_GAINED = ("sqnr_db", "agreement", "top1", "token_accuracy", "perplexity")  # that stages are compared by


def recommendations(report: Mapping[str, Any]) -> tuple[Recommendation, ...]:
    """Returns what the facts recommend, the reasons that undo most first; empty where nothing stands out.

    As long as the quantized model agrees with the float one on 99 % of the samples, or reaches 30 dB, nothing is said
    against noise, only against what was not done or not measured.
    """
    return tuple(found for reason in REASONS for found in reason(report))


def as_facts(found: Sequence[Recommendation]) -> list[dict[str, Any]]:
    """Returns the recommendations as plain data."""
    return [asdict(each) | {"where": list(each.where)} for each in found]


def stage_gains(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns what each stage gained over the one before it, of those that were measured quantized.

    A row is {"stage", "over", and for each metric of both the difference}: dB (of the worst output, where there are
    several), and fractions for agreement, top-1 and tokens.
    """
    measured = [stage for stage in stages if stage["stage"] != "float" and "sqnr_db" in stage["metrics"]]
    rows = []
    for before, after in itertools.pairwise(measured):
        old, new = (stage["metrics"] | {"sqnr_db": worst_db(stage["metrics"])} for stage in (before, after))
        names = [name for name in _GAINED if name in old and name in new]
        gains = {name: _difference(new[name], old[name]) for name in names}
        rows.append({"stage": after["stage"], "over": before["stage"], **gains})
    return rows


def shares(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns by group the fraction of all noise in the output that it causes, the largest first."""
    groups = (report.get("sensitivity") or {}).get("groups", [])
    total = sum(group["noise"] for group in groups)
    order = sorted(groups, key=lambda group: -group["noise"])
    return {group["name"]: group["noise"] / total for group in order} if total > 0 else {}


def without_samples(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends samples where there are none, or few."""
    count = report["source"].get("num_samples")
    if count is None or count >= _FEW_SAMPLES:
        return []
    how = "--calibration DATA.npz"
    if count == 0:
        why = "there were no samples: ranges and corrections are what batch norms tell, and nothing was measured."
        return [Recommendation(reason="no samples", what="Calibrate on samples of your data.", why=why, option=how)]
    why = f"{count} samples were given: values that they do not reach are clipped. A hundred need no labels."
    return [Recommendation(reason="few samples", what="Calibrate on more samples.", why=why, option=how)]


def changed_function(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends the exact way where a transform has changed the function in float."""
    for stage in report["stages"]:
        kept = stage["metrics"].get("float_sqnr_db", math.inf)
        if kept < _SAME_FUNCTION_DB:
            return [
                Recommendation(
                    reason="changed function",
                    what=f"Have {stage['stage']} keep the function.",
                    why=f"computed in float, the model after {stage['stage']} is {kept:.1f} dB from the one that was "
                    "read (an exact transform leaves a hundred); quantized, it cannot be nearer.",
                    option=exact_option(report["settings"]),
                )
            ]
    return []


def losing_stages(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends to leave out a stage after which less is left than before.

    Not one that was kept because it was better on samples held back: on samples that grids were found on, what fits
    these best looks best.
    """
    options = {"equalize": "--no-equalize", "correct": "--correct none"}
    kept = {
        record["what"] for record in report.get("records", ()) if record["transform"] == "choose" and record["done"]
    }
    options = {stage: option for stage, option in options.items() if f"{JUDGED}{stage}" not in kept}
    if report["settings"].get("correct") == "none":  # weights alone were corrected, for the target's kernels
        options.pop("correct", None)
    return [
        Recommendation(
            reason="losing stage",
            what=f"Leave out {gain['stage']}.",
            why=f"after it the quantized model has {-gain['sqnr_db']:.1f} dB less than after {gain['over']}, on the "
            "calibration samples.",
            option=options[gain["stage"]],
            gain_db=-gain["sqnr_db"],
        )
        for gain in stage_gains(report["stages"])
        if gain["stage"] in options and gain["sqnr_db"] < -_LOST_DB
    ]


def weak_output(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends to look after the output that is worth much less than the best one."""
    outputs = report["stages"][-1].get("outputs", {}) if report["stages"] else {}
    order = sorted(outputs, key=lambda name: outputs[name])
    if not order or outputs[order[0]] >= _GOOD_DB or outputs[order[-1]] < outputs[order[0]] + _WEAKER_DB:
        return []
    worst, best = order[0], order[-1]
    return [
        Recommendation(
            reason="weak output",
            what=f"Leave in float what makes {worst}.",
            where=(worst,),
            why=f"of {len(order)} outputs or parts it is the worst: {outputs[worst]:.1f} dB, where {best} has "
            f"{outputs[best]:.1f}.",
            option=f"--exclude {quoted(worst.rpartition(': ')[2])}",
        )
    ]


def one_grid_for_all_channels(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends a grid per channel where one serves channels that differ by orders of magnitude."""
    if _is_good(report):
        return []
    ranges = {
        name: spread(pair["after"])
        for name, pair in report["weight_ranges"].items()
        if name in report["encodings"] and report["encodings"][name]["axis"] is None
    }
    wide = sorted((name for name in ranges if ranges[name] >= _LEAST_SPREAD), key=lambda name: -ranges[name])
    if not wide:
        return []
    worst, bits = wide[0], report["encodings"][wide[0]]["num_bits"]
    left = max(bits - math.log2(ranges[worst]), 0)
    return [
        Recommendation(
            reason="one grid for all channels",
            what="Give each channel of the weights a grid of its own.",
            where=tuple(wide[:MOST_NAMED]),
            why=f"{count_of(len(wide), 'weight has', 'weights have')} one grid for channels that differ by a factor of "
            f"{_LEAST_SPREAD:.0f} or more; in {worst} by {ranges[worst]:.3g}: of its {bits} bits the narrowest channel "
            f"uses {left:.1f}.",
            option="--granularity channel",
        )
    ]


def dominant_groups(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends to widen weights of few bits, and to exclude other tensors, that cause much of the noise each."""
    if _is_good(report):
        return []
    parts = shares(report)
    least = min(_TIMES_ITS_PART / max(len(parts), 1), 0.5)
    groups = {group["name"]: group for group in (report.get("sensitivity") or {}).get("groups", [])}
    found: dict[bool, list[Mapping[str, Any]]] = {True: [], False: []}
    for name in [name for name, share in parts.items() if share >= least and _gain(share) >= _LEAST_GAIN_DB]:
        widens = groups[name]["kind"] == "weight" and _bits(report, groups[name]["tensors"]) < _WIDE
        found[widens].append(groups[name])
    return [_about_groups(named[:MOST_NAMED], report, widens=widens) for widens, named in found.items() if named]


def noisy_kind(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends the next wider type for all weights, or all activations, whichever cause more of the noise."""
    groups = (report.get("sensitivity") or {}).get("groups", [])
    total = sum(group["noise"] for group in groups)
    if _is_good(report) or total <= 0:
        return []
    noise = {kind: sum(g["noise"] for g in groups if g["kind"] == kind) for kind in ("weight", "activation")}
    kind = max(noise, key=lambda each: noise[each])
    setting = f"{kind}s"
    wider = wider_type(report["settings"][setting])
    if wider is None:
        return []
    dtype, left = wider
    share = noise[kind] / total
    gain = _gain(share * (1 - left))
    if gain < _LEAST_GAIN_OF_KIND_DB:
        return []
    return [
        Recommendation(
            reason="noisy kind",
            what=f"Widen the {setting} to {dtype}, or the ones above alone.",
            why=f"{setting} in {report['settings'][setting]} cause {100 * share:.0f} % of the noise in the output. "
            "ptqjax.mixed_precision divides a budget of bits among them.",
            option=f"--{setting} {dtype}",
            gain_db=gain,
        )
    ]


def clipping(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends the whole range where most of what a tensor's rounding adds is from values outside its grid."""
    if _is_good(report):
        return []
    on_purpose = {each["tensor"] for each in report.get("never", ())}  # what means never lies outside
    clipped = [
        tensor
        for tensor in report.get("tensors", [])
        if tensor["name"] not in on_purpose
        and tensor["clip_share"] > _MUCH_CLIPPED
        and (tensor["kind"] == "weight" or tensor["own_sqnr_db"] < tensor["sqnr_db"] + _NEAR_DB)
        and report["settings"]["ranges"] != "min-max"
    ]
    if not clipped:
        return []
    clipped.sort(key=lambda tensor: tensor["own_sqnr_db"])
    first, names = clipped[0], tuple(tensor["name"] for tensor in clipped[:MOST_NAMED])
    return [
        Recommendation(
            reason="clipping",
            what=f"Let the {count_of(len(clipped), 'range', 'ranges')} reach as far as the values do.",
            where=names,
            why=f"{first['name']} has {100 * first['clipped']:.3g} % of its values outside its grid, and "
            f"{100 * first['clip_share']:.0f} % of the noise that its rounding adds ({first['own_sqnr_db']:.1f} dB) is "
            "from these.",
            option=rule_text(names, ranges="min-max"),
        )
    ]


def other_arithmetic(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends to judge the file in the runtime where that computes something else than what is simulated."""
    runtime = report.get("runtime") or {}
    if not runtime.get("compared"):
        return []
    is_simulated = runtime.get("by") != "definition"
    agreement = runtime["integer"]["agreement"] if has_classes(report) and is_simulated else 1.0
    worst = runtime["groups"][:MOST_NAMED]
    if agreement >= _GOOD_AGREEMENT and not runtime["unverified"]:
        return []
    same = f"the integer program and ONNX Runtime take the same class on {100 * agreement:.1f} % of the samples"
    reasons = [same] if is_simulated else []
    if runtime["unverified"]:
        count = count_of(len(runtime["unverified"]), "tensor is", "tensors are")
        reasons.append(f"{count} computed otherwise than foreseen")
    return [
        Recommendation(
            reason="other arithmetic",
            what="Judge the file in ONNX Runtime; the simulation does not speak for it.",
            where=tuple(runtime["unverified"][:MOST_NAMED]) or tuple(group["tensor"] for group in worst),
            why=f"{'; '.join(reasons)}.",
            option="ptqjax evaluate model.onnx --data TEST.npz --reference FLOAT.onnx",
        )
    ]


REASONS: tuple[Callable[[Mapping[str, Any]], list[Recommendation]], ...] = (
    without_samples,
    changed_function,
    losing_stages,
    unlike_parts,
    weak_output,
    never_values,
    saturating_sums,
    one_grid_for_all_channels,
    dominant_groups,
    noisy_kind,
    clipping,
    other_arithmetic,
)
"""The reasons in the order in which they are told: facts -> recommendations."""


def _is_good(report: Mapping[str, Any]) -> bool:
    """Tells whether the quantized model is near enough to the float one, or not known not to be."""
    last = report["stages"][-1]["metrics"] if report["stages"] else {}
    if "sqnr_db" not in last:
        return True
    agrees = has_classes(report) and last.get("agreement", 0.0) >= _GOOD_AGREEMENT and "worst_sqnr_db" not in last
    return agrees or worst_db(last) >= _GOOD_DB


def worst_db(metrics: Mapping[str, float]) -> float:
    """Returns the SQNR of the output that has least, in dB: of the only one, where there are not several."""
    return metrics.get("worst_sqnr_db", metrics["sqnr_db"])


def has_classes(report: Mapping[str, Any]) -> bool:
    """Tells whether agreement says anything: where it was measured, and not of one element to a sample."""
    outputs = report["model"]["outputs"]
    shape = outputs[0]["shape"] if outputs else None
    is_measured = any("agreement" in stage["metrics"] for stage in report["stages"])
    return is_measured and (shape is None or any(size != 1 for size in shape[1:]))


def _about_groups(groups: Sequence[Mapping[str, Any]], report: Mapping[str, Any], *, widens: bool) -> Recommendation:
    parts, first = shares(report), groups[0]
    saved = [1 - _left(report, group) if widens else 1.0 for group in groups]
    tensors = tuple(name for group in groups for name in group["tensors"])
    others = f" and {count_of(len(groups) - 1, 'other', 'others')}" if len(groups) > 1 else ""
    told = ", ".join(f"{group['name']} {100 * parts[group['name']]:.0f} %" for group in groups)
    return Recommendation(
        reason="dominant groups",
        what=f"Widen {first['name']}{others} to int8." if widens else f"Exclude {first['name']}{others}.",
        where=tensors,
        why=f"of {len(parts)} groups that make noise in the output, these make more than their part: {told}. Rounded "
        f"alone, {first['name']} leaves {_decibels(first['noise'])} dB.",
        option=rule_text(tensors, dtype="int8")
        if widens
        else " ".join(f"--exclude {quoted(name)}" for name in tensors),
        gain_db=_gain(sum(parts[group["name"]] * part for group, part in zip(groups, saved, strict=True))),
    )


def _gain(share: float) -> float:
    """Returns what it gains in dB to be rid of a share of the noise; of all of it, 30."""
    return -10 * math.log10(max(1 - share, 1e-3))


def _left(report: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    """Returns the part of a group's noise that is left in 8 bits: a quarter for each bit more."""
    return 4.0 ** (_bits(report, group["tensors"]) - _WIDE)


def _bits(report: Mapping[str, Any], tensors: Sequence[str]) -> int:
    known = [report["encodings"][name]["num_bits"] for name in tensors if name in report["encodings"]]
    return min(known, default=_WIDE)


def _difference(after: float, before: float) -> float:
    return 0.0 if after == before else float(after - before)  # both may be infinite


def _decibels(noise: float) -> str:
    return f"{-10 * math.log10(noise):.1f}" if noise > 0 else "any number of"
