"""What commands say on a terminal: tables, as wide as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ptqjax.agreement import Distance, Group, Validation
from ptqjax.config import QuantizationConfig
from ptqjax.evaluation import Evaluation
from ptqjax.ir import Record
from ptqjax.placement.place import Placement
from ptqjax.report.grids import HEADINGS, grid_rows, summary, target_line
from ptqjax.report.inspection import Inspection, Unknown
from ptqjax.report.texts import by_transform, figure_texts, metric_heading, metric_headings, metric_text, output_rows
from ptqjax.transforms.saturation import Saturation

_NODES = 5  # named of each operator without a lowering
_WIDTH = 120  # characters of a line where no terminal says otherwise


def print_stages(stages: Sequence[Mapping[str, Any]], by: str, on: str) -> None:
    """Prints the table of a run: what each stage kept, computed by what on which samples; nothing without any."""
    if not stages:
        return
    headings = metric_headings(stages)
    rows = [[stage["stage"], *(metric_text(name, stage["metrics"].get(name)) for name in headings)] for stage in stages]
    _table(f"After each stage: in {by}, on {on}", ["", *headings.values()], rows, numbers_from=1)
    if outputs := output_rows(stages):
        _table("Output by output, after the last stage", ["", "SQNR, dB", ""], outputs)


def print_validation(path: Path, found: Validation) -> None:
    """Prints the distance of each tensor in steps, per operator and of the whole programs; warnings go to stderr."""
    if found.run_time:
        _print_run_time(path, found)
        return
    headings = ["kernel", "alone, steps", "equal, %", "end to end, steps", "equal, %"]
    rows = [
        [group.tensor, group.operator, _kernel(group), *_distances(group.alone, group.end_to_end)]
        for group in found.groups
    ]
    title = f"{path}: {found.num_samples} samples; each tensor from ONNX Runtime's own integers, and from the inputs"
    _table(title, ["tensor", "operator", *headings], rows, numbers_from=3)
    rows = [
        [each.operator, f"{each.num_integer} of {each.num_groups}", *_distances(each.alone, each.end_to_end)]
        for each in found.operators
    ]
    _table("By operator", ["operator", "in integers", *headings[1:]], rows, numbers_from=1)
    rows = [
        [name, f"{likeness.sqnr:.1f}", f"{100 * likeness.agreement:.2f}", f"{100 * likeness.equal:.2f}"]
        for name, likeness in (("integer program", found.integer), ("float program", found.float))
        if likeness is not None
    ]
    _table("Outputs, end to end", ["", "SQNR, dB", "agreement, %", "equal, %"], rows, numbers_from=1)
    _print_saturating(found.saturating)
    for warning in found.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(f"largest difference in a group: {found.largest} steps; equal in at least {_percent(found.equal)} %")
    farthest = found.farthest
    where = "" if farthest.end_to_end.equal == 1 else f", at '{farthest.tensor}'"
    click.echo(f"end to end: equal in at least {_percent(farthest.end_to_end.equal)} %{where}")


def _print_run_time(path: Path, found: Validation) -> None:
    """Prints how far tensors are whose grids no file holds: relative to the largest magnitude of each."""
    rows = [[group.tensor, group.operator, f"{group.alone:.1e}"] for group in found.run_time]
    title = f"{path}: {found.num_samples} samples; each tensor from ONNX Runtime's own ones before it"
    _table(title, ["tensor", "operator", "largest difference"], rows, numbers_from=2)
    likeness = found.integer
    row = ["simulation", f"{likeness.sqnr:.1f}", f"{100 * likeness.agreement:.2f}"]
    _table("Outputs, end to end", ["", "SQNR, dB", "agreement, %"], [row], numbers_from=1)
    for warning in found.warnings:
        click.echo(f"Warning: {warning}", err=True)
    for line in level_lines(found.accuracy_levels):
        click.echo(line)
    click.echo(f"largest difference of a tensor: {max(group.alone for group in found.run_time):.1e} of its magnitude")


def level_lines(levels: Sequence[int]) -> list[str]:
    """Returns a line for each accuracy level at which ONNX Runtime multiplies by weights of few bits."""
    meaning = {4: "activations rounded to int8 in blocks", 1: "activations in float"}
    return [f"MatMulNBits ran at accuracy level {each}: {meaning.get(each, 'as it chooses')}" for each in levels]


def _print_saturating(weights: Sequence[Saturation]) -> None:
    if not weights:
        return
    rows = [
        [each.weight, each.operator, f"{each.num_saturating:,} of {each.num_pairs:,}", f"{100 * each.fraction:.3g}"]
        for each in weights
    ]
    headings = ["weight", "operator", "pairs of products beyond 16 bits", "%"]
    _table("What may saturate on an x86 without VNNI", headings, rows, numbers_from=2)


def _kernel(group: Group) -> str:
    if group.integer:
        return "integer"
    return "float" if group.is_verified else "unseen"


def _distances(*distances: Distance) -> list[str]:
    return [text for each in distances for text in (f"{each.largest}", _percent(each.equal))]


def _percent(fraction: float) -> str:
    """Returns a fraction in percent; 100.000 stands for all, without exception."""
    return "100.000" if fraction == 1 else f"{min(100 * fraction, 99.999):.3f}"


def print_evaluation(
    path: Path, found: Evaluation, reference: Evaluation | None, exact: Evaluation | None = None
) -> None:
    """Prints what a file is worth in the session that users open; beside it in exact sums, where that may differ.

    The reference's accuracy is shown where it is known.
    """
    every = [_evaluation_rows(each, reference) for each in (found, exact) if each is not None]
    rows = [[row[0], *(other[1] for other in same)] for row, *same in zip(every[0], *every, strict=True)]
    headings = ["", ""] if exact is None else ["", "plain session", "exact sums"]
    _table(f"{path} in ONNX Runtime", headings, rows, numbers_from=1)


def _evaluation_rows(found: Evaluation, reference: Evaluation | None) -> list[list[str]]:
    figures = {
        "top-1 of the reference, %": None if reference is None else reference.top1,
        "top-1, %": found.top1,
        "agreement with the reference, %": found.agreement,
    }
    rows = [["samples", str(found.num_samples)]]
    rows += [[name, f"{100 * value:.2f}"] for name, value in figures.items() if value is not None]
    for name, value in found.figures.items():
        if reference is not None and name in reference.figures:
            rows += [[f"{metric_heading(name)}, of the reference", metric_text(name, reference.figures[name])]]
        rows += [[metric_heading(name), metric_text(name, value)]]
    if found.worst is not None:
        rows += [[f"SQNR of '{name}', dB", f"{value:.2f}"] for name, value in found.outputs.items()]
        rows += [[f"the worst output: '{found.worst[0]}'; SQNR, dB", f"{found.worst[1]:.2f}"]]
    elif found.sqnr is not None:
        rows += [["SQNR, dB", f"{found.sqnr:.2f}"]]
    return rows


def print_inspection(path: Path, found: Inspection) -> None:
    """Prints what is in a model; then what can be done to it, or why nothing can."""
    _print_contents(path, found)
    if found.placement is None:
        click.echo(f"It cannot be quantized: {found.obstacle}")
        return
    _print_transforms(found.records)
    click.echo(f"{target_line(found.config)}\n")
    _print_placement(found.placement, found.config)


def _print_contents(path: Path, found: Inspection) -> None:
    contents = found.contents
    tensors = [(kind, spec) for kind in ("input", "output") for spec in contents[f"{kind}s"]]
    rows = [[kind, spec["name"], spec["dtype"], _shape(spec["shape"])] for kind, spec in tensors]
    _table(f"{path.name}: opset {contents['opset']}, {contents['num_parameters']:,} parameters", ["", "", "", ""], rows)
    unknown = {entry.operator for entry in found.without_lowering}
    rows = [
        [name, str(count), "no lowering" if name in unknown else ""] for name, count in contents["operators"].items()
    ]
    _table("Operators", ["operator", "number", ""], rows)
    _print_unknown(found.without_lowering)


def _print_unknown(unknown: Sequence[Unknown]) -> None:
    if not unknown:
        return
    rows = [
        [entry.domain or "ai.onnx", entry.nodes[0].op_type, str(entry.opset), str(len(entry.nodes)), _nodes(entry)]
        for entry in unknown
    ]
    _table("Operators without a lowering", ["domain", "operator", "opset", "number", "nodes"], rows)
    click.echo("The model can be read and written, but not run; @ptqjax.lowers gives an operator a meaning.\n")


def _nodes(entry: Unknown) -> str:
    """Returns the first few places by the nodes' own names, or by the tensors that they produce."""
    names = [node.name or f"producing '{node.output}'" for node in entry.nodes[:_NODES]]
    rest = len(entry.nodes) - len(names)
    return ", ".join(names) + (f" and {rest} more" if rest else "")


