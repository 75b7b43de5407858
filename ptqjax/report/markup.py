"""Pieces of HTML text that every part of the page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_LEAST = 1e-4  # a fraction that is told in percent


def section(identity: str, title: str, text: str, content: str) -> str:
    """Returns a part of the page under its heading; `text` and `content` are HTML already."""
    paragraph = f"<p>{text}</p>" if text else ""
    return f'<section id="{identity}"><h2>{escape(title)}</h2>{paragraph}\n{content}</section>\n'


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    identity: str,
    caption: str,
    numbers: Sequence[int] = (),
    mark_last: bool = False,
    leave_out_empty: bool = False,
) -> str:
    """Returns a table; cells are HTML already.

    Args:
        headings: Of the columns.
        rows: As many cells in each.
        identity: The table's id in the page.
        caption: What it shows, for those who do not see the page.
        numbers: Columns that are aligned right.
        mark_last: Whether the last row stands out.
        leave_out_empty: Whether columns without any text are left out.
    """
    kept = [i for i in range(len(headings)) if not leave_out_empty or any(row[i] for row in rows)]
    kinds = {i: ' class="number"' if i in numbers else "" for i in kept}
    head = "".join(f'<th scope="col"{kinds[i]}>{escape(headings[i])}</th>' for i in kept)
    lines = [
        ('<tr class="last">' if mark_last and index == len(rows) - 1 else "<tr>")
        + "".join(f"<td{kinds[i]}>{row[i]}</td>" for i in kept)
        + "</tr>"
        for index, row in enumerate(rows)
    ]
    return (
        f'<div class="wide"><table id="{escape(identity)}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(title: str, count: str, content: str) -> str:
    """Returns what is shown when its line is clicked; `title` is HTML already."""
    return f'<details><summary>{title}<span class="count">{escape(count)}</span></summary>{content}</details>'


def gallery(figures: Sequence[str], *, shown: int, rest: str = "The others") -> str:
    """Returns the first `shown` pictures at a glance, and the others folded away."""
    first, others = figures[:shown], figures[shown:]
    more = folded(escape(rest), str(len(others)), f'<div class="plots">{"".join(others)}</div>') if others else ""
    return f'<div class="plots">{"".join(first)}</div>{more}'


def code(text: str) -> str:
    """Returns a name as a name."""
    return f"<code>{escape(text)}</code>"


def figure(value: float | None) -> str:
    """Returns a number in four digits."""
    return "?" if value is None else f"{value:.4g}"


def decibels(value: float | None) -> str:
    """Returns an SQNR; that of an exact copy is infinite."""
    if value is None:
        return "?"
    return "exact" if value == float("inf") else f"{value:.1f}"


def percent(fraction: float) -> str:
    """Returns a fraction in percent; 0 and 100 stand for none and all, without exception."""
    if fraction in (0, 1):
        return f"{100 * fraction:.0f}"
    return f"{min(100 * fraction, 99.99):.2f}" if fraction >= _LEAST else f"under {100 * _LEAST:g}"
