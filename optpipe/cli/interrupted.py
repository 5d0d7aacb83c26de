"""What an interrupted command says: what is kept, where, and how to go on."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

ANSWERS = ("trial.json", "step.json", "trained.json", "weights.safetensors")


def last_words(words: Sequence[str], folder: Path | None) -> str:
    """One line for a command of ``words``, that was at work in a run's ``folder`` or in none."""
    # Given again, --fresh would move aside what is kept.
    command = shlex.join(["optpipe", *(word for word in words if word != "--fresh")])
    if folder is None:
        return f"Interrupted; `{command}` begins anew"
    stage, kept = _where(folder)
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    if not kept:
        return f"Interrupted in {stage}: nothing is finished yet in {shown}; `{command}` begins anew"
    return f"Interrupted in {stage}: {kept} kept in {shown}; `{command}` goes on from here"


def _where(folder: Path) -> tuple[str, str]:
    """The stage that was not finished, and what there is to go on from, with its verb."""
    from optpipe import store

    run = store.Run(folder, None)
    done = [stage for stage in store.STAGES if (run.stage_folder(stage) / "result.json").exists()]
    if len(done) == len(store.STAGES):
        return "the report", "all six stages are"
    stage = store.STAGES[len(done)]
    if stage == "ingest":
        made = (folder / "synthesized.npz").exists()
        return stage, "the images made so far are" if made else ""
    if stage == "analyze":
        count = sum(any((trial / name).exists() for name in ANSWERS) for trial in folder.glob("trials/*"))
        if not count:
            return stage, "the original's measurement is"
        return stage, f"{count} trial{'s are' if count > 1 else ' is'}"
    if stage == "recover":
        steps = [_step(path) for path in run.stage_folder(stage).glob("checkpoint-*.safetensors")]
        reached = f" and the training up to step {max(steps)} are" if steps else " is"
        return stage, f"the pruned network{reached}"
    return stage, {
        "prune": "the search's choice is",
        "export": "the recovered network is",
        "benchmark": "the exported engines are",
    }[stage]


def _step(checkpoint: Path) -> int:
    """The steps that a training's checkpoint stands for; 0 where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    with contextlib.suppress(OSError, SafetensorError), safe_open(checkpoint, "numpy") as file:
        return int(file.get_tensor("step"))
    return 0
