"""The pieces of report.html: escaped text, tables that sort, figures with their numbers. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from optpipe.report import figures
from optpipe.types import Cell, Figure, Surface, Table

_LONG = 40
"""From more characters than this a cell may take several lines, but no narrow ones."""
_JOINED = "\u00a0"
_INTERVAL = re.compile(rf"[^\s]+{_JOINED}to{_JOINED}[^\s]+")
_TAG = re.compile(r"<[^>]*>")
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style\b.*?</style>", re.DOTALL)
_PAPER = {"fill: #ffffff": "fill: var(--card)", "stroke: #ffffff": "stroke: var(--card)"}
_INK = {"fill: #000000": "fill: currentColor", "stroke: #000000": "stroke: currentColor"}
_DEEP = {"fill: #0072b2": "fill: var(--blue)", "stroke: #0072b2": "stroke: var(--blue)"}
_THEMED = _PAPER | _INK | _DEEP


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell: what it shows, and the number that it is sorted by; None sorts by the text."""

    text: str = ""
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table as it is shown; the first cell of each row is its heading.

    ``sortable`` is False where the rows are of different kinds.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    sortable: bool = True


def text(value: str) -> str:
    """Text as HTML that shows it as it is, in an element or a quoted attribute."""
    return escape("".join(letter if letter.isprintable() or letter == _JOINED else " " for letter in value))


def words(value: str) -> str:
    """Text as HTML, in which an interval stays on one line where there is room for it."""
    return _INTERVAL.sub(
        lambda found: f'<span class="interval">{found.group().replace(_JOINED, " ")}</span>', text(value)
    )


def spread(low: str, high: str) -> str:
    """An interval in words, which :func:`words` knows again."""
    return f"{low}{_JOINED}to{_JOINED}{high}"


def prose(markdown: str) -> str:
    """A paragraph of the report's Markdown, which marks ``**strong**`` words and code alone."""
    shown = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text(markdown))
    shown = re.sub("`([^`]+)`", r"<code>\1</code>", shown)
    return f"<p>{shown}</p>"


def sheet(table: Table) -> Sheet:
    """A method's table: as many digits as the Markdown shows, sorted by all that there are."""
    # A method's own mistake, a row too long or short, must not cost a finished run its report.
    width = max(len(table.columns), *map(len, table.rows)) if table.rows else len(table.columns)
    columns = (*table.columns, *[""] * (width - len(table.columns)))
    rows = tuple((*map(_entry, row), *[Entry()] * (width - len(row))) for row in table.rows)
    return Sheet(table.title, columns, rows)


def table(shown: Sheet, *, hidden_title: bool = False) -> str:
    """The table in a box of its own, which scrolls where the page is too narrow for it.

    ``hidden_title`` leaves the caption to screen readers, where a heading shows the same words.
    """
    title = text(shown.title)
    numeric = [_is_numeric(shown, index) for index in range(len(shown.columns))]
    head = "".join(
        f'<th scope="col"{_aligned(right)}>{text(column)}</th>'
        for column, right in zip(shown.columns, numeric, strict=True)
    )
    rows = "\n".join(f"<tr>{_row(row, numeric)}</tr>" for row in shown.rows)
    caption = f'<caption class="hidden">{title}</caption>' if hidden_title else f"<caption>{title}</caption>"
    box, look = ("scroll", ' class="sortable"') if shown.sortable else ("scroll whole", "")
    return (
        f'<div class="{box}" role="region" tabindex="0" aria-label="{title}">\n'
        f"<table{look}>{caption}\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def figure(drawn: Figure, number: int, *, notes: Sequence[str] = (), numbers: Sheet | None = None) -> str:
    """The figure as inline SVG and, folded away, the numbers that it is drawn from.

    ``number`` is another for each figure of a page: it keeps their ids apart. ``numbers`` stand in place of
    the figure's own points, where there is more to say of them.
    """
    svg = inline_svg(figures.figure_svg(drawn, notes=notes), f"f{number}-", drawn.title)
    return (
        f'<figure aria-label="{text(drawn.title)}">\n{svg}\n'
        f"<details><summary>The numbers of this figure</summary>\n"
        f"{table(numbers or points(drawn))}\n</details></figure>"
    )


def points(drawn: Figure) -> Sheet:
    """All that a figure is drawn from: its points or, where it has a surface, that too, a row for each."""
    title = f"{drawn.title}: numbers"
    rows = [
        (Entry(curve.name), _number(x), _number(y), Entry())
        for curve in drawn.curves
        for x, y in zip(curve.x, curve.y, strict=True)
    ]
    columns = ("curve", drawn.x_label, drawn.y_label)
    if drawn.surface is None:
        return Sheet(title, columns, tuple(row[:3] for row in rows))
    heights = _heights(drawn.surface)
    return Sheet(title, (*columns, drawn.surface.label), (*rows, *heights))


def inline_svg(svg: str, prefix: str, title: str) -> str:
    """An SVG that can stand in the page beside others: ids of its own, no style that reaches beyond it.

    What is black, white or too deep a blue for a dark page follows the page's colours; what names another
    document is gone.
    """
    bare = _TAG.sub(lambda found: _own(found.group(), prefix), _DROPPED.sub("", svg))
    return bare.replace("<svg ", f'<svg role="img" aria-label="{text(title)}" ', 1)


def _own(tag: str, prefix: str) -> str:
    tag = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", tag)
    tag = tag.replace("xlink:href=", "href=")
    tag = re.sub(r'\bid="', f'id="{prefix}', tag)
    tag = re.sub(r'\bhref="#', f'href="#{prefix}', tag)
    tag = tag.replace("url(#", f"url(#{prefix}")
    for plain, themed in _THEMED.items():
        tag = tag.replace(plain, themed)
    return tag


def _row(row: Sequence[Entry], numeric: Sequence[bool]) -> str:
    cells = []
    for index, (entry, right) in enumerate(zip(row, numeric, strict=True)):
        sorted_by = "" if entry.value is None else f' data-value="{entry.value!r}"'
        look = ' class="long"' if len(entry.text) > _LONG and not right else _aligned(right)
        name, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
        cells.append(f"<{name}{scope}{look}{sorted_by}>{words(entry.text)}</{name}>")
    return "".join(cells)


def _aligned(right: bool) -> str:
    return ' class="number"' if right else ""


def _is_numeric(shown: Sheet, index: int) -> bool:
    entries = [row[index] for row in shown.rows if row[index].text]
    return bool(entries) and all(entry.value is not None for entry in entries)


def _entry(cell: Cell) -> Entry:
    if cell is None:
        return Entry()
    if isinstance(cell, bool):
        return Entry("yes" if cell else "no")
    return Entry(cell) if isinstance(cell, str) else _number(cell)


def _number(value: float) -> Entry:
    shown = str(value) if isinstance(value, int) else f"{value:.4g}"
    return Entry(shown, float(value) if math.isfinite(value) else None)


def _heights(surface: Surface) -> list[tuple[Entry, ...]]:
    return [
        (Entry("surface"), _number(x), _number(y), Entry() if value is None else _number(value))
        for y, row in zip(surface.y, surface.values, strict=True)
        for x, value in zip(surface.x, row, strict=True)
    ]
