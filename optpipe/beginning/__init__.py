"""``optpipe init``: a first recipe for somebody's network, written after looking at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optpipe import files
from optpipe.beginning.look import Asked, look_at
from optpipe.beginning.text import FILL_IN, recipe_text
from optpipe.errors import UsageError

__all__ = ["Asked", "Begun", "as_text", "begin"]


@dataclass(frozen=True, slots=True)
class Begun:
    """A written recipe: what it says, which method was picked, and why."""

    path: Path
    text: str
    method: str
    reason: str


def begin(asked: Asked, path: Path, *, force: bool = False) -> Begun:
    """Look at a network and its images, and write a recipe for them to ``path``.

    Raises:
        UsageError: the file is there and not to be replaced, or the network or images are of no use.
        RunError: the file cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a .toml file in it with --out")
    if path.exists() and not force:
        raise UsageError(f"{path}: is there already; replace it with --force, or name another with --out")
    seen = look_at(asked, path.resolve().parent)
    text = recipe_text(seen, path)
    files.write_atomically(path, text)
    return Begun(path, text, seen.chosen.name, seen.chosen.reason)


def as_text(begun: Begun) -> str:
    """What was written, which lines are still to be filled in, and what to do next."""
    lines = begun.text.splitlines()
    open_points = [
        f"  line {number}: {line.partition(FILL_IN)[2].strip(': ')}"
        for number, line in enumerate(lines, start=1)
        if f"# {FILL_IN}" in line
    ]
    head = f'{begun.path}: method "{begun.method}": {begun.reason}'
    fill = ["To fill in:", *open_points] if open_points else []
    return "\n".join([head, *fill, f"Then: optpipe run {begun.path} --dry-run"]) + "\n"