def _print_transforms(records: Sequence[Record]) -> None:
    """Prints a table for each transform, a line for each place; columns that would be empty are left out."""
    for transform, found in by_transform(records, lambda record: record.transform).items():
        num_done = sum(record.done for record in found)
        rows = [_record_row(record) for record in found]
        headings = ["", "where", "what", "before → after", "why"]
        kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
        title = f"{transform}: {num_done} places it would change, {len(found) - num_done} it would leave alone"
        _table(title, [headings[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _record_row(record: Record) -> list[str]:
    mark = "done" if record.done else "left"
    what = "" if record.what == "left alone" else record.what
    figures = "; ".join(figure_texts(record.before, record.after))
    return [mark, record.where[0], what, figures, record.reason]


def _print_placement(placement: Placement, config: QuantizationConfig) -> None:
    title = f"Which tensor would get which grid: {summary(placement)}"
    _table(title, HEADINGS, grid_rows(placement, config))


def _shape(shape: Sequence[Any] | None) -> str:
    return "of any shape" if shape is None else " x ".join("?" if size is None else str(size) for size in shape)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_from: int = 99) -> None:
    """Prints a table with its title above; columns from `numbers_from` on are aligned right."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(headings), show_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i >= numbers_from else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    console.print(table)
    console.print()
