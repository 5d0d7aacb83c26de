"""Runs whose disk is full, or cannot be written, from each of their writes on; and goes on once it can."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from faults import sittings, small_runs
from faults.kills import torn
from faults.report import Found
from faults.rot import light
from faults.small_runs import EKG, PRACTISE, Kind
from optpipe import timing

TITLE = "## Full disks, and disks that cannot be written"

INTRODUCTION = """\
`make faults CAMPAIGNS=disk` stops small runs at every one of their writes: each time that Python opens a file
to write, renames, links, makes a folder or removes something in the run's folder, in the cache beside it or
among the temporary files. There the process is forked. The one half meets a fault and goes on to its end, the
other waits, puts the files back and goes on to its next write. Two faults are met at each:

- *full*: the disk, a real one of a few megabytes in memory, is filled to its last page, so that this write
  and all after it, by whatever library, fail as they do on a full disk. Where mounting is not permitted,
  writes fail by the same error instead, and the section says so.
- *read-only*: this write and all after it fail as on a disk that was mounted read-only, at every second write
  as for want of permission.

The run must end in one line that begins with `Error:`, without a traceback and with exit code 4 (2 where it
had not begun), unless it could do without that write; every file under its final name must be whole, and on a
full disk no temporary file may be left. Then there is room again: what a fault left behind is resumed by the
same command, and must come to the plan, weights, engines, figures and files of the undisturbed run. States
that are alike are resumed once.
"""

MENDED = """\
Found in making this campaign or by it, and mended:

- ONNX Runtime does not tell that it could not write its profile, and reading it ended in a traceback. The run
  now goes on without the times of the layers, which the report says.
- Temporary files that could be made and not removed ended in an endless recursion, in ONNX Runtime's
  quantization and in folders of optpipe's own. The former says so now, the latter do without.
- A full disk left half a line at the end of `events.jsonl`, to which the next line was glued. A line is
  written whole or taken back.
"""

ROOM = 48 * 2**20
"""Bytes of the disk that is filled."""
RESUMED = 40
"""States at the most that are resumed, evenly chosen."""
FAULTS = ("full", "read-only")
_FILLER = "filler"
_WRITES = {"os.rename": 1, "os.link": 1, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}
"""Audit events of what changes a folder, and the place of the path among their arguments."""


@dataclass(frozen=True, slots=True)
class Point:
    """One write of a run and one fault there: how the run then ended, and what it left."""

    number: int
    event: str
    name: str
    fault: str
    code: int
    lines: tuple[str, ...]
    wrong: tuple[str, ...]
    state: str


# ---------------------------------------------------------------- in the sitting


class Starver:
    """Forks the process at each write below ``disk``; one half meets a fault there.

    What comes of it is appended to the file ``told``; states go to folders in ``states``, one of each kind.
    Every ``every``-th write alone is tried.
    """

    def __init__(self, disk: Path, told: Path, states: Path, every: int, *, real: bool) -> None:
        self._disk = str(disk)
        self._told = told
        self._states = states
        self._every = every
        self._real = real
        self._count = 0
        self._busy = False
        self._failing: int | None = None

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit hook: called before each write, which fails where this raises."""
        if self._busy:
            return
        path = _written(event, arguments)
        if path is None or not path.startswith(self._disk):
            return
        if self._failing is not None:
            self._refuse(event, path)
            return
        self._count += 1
        if self._count % self._every:
            return
        self._busy = True
        try:
            # The half that meets a fault leaves here.
            any(self._fork(event, path, fault) for fault in FAULTS)
        finally:
            self._busy = False
        self._refuse(event, path)

    def _refuse(self, event: str, path: str) -> None:
        """Raise what the system would; on a full disk something can still be taken away."""
        frees = event in {"os.remove", "os.rmdir", "os.truncate"}
        if self._failing is not None and not (frees and self._failing == errno.ENOSPC):
            raise OSError(self._failing, os.strerror(self._failing), path)

    def _fork(self, event: str, path: str, fault: str) -> bool:
        """Whether this is the half that meets the fault; the other has waited for it."""
        disk = Path(self._disk)
        kept = Path(tempfile.mkdtemp(dir=self._told.parent))
        before = files_of(disk)
        shutil.copytree(disk, kept, dirs_exist_ok=True)
        said = kept.with_suffix(".said")
        child = os.fork()
        if child == 0:
            self._meet(fault, said)
            return True
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (disk / _FILLER).unlink(missing_ok=True)
        lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
        said.unlink()
        wrong = [*_unclear(code, lines), *torn(disk), *unreadable(disk)]
        if fault == "full":
            wrong += [f"{one.relative_to(disk)} is left over" for one in disk.rglob(".*.tmp")]
        told = (
            *(self._count, event, Path(path).relative_to(disk).as_posix(), fault),
            *(code, lines[-3:], wrong, self._keep_state(disk)),
        )
        with self._told.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
        put_back(disk, kept, before)
        shutil.rmtree(kept)
        return False

    def _meet(self, fault: str, said: Path) -> None:
        """In the half that meets the fault: everything fails from here on."""
        # The device's lock is one for both halves, and the other waits for this one.
        timing.device_lock = lambda device, **named: contextlib.nullcontext()  # type: ignore[assignment]
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if fault == "full" and self._real:
            _fill(Path(self._disk) / _FILLER)
            self._every = sys.maxsize  # no other fork: the disk itself refuses
            return
        refused = errno.EACCES if self._count % 2 else errno.EROFS
        self._failing = errno.ENOSPC if fault == "full" else refused

    def _keep_state(self, disk: Path) -> str:
        """Where what was left is kept, to be resumed; the same for states that are alike."""
        whole = hashlib.sha256()
        for path in sorted(disk.rglob("*")):
            if path.is_file() and path.name not in {"events.jsonl", "failure.json"}:
                name = path.relative_to(disk).as_posix()
                whole.update(b"tmp" if path.name.endswith(".tmp") else f"{name} {_digest(path)}".encode())
        state = whole.hexdigest()[:16]
        if not (self._states / state).exists():
            shutil.copytree(disk, self._states / state)
        return state


