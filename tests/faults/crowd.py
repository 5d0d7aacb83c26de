"""Many at once: runs that share a cache, a folder or a device, and readers of a run that is being written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults import children
from faults.children import Came, came, end, one_line, optpipe, start, torn, until
from faults.report import Found

PROCESSES = 10
READS = ("report", "compare", "bench", "gate", "verify", "rebuild")
"""Commands that take a run's folder, given again and again while the run is being written."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What one case came to: how many of what there were, and what was wrong with them."""

    count: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """``run`` gets an empty folder, and how many processes there are to be."""

    name: str
    what: str
    run: Callable[[Path, int], Tried]
    seldom: bool = True
    """Whether it takes whole runs: then the quick suite leaves it out."""


def run(root: Path, share: int, tell: Callable[[str], None]) -> Found:
    """Every case, with a share of the processes, but always two."""
    rows, problems = list[tuple[str, str, int]](), list[str]()
    for number, case in enumerate(CASES):
        folder = root / str(number)
        folder.mkdir()
        begun = time.monotonic()
        tried = case.run(folder, max(2, PROCESSES // share))
        tell(
            f"{case.name}: {tried.count} {case.what}, {len(tried.problems)} wrong, "
            f"{time.monotonic() - begun:.0f} s"
        )
        rows.append((case.name, case.what, tried.count))
        problems += [f"{case.name}: {problem}" for problem in tried.problems]
    return Found(section(rows), tuple(problems))


# ---------------------------------------------------------------- runs beside each other


def sharing_a_cache(folder: Path, count: int) -> Tried:
    """Runs in folders side by side, which have each other's answers by the cache between them."""
    return _beside(folder, count, lambda name: optpipe("run", "small.toml", "--out", name, folder=folder))


def lending(folder: Path, count: int) -> Tried:
    """Runs as those of a sweep, which have each other's files too."""
    return _beside(folder, count, lambda name: start("-c", children.SHARED, name, folder=folder))


def with_workers(folder: Path, count: int) -> Tried:
    """Two runs at once, each with two worker processes; the least of them may come from the cache."""
    words = ("--set", 'run.workers="local:2"')
    begin = lambda name: optpipe("run", "small.toml", "--out", name, *words, folder=folder)  # noqa: E731
    return _beside(folder, 2, begin, 'name = "practise"\nscorer = "exact"', "drop_blocks = 2")


def _beside(
    folder: Path,
    count: int,
    begin: Callable[[str], subprocess.Popen[str]],
    method: str = "",
    budget: str = "",
) -> Tried:
    expected = _alone(folder, method, budget)
    begun = [begin(f"run{number}") for number in range(count)]
    wrong = list[str]()
    for number, ended in enumerate([end(process) for process in begun]):
        if ended.code:
            wrong.append(f"run {number}: exit code {ended.code}: {ended.err[-600:]!r}")
        else:
            wrong += _differs(folder / f"run{number}", expected)
    return Tried(count, (*wrong, *torn(folder)))


def _alone(folder: Path, method: str = "", budget: str = "") -> Came:
    """What the run comes to by itself, elsewhere, in a folder that is made for both."""
    folder.rmdir()
    children.make(folder, method or 'name = "filters"', budget or "macs_reduction = 0.3")
    apart = folder.with_name(f"{folder.name}-alone")
    shutil.copytree(folder, apart)
    ended = end(optpipe("run", "small.toml", "--out", "run0", folder=apart))
    assert ended.code == 0, ended.err
    return came(apart / "run0")


def _differs(run: Path, expected: Came) -> list[str]:
    found = came(run)
    return [] if found == expected else [f"{run.name}: came to {found}, alone to {expected}"]


def in_one_folder(folder: Path, count: int) -> Tried:
    """More runs in the folder of one that is at work: refused, and it goes on.

    It is kept at work by another process that holds its device until all have been refused.
    """
    expected = _alone(folder)
    shutil.rmtree(folder / "run")
    temporary = folder / "temporary"
    temporary.mkdir()
    holder = Holder(temporary)
    wrong = [] if holder.line() == "held" else ["nobody holds the device"]
    words = ("run", "small.toml", "--out", "run")
    first = optpipe(*words, folder=folder, temporary=temporary)
    if not until((folder / "run" / "environment.json").exists, first):
        wrong.append("the first never began")
    # One that would move it aside among them.
    others = [optpipe(*words, *(["--fresh"] if number % 2 else []), folder=folder) for number in range(count)]
    for ended in [end(process) for process in others]:
        wrong += one_line(ended, 2, "another optpipe is running in this folder")
    wrong += _ended(holder)
    ended = end(first)
    if ended.code:
        wrong.append(f"the first: exit code {ended.code}: {ended.err[-600:]!r}")
    else:
        wrong += _differs(folder / "run", expected)
        if "waiting for process" not in ended.err:
            wrong.append("the first did not say for whom it waited")
    moved = [path.name for path in folder.glob("run.old-*")]
    return Tried(count, (*wrong, *torn(folder), *(f"moved aside: {name}" for name in moved)))


def read_while_it_is_written(folder: Path, count: int) -> Tried:
    """Every command that reads a run, again and again until the run is finished."""
    expected = _alone(folder)
    run = optpipe("run", "small.toml", "--out", "new", folder=folder)
    wrong, reads = list[str](), 0
    if not until((folder / "new").exists, run):
        wrong.append("the run never began")
    while run.poll() is None:
        for command in READS:
            extra = {"bench": ["--duration", "0.1"], "rebuild": ["--out", f"rebuilt{reads}"]}
            ended = end(optpipe(command, "new", *extra.get(command, []), folder=folder))
            reads += 1
            if ended.code and (ended.code not in {1, 2, 4} or one_line(ended, ended.code, "Error: ")):
                wrong.append(f"{command}: exit code {ended.code}: {ended.err[-600:]!r}")
            shutil.rmtree(folder / f"rebuilt{reads - 1}", ignore_errors=True)
    ended = end(run)
    wrong += (
        [f"exit code {ended.code}: {ended.err[-600:]!r}"]
        if ended.code
        else _differs(folder / "new", expected)
    )
    return Tried(reads, (*wrong, *torn(folder)))


# ---------------------------------------------------------------- one device

HOLD = """
import os, sys
from optpipe import locks, timing
if sys.argv[1:]:
    os.setuid(int(sys.argv[1]))
with locks.telling(lambda line: print(line, flush=True)), timing.device_lock("cpu"):
    print("held", flush=True)
    sys.stdin.readline()
"""
"""Holds the device until it is written a line, or its input ends; as another user where one is named."""


class Holder:
    """A process that holds, or waits for, the device whose lock lies in a temporary folder."""

    def __init__(self, temporary: Path, user: int | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, *([] if user is None else [str(user)])],
            env={**os.environ, "PYTHONPATH": str(children.ROOT), "TMPDIR": str(temporary)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            umask=0o077,
        )

    def line(self) -> str:
        """What it says next; empty where it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """Let go, and how it ended."""
        _, err = self.process.communicate("\n", timeout=60)
        return self.process.returncode, err


def dead_holder(folder: Path, count: int) -> Tried:
    """The device held by processes that are killed, one after the other."""
    wrong = list[str]()
    for number in range(count):
        holder = Holder(folder)
        if (said := holder.line()) != "held":
            wrong.append(f"holder {number} said {said!r}")
        holder.process.kill()
        holder.process.communicate()
    last = Holder(folder)
    said = last.line()
    return Tried(count, (*wrong, *([] if said == "held" else [f"after them: {said!r}"]), *_ended(last)))


def live_holder(folder: Path, count: int) -> Tried:
    """Others come while it is held: each says for whom it waits, and has it in its turn."""
    first = Holder(folder)
    wrong = [] if first.line() == "held" else ["the first does not hold it"]
    others = [Holder(folder) for _ in range(count)]
    for other in others:
        said = other.line()
        if not said.startswith("waiting for process ") or not said.endswith(", which measures on cpu"):
            wrong.append(f"said {said!r}")
    wrong += _ended(first)
    for other in others:
        assert other.process.stdin is not None
        other.process.stdin.write("\n")
        other.process.stdin.flush()
    wrong += [f"never had it: {said!r}" for other in others if (said := other.line()) != "held"]
    return Tried(count, (*wrong, *(problem for other in others for problem in _ended(other))))


def interrupted(folder: Path, count: int) -> Tried:
    """A command that waits for the device says so, and ends at Ctrl-C within two seconds."""
    folder.rmdir()
    children.make(folder)
    temporary = folder / "temporary"
    temporary.mkdir()
    holder = Holder(temporary)
    wrong = [] if holder.line() == "held" else ["the first does not hold it"]
    waiting = [
        optpipe("bench", "model.onnx", "--threads", "1", folder=folder, temporary=temporary) for _ in range(2)
    ]
    for command in waiting:
        assert command.stderr is not None
        said = command.stderr.readline()
        if said != f"waiting for process {holder.process.pid}, which measures on cpu\n":
            wrong.append(f"said {said!r}")
        command.send_signal(signal.SIGINT)
        ended = end(command, 30)
        if ended.code != 130 or ended.seconds > 2.0:
            wrong.append(f"exit code {ended.code} after {ended.seconds:.1f} s: {ended.err!r}")
    return Tried(len(waiting), (*wrong, *_ended(holder)))


def odd_places(folder: Path, count: int) -> Tried:
    """What lies where the lock should be, or the folder of it gone: one clear line, or it is no matter."""
    tried = 0
    wrong = list[str]()
    for name, (spoil, fine) in PLACES.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        spoil(place / "optpipe-cpu.lock")
        tried += 1
        code = f"import tempfile\ntempfile.tempdir = {str(place)!r}\n{HOLD}"
        ended = end(start("-c", code, folder=folder), 60)
        told = ended.err.strip().splitlines()[-1:]
        clear = bool(told) and "RunError: " in told[0] and "set TMPDIR to a folder" in told[0]
        if (ended.code == 0) != fine or (not fine and not clear):
            wrong.append(f"{name}: exit code {ended.code}: {ended.err[-400:]!r}")
    return Tried(tried, tuple(wrong))


PLACES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda path: None, True),
    "a file of before": (lambda path: path.write_text("old"), True),
    "a folder": (lambda path: path.mkdir(), False),
    "a link elsewhere": (lambda path: path.symlink_to(path.with_name("elsewhere")), False),
    "a link to itself": (lambda path: path.symlink_to(path), False),
    "no temporary folder": (lambda path: path.parent.rmdir(), False),
}


def removed(folder: Path, count: int) -> Tried:
    """The lock's file is removed while it is held, as by a tidy system, and while others wait for it."""
    wrong = list[str]()
    first = Holder(folder)
    wrong += [] if first.line() == "held" else ["the first does not hold it"]
    others = [Holder(folder) for _ in range(2)]
    wrong += [f"said {said!r}" for other in others if not (said := other.line()).startswith("waiting")]
    (folder / "optpipe-cpu.lock").unlink()
    wrong += _ended(first)
    # Both were given the old file in turn; who has it looks whether it is still the one that others find.
    for other in others:
        assert other.process.stdin is not None
        other.process.stdin.write("\n")
        other.process.stdin.flush()
    wrong += [f"never had it: {said!r}" for other in others if (said := other.line()) != "held"]
    for other in others:
        wrong += _ended(other)
    last = Holder(folder)
    wrong += [] if last.line() == "held" else ["nobody gets it any more"]
    return Tried(len(others), (*wrong, *_ended(last)))


def other_users(folder: Path, count: int) -> Tried:
    """A file that another user made: under any umask of this version, by hand, and one that is closed.

    Only an administrator can begin processes of two users; for others there is nothing to try.
    """
    if os.geteuid() != 0:
        return Tried(0, ())
    wrong = list[str]()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        shared, path = Path(name), Path(name) / "optpipe-cpu.lock"
        shared.chmod(0o1777)
        first = Holder(shared)
        wrong += [] if first.line() == "held" else ["the first does not hold it"]
        wrong += [] if path.stat().st_mode & 0o777 == 0o666 else [f"its mode is {path.stat().st_mode:o}"]
        other = Holder(shared, NOBODY)
        wrong += [] if (said := other.line()).startswith("waiting for ") else [f"said {said!r}"]
        wrong += _ended(first)
        wrong += [] if (said := other.line()) == "held" else [f"said {said!r}"]
        wrong += _ended(other)
        path.chmod(0o644)
        other = Holder(shared, NOBODY)
        wrong += [] if (said := other.line()) == "held" else [f"where it may read: {said!r}"]
        wrong += _ended(other)
        path.chmod(0o600)
        code, err = Holder(shared, NOBODY).end()
        if code == 0 or "Permission denied), and by this file" not in err:
            wrong.append(f"where it may not: {code}, {err[-300:]!r}")
    return Tried(3, tuple(wrong))


NOBODY = 65534
"""The user of that name."""


def _ended(holder: Holder) -> list[str]:
    code, err = holder.end()
    return [f"a holder ended with {code}: {err[-300:]!r}"] if code else []


CASES = (
    Case("runs that share a cache, begun at once", "runs", sharing_a_cache),
    Case("runs that lend each other their files, begun at once", "runs", lending),
    Case("runs with two workers each, begun at once", "runs", with_workers),
    Case("runs in the folder of one that is at work, half of them `--fresh`", "runs", in_one_folder),
    Case("commands that read a run while it is written", "commands", read_while_it_is_written),
    Case("holders of the device that are killed", "processes", dead_holder, seldom=False),
    Case("processes that wait for a living holder", "processes", live_holder, seldom=False),
    Case("commands that are interrupted while they wait", "commands", interrupted),
    Case("processes that wait for a lock whose file is removed", "processes", removed, seldom=False),
    Case("odd things in the place of the lock", "places", odd_places, seldom=False),
    Case("a lock of another user's", "processes", other_users, seldom=False),
)

TITLE = "## Many at once"

INTRODUCTION = """\
`make faults CAMPAIGNS=crowd` runs many processes at once on what they share: a cache, a folder, the device.
Each run must end as it does alone, with the same plan, the same weights, byte for byte, and the same
accuracy; no temporary file may be left and no file be torn; and nobody may wait for ever. What is refused is
refused in one line with its exit code. Networks and timings are tiny. Nothing is written here unless all do.

The quick test suite tries the locks, the slow one all of it with two processes where these are ten.
"""

MENDED = """\
Found and mended by it:

- A process that waited for the device waited without a word. It now says for which process, and `run`,
  `sweep` and `bench` show that.
- A lock's file that was removed while it was held, as tidy systems do, let two processes measure at once, or
  run in one folder.
- The device's lock had the mode that its maker's umask left, so that another user might not be able to lock
  it. It is open to all now, no link is followed, and what cannot be made or locked is one line that names
  `TMPDIR`.
- Two runs that lent the same folder at the same moment could fail, and one that borrowed it meanwhile could
  have half of each: whoever changes or copies a lent folder now keeps the others out.

Processes keep out of each other's way by a file in the temporary folder. Where they have different ones
(`TMPDIR`, containers), they measure at the same time, and each other's noise.
"""


def section(rows: list[tuple[str, str, int]]) -> str:
    """The section of the page, with how many of each were tried."""
    lines = [TITLE, "", INTRODUCTION, "| what | tried |", "| --- | ---: |"]
    lines += [f"| {name} | {count} {what} |" for name, what, count in rows if count]
    return "\n".join([*lines, "", MENDED])
