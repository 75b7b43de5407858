"""The tables in Markdown of what `gpu_programs.py` counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from described_gpu import BANDWIDTH

_GIGA, _MEGA = 1e9, 1e6


def tables(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the lines of two tables: the calls of each network and batch, and the programs of each call."""
    calls = [each for each in records if each["program"] == ""]
    floats = {(each["network"], each["batch"]): each for each in calls if each["call"] == "float"}
    yield "| network | batch | call | kernels | GB | of float's | of the least | temporary MB | ms at 4.8 TB/s |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|"
    for record in _ordered(calls):
        yield _row(records, record, floats.get((record["network"], record["batch"])))
    yield ""
    yield "| network | batch | call | program | kernels | GB | temporary MB |"
    yield "|---|---:|---|---|---:|---:|---:|"
    for record in _ordered([each for each in records if each["program"]]):
        yield (
            f"| {record['network']} | {record['batch']} | {record['call']} | `{record['program']}` | "
            f"{_counts(record)} |"
        )


def _ordered(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(records, key=lambda each: (each["network"], each["batch"]))


def _row(records: Sequence[Mapping[str, Any]], record: Mapping[str, Any], plain: Mapping[str, Any] | None) -> str:
    """Returns a call's row; what it does once for parameters and encodings is not in it, see the programs."""
    place = f"| {record['network']} | {record['batch']} | {record['call']} | "
    if record.get("error"):
        return f"{place}does not compile: {record['error'].splitlines()[0][:80]} |" + " |" * 5
    parts = _parts(records, record)
    moved, kernels = (sum(each[key] for each in parts) for key in ("num_bytes", "kernels"))
    of_float = f"{moved / sum(each['num_bytes'] for each in _parts(records, plain)):.3f}" if plain else ""
    of_least = f"{moved / plain['least']:.2f}" if plain and plain.get("least") else ""
    temporary = max((each["temporary"] for each in parts), default=0)
    return (
        f"{place}{kernels} | {moved / _GIGA:.3f} | {of_float} | {of_least} | {temporary / _MEGA:.0f} | "
        f"{moved / BANDWIDTH * 1e3:.2f} |"
    )


def _parts(records: Sequence[Mapping[str, Any]], call: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the programs of a call, but for those that run once for parameters and encodings."""
    same = [each for each in records if all(each[key] == call[key] for key in ("network", "batch", "call"))]
    return [each for each in same if "kernels" in each and each["program"] and not is_prepared(each["program"])]


def is_prepared(program: str) -> bool:
    """Tells whether a program is the first of two parts (`lowering/two_parts.py`); the solver has a `_prepared` too."""
    return program.endswith("_prepared") and program != "_prepared"


def _counts(record: Mapping[str, Any]) -> str:
    if record.get("error"):
        return f"does not compile: {record['error'].splitlines()[0][:80]} | |"
    loops = " and more: loops whose turns are not told count once" if record.get("open_loops") else ""
    return f"{record['kernels']}{loops} | {record['num_bytes'] / _GIGA:.3f} | {record['temporary'] / _MEGA:.0f}"
