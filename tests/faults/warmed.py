"""Imported by the process that sittings are forked from: everything that a run imports, imported.

A whole run is taken here once, since exporters and engines import most of what they need when they are first
used. The clock is the campaigns' own from then on.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from pathlib import Path

import torch

from faults import small_runs
from optpipe import pipeline, preparation
from optpipe import recipe as recipes


def _warm() -> None:
    # The first backward pass starts a thread for each kind of device that is known by then: here none.
    weight = torch.ones(1, requires_grad=True)
    torch.autograd.grad((2 * weight).sum(), weight)
    torch.set_num_threads(1)
    small_runs.pretended()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        home = Path(name)
        small_runs.PRACTISE.make(home)
        loaded = recipes.load(home / "small.toml", ())
        pipeline.run(preparation.prepare(loaded), home / "run", fresh=False, emit=lambda event: None)
    # A process with threads must not be forked: the child has none of them, and may hold their locks. One is
    # ONNX Runtime's, which sleeps.
    assert threading.active_count() == 1
    others = len(list(Path("/proc/self/task").iterdir())) - 1
    if others > 1:
        raise RuntimeError(f"{others} threads were left by a run; nothing can be forked from here")


_warm()
