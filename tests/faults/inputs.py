"""Bad inputs: the catalogue of those made by hand, and what generators make of good ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from faults import campaigns, cases, workspace
from faults.catalogue import CATALOGUE
from faults.report import Found

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


def run(root: Path, share: int, tell: Callable[[str], None]) -> Found:
    """The whole catalogue, and a share of the generated inputs."""
    good, problems = root / "good", list[str]()
    good.mkdir()
    workspace.make(good)

    def count(what: str, inputs: int, wrong: list[str]) -> None:
        tell(f"{what}: {inputs} inputs, {len(wrong)} wrong")
        problems.extend(wrong)

    for group, listed in CATALOGUE.items():
        wrong = [
            f"{case.name}: {'; '.join(found)}"
            for number, case in enumerate(listed)
            if (found := cases.faults(case, cases.run(case, good, root / f"{group}-{number}")))
        ]
        count(group, len(listed), wrong)
    recipes = campaigns.RECIPES[1] // share
    count("recipes of a generator", recipes, campaigns.recipes(good, root / "recipes", recipes))
    for one in campaigns.CAMPAIGNS:
        made = one.whole // share
        count(one.name, made, campaigns.run(one, good, root / one.name, made))
    return Found(section(), tuple(problems))


def section() -> str:
    """The section as it must stand in the page: what is run, held against the catalogue by a test."""
    lines = [TITLE, "", INTRODUCTION, "| catalogue | cases |", "| --- | ---: |"]
    lines += [f"| {name} | {len(cases)} |" for name, cases in CATALOGUE.items()]
    lines += [f"| all | {sum(map(len, CATALOGUE.values()))} |", ""]
    made = [("recipes, by hypothesis", campaigns.RECIPES[1])]
    made += [(one.name, one.whole) for one in campaigns.CAMPAIGNS]
    lines += ["| generated | inputs |", "| --- | ---: |"]
    lines += [f"| {name} | {count:,} |" for name, count in made]
    lines += [f"| all | {sum(count for _, count in made):,} |", ""]
    return "\n".join(lines)
