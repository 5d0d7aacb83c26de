"""Ctrl-C and SIGTERM in real processes: how soon they end, with what code, what they say and leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_pipeline import write_recipe

from optpipe import interruption
from optpipe.cli.interrupted import last_words

ROOT = Path(__file__).resolve().parents[1]
SOON_S = 2.0
"""How soon a process must have ended; on a machine that others use too, so much processor time."""

BEGIN = """
import contextlib, hashlib, os, pathlib, signal, subprocess, sys, tempfile, time
from optpipe import files, interruption
# Python ignores an interrupt whose signal its parent ignored, as shells do for what runs behind them.
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = pathlib.Path(sys.argv[1])

def ready():
    print("ready", flush=True)

def hang():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one call, and no instruction of Python in it
"""


@dataclass
class Ended:
    """How a process ended after its last signal: its code, stderr, and the time that took."""

    code: int
    said: str
    wall_s: float
    processor_s: float

    def soon(self) -> bool:
        return min(self.wall_s, self.processor_s) < SOON_S


def signalled(
    command: Sequence[str],
    until: str,
    numbers: Sequence[int],
    *,
    cwd: Path | None = None,
    after_s: float = 0.0,
) -> Ended:
    """Start a process, and send it signals once a line of its output holds ``until``."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
    )
    with process:
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                lines.append(line)
                if until in line:
                    break
            else:
                pytest.fail("".join(lines))
            time.sleep(after_s)
            wall, used = time.monotonic(), processor_s(process.pid)
            for number in numbers:
                process.send_signal(number)
                time.sleep(0.2 if len(numbers) > 1 else 0.0)
            pid, status, usage = os.wait4(process.pid, 0)
            assert pid == process.pid
            process.returncode = os.waitstatus_to_exitcode(status)
            wall_s = time.monotonic() - wall
            said = process.stdout.read()
        finally:
            if process.returncode is None:
                process.kill()
    return Ended(process.returncode, said, wall_s, usage.ru_utime + usage.ru_stime - used)


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    values = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def script(text: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", BEGIN + text, str(folder)]


WATCHED = """
with interruption.Watch(lambda: "last words") as watch:
    try:
{body}
    except KeyboardInterrupt:
        print("stopped", flush=True)
        sys.exit(watch.exit_code)
"""


def watched(body: str, folder: Path) -> list[str]:
    return script(WATCHED.format(body="\n".join(f"        {line}" for line in body.splitlines())), folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_an_interrupt_with_its_own_code(tmp_path: Path, number: int, code: int) -> None:
    ended = signalled(watched("ready()\ntime.sleep(60)", tmp_path), "ready", [number])
    assert (ended.code, ended.said) == (code, "stopped\n")
    assert ended.soon()


def test_a_call_that_never_comes_back_is_ended_and_leaves_nothing(tmp_path: Path) -> None:
    body = """
child = subprocess.Popen(["sleep", "60"])
tempfile.tempdir = str(folder)
(folder / "pid").write_text(str(child.pid))
with files.replacing(folder / "weights") as path, interruption.temporary_folder() as made:
    path.touch()
    (made / "file").touch()
    ready()
    hang()
"""
    ended = signalled(watched(body.strip(), tmp_path), "ready", [signal.SIGINT])
    assert (ended.code, ended.said) == (130, "\nlast words\n")
    assert ended.wall_s > interruption.GRACE_S / 2, "it had its time to end by itself"
    # All of the call's time is the processor's, so that only the clock tells how soon it ended.
    assert ended.wall_s < SOON_S or ended.processor_s < interruption.GRACE_S + 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]
    child = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):  # the system reaps what has no parent any more
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.02)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    ended = signalled(watched("ready()\nhang()", tmp_path), "ready", [signal.SIGINT, signal.SIGINT])
    assert (ended.code, ended.said) == (130, "\nlast words\n")
    assert min(ended.wall_s, ended.processor_s) < interruption.GRACE_S


def test_what_is_held_back_is_done_before_the_interrupt(tmp_path: Path) -> None:
    body = """
with interruption.held_back() as asked:
    with interruption.held_back():
        ready()
        time.sleep(0.3)
        while not asked(): time.sleep(0.01)
    print("whole", flush=True)
print("never", flush=True)
"""
    ended = signalled(watched(body.strip(), tmp_path), "ready", [signal.SIGINT])
    assert (ended.code, ended.said) == (130, "whole\nstopped\n")


