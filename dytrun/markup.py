"""Pieces of HTML: a table, a line's look, a chart with what a screen reader says of it. All text is escaped here."""

import re
from collections.abc import Sequence
from html import escape

from dytrun.figures import Chart, Look

# A column with a cell of more letters is broken into lines.
_WIDE = 28
_MARKS = {
    "": "", "circle": '<circle cx="22" cy="7" r="4"/>', "square": '<rect x="18" y="3" width="8" height="8"/>',
    "diamond": '<path d="M22 1l5 6-5 6-5-6z"/>', "triangle-up": '<path d="M22 2l5 9h-10z"/>',
    "triangle-down": '<path d="M22 12l5-9h-10z"/>', "pentagon": '<path d="M22 2l5 4-2 6h-6l-2-6z"/>',
    "star": '<path d="M22 1l1.5 4.2h4.4l-3.5 2.7 1.3 4.3-3.7-2.6-3.7 2.6 1.3-4.3-3.5-2.7h4.4z"/>',
    "hexagon2": '<path d="M17 7l2.5-4.5h5l2.5 4.5-2.5 4.5h-5z"/>',
}  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, marks: Sequence[str] = ()) -> str:
    """Return a table whose first column names the rows; numbers stand at the right. `marks` are HTML, one a row."""
    kinds = [_kind([row[number] for row in rows]) for number in range(len(columns))]
    head = "".join(f"<th scope=col{kind}>{escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    lines = []
    for place, row in enumerate(rows):
        mark = f"{marks[place]} " if marks else ""
        cells = "".join(f"<td{kind}>{_breakable(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        lines.append(f"<tr><th scope=row>{mark}{escape(row[0])}</th>{cells}</tr>")
    body = "".join(lines)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def figure(chart: Chart, number: int) -> str:
    """Return the place of a chart, which the page's script draws by its number, and its numbers as a table."""
    height = chart.layout["height"]
    note = f"<p class=note>{escape(chart.note)}</p>" if chart.note else ""
    numbers = table(chart.columns, chart.rows, chart.title)
    title = escape(chart.title)
    return (
        f"<figure><figcaption><h4>{title}</h4></figcaption>"
        f'<div class=plot role=img style="--height:{height}px" data-chart={number} aria-label="{escape(chart.said)}">'
        f"</div>{note}<details><summary>Numbers</summary>"
        f'<div class=scroll tabindex=0 role=region aria-label="{title}, numbers">{numbers}</div></details></figure>'
    )


def swatch(look: Look) -> str:
    """Return a sample of an arm's line."""
    dash = "" if look.dash == "solid" else f' stroke-dasharray="{look.dash.replace("px", "")}"'
    return (
        f'<svg class=swatch viewBox="0 0 44 14" aria-hidden=true fill="{look.colour}"><path d="M1 7h42" '
        f'stroke="{look.colour}" stroke-width=2.5{dash} />{_MARKS[look.symbol]}</svg>'
    )


def counted(number: int, noun: str) -> str:
    """Return `1 run`, `2 runs`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _breakable(cell: str) -> str:
    """Return a cell that may be broken before its interval, where the table would else be wider than the page."""
    return escape(cell).replace(" [", " <wbr>[").replace("], ", "], <wbr>")


def _kind(cells: Sequence[str]) -> str:
    """Return the class of a column: numbers, long texts, or neither."""
    if all(re.match(r"[-+–\d]|$", cell) for cell in cells):
        return " class=num"
    return " class=wide" if max(map(len, cells), default=0) > _WIDE else ""
