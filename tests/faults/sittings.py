"""Command lines of optpipe in processes of their own, that begin in a moment and can be killed.

They are forked from a process that has imported everything (``faults.warmed``): importing torch would take
seconds of each.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Sitting:
    """A process that is at a command line; what it says goes to the file ``said``."""

    process: ForkServerProcess
    said: Path

    def end(self, within_s: float) -> int | None:
        """Its exit code, or None where it has not ended in so many seconds."""
        self.process.join(within_s)
        return self.process.exitcode

    def kill(self) -> None:
        """End it by SIGKILL, which it cannot see coming."""
        self.process.kill()
        self.process.join()

    def lines(self) -> list[str]:
        """What it has said."""
        return self.said.read_text(encoding="utf-8", errors="replace").splitlines()


def begin(
    words: tuple[str, ...], home: Path, said: Path, prepare: Callable[[], object] | None = None
) -> Sitting:
    """Begin a command line in the folder ``home``; its process calls ``prepare``, of a module, first."""
    process = _context().Process(target=_carry_out, args=(words, str(home), str(said), prepare))
    process.start()
    return Sitting(process, said)


def finish(
    words: tuple[str, ...],
    home: Path,
    said: Path,
    prepare: Callable[[], object] | None = None,
    within_s: float = 600.0,
) -> tuple[int, list[str]]:
    """Carry a command line out: its exit code, and what it said."""
    sitting = begin(words, home, said, prepare)
    code = sitting.end(within_s)
    if code is None:
        sitting.kill()
        raise TimeoutError(f"{' '.join(words)}: has not ended in {within_s:.0f} s")
    return code, sitting.lines()


def _context() -> ForkServerContext:
    # The server is a fresh interpreter, which finds modules by its environment alone.
    places = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults.warmed"])
    return context


def _carry_out(words: tuple[str, ...], home: str, said: str, prepare: Callable[[], object] | None) -> None:
    from optpipe import cli
    from optpipe.deploy import run_engine
    from optpipe.errors import OptpipeError

    if "faults.warmed" not in sys.modules:  # what fails there fails silently
        raise RuntimeError("the process that this one was forked from is not warm")
    from faults import small_runs
    from optpipe.pipeline.workers import child

    _redirect(said)
    os.chdir(home)
    small_runs.keep_exports(Path(said).parent / "exports")
    child.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=None)  # type: ignore[assignment,attr-defined]
    if prepare is not None:
        prepare()
    try:
        if words[0] == "load":
            _load(words[1])
        elif words[0] == "run_engine":
            _leave(run_engine.main(list(words[1:])))
        else:
            # The list keeps the command line from ending the process its own way.
            cli.main(list(words))
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except SystemExit as stop:
        _leave(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except BaseException:
        traceback.print_exc()
        _leave(70)
    _leave(0)


def _load(run: str) -> None:
    """What a program does that takes the network of a run: print its weights' digest."""
    import optpipe
    from optpipe import seals

    print(seals.tensors_sha256(optpipe.load(run).state_dict()))


class Forked:
    """A worker's process, forked where the run would begin a fresh interpreter."""

    def __init__(self, command: Sequence[str], **settings: object) -> None:
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            from optpipe.pipeline.workers import process

            try:
                process.main(int(command[-1]))
            finally:
                os._exit(1)

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code


def _redirect(said: str) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
