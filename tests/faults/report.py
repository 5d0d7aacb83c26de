"""What campaigns came to, in docs/reliability.md: a section of the page for each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@dataclass(frozen=True, slots=True)
class Found:
    """What a campaign came to: its section of the page, beginning with its title, and what went wrong."""

    section: str
    problems: tuple[str, ...]


class Campaign(Protocol):
    """A module of this package."""

    def run(self, root: Path, share: int, tell: Callable[[str], None]) -> Found:
        """Run one ``share``-th of the campaign in the empty folder ``root``."""


def write(section: str) -> None:
    """Put a section into the page, in the place of the one of its title."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Reliability\n"
    PAGE.write_text(replaced(text, section), encoding="utf-8")


def replaced(text: str, new: str) -> str:
    """A page with its section, from its title to the next of its kind, replaced or added at the end."""
    title = new.partition("\n")[0]
    found = re.search(rf"^{re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{text.rstrip()}\n\n{new}"
    rest = text[found.end() :]
    return f"{text[: found.start()]}{new}{chr(10) if rest else ''}{rest}"
