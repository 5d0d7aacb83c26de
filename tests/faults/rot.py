"""Every kind of file of a run damaged in every way, the run then resumed, and read by what reads it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from faults import sittings, small_runs
from faults.report import Found
from faults.small_runs import DLLP, EKG, SWEEP, THREE_D, Kind
from optpipe import store

SEED = 9
TITLE = "## Damaged files"

INTRODUCTION = """\
`make faults CAMPAIGNS=rot` takes a file of every kind that a run leaves behind, in a finished run and in runs
that were stopped on the way, and cuts it off in its middle, empties it, flips one of its bits, changes one
digit of its JSON into another, removes it, takes the right to read it away, or puts a folder in its place.
The run is then resumed by the command that began it, and a finished run is read by each command that reads
the file: `report`, `gate`, `compare`, `verify`, `bench`, `rebuild`, `landscape`, `optpipe.load` and the
bundle's `run_engine.py`. Small runs, and the clock, are those of the kills above; processes give up the right
of root to read everything.

A case is wrong unless it ends in one of three ways: *mended*, with exit code 0 and the plan, weights, engines
and figures of the undisturbed run, what was damaged being made again; *named*, in one line that begins with
`Error:` and names the file or its folder, with an exit code of its own; or *not read*, where nothing hangs on
the file any more, with the same results.
"""

MENDED = """\
Found in making this campaign or by it, and mended:

- A digit that flipped in a trial, a step, a latency or a stage's result was read as if it had been measured.
  Every JSON file that optpipe reads back now ends with a seal over its content, reports and manifests too.
- Recovered, pruned and trained weights, checkpoints and those borrowed in a sweep were used as they were
  found. Each carries its digest now, and what does not match is trained again.
- The same went for the memory bank's logits and the original's logits.
- A stage that was done again after the loss of its result could leave later stages standing that were made
  from another choice. Each result now says what it was made from.
- A damaged bundle was noticed by `verify` and `load` alone; a resumed run left it as it was. It is exported
  again now, as is an engine of the original that is not the one that was built.
- `optpipe.load` raised the system's own error for a bundle that may not be read.
- A folder where an engine had been, in the ingest that a sweep lends or in the place of an ensemble's, failed
  the run or left the ensemble without a price. What was damaged is cleared away before it is made again.
- A lost result of the ingest began its count of drifts anew, so that latencies of an earlier drift counted
  again.
