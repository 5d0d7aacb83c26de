"""What tests of whole runs share: taking a recipe through the pipeline, and stopping it on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optpipe import pipeline, preparation, store
from optpipe.report import schema
from optpipe.results import Analyzed
from optpipe.types import Choice, Event


@dataclass
class Ran:
    """A finished run: its folder, its report and what it told."""

    setup: preparation.Setup
    folder: Path
    report: schema.Report
    events: list[Event] = field(default_factory=list)

    @property
    def choice(self) -> Choice:
        """Where its search ended."""
        analyzed = store.Run(self.folder, None).stage_result("analyze", Analyzed)
        assert analyzed is not None
        return analyzed.choice

    def details(self, kind: str) -> list[tuple[str, str]]:
        """(name, detail) of every event of a kind."""
        return [(event.name, event.detail) for event in self.events if event.kind == kind]

    def notes(self, name: str) -> list[str]:
        """What was noted under a name."""
        return [detail for noted, detail in self.details("note") if noted == name]


def take(
    setup: preparation.Setup, folder: Path, *, fresh: bool = False, events: list[Event] | None = None
) -> Ran:
    """Take a run to its end; its events are added to ``events`` as they come, if it stops half way too."""
    told: list[Event] = [] if events is None else events
    report = pipeline.run(setup, folder, fresh=fresh, emit=told.append)
    return Ran(setup, folder, report, told)


def write_images(path: Path, count: int, *, seed: int, size: int = 16, classes: int = 4) -> None:
    """Images of noise, equally many of each class."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % classes)


def forget(folder: Path, *stages: str) -> None:
    """Take the results of stages away, as if the run had been killed in them."""
    for stage in stages:
        (folder / f"{store.STAGES.index(stage) + 1:02d}-{stage}" / "result.json").unlink()


def recovered_sha256(folder: Path) -> str:
    """sha256 of the recovered network's weights."""
    return store.file_sha256(folder / "04-recover" / "weights.safetensors")


def interrupt(patch: pytest.MonkeyPatch, owner: object, name: str, after: int) -> None:
    """Make a function raise KeyboardInterrupt once it was called ``after`` times."""
    function, calls = getattr(owner, name), 0

    def interrupted(*arguments: Any, **named: Any) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    patch.setattr(owner, name, interrupted)