def _written(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to change; None where it changes nothing."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
    elif event in _WRITES:
        path = arguments[_WRITES[event]]
    else:
        return None
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    if not name:
        return None
    name = os.path.abspath(name)  # noqa: PTH100 (pathlib would follow links)
    there = os.path.lexists(name)
    # The system looks first whether there is anything to do.
    if (event == "os.mkdir" and there) or (event in {"os.remove", "os.rmdir"} and not there):
        return None
    return name


def _fill(path: Path) -> None:
    """A file that takes all the room that is left on its disk, to the last page."""
    size = 2**20
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2


def files_of(disk: Path) -> dict[Path, tuple[int, int, int]]:
    found = {}
    for path in disk.rglob("*"):
        status = path.stat()
        found[path] = status.st_ino, status.st_size if path.is_file() else 0, status.st_mtime_ns
    return found


def put_back(disk: Path, kept: Path, before: dict[Path, tuple[int, int, int]]) -> None:
    """Make a disk what it was; files that nothing has changed stay the same files."""
    for path in sorted(files_of(disk), reverse=True):
        if path not in before:
            path.rmdir() if path.is_dir() else path.unlink()
    left = files_of(disk)
    for path, status in sorted(before.items()):
        copy = kept / path.relative_to(disk)
        if copy.is_dir():
            path.mkdir(parents=True, exist_ok=True)
        elif left.get(path) != status:
            path.write_bytes(copy.read_bytes())


def unreadable(disk: Path) -> list[str]:
    """Arrays, ONNX files and lines of events that are not whole."""
    import onnx

    wrong = []
    for path in (one for one in disk.rglob("*") if one.is_file() and not one.name.endswith(".tmp")):
        try:
            if path.suffix == ".npy":
                np.load(path, allow_pickle=False)
            elif path.suffix == ".onnx":
                onnx.load(path)
            elif path.name == "events.jsonl":
                text = path.read_text(encoding="utf-8")
                assert text.endswith("\n") or not text
                [json.loads(line) for line in text.splitlines()]
        except Exception as error:
            wrong.append(f"{path.relative_to(disk)} is half written: {type(error).__name__}")
    return wrong


def _unclear(code: int, lines: Sequence[str]) -> list[str]:
    errors = [line for line in lines if line.startswith("Error: ")]
    if any("Traceback" in line or "Error: unexpected" in line for line in lines):
        return [f"nobody foresaw it: {list(lines[-3:])}"]
    if code == 0:
        return [f"exit code 0 with {errors}"] if errors else []
    if code not in {2, 4} or len(errors) != 1:
        return [f"exit code {code}: {list(lines[-3:])}"]
    return []


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def starve(disk: Path, told: Path, states: Path, every: int, *, real: bool) -> None:
    """In a sitting: from now on each write below ``disk`` is tried with every fault."""
    light()
    tempfile.tempdir = str(disk / "tmp")
    sys.addaudithook(Starver(disk, told, states, every, real=real).hook)


def _elsewhere(folder: Path) -> None:
    """In a sitting: temporary files lie there."""
    light()
    tempfile.tempdir = str(folder)


# ---------------------------------------------------------------- the campaign


@dataclass
class Tally:
    """What came of one command's writes."""

    name: str
    points: list[Point] = field(default_factory=list)
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, fault: str, *codes: int) -> int:
        """How many ended with these exit codes."""
        return sum(one.fault == fault and one.code in codes for one in self.points)


def run(root: Path, share: int, tell: Callable[[str], None]) -> Found:
    """Every ``share``-th write of two kinds of run, and of what is done with a finished one."""
    tallies: list[Tally] = []
    with _disk(root / "disk") as (disk, real):
        for number, kind in enumerate((PRACTISE, EKG)):
            tallies += _starved(kind, root / str(number), disk, share, tell, real=real)
    problems = [f"{one.name}: {problem}" for one in tallies for problem in one.wrong]
    return Found(section(tallies, real=real), tuple(problems))


