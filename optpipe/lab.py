"""Answers a search's requests: applies the plan, tunes, exports, builds an engine, times it, stores it.

A search is driven by :func:`drive`; run again after a kill, it is replayed against the stored answers and
goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from optpipe import graph, onnx_export, quality, store, timing, tune
from optpipe.types import (
    Answer,
    Ask,
    Backend,
    Choice,
    Emit,
    Event,
    Images,
    Latency,
    Plan,
    Quality,
    Request,
    Search,
    Session,
    Step,
    StepResult,
    Target,
    Trial,
)

if TYPE_CHECKING:
    from torch import fx

# Part of every key: raise it when an answer to the same request would come out different.
KEY_VERSION = 1

Origin = Literal["computed", "reused", "cached"]


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """What trial.json holds; the latency is stored with the engine, which other trials may share."""

    ask: Ask
    parameters: int
    macs: int
    quality: Quality | None
    distance: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Subject:
    """What every answer depends on beside the request itself. Not JSON-able."""

    original: fx.GraphModule
    model_digest: str
    calibration: Images
    seed: int


@dataclass(frozen=True, slots=True)
class Clock:
    """How long to measure: to a half-width of the ratio's 95% interval, or for so many seconds."""

    tolerance: float
    budget_s: float


class Lab:
    """One run's laboratory: keeps the baseline's engine open and answers requests one by one.

    Latencies are those of the whole chain: export, engine, paired timing against the baseline. They depend
    on structure and target alone, so trials of equal structure share one engine. What a search may learn
    about accuracy comes from calibration images; evaluation images never get here.
    """

    def __init__(
        self,
        run: store.Run,
        subject: Subject,
        backend: Backend,
        target: Target,
        clock: Clock,
        epoch: int,
        emit: Emit,
    ) -> None:
        """``epoch`` counts how often the baseline drifted; latencies of another epoch are not reused."""
        self._run = run
        self._subject = subject
        self._backend = backend
        self._target = target
        self._clock = clock
        self._epoch = epoch
        self._emit = emit
        self._fingerprint = backend.fingerprint(target)
        self._baseline: Session | None = None

    def close(self) -> None:
        """Release the baseline's engine."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, from the store where they are there."""
        answers: list[Answer] = []
        for number, request in enumerate(requests, start=1):
            watch = timing.Stopwatch()
            if isinstance(request, Step):
                answer, origin = self._step(request)
                name = request.name
            else:
                answer, origin = self._trial(request)
                name = plan_name(request.plan)
            answers.append(answer)
            key = (("key", answer.key),)
            self._emit(Event("trial", name, origin, number, len(requests), watch.seconds, key))
        return answers

    # ------------------------------------------------------------ steps

    def _step(self, step: Step) -> tuple[Answer, Origin]:
        key = self._key("step", step.name, step.depends)
        stored = self._run.answer("trials", key, "step.json", StepResult)
        if stored is not None:
            return stored[0], "cached" if stored[1] else "reused"
        watch = timing.Stopwatch()
        values = step.function()
        result = StepResult(key, step.name, values, watch.seconds)
        self._run.store_answer("trials", key, "step.json", result)
        return result, "computed"

    def _key(self, kind: str, *depends: object) -> str:
        subject = self._subject
        return store.digest(
            KEY_VERSION, kind, subject.model_digest, subject.calibration.digest, subject.seed, *depends
        )

    # ------------------------------------------------------------ trials

    def _trial(self, ask: Ask) -> tuple[Answer, Origin]:
        key = self._key("trial", ask)
        origin: Origin = "reused"
        stored = self._run.answer("trials", key, "trial.json", TrialRecord)
        if stored is None:
            record, origin = self._examine(key, ask), "computed"
            self._run.store_answer("trials", key, "trial.json", record)
        else:
            record = stored[0]
            origin = "cached" if stored[1] else "reused"
        latency = None
        if "latency" in ask.wants:
            latency, timed = self.latency(ask.plan)
            origin = timed if timed == "computed" else origin
        trial = Trial(
            key, ask, record.parameters, record.macs, latency, record.quality, record.distance, record.seconds
        )
        return trial, origin

    def _examine(self, key: str, ask: Ask) -> TrialRecord:
        """All that a trial can say without an engine: its size, and after tuning, its errors."""
        subject = self._subject
        shape = self._target.input_shape
        watch = timing.Stopwatch()
        candidate = graph.apply(subject.original, ask.plan, shape)
        parameters, macs = graph.count(candidate, shape)
        if ask.tune is not None:
            candidate = self._tuned(candidate, ask, self._run.trial_folder(key))
        distance = None
        if "distance" in ask.wants:
            distance = tune.distance(candidate, subject.original, subject.calibration)
        measured = self._calibration_quality(candidate) if "quality" in ask.wants else None
        return TrialRecord(ask, parameters, macs, measured, distance, watch.seconds)

    def _tuned(self, candidate: fx.GraphModule, ask: Ask, folder: Path) -> fx.GraphModule:
        assert ask.tune is not None
        subject = self._subject
        adapted = ask.tune.trainable == "adaptors"
        if adapted:
            candidate = graph.with_adaptors(subject.original, ask.plan, self._target.input_shape)
            if not graph.adaptors(candidate):
                return candidate
        tune.train(
            candidate, subject.original, subject.calibration, ask.tune, seed=subject.seed, emit=self._emit
        )
        if adapted:
            candidate = graph.fold(candidate)
        store.save_tensors(folder / "weights.safetensors", candidate.state_dict())
        return candidate

    def _calibration_quality(self, candidate: fx.GraphModule) -> Quality:
        images = self._subject.calibration
        labels = None if images.labels is None else images.labels.numpy()
        own = tune.logits(candidate, images).numpy()
        return quality.score(own, labels, tune.logits(self._subject.original, images).numpy(), "calibration")

    # ------------------------------------------------------------ engines

    def latency(self, plan: Plan) -> tuple[Latency, Origin]:
        """The plan's latency beside the baseline's, timed now unless an equal structure was timed before."""
        model = graph.apply(self._subject.original, plan, self._target.input_shape)
        key = self._engine_key(model)
        stored = self._run.answer("engines", key, "latency.json", Latency)
        if stored is not None:
            return stored[0], "cached" if stored[1] else "reused"
        folder = self._run.engine_folder(key)
        with timing.device_lock(self._target.device):
            session = self._session(model, folder)
            try:
                measured = timing.paired(
                    self._open_baseline(),
                    session,
                    tolerance=self._clock.tolerance,
                    budget_s=self._clock.budget_s,
                    seed=self._subject.seed,
                )
            finally:
                session.close()
        with store.replacing(folder / "samples.npy") as path, path.open("wb") as file:
            np.save(file, measured.samples_ms)
        latency = measured.candidate(self._fingerprint)
        self._run.store_answer("engines", key, "latency.json", latency)
        # The choice is exported anew with its recovered weights; a candidate's files have served.
        for path in folder.iterdir():
            if path.suffix not in {".json", ".npy"}:
                path.unlink()
        return latency, "computed"

    def _engine_key(self, model: fx.GraphModule) -> str:
        structure = graph.structure_key(model, self._target.input_shape, self._target.batch)
        return store.digest(
            KEY_VERSION, "engine", structure, self._target, self._fingerprint, self._clock, self._epoch
        )

    def _open_baseline(self) -> Session:
        if self._baseline is None:
            original = self._subject.original
            self._baseline = self._session(original, self._run.engine_folder(self._engine_key(original)))
        return self._baseline

    def _session(self, model: fx.GraphModule, folder: Path) -> Session:
        watch = timing.Stopwatch()
        path = folder / "model.onnx"
        onnx_export.export(model, self._target.input_shape, self._target.batch, path)
        engine = self._backend.build(path, self._target, folder)
        self._emit(Event("note", "engine", f"built {folder.name[:12]}", seconds=watch.seconds))
        return self._backend.load(engine, self._target)


def drive(search: Search, lab: Lab) -> Choice:
    """Run a search to its end, answering what it yields."""
    try:
        requests = next(search)
        while True:
            requests = search.send(lab.answer(requests))
    except StopIteration as stop:
        choice = stop.value
        assert isinstance(choice, Choice)
        return choice


def plan_name(plan: Plan) -> str:
    """A short name for a plan, for progress bars and tables."""
    parts: list[str] = []
    if plan.drop_blocks:
        names = " ".join(plan.drop_blocks)
        parts.append(
            f"without {names}" if len(plan.drop_blocks) <= 3 else f"without {len(plan.drop_blocks)} blocks"
        )
    if plan.keep_channels:
        parts.append(f"{len(plan.keep_channels)} groups narrowed")
    if plan.input_hw:
        parts.append(f"at {plan.input_hw[0]}x{plan.input_hw[1]}")
    return ", ".join(parts) or "original"
