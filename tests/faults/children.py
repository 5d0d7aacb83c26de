"""Small runs in processes of their own, and what is compared of them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import workspace
from faults.report import PAGE

ROOT = PAGE.parents[1]
LONGEST_S = 900
"""How long a process may take, on a machine that does other things too, before it is held to hang."""

NETWORK = """\
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def network(classes=4, in_channels=3):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), Block(), Block(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""
QUICK = """
[target]
batch = 4
threads = 1

[timing]
tolerance = 0.5
budget_s = 0.05
final_budget_s = 0.05
drift = 1000

[recover]
steps = 12
batch = 4
stage_weight = 0.0

[run]
checkpoint_every = 4
"""
SHARED = """
import sys
from pathlib import Path
from optpipe import pipeline, preparation, recipe
setup = preparation.prepare(recipe.load(Path("small.toml")))
pipeline.run(setup, Path(sys.argv[1]), fresh=False, emit=lambda event: None, shared=Path("shared-cache"))
"""
"""A run as those of a sweep are: what it trains and measures is lent to the others."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Came:
    """What a run came to: all that may not depend on what else is going on."""

    plan: str
    weights: str
    qualities: str


def make(folder: Path, method: str = 'name = "filters"', budget: str = "macs_reduction = 0.3") -> None:
    """A recipe of a few seconds in a folder of its own, whose plan does not hang on a clock."""
    folder.mkdir()
    workspace.make(folder)
    (folder / "mine.py").write_text(NETWORK, encoding="utf-8")
    text = workspace.RECIPE + QUICK
    changes = ('name = "practise"', method), ("drop_blocks = 1", budget), ("weights.pth", "random")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "small.toml").write_text(text, encoding="utf-8")


def start(
    *words: str, folder: Path, temporary: Path | None = None, extra: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Begin a Python process: ``-m optpipe.cli`` and its words, say; ``extra`` is for its environment."""
    kept = {} if temporary is None else {"TMPDIR": str(temporary)}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Begun in the background this process ignores Ctrl-C, and so would all that it begins.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **kept, **(extra or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def optpipe(*words: str, folder: Path, temporary: Path | None = None) -> subprocess.Popen[str]:
    """Begin a command of optpipe."""
    return start("-m", "optpipe.cli", *words, folder=folder, temporary=temporary)


def end(process: subprocess.Popen[str], seconds: float = LONGEST_S) -> Ended:
    """Wait for a process; one that takes too long is killed, and has the exit code -9."""
    begun = time.monotonic()
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return Ended(process.returncode, out, err, time.monotonic() - begun)


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = LONGEST_S) -> bool:
    """Wait until something is so; False where the process ends before it is, or it takes too long."""
    over = time.monotonic() + seconds
    while not true():
        if process.poll() is not None or time.monotonic() > over:
            return true()
        time.sleep(0.02)
    return True


def came(run: Path) -> Came:
    """What a finished run came to; latencies, which are others each time, are left out."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    weights = hashlib.sha256((run / "deploy" / "model.safetensors").read_bytes()).hexdigest()
    scored = [report[which]["quality"] for which in ("original", "result")]
    return Came(json.dumps(report["plan"]), weights, json.dumps(scored))


def torn(folder: Path) -> list[str]:
    """Files below a folder that no finished process leaves: temporary ones, and JSON that is none."""
    found = [f"{path}: left behind" for path in folder.rglob(".*.tmp")]
    for path in folder.rglob("*.json"):
        try:
            _: Any = json.loads(path.read_bytes())
        except ValueError as error:
            found.append(f"{path}: {error}")
    return found


def one_line(ended: Ended, code: int, says: str) -> list[str]:
    """In what an end is not one clear line with that exit code."""
    lines = ended.err.splitlines()
    if ended.code == code and len(lines) == 1 and says in lines[0]:
        return []
    return [f"exit code {ended.code}, not {code} with a line of {says!r}: {ended.err[-600:]!r}"]