_AFTERWARDS = (
    ("report", "run"),
    ("rebuild", "run"),
    ("compare", "run", "run", "--out", "compared"),
    ("gate", "run", "--max-accuracy-drop", "100", "--junit", "gate.xml"),
)
"""Commands that write to a finished run, or about it."""


def _starved(
    kind: Kind, root: Path, disk: Path, share: int, tell: Callable[[str], None], *, real: bool
) -> Iterator[Tally]:
    """Of one kind of run: all its writes, those of the commands after it, and what became of both."""
    home = root / "home"
    kind.make(home)
    (root / "alone").mkdir()
    words = kind.words(root / "alone" / "run")
    code, lines = sittings.finish(words, home, root / "said", light)
    if code:
        raise RuntimeError(f"{kind.name}: exit code {code}: {lines[-3:]}")
    wanted = small_runs.outcome(root / "alone" / "run")

    _clear(disk)
    tally = tried(f"{kind.name}: run", kind.words(disk / "run"), home, root / "run", disk, share, real=real)
    tally.wrong += [
        f"beside its faults: {one}"
        for one in small_runs.differences(wanted, small_runs.outcome(disk / "run"))
    ]
    _resume(tally, kind, home, root, wanted, share)
    tell(f"{tally.name}: {len(tally.points)} points, {tally.resumed} resumed, {len(tally.wrong)} wrong")
    yield tally
    for words in _AFTERWARDS if kind is PRACTISE else ():
        one = tried(f"{kind.name}: {words[0]}", words, disk, root / words[0], disk, share, real=real)
        tell(f"{one.name}: {len(one.points)} points, {len(one.wrong)} wrong")
        yield one


def tried(
    name: str, words: tuple[str, ...], home: Path, root: Path, disk: Path, share: int, *, real: bool
) -> Tally:
    """Carry a command line out, trying every ``share``-th of its writes."""
    (root / "states").mkdir(parents=True)
    (disk / "tmp").mkdir(exist_ok=True)
    prepare = partial(starve, disk, root / "told", root / "states", share, real=real)
    tally = Tally(name)
    code, lines = sittings.finish(words, home, root.parent / "said", prepare, within_s=3000.0)
    if code:
        tally.wrong.append(f"without a fault: exit code {code}: {lines[-3:]}")
    told = root / "told"
    for line in told.read_text(encoding="utf-8").splitlines() if told.exists() else ():
        number, event, path, fault, code, said, wrong, state = json.loads(line)
        point = Point(number, event, path, fault, code, tuple(said), tuple(wrong), state)
        tally.points.append(point)
        tally.wrong += [f"{fault} at write {number}, {event} {path}: {one}" for one in point.wrong]
    return tally


def _resume(tally: Tally, kind: Kind, home: Path, root: Path, wanted: dict[str, Any], share: int) -> None:
    """Resume what the faults left, where there is room."""
    states = {one.state: one for one in tally.points if one.code}
    most = max(1, RESUMED // share)
    step = max(1, -(-len(states) // most))
    for state, point in list(states.items())[::step]:
        folder = root / "resumed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "run" / "states" / state, folder)
        prepare = partial(_elsewhere, folder / "tmp")
        code, lines = sittings.finish(kind.words(folder / "run"), home, root / "said", prepare)
        tally.resumed += 1
        where = f"resumed after {point.fault} at write {point.number}, {point.event} {point.name}"
        if code:
            tally.wrong.append(f"{where}: exit code {code}: {lines[-3:]}")
            continue
        wrong = small_runs.differences(wanted, small_runs.outcome(folder / "run"))
        wrong += [f"{one.relative_to(folder)} is left over" for one in folder.rglob(".*.tmp")]
        tally.wrong += [f"{where}: {one}" for one in wrong]


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A small disk of its own, and whether it is one: mounting takes the rights of root."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(folder)], check=False, capture_output=True
    )
    try:
        yield folder, mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _clear(disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def section(tallies: Sequence[Tally], *, real: bool) -> str:
    """The section as it stands in the page."""
    text = io.StringIO()
    print(TITLE, "", INTRODUCTION, sep="\n", file=text)
    print(
        "| command | writes | full: failed | went on | read-only: failed | went on | resumed | wrong |",
        file=text,
    )
    print("| --- |" + " ---: |" * 7, file=text)
    totals = Counter[str]()
    for one in tallies:
        cells = {
            "writes": len({point.number for point in one.points}),
            "full": one.count("full", 2, 4),
            "full, went on": one.count("full", 0),
            "read-only": one.count("read-only", 2, 4),
            "read-only, went on": one.count("read-only", 0),
            "resumed": one.resumed,
            "wrong": len(one.wrong),
        }
        totals.update(cells)
        print(f"| {one.name} | {' | '.join(map(str, cells.values()))} |", file=text)
    print(f"| all | {' | '.join(map(str, totals.values()))} |\n", file=text)
    how = (
        f"a real disk of {ROOM // 2**20} MiB was filled"
        if real
        else "no disk could be mounted: writes failed by the error"
    )
    print(f"Measured {time.strftime('%Y-%m-%d', time.gmtime())}; {how}.\n\n{MENDED}", end="", file=text)
    return text.getvalue()