def test_an_interrupt_that_a_destructor_swallows_ends_the_process_all_the_same(tmp_path: Path) -> None:
    body = """
class Slow:
    def __del__(self):
        ready()
        time.sleep(0.3)
Slow()
time.sleep(60)
"""
    ended = signalled(watched(body.strip(), tmp_path), "ready", [signal.SIGINT])
    assert (ended.code, ended.said) == (130, "\nlast words\n")


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path: Path) -> None:
    text = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with interruption.Watch(lambda: "last words"):
    ready()
    time.sleep(0.5)
"""
    ended = signalled(script(text, tmp_path), "ready", [signal.SIGINT])
    assert (ended.code, ended.said) == (0, "")


def test_handlers_are_what_they_were_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interruption.Watch(lambda: "last words"):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


# ---------------------------------------------------------------- what is said


def test_the_last_words_name_stage_what_is_kept_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "practise"
    words = ["run", "my recipes/practise.toml", "--fresh", "--set", "run.seed=1"]
    command = "`optpipe run 'my recipes/practise.toml' --set run.seed=1`"

    def said() -> str:
        return last_words(words, run)

    def leave(*names: str) -> None:
        for name in names:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).touch()

    assert last_words(["bench", "a.onnx"], None) == "Interrupted; `optpipe bench a.onnx` begins anew"
    where = f"in {Path('runs') / 'practise'}; {command}"
    assert said() == f"Interrupted in ingest: nothing is finished yet {where} begins anew"
    leave("synthesized.npz")
    assert said() == f"Interrupted in ingest: the images made so far are kept {where} goes on from here"
    leave("01-ingest/result.json")
    assert said() == (f"Interrupted in analyze: the original's measurement is kept {where} goes on from here")
    leave("trials/a/trial.json", "trials/c/failed.json")
    assert said() == f"Interrupted in analyze: 1 trial is kept {where} goes on from here"
    leave("trials/b/weights.safetensors", "trials/b/trained.json")
    assert said() == f"Interrupted in analyze: 2 trials are kept {where} goes on from here"
    leave("02-analyze/result.json")
    assert "in prune: the search's choice is kept" in said()
    leave("03-prune/result.json")
    assert "in recover: the pruned network is kept" in said()
    leave("04-recover/result.json")
    assert "in export: the recovered network is kept" in said()
    leave("05-export/result.json")
    assert "in benchmark: the exported engines are kept" in said()
    leave("06-benchmark/result.json")
    assert "in the report: all six stages are kept" in said()


def test_the_last_words_name_the_step_that_a_training_reached(tmp_path: Path) -> None:
    import torch

    from optpipe import store

    for stage in ("01-ingest", "02-analyze", "03-prune"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "result.json").touch()
    store.save_tensors(tmp_path / "04-recover" / "checkpoint-0.safetensors", {"step": torch.tensor(37)})
    assert "the pruned network and the training up to step 37 are kept" in last_words(["run"], tmp_path)


# ---------------------------------------------------------------- whole runs


COMMAND_LINE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from optpipe.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_interrupted_in_analyze_and_in_recover_goes_on_to_its_end(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("steps = 10", "steps = 400"))
    words = ["run", recipe.name, "--out", "out"]
    command = [sys.executable, "-c", COMMAND_LINE, *words]

    in_analyze = signalled(command, "computed", [signal.SIGINT], cwd=tmp_path)
    assert in_analyze.code == 130
    assert re.search(
        r"^Interrupted in analyze: \d+ trials? (is|are) kept in out; "
        r"`optpipe run small\.toml --out out` goes on from here$",
        in_analyze.said,
        re.MULTILINE,
    )
    in_recover = signalled(command, "training", [signal.SIGTERM], cwd=tmp_path)
    assert in_recover.code == 143
    assert re.search(r"^Interrupted in recover: .* up to step \d+ are kept in out; ", in_recover.said, re.M)
    for ended in (in_analyze, in_recover):
        assert ended.soon()
        assert "Traceback" not in ended.said
    assert not list(tmp_path.rglob(".*.tmp"))

    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[2/6] analyze: reused" in done.stderr
    assert (tmp_path / "out" / "report.json").exists()
