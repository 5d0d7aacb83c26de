"""What the soak runs: run after run in one process.

After each it prints what the process holds, as JSON. The runs are those of the shipped demo, made small: its
images and its method, on a network of two blocks, with a dozen steps and the shortest of timings. By turns
they are given to ``optpipe.run`` and to the command line, and every fifth is one that ends in an error.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import optpipe
from faults import children
from optpipe import cli
from optpipe.errors import OptpipeError

RECIPE = """\
[model]
name = "mine:network"
classes = 10
in_channels = 1

[data]
calibration = {{ source = "{images}/digits_calibration.npz", labels = false, count = 64 }}
evaluation = {{ source = "{images}/digits_evaluation.npz", count = 128 }}

[data.preprocess]
size = [32, 32]
mean = [0.5]
std = [0.5]

[target]
batch = 16
threads = 1

[timing]
tolerance = 0.5
budget_s = 0.2
final_budget_s = 0.2

[method]
name = "practise"
scorer = "fast"

[recover]
steps = 12

[budget]
drop_blocks = 1

[run]
cache = false
"""


def main(runs: int, folder: Path) -> None:
    """Take the runs, in a folder that is empty."""
    os.chdir(folder)
    Path("mine.py").write_text(children.NETWORK, encoding="utf-8")
    recipe = RECIPE.format(images=children.ROOT / "calibration_data")
    Path("soak.toml").write_text(recipe, encoding="utf-8")
    # No network of this one is as fast as that.
    unmet = recipe.replace("drop_blocks = 1", "latency_ms = 1e-6")
    Path("unmet.toml").write_text(unmet, encoding="utf-8")
    for number in range(runs):
        ended = _take(number)
        shutil.rmtree("run", ignore_errors=True)
        gc.collect()
        print(json.dumps({"ended": ended, **_held()}), file=sys.__stdout__, flush=True)


def _take(number: int) -> str:
    """One run; how it ended: "finished", or the line of its error."""
    recipe = "unmet.toml" if number % 5 == 4 else "soak.toml"
    if number % 2:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                cli.main(["run", recipe, "--out", "run", "--quiet"])
            except SystemExit as stop:
                if stop.code:
                    return err.getvalue().strip()
        return "finished"
    try:
        optpipe.run(recipe, out="run")
    except OptpipeError as error:
        return f"Error: {error}"
    return "finished"


def _held() -> dict[str, float]:
    """What this process holds now, each by a name with its unit."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    )
    tasks = list(Path("/proc/self/task").iterdir())
    return {
        "memory MB": int(status["VmRSS"].split()[0]) / 1024,
        "objects": len(gc.get_objects()),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(tasks),
        "Python threads": threading.active_count(),
        "children": sum(len((task / "children").read_text().split()) for task in tasks),
        "temporary files": sum(1 for _ in Path(tempfile.gettempdir()).iterdir()),
    }
