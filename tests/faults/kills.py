"""Runs of every kind killed by SIGKILL again and again, and taken to their end each time."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from faults import sittings, small_runs
from faults.report import Found
from faults.small_runs import KINDS, Kind
from optpipe import seals, store

KILLS = 200
SEED = 9
AT_A_BORDER = 0.25
"""The share of the kills that come as soon as a stage's result is stored; the others come at any moment."""
STAGES = ("begin", *store.STAGES, "report")
"""What a kill can fall into: before the run has a folder, a stage, or what comes after the last."""
ANSWERS = ("trial.json", "step.json", "trained.json", "latency.json", "weights.safetensors")
"""What is stored once and never made again."""

TITLE = "## Killed"

INTRODUCTION = """\
`make faults CAMPAIGNS=kills` takes small runs of every method through all six stages and kills the process
with SIGKILL, which nothing can catch: at moments drawn evenly over the time that the run takes undisturbed,
and one time in four as soon as a stage has stored its result. The same command is given again until the run
is at its end, killed again on the way as chance has it; then another begins in a fresh folder. The draws are
of one seed, so that a moment can be tried again as nearly as timing allows.

Engines are built, loaded and computed with as ever, but what one takes is told by the weights in its file
instead of the clock: measured latencies would differ from run to run, killed or not. Two undisturbed runs
then agree in every figure but wall times. Sittings, and workers too, are forked from a process that has
imported everything; a network that was exported before is written from a copy of that export, and figures are
their titles alone.

A run counts as wrong unless, at each kill, every file under its final name is whole and what was stored
before is still the same file as it was stored (so nothing was computed twice), and unless it ends with exit
code 0 and with the plan, the weights, the engines, the latencies, the figures and the very list of files of
the undisturbed run: no temporary file is left in its folder or in the cache beside it.
"""

MENDED = """\
Found in making this campaign or by it, and mended:

- A temporary file of the shared cache was left there for ever: the cache has no owner who could tell a dead
  process's from a live one's. They are now made in the run's own folder, which clears them.
- A candidate's ONNX file or a finished training's checkpoint stayed in the run's folder where the process was
  killed between storing the answer and removing them, and so did the original's engine.
- A worker whose driver was killed went on writing for up to half a second, into a run that had been begun
  again by then. Linux ends it with its driver now.
"""


@dataclass
class Tally:
    """What came of one kind of run."""

    kind: Kind
    alone_s: float = 0.0
    runs: int = 0
    sittings: int = 0
    fell: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Of all its runs."""
        return sum(self.fell.values())


def run(root: Path, share: int, tell: Callable[[str], None]) -> Found:
    """A share of the kills, divided among the kinds."""
    wanted = KILLS // share
    weights = sum(kind.weight for kind in KINDS)
    counts = [wanted * kind.weight // weights for kind in KINDS]
    counts[0] += wanted - sum(counts)
    tallies = [
        killed(kind, count, root / str(number), np.random.default_rng((SEED, number)), tell)
        for number, (kind, count) in enumerate(zip(KINDS, counts, strict=True))
        if count
    ]
    problems = [f"{one.kind.name}: {problem}" for one in tallies for problem in one.wrong]
    return Found(section(tallies), tuple(problems))


def killed(
    kind: Kind, count: int, root: Path, rng: np.random.Generator, tell: Callable[[str], None]
) -> Tally:
    """One kind of run, killed ``count`` times in all."""
    home = root / "home"
    kind.make(home)
    tally = Tally(kind)
    outcomes = [_undisturbed(kind, home, root, name, tally) for name in ("first", "second")]
    if tally.wrong:
        return tally
    tally.wrong += [f"undisturbed runs differ: {one}" for one in small_runs.differences(*outcomes)]
    while tally.kills < count and not tally.wrong:
        out = root / f"run-{tally.runs}" / "run"
        out.parent.mkdir()
        _chain(out, home, count, rng, tally)
        if not tally.wrong:
            found = small_runs.differences(outcomes[0], small_runs.outcome(out))
            tally.wrong += [*found, *_left_over(out.parent)]
        if tally.wrong:
            tally.wrong.append(f"in run {tally.runs} of seed {SEED}, the kills before: {dict(tally.fell)}")
        tally.runs += 1
    tell(
        f"{kind.name}: {tally.kills} kills in {tally.runs} runs of {tally.alone_s:.1f} s, {tally.sittings} "
        f"sittings, {len(tally.wrong)} wrong; {dict(tally.fell)}"
    )
    return tally


def _undisturbed(kind: Kind, home: Path, root: Path, name: str, tally: Tally) -> dict[str, object]:
    out = root / name / "run"
    out.parent.mkdir()
    begun = time.monotonic()
    code, lines = sittings.finish(kind.words(out), home, root / "said", small_runs.without_figures)
    tally.alone_s = time.monotonic() - begun  # the second time: exports are made by then
    if code:
        tally.wrong.append(f"undisturbed: exit code {code}: {lines[-3:]}")
        return {}
    return small_runs.outcome(out)


def _chain(out: Path, home: Path, count: int, rng: np.random.Generator, tally: Tally) -> None:
    """Take one run to its end, killing it on the way as long as kills are left."""
    said = home.parent / "said"
    stored: dict[Path, tuple[int, int]] = {}
    while True:
        tally.sittings += 1
        sitting = sittings.begin(tally.kind.words(out), home, said, small_runs.without_figures)
        if tally.kills >= count:
            code = sitting.end(600.0)
        elif rng.random() < AT_A_BORDER:
            code = _until_border(sitting, out, float(rng.uniform(0, tally.alone_s)))
        else:
            code = sitting.end(float(rng.uniform(0, tally.alone_s)))
        if code is not None:
            if code:
                tally.wrong.append(f"exit code {code}: {sitting.lines()[-3:]}")
            tally.wrong += changed(out, stored)
            return
        sitting.kill()
        tally.fell[_stage(out)] += 1
        tally.wrong += [*torn(out.parent), *changed(out, stored)]
        if tally.wrong:
            return


def _until_border(sitting: sittings.Sitting, out: Path, within_s: float) -> int | None:
    """Wait for the next stage's result, or the end; ``within_s`` bounds the wait."""
    done, end = len(_results(out)), time.monotonic() + 2 * within_s
    while len(_results(out)) == done and time.monotonic() < end:
        code = sitting.end(0.004)
        if code is not None:
            return code
    return None


