"""A case of the catalogue, and how it is run: in this process, in a folder of its own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import optpipe
from optpipe import cli
from optpipe.deploy import run_engine
from optpipe.errors import OptpipeError

LONGEST = 1500
"""Characters that an error may have and still be one clear line."""


@dataclass(frozen=True, slots=True)
class Case:
    """One bad input: how the good folder is spoilt, what is called, and how that must end.

    ``words`` are a command line of optpipe, with the folder as the working folder. The first may also be
    "run_engine", the program in a bundle, or "load", which is ``optpipe.load``. ``says`` is a piece of the
    error; ``shows`` is how stdout begins, where a command answers before it fails. A case of exit code 0 is
    an input that only looks dangerous.
    """

    name: str
    make: Callable[[Path], object]
    words: tuple[str, ...]
    code: int
    says: str
    shows: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended, and which files were changed, lost or left half written by it."""

    code: int
    out: str
    err: str
    spoilt: tuple[str, ...]


def run(case: Case, good: Path, folder: Path) -> Outcome:
    """Copy the ``good`` folder to ``folder``, spoil it and make the call."""
    shutil.copytree(good, folder, symlinks=True)
    case.make(folder)
    return call(case.words, folder)


def call(words: tuple[str, ...], folder: Path) -> Outcome:
    """Make a call in a folder, as a shell would."""
    before = _contents(folder)
    code, out, err = _called(words, folder)
    after = _contents(folder)
    spoilt = [name for name, content in before.items() if after.get(name) != content]
    spoilt += [name for name in after if name.endswith(".tmp")]
    return Outcome(code, out, err, tuple(spoilt))


def faults(case: Case, found: Outcome) -> list[str]:
    """In what an outcome is not what its case asks for; empty where it is."""
    wrong = [] if found.code == case.code else [f"exit code {found.code}, not {case.code}"]
    if case.code:
        wrong += unclear(found)
        if case.says not in found.err:
            wrong.append(f"the error does not say {case.says!r}")
    if not found.out.startswith(case.shows) or (case.code and not case.shows and found.out):
        wrong.append(f"stdout is {found.out[:200]!r}")
    return [*wrong, *_changed(found)] + ([f"stderr is {found.err[:600]!r}"] if wrong else [])


def unclear(found: Outcome) -> list[str]:
    """In what a failure is no clear line: more than one, a traceback, a control character."""
    lines = found.err.splitlines()
    usage = found.code == 2 and lines[:1] and lines[0].startswith("Usage: optpipe ")
    errors = [line for line in lines if line.startswith("Error: ")]
    wrong = []
    if "Traceback" in found.err or "Error: unexpected " in found.err:
        wrong.append("nobody foresaw it")
    if len(errors) != 1 or (len(lines) != 1 and not usage):
        wrong.append(f"{len(lines)} lines, {len(errors)} of them errors")
    if any(not line.isprintable() for line in lines):
        wrong.append("a control character")
    if any(len(line) > LONGEST for line in lines):
        wrong.append(f"a line of {max(map(len, lines))} characters")
    return wrong


def strange(found: Outcome) -> list[str]:
    """What no input may do: the wrong kind of exit, no clear line, or a file lost."""
    if found.code == 0:
        return [*_changed(found)]
    wrong = [] if found.code in {1, 2, 3, 4} else [f"exit code {found.code}"]
    wrong += [*unclear(found), *_changed(found)]
    return wrong + ([f"stderr is {found.err[:600]!r}"] if wrong else [])


def _changed(found: Outcome) -> list[str]:
    return [f"spoilt: {', '.join(found.spoilt)}"] if found.spoilt else []


def _called(words: tuple[str, ...], folder: Path) -> tuple[int, str, str]:
    with _captured() as texts, contextlib.chdir(folder), _untouched():
        code = _code(words, folder)
    return code, texts["out"], texts["err"]


def _code(words: tuple[str, ...], folder: Path) -> int:
    try:
        if words[0] == "load":
            optpipe.load(folder / "run")
        elif words[0] == "run_engine":
            bundle = folder / "run" / "deploy"
            return run_engine.main(
                ["--bundle", str(bundle), "--duration", "0.01", "--warmUp", "1", *words[1:]]
            )
        else:
            cli.main(list(words))
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _captured() -> Iterator[dict[str, str]]:
    """What is written to the two streams, by Python and by the libraries below it."""
    texts: dict[str, str] = {}
    streams = sys.stdout, sys.stderr
    for stream in streams:
        stream.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        with (
            os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace") as sys.stdout,
            os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") as sys.stderr,
        ):
            try:
                yield texts
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                for number, descriptor in enumerate(kept, start=1):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
        sys.stdout, sys.stderr = streams
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            texts[name] = file.read().decode(errors="replace")


@contextlib.contextmanager
def _untouched() -> Iterator[None]:
    """Modules and warnings as they were; a user's own modules are imported anew by the next case."""
    _forget_own()
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("default")
        yield
    _forget_own()


def _forget_own() -> None:
    sys.modules.pop("mine", None)


def _contents(folder: Path) -> Mapping[str, str]:
    """Every file and link below a folder and what it holds, in short."""
    found: dict[str, str] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in (*folders, *names):
            path = Path(root) / name
            if path.is_symlink():
                found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
            elif path.is_file():
                content = path.read_bytes()
                found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found
