"""Trials: what is asked of a candidate, with an engine of it or without."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optpipe import graph, store, timing, tune
from optpipe.errors import RunError, UsageError
from optpipe.lab.engines import Engines
from optpipe.lab.ground import Ground
from optpipe.lab.names import plan_name
from optpipe.lab.subject import Origin, refuse_other_size
from optpipe.types import Ask, Quality, Trial

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What trial.json holds; the latency is stored with the engine, which other trials may share."""

    ask: Ask
    parameters: int
    macs: int
    quality: Quality | None
    distance: float | None
    seconds: float


class Trials:
    """Examines a candidate once; its engine is timed by whoever drives the search."""

    def __init__(self, ground: Ground, engines: Engines) -> None:
        self._ground = ground
        self._engines = engines

    def awaited(self, ask: Ask) -> bool:
        """Whether something beside a latency is asked that is not in the store yet."""
        slow = ask.tune is not None or set(ask.wants) != {"latency"}
        return slow and self._stored(self._key(ask)) is None

    def compute(self, ask: Ask) -> None:
        """Put all but the latency into the store."""
        self._examined(ask)

    def answer(self, ask: Ask) -> tuple[Trial, Origin]:
        """The trial, with the latency of its engine where that is wanted."""
        key, record, origin = self._examined(ask)
        latency = None
        if "latency" in ask.wants:
            latency, timed = self._engines.latency(ask.plan)
            origin = timed if timed == "computed" else origin
        trial = Trial(
            key, ask, record.parameters, record.macs, latency, record.quality, record.distance, record.seconds
        )
        return trial, origin

    def _examined(self, ask: Ask) -> tuple[str, TrialRecord, Origin]:
        """A trial's key and all that it says without an engine."""
        key = self._key(ask)
        stored = self._stored(key)
        if stored is not None:
            return key, stored[0], "cached" if stored[1] else "reused"
        record = self._examine(key, ask)
        self._ground.run.store_answer("trials", key, "trial.json", record)
        return key, record, "computed"

    def _stored(self, key: str) -> tuple[TrialRecord, bool] | None:
        return self._ground.run.answer("trials", key, "trial.json", TrialRecord)

    def _key(self, ask: Ask) -> str:
        # Training on another device rounds otherwise.
        return self._ground.key("trial", ask, self._ground.device)

    def _examine(self, key: str, ask: Ask) -> TrialRecord:
        """All that a trial can say without an engine: its size, and after tuning, its errors."""
        ground, subject = self._ground, self._ground.subject
        self._refuse_other_size(ask)
        watch = timing.Stopwatch()
        candidate = graph.apply(subject.original, ask.plan, ground.shape)
        parameters, macs = graph.count(candidate, ground.resolutions.shape(ask.plan))
        if ask.tune is not None:
            candidate = self._tuned(candidate, ask, key)
        distance = None
        if "distance" in ask.wants:
            distance = tune.distance(candidate, subject.original, subject.calibration, ground.device)
            if not math.isfinite(distance):
                raise RunError(
                    f"{plan_name(ask.plan)}: the candidate's features are no numbers ({distance}): its "
                    "training diverged, or the network cannot be without what was taken out"
                )
        measured = ground.quality(candidate, ask.plan) if "quality" in ask.wants else None
        return TrialRecord(ask, parameters, macs, measured, distance, watch.seconds)

    def _refuse_other_size(self, ask: Ask) -> None:
        """UsageError where features are to be compared with the original's, and are of another size."""
        ground = self._ground
        if ask.tune is not None and ask.tune.loss != "labels":
            refuse_other_size(ask.plan, ground.shape, ask.tune.loss)
        shape = ground.resolutions.shape(ask.plan)
        if "distance" in ask.wants and shape != ground.shape:
            raise UsageError(
                f"{plan_name(ask.plan)}: features of images of {shape[1]}x{shape[2]} have no distance to the "
                f"original's, which takes {ground.shape[1]}x{ground.shape[2]}; ask for quality"
            )

    def _tuned(self, candidate: fx.GraphModule, ask: Ask, key: str) -> fx.GraphModule:
        """The candidate with what its training came to, which stays with the run.

        A process that was killed before it stored the trial does not train again.
        """
        run = self._ground.run
        path = run.weights(key)
        if not run.has_tensors(path):
            trained = self._trained(candidate, ask)
            if trained is None:
                return candidate
            store.save_tensors(path, trained.state_dict())
            run.give(path)
        store.load_tensors(candidate, path)
        return candidate

    def _trained(self, candidate: fx.GraphModule, ask: Ask) -> fx.GraphModule | None:
        """A network of the candidate's weights after its training; None where there is nothing to train."""
        assert ask.tune is not None
        ground, subject = self._ground, self._ground.subject
        adapted = ask.tune.trainable == "adaptors"
        if adapted:
            candidate = graph.with_adaptors(subject.original, ask.plan, ground.shape)
            if not graph.adaptors(candidate):
                return None
        tune.train(
            candidate,
            subject.original,
            ground.resolutions.images(ask.plan),
            ask.tune,
            seed=subject.seed,
            emit=ground.emit,
            device=ground.device,
        )
        return graph.fold(candidate) if adapted else candidate
