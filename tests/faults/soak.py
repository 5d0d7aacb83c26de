"""A long life: one process takes run after run, and holds no more after the last than after the first few."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from faults.children import end, start
from faults.report import PAGE, Found

RUNS = 50
SETTLED = 5
"""The first runs fill caches that have an end; what is held is compared from then on."""
MOST_MB = 0.25
"""By how much memory may grow in a run, at the upper end of the interval."""
MOST_OBJECTS = 25.0
"""By how many objects, likewise."""
LONGEST_S = 4 * 3600
SOAK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from faults import soaking
soaking.main(int(sys.argv[2]), Path("."))
"""


@dataclass(frozen=True, slots=True)
class Slope:
    """How fast a figure grows from run to run, with the 95% interval of a straight line's slope."""

    slope: float
    low: float
    high: float


def slope_of(values: Sequence[float]) -> Slope:
    """The slope of a line through values that came one after the other; at least three of them."""
    found = stats.linregress(np.arange(len(values)), values)
    reach = float(stats.t.ppf(0.975, len(values) - 2)) * float(found.stderr)
    return Slope(float(found.slope), float(found.slope) - reach, float(found.slope) + reach)


def run(root: Path, share: int, tell: Callable[[str], None]) -> Found:
    """A share of the runs, but enough of them to tell growth from noise."""
    runs = max(RUNS // share, SETTLED + 3)
    temporary = root / "temporary"
    work = root / "work"
    temporary.mkdir()
    work.mkdir()
    process = start("-c", SOAK, str(PAGE.parents[1] / "tests"), str(runs), folder=work, temporary=temporary)
    ended = end(process, LONGEST_S)
    held = [json.loads(line) for line in ended.out.splitlines()]
    if ended.code or len(held) != runs:
        return Found("", (f"exit code {ended.code} after {len(held)} of {runs} runs: {ended.err[-3000:]}",))
    tell(f"{runs} runs in {ended.seconds:.0f} s")
    return Found(section(held), tuple(problems(held)))


def problems(held: list[dict[str, float | str]]) -> list[str]:
    """What grows that should not, and runs that ended as none should."""
    found = list[str]()
    for name, most in (("memory MB", MOST_MB), ("objects", MOST_OBJECTS)):
        slope = slope_of(_settled(held, name))
        if slope.high > most:
            found.append(f"{name}: grow by {slope.slope:.3g} ({slope.low:.3g} to {slope.high:.3g}) a run")
    for name in COUNTED:
        values = _settled(held, name)
        if max(values) > values[0]:
            found.append(f"{name}: {values[0]:g} after {SETTLED} runs, {max(values):g} at most since")
    for number, one in enumerate(held):
        said = str(one["ended"])
        unmet = number % 5 == 4
        if not said.startswith(("Error: no plan meets the budget", NOISE) if unmet else ("finished", FEW)):
            found.append(f"run {number}: {said}")
    return found


COUNTED = ("files", "threads", "Python threads", "children", "temporary files")
"""What may not grow at all."""

NOISE, FEW = "Error: no block saves measurable time", "Error: [budget] drop_blocks = 1: only 0 of"
"""How runs may end on a machine that is so busy that no block's saving can be told from none."""

TITLE = "## A long life"

INTRODUCTION = """\
`make faults CAMPAIGNS=soak` takes run after run in one process, by turns through `optpipe.run` and the
command line: the shipped demo made small (its images and its method, on a network of two blocks, with 12
steps and timings of 0.2 s); every fifth asks for more than any network saves, and ends in an error. After
each run, and a collection of garbage, it is counted what the process holds.
"""

MENDED = """\
Found and mended by it:

- With each export torch kept, for ever, the sizes that it had reasoned about, in a circle that leads through
  C++, where Python's collector cannot follow, and the text of the code that it had generated: 1,050 objects
  and a fifth of a megabyte for a network of two blocks. optpipe lets go of them after each export
  (`optpipe/leftovers.py`).
"""


def section(held: list[dict[str, float | str]]) -> str:
    """The section of the page."""
    ended = [str(one["ended"]) for one in held]
    refused, noisy = len(held) - ended.count("finished"), sum(one.startswith((NOISE, FEW)) for one in ended)
    memory, objects = (slope_of(_settled(held, name)) for name in ("memory MB", "objects"))
    lines = [TITLE, "", INTRODUCTION]
    lines += [
        f"{len(held)} runs were taken; {refused} ended in an error, all but {noisy} of them as they had to",
        f"(the others found no saving on a busy machine). From the {SETTLED}th run to the last:",
        "",
    ]
    lines += ["| held | after the first runs | at the end | growth a run (95% interval) | allowed |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, slope, most in (("memory MB", memory, MOST_MB), ("objects", objects, MOST_OBJECTS)):
        values = _settled(held, name)
        interval = f"{slope.slope:+.3f} ({slope.low:+.3f} to {slope.high:+.3f})"
        lines.append(f"| {name} | {values[0]:,.0f} | {values[-1]:,.0f} | {interval} | {most:g} |")
    for name in COUNTED:
        values = _settled(held, name)
        lines.append(f"| {name} | {values[0]:,.0f} | {values[-1]:,.0f} | | 0 |")
    return "\n".join([*lines, "", MENDED])


def _settled(held: list[dict[str, float | str]], name: str) -> list[float]:
    return [float(one[name]) for one in held[SETTLED - 1 :]]