def _results(out: Path) -> list[Path]:
    return [*out.glob("0*/result.json"), *out.glob("*/0*/result.json")]


def _stage(out: Path) -> str:
    """The stage that was not finished; of a sweep, of the run that it was at."""
    runs = [path.parent for path in (*out.glob("recipe.toml"), *out.glob("*/recipe.toml"))]
    if not runs:
        return "begin"
    stages = [_unfinished(run) for run in runs]
    return min(stages, key=STAGES.index)


def _unfinished(run: Path) -> str:
    for number, stage in enumerate(store.STAGES, start=1):
        if not (run / f"{number:02d}-{stage}" / "result.json").exists():
            return stage
    return "report"


def torn(folder: Path) -> list[str]:
    """Files under their final names that are not whole."""
    wrong = []
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            wrong.append(f"{path.relative_to(folder)} is torn")
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith(".") and not seals.is_whole(path):
            wrong.append(f"{path.relative_to(folder)} is torn")
    return wrong


def changed(out: Path, stored: dict[Path, tuple[int, int]]) -> list[str]:
    """Answers that were stored before and are not the same files now; ``stored`` learns of new ones."""
    wrong = []
    for name in ANSWERS:
        for path in (*out.rglob(f"trials/*/{name}"), *out.rglob(f"engines/*/{name}")):
            status = path.stat()
            found = status.st_ino, status.st_mtime_ns
            if stored.setdefault(path, found) != found:
                wrong.append(f"{path.relative_to(out)} was made twice")
    wrong += [f"{path.relative_to(out)} is gone" for path in stored if not path.exists()]
    return wrong


def _left_over(folder: Path) -> list[str]:
    return [f"{path.relative_to(folder)} is left over" for path in folder.rglob(".*.tmp")]


def section(tallies: Sequence[Tally]) -> str:
    """The section as it stands in the page."""
    lines = [TITLE, "", INTRODUCTION]
    lines += [f"| run | undisturbed, s | kills | in {' | in '.join(STAGES)} | runs | wrong |"]
    lines += ["| --- |" + " ---: |" * (len(STAGES) + 4)]
    for one in tallies:
        fell = " | ".join(str(one.fell[stage]) for stage in STAGES)
        lines.append(
            f"| {one.kind.name} | {one.alone_s:.1f} | {one.kills} | {fell} | {one.runs} | {len(one.wrong)} |"
        )
    whole = Counter[str]()
    for one in tallies:
        whole.update(one.fell)
    fell = " | ".join(str(whole[stage]) for stage in STAGES)
    runs, wrong = sum(one.runs for one in tallies), sum(len(one.wrong) for one in tallies)
    lines += [f"| all | | {sum(whole.values())} | {fell} | {runs} | {wrong} |", ""]
    took = sum(one.sittings for one in tallies)
    lines += [f"Measured {time.strftime('%Y-%m-%d', time.gmtime())}: {took} sittings, seed {SEED}.", ""]
    return "\n".join([*lines, MENDED])
