"""The section "Bad inputs" of docs/reliability.md: what was run, held against the catalogue by a test."""

from __future__ import annotations

import re
from pathlib import Path

from faults import campaigns
from faults.catalogue import CATALOGUE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
TITLE = "## Bad inputs"

INTRODUCTION = """\
`make faults` runs a catalogue of inputs that are wrong, damaged or hostile, and then files that a generator
makes: recipes by hypothesis, all others by mutation of good ones. Each case of the catalogue names its exit
code and a piece of its line. All of them, and every generated input, must end in exactly one line that begins
with `Error:` (or click's usage), without a traceback, a control character or a warning of some library, with
nothing on stdout that is no result, and with every file that was there as it was. Nothing is written here
unless all do.

The quick test suite runs the whole catalogue and the first few generated inputs of each kind, the slow one a
tenth of them. [SECURITY.md](../SECURITY.md) says what is trusted and why.
"""


def section() -> str:
    """The section as it must stand in the page."""
    lines = [TITLE, "", INTRODUCTION, "| catalogue | cases |", "| --- | ---: |"]
    lines += [f"| {name} | {len(cases)} |" for name, cases in CATALOGUE.items()]
    lines += [f"| all | {sum(map(len, CATALOGUE.values()))} |", ""]
    made = [("recipes, by hypothesis", campaigns.RECIPES[1])]
    made += [(one.name, one.whole) for one in campaigns.CAMPAIGNS]
    lines += ["| generated | inputs |", "| --- | ---: |"]
    lines += [f"| {name} | {count:,} |" for name, count in made]
    lines += [f"| all | {sum(count for _, count in made):,} |", ""]
    return "\n".join(lines)


def write() -> None:
    """Put the section into the page, in the place of the one that is there."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Reliability\n"
    PAGE.write_text(replaced(text, section()), encoding="utf-8")


def replaced(text: str, new: str) -> str:
    """A page with its section, from its title to the next of its kind, replaced or added at the end."""
    found = re.search(rf"^{re.escape(TITLE)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{text.rstrip()}\n\n{new}"
    rest = text[found.end() :]
    return f"{text[: found.start()]}{new}{chr(10) if rest else ''}{rest}"
