"""What to do about values that no grid suits: unlike parts, values that mean "never", sums that saturate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptqjax.report.advice import MOST_NAMED, Recommendation, count_of
from ptqjax.report.options import quoted, rule_text


def unlike_parts(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends what to do about tensors whose parts one grid cannot hold: 16 bits, where they are not in float."""
    found = [record for record in report.get("records", ()) if record["transform"] == "give_up_grids"]
    return [
        Recommendation(
            reason="unlike parts",
            what=f"End the model before {first}, or keep it in float whatever the data." if done else f"Widen {first}.",
            where=tuple(where[:MOST_NAMED]),
            why=f"{reason}; {what}.",
            option=f"--exclude {quoted(first)}" if done else rule_text((first,), dtype="uint16"),
        )
        for done, (first, *_), where, reason, what in (
            [record[key] for key in ("done", "where", "where", "reason", "what")] for record in found[:MOST_NAMED]
        )
    ]


def never_values(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends to leave in float what has values that mean "never", where they count as data."""
    found = [each for each in report.get("never", ()) if each["counts"]]
    names = tuple(each["tensor"] for each in found[:MOST_NAMED])
    return [
        Recommendation(
            reason="never values",
            what=f"Leave {count_of(len(found), 'tensor', 'tensors')} of a mask in float.",
            where=names,
            why=f"{each['tensor']} {each['reason']}: they take the range of what is meant to count.",
            option=" ".join(f"--exclude {quoted(name)}" for name in names),
        )
        for each in found[:1]
    ]


def saturating_sums(report: Mapping[str, Any]) -> list[Recommendation]:
    """Recommends the target whose weights are chosen for kernels that add two products in 16 bits."""
    weights = report.get("saturating", ())
    if not weights:
        return []
    return [
        Recommendation(
            reason="saturating sums",
            what="Quantize for the target ort-cpu, or open sessions with the entry session.x64quantprecision=1.",
            where=tuple(weights[:MOST_NAMED]),
            why=f"on an x86 without VNNI, ONNX Runtime adds products two by two in 16 bits, and at "
            f"{count_of(len(weights), 'weight', 'weights')} of this file two may exceed them.",
            option="--target ort-cpu",
        )
    ]