"""


# ---------------------------------------------------------------- damage

Damage = Callable[[Path, np.random.Generator], bool]
"""Damages a file; False where it cannot be damaged so."""


def _cut(path: Path, rng: np.random.Generator) -> bool:
    content = path.read_bytes()
    return _replace(path, content[: len(content) // 2]) if len(content) > 1 else False


def _empty(path: Path, rng: np.random.Generator) -> bool:
    return _replace(path, b"")


def _flip(path: Path, rng: np.random.Generator) -> bool:
    content = bytearray(path.read_bytes())
    if not content:
        return False
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return _replace(path, bytes(content))


def _digit(path: Path, rng: np.random.Generator) -> bool:
    """One digit of a number in JSON, so that it still reads as such a file."""
    if path.suffix != ".json":
        return False
    content = bytearray(path.read_bytes())
    places = [one.start() for one in re.finditer(rb"(?<=[\d.])[1-8]", bytes(content))]
    if not places:
        return False
    content[places[int(rng.integers(len(places)))]] += 1
    return _replace(path, bytes(content))


def _remove(path: Path, rng: np.random.Generator) -> bool:
    path.unlink()
    return True


def _forbid(path: Path, rng: np.random.Generator) -> bool:
    path.chmod(0)
    return True


def _folder(path: Path, rng: np.random.Generator) -> bool:
    path.unlink()
    path.mkdir()
    return True


def _replace(path: Path, content: bytes) -> bool:
    """Other bytes in the same file: a disk that rots changes all links to it."""
    if path.read_bytes() == content:
        return False
    path.write_bytes(content)
    return True


DAMAGES: dict[str, Damage] = {
    "cut off": _cut,
    "emptied": _empty,
    "a bit flipped": _flip,
    "a digit changed": _digit,
    "removed": _remove,
    "not readable": _forbid,
    "a folder instead": _folder,
}


# ---------------------------------------------------------------- runs to damage


@dataclass(frozen=True, slots=True)
class State:
    """A run as it was left: ``folder`` holds it and its cache; only files like ``patterns`` are damaged.

    With ``essence`` only plan, weights and figures must come out the same, whoever computed what.
    """

    name: str
    kind: Kind
    folder: Path
    wanted: dict[str, Any]
    patterns: tuple[str, ...] = ("*",)
    essence: bool = False
    readers: bool = False


UNTOUCHED = (".run.lock", "*/figures/*", "run/report.md", "run/report.html", "run/environment.json")
"""Locks, and what is written anew at the end of every run without being read."""


def _states(root: Path, tell: Callable[[str], None]) -> Iterator[State]:
    """The runs, each with what it comes to undisturbed."""
    homes = {kind.name: root / f"home-{number}" for number, kind in enumerate((EKG, DLLP, THREE_D, SWEEP))}
    for kind in (EKG, DLLP, THREE_D, SWEEP):
        kind.make(homes[kind.name])

    def made(kind: Kind, name: str, prepare: Callable[[], object] | None = None) -> Path:
        folder = root / name
        folder.mkdir()
        code, lines = sittings.finish(
            kind.words(folder / "run"), homes[kind.name], root / "said", prepare or light
        )
        if code not in {0, _STOPPED}:
            raise RuntimeError(f"{name}: exit code {code}: {lines[-3:]}")
        tell(f"made: {name}")
        return folder

    finished = made(EKG, "ekg")
    whole = small_runs.outcome(finished / "run")
    yield State("finished", EKG, finished, whole, readers=True)
    stopped = made(EKG, "ekg-stopped", _stop_in_recover)
    yield State("stopped in recover", EKG, stopped, whole)
    afresh = root / "ekg-afresh"
    shutil.copytree(finished, afresh)
    shutil.rmtree(afresh / "run")
    yield State("new, beside a cache", EKG, afresh, whole, (".optpipe-cache/*",), essence=True)
    ensemble = made(DLLP, "dllp")
    patterns = ("run/trials/*", "run/05-export/*", "run/deploy/uncertainty.onnx", "run/02-analyze/*")
    yield State("finished", DLLP, ensemble, small_runs.outcome(ensemble / "run"), patterns)
    searched = made(THREE_D, "three_d")
    wanted = small_runs.outcome(searched / "run")
    for stage in ("02-analyze", "03-prune", "04-recover", "05-export", "06-benchmark", "deploy"):
        shutil.rmtree(searched / "run" / stage)
    yield State("stopped after the search", THREE_D, searched, wanted, ("run/trials/*", "run/engines/*"))
    swept = made(SWEEP, "sweep")
    wanted = small_runs.outcome(swept / "run")
    shutil.rmtree(swept / "run" / "other-0.1")
    yield State("one run of two", SWEEP, swept, wanted, ("run/.optpipe-cache/*",), essence=True)


_STOPPED = 9


def light() -> None:
    """In a sitting: pages without figures, and no rights of root."""
    small_runs.without_figures()
    bereave()


def _stop_in_recover() -> None:
    """In a sitting: ends it as a kill would after the third checkpoint of the recovery."""
    light()
    save, count = store.DiskCheckpoint.save, Counter[str]()

    def saved(checkpoint: store.DiskCheckpoint, state: Any) -> None:
        save(checkpoint, state)
        count[checkpoint.path.parent.name] += 1
        if count["04-recover"] == 3:
            os._exit(_STOPPED)

    store.DiskCheckpoint.save = saved  # type: ignore[method-assign,assignment]


def bereave() -> None:
    """Take from this process what root may beyond others: to read and write what it has no right to.

    Nothing happens to a process of another user.
    """
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):  # effective, permitted, inheritable
        sets[place] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _patterns_of(state: State) -> dict[str, Path]:
    """A file of every kind that is there, by its name with digests as stars."""
    found: dict[str, Path] = {}
    for path in sorted(state.folder.rglob("*")):
        name = path.relative_to(state.folder).as_posix()
        if not path.is_file() or any(fnmatch(name, one) for one in UNTOUCHED):
            continue
        if any(fnmatch(name, one) for one in state.patterns):
            found.setdefault(re.sub(r"[0-9a-f]{16,64}", "*", name), path)
    return found


# ---------------------------------------------------------------- what reads a file

Words = tuple[str, ...]
_GATE: Words = ("gate", "run", "--max-accuracy-drop", "100")
_SURVEY: Words = (
    *("landscape", "run", "--images", "2", "--iterations", "2"),
    *("--points", "1", "--grid", "3"),
)
_BUNDLE: tuple[Words, ...] = (
    ("verify", "run"),
    ("load", "run"),
    ("bench", "run", "--duration", "0.1", "--warmUp", "1"),
    ("rebuild", "run", "--out", "rebuilt"),
    (
        *("run_engine", "--bundle", "run/deploy", "--duration", "0.01"),
        *("--warmUp", "1", "--json", "images.npy"),
    ),
)
READERS: tuple[tuple[str, tuple[Words, ...]], ...] = (
    ("run/report.json", (("report", "run"), _GATE, ("compare", "run", "run"))),
    ("run/gate.json", (_GATE,)),
    ("run/recipe.toml", (_SURVEY,)),
    ("run/inputs.json", (_SURVEY,)),
    ("run/03-prune/weights.safetensors", (_SURVEY,)),
    ("run/deploy/*", _BUNDLE),
)
"""What reads which files of a finished run."""


def _readers(name: str) -> tuple[tuple[str, ...], ...]:
    return next((words for pattern, words in READERS if fnmatch(name, pattern)), ())


# ---------------------------------------------------------------- the campaign


@dataclass
class Tally:
    """What came of the cases of one state and one command."""

    name: str
    files: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def run(root: Path, share: int, tell: Callable[[str], None]) -> Found:
    """Every ``share``-th case of all."""
    tallies: dict[str, Tally] = {}
    kinds: set[str] = set()
    damaged: Counter[str] = Counter()
    number = 0
    for state in _states(root, tell):
        resumed = tallies.setdefault(f"{state.kind.name}, {state.name}: resumed", Tally(""))
        for name, path in _patterns_of(state).items():
            kinds.add(name)
            resumed.files += 1
            for damage, spoil in DAMAGES.items():
                number += 1
                if number % share:
                    continue
                tried = partial(case, state, path, spoil, (SEED, number), root)
                ended, wrong = tried(state.kind.words(root / "case" / "run"))
                if not ended:
                    continue
                damaged[damage] += 1
                resumed.ended[ended] += 1
                resumed.wrong += [f"{name}, {damage}: {one}" for one in wrong]
                for words in _readers(name) if state.readers else ():
                    read = tallies.setdefault(f"{state.kind.name}, {state.name}: {words[0]}", Tally(""))
                    ended, wrong = tried(words)
                    read.ended[ended] += 1
                    read.wrong += [f"{name}, {damage}: {one}" for one in wrong]
        tell(f"{state.kind.name}, {state.name}: {dict(resumed.ended)}, {len(resumed.wrong)} wrong")
        for one in (one for tally in tallies.values() for one in tally.wrong):
            tell(f"    {one}")
    for name, tally in tallies.items():
        tally.name = name
    problems = [f"{one.name}: {problem}" for one in tallies.values() for problem in one.wrong]
    return Found(section(list(tallies.values()), kinds, damaged), tuple(problems))


def case(
    state: State, path: Path, spoil: Damage, seed: Sequence[int], root: Path, words: tuple[str, ...]
) -> tuple[str, list[str]]:
    """Damage a copy, give a command, and say how that ended; an empty word where there is no such damage."""
    folder = root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(state.folder, folder)
    victim = folder / path.relative_to(state.folder)
    if not spoil(victim, np.random.default_rng(list(seed))):
        return "", []
    begins_with_recipe = words[0] in {"run", "sweep"}
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8))
    number = (EKG, DLLP, THREE_D, SWEEP).index(state.kind)
    home = root / f"home-{number}" if begins_with_recipe else folder
    code, lines = sittings.finish(words, home, root / "said", light)
    if code:
        return "named", unclear(code, lines, victim)
    if not begins_with_recipe:
        return _as_undamaged(state, root, words, lines)
    return _as_wanted(state, folder, victim)


def unclear(code: int, lines: Sequence[str], victim: Path) -> list[str]:
    """What is wrong with a failure: it must be one line that names the file or the folder that it lies in."""
    errors = [line for line in lines if line.startswith("Error: ")]
    failed = [line for line in lines if line.startswith("FAILED ")]  # what verify says of each file
    wrong = [] if code in {1, 2, 3, 4} else [f"exit code {code}"]
    if len(errors) != 1 or any("Traceback" in line for line in lines) or "unexpected" in errors[0]:
        return [*wrong, f"no clear line: {lines[-4:]}"]
    places = (victim.name, victim.parent.name)
    if not any(place in line for line in (*errors, *failed) for place in places):
        wrong.append(f"does not name the file: {errors[0]}")
    return wrong


def _as_wanted(state: State, folder: Path, victim: Path) -> tuple[str, list[str]]:
    """How a run that ended well compares with the undisturbed one."""
    if victim.is_file():
        victim.chmod(0o644)
    wanted, found = state.wanted, small_runs.outcome(folder / "run")
    if state.essence:
        wanted, found = _essence(wanted), _essence(found)
    own = victim.relative_to(folder / "run").as_posix() if victim.is_relative_to(folder / "run") else ""
    same = wanted.get(own) == found.get(own)
    return ("mended" if same else "not read"), small_runs.differences(
        _without(own, wanted), _without(own, found)
    )


def _without(name: str, outcome: dict[str, Any]) -> dict[str, Any]:
    listed = [one for one in outcome.get("<files>", ()) if one != name]
    return {key: value for key, value in outcome.items() if key != name} | {"<files>": listed}


def _essence(outcome: dict[str, Any]) -> dict[str, Any]:
    """Plan, weights, engines and figures, without who computed what and where it was kept."""
    names = ("weights.safetensors", "model.onnx", "plan.json", "report.json")
    found = {name: one for name, one in outcome.items() if name.endswith(names) and "engines/" not in name}
    found = {name: one for name, one in found.items() if "cache" not in name and "trials/" not in name}
    for name, one in found.items():
        if name.endswith("report.json"):
            found[name] = {key: value for key, value in one.items() if key not in {"engines", "warnings"}}
    return found


_KNOWN: dict[tuple[str, tuple[str, ...]], list[str]] = {}


def _as_undamaged(
    state: State, root: Path, words: tuple[str, ...], lines: list[str]
) -> tuple[str, list[str]]:
    """How what a command showed compares with what it shows of the undamaged run."""
    key = state.name, words
    if key not in _KNOWN:
        folder = root / "undamaged"
        if not folder.exists():
            shutil.copytree(state.folder, folder)
            shutil.copy(root / "case" / "images.npy", folder)
        code, shown = sittings.finish(words, folder, root / "said", light)
        if code:
            raise RuntimeError(f"{words}: {shown}")
        shutil.rmtree(folder / "rebuilt", ignore_errors=True)
        _KNOWN[key] = _shown(words, shown)
    known, found = _KNOWN[key], _shown(words, lines)
    if known != found:
        return "mended", [f"{words[0]} shows {[line for line in found if line not in known][:3]}"]
    return "not read", []


def _shown(words: tuple[str, ...], lines: list[str]) -> list[str]:
    """What a command says without the times that it took itself."""
    if words[0] == "run_engine":
        return [json.dumps(one) for one in json.loads("\n".join(lines))["images"]]
    if words[0] == "landscape":
        lines = [re.sub(r" +[\d.]+$", "", line) for line in lines]
    return [re.sub(r"\d+\.\d+ s\b|/\S*/", "", line) for line in lines]


def section(tallies: Sequence[Tally], kinds: set[str], damaged: Counter[str]) -> str:
    """The section as it stands in the page."""
    ways = ("mended", "named", "not read")
    lines = [TITLE, "", INTRODUCTION, f"| a damaged file of | cases | {' | '.join(ways)} | wrong |"]
    lines += ["| --- |" + " ---: |" * (len(ways) + 2)]
    whole: Counter[str] = Counter()
    for one in tallies:
        whole.update(one.ended)
        counts = " | ".join(str(one.ended[way]) for way in ways)
        lines.append(f"| {one.name} | {sum(one.ended.values())} | {counts} | {len(one.wrong)} |")
    counts = " | ".join(str(whole[way]) for way in ways)
    wrong = sum(len(one.wrong) for one in tallies)
    lines += [f"| all | {sum(whole.values())} | {counts} | {wrong} |", ""]
    shares = ", ".join(f"{name} {count}" for name, count in damaged.items())
    lines += [
        f"Measured {time.strftime('%Y-%m-%d', time.gmtime())}: files of {len(kinds)} kinds, damaged "
        f"{sum(damaged.values())} times ({shares}), seed {SEED}.",
        "",
    ]
    return "\n".join([*lines, MENDED])
