"""Answers a search's requests: applies the plan, tunes, exports, builds an engine, times it, stores it.

A search is driven by :func:`drive`; run again after a kill, it is replayed against the stored answers and
goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from optpipe import building, data, files, graph, quality, store, timing, tune
from optpipe.types import (
    Answer,
    Ask,
    Choice,
    Emit,
    Engine,
    EngineCount,
    Event,
    Latency,
    Plan,
    Quality,
    Request,
    Search,
    Session,
    Step,
    StepResult,
    Train,
    Trained,
    Trial,
)

if TYPE_CHECKING:
    from torch import fx

# Part of every key: raise it when an answer to the same request would come out different.
KEY_VERSION = 2

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
class EngineRecord:
    """What latency.json holds. ``second_build_s`` is None where a build leaves no cache behind."""

    latency: Latency
    build_s: float
    second_build_s: float | None


@dataclass(frozen=True, slots=True)
class Subject:
    """What every answer depends on beside the request itself. Not JSON-able."""

    original: fx.GraphModule
    model_digest: str
    calibration: data.ImageSet
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
        bench: building.Workbench,
        clock: Clock,
        epoch: int,
        emit: Emit,
        *,
        checkpoint_every: int = 50,
    ) -> None:
        """``epoch`` counts how often the baseline drifted; latencies of another epoch are not reused.

        ``checkpoint_every`` is how many steps a candidate trains between two checkpoints.
        """
        self._run = run
        self._subject = subject
        self._bench = bench
        self._target = bench.target
        self._device = tune.training_device(bench.target.device)
        self._clock = clock
        self._epoch = epoch
        self._emit = emit
        self._checkpoint_every = checkpoint_every
        self._fingerprint = bench.backend.fingerprint(bench.target)
        self._baseline: Session | None = None
        self._asked = 0
        self._engines: dict[str, tuple[EngineRecord, Origin]] = {}
        # Whether narrowed candidates can be cut from the original's file; None until one was tried.
        self._cuts: bool | None = None

    def close(self) -> None:
        """Release the baseline's engine."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None
            shutil.rmtree(self._run.engine_folder("baseline"), ignore_errors=True)

    @property
    def engines(self) -> EngineCount:
        """Where the latencies answered so far came from; the same after a replay."""
        records = [record for record, origin in self._engines.values() if origin != "cached"]
        twice = next((record for record in records if record.second_build_s is not None), None)
        return EngineCount(
            candidates=self._asked,
            structures=len(self._engines),
            cached=len(self._engines) - len(records),
            builds_s=tuple(record.build_s for record in records),
            first_build_s=None if twice is None else twice.build_s,
            second_build_s=None if twice is None else twice.second_build_s,
        )

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, from the store where they are there."""
        answers: list[Answer] = []
        for number, request in enumerate(requests, start=1):
            watch = timing.Stopwatch()
            if isinstance(request, Step):
                answer, origin = self._step(request)
                name = request.name
            elif isinstance(request, Train):
                answer, origin = self._train(request)
                name = f"trained {plan_name(request.plan)}"
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
        tune.release(self._device)
        result = StepResult(key, step.name, values, watch.seconds)
        self._run.store_answer("trials", key, "step.json", result)
        return result, "computed"

    def _train(self, request: Train) -> tuple[Answer, Origin]:
        """A trained candidate; its weights stay with the run, for whoever goes on from them."""
        subject = self._subject
        request = replace(request, tune=tune.on_this_machine(request.tune, self._device))
        key = self._key("train", request, self._device)
        watch = timing.Stopwatch()
        candidate = graph.apply(subject.original, request.plan, self._target.input_shape)
        path = self._run.weights(key)
        if path.exists():
            store.load_tensors(candidate, path)
            return Trained(key, candidate, store.file_sha256(path), seconds=watch.seconds), "reused"
        images = subject.calibration
        if request.images is not None:
            images = data.part(images, request.images)
        checkpoint = path.with_name("checkpoint.safetensors")
        tune.train(
            candidate,
            subject.original,
            images,
            request.tune,
            seed=subject.seed,
            checkpoint=store.DiskCheckpoint(checkpoint, self._checkpoint_every),
            emit=self._emit,
            device=self._device,
        )
        store.save_tensors(path, candidate.state_dict())
        checkpoint.unlink(missing_ok=True)
        tune.release(self._device)
        return Trained(key, candidate, store.file_sha256(path), seconds=watch.seconds), "computed"

    def _key(self, kind: str, *depends: object) -> str:
        subject = self._subject
        return store.digest(
            KEY_VERSION, kind, subject.model_digest, subject.calibration.digest, subject.seed, *depends
        )

    # ------------------------------------------------------------ trials

    def _trial(self, ask: Ask) -> tuple[Answer, Origin]:
        # Training on another device rounds otherwise.
        key = self._key("trial", ask, self._device)
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
            distance = tune.distance(candidate, subject.original, subject.calibration, self._device)
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
            candidate,
            subject.original,
            subject.calibration,
            ask.tune,
            seed=subject.seed,
            emit=self._emit,
            device=self._device,
        )
        if adapted:
            candidate = graph.fold(candidate)
        store.save_tensors(folder / store.WEIGHTS, candidate.state_dict())
        return candidate

    def _calibration_quality(self, candidate: fx.GraphModule) -> Quality:
        images = self._subject.calibration
        labels = None if images.labels is None else images.labels.numpy()
        own = tune.logits(candidate, images, self._device).numpy()
        reference = tune.logits(self._subject.original, images, self._device).numpy()
        return quality.score(own, labels, reference, "calibration")

    # ------------------------------------------------------------ engines

    def latency(self, plan: Plan) -> tuple[Latency, Origin]:
        """The plan's latency beside the baseline's, timed now unless an equal structure was timed before."""
        model = graph.apply(self._subject.original, plan, self._target.input_shape)
        key = self._engine_key(model)
        self._asked += 1
        if key not in self._engines:
            stored = self._run.answer("engines", key, "latency.json", EngineRecord)
            if stored is None:
                self._engines[key] = self._time(model, key, narrowed=_is_narrowed(plan)), "computed"
                return self._engines[key][0].latency, "computed"
            self._engines[key] = stored[0], "cached" if stored[1] else "reused"
        record, origin = self._engines[key]
        return record.latency, "cached" if origin == "cached" else "reused"

    def _time(self, model: fx.GraphModule, key: str, *, narrowed: bool) -> EngineRecord:
        folder = self._run.engine_folder(key)
        # A builder times kernels too: nobody else measures meanwhile.
        with timing.device_lock(self._target.device):
            baseline = self._open_baseline()
            engine, second_build_s = self._build_candidate(model, folder, narrowed=narrowed)
            session = self._bench.backend.load(engine, self._target)
            try:
                measured = timing.paired(
                    baseline,
                    session,
                    tolerance=self._clock.tolerance,
                    budget_s=self._clock.budget_s,
                    seed=self._subject.seed,
                )
            finally:
                session.close()
        with files.replacing(folder / "samples.npy") as path, path.open("wb") as file:
            np.save(file, measured.samples_ms)
        latency = measured.candidate(self._fingerprint)
        for warning in latency.warnings:
            self._emit(Event("warning", f"engine {folder.name[:12]}", warning))
        record = EngineRecord(latency, engine.build_s, second_build_s)
        self._run.store_answer("engines", key, "latency.json", record)
        # The choice is exported anew with its recovered weights; a candidate's files have served.
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix not in {".json", ".npy"}:
                path.unlink()
        return record

    def _engine_key(self, model: fx.GraphModule) -> str:
        structure = graph.structure_key(model, self._target.input_shape, self._target.batch)
        return store.digest(
            KEY_VERSION, "engine", structure, self._target, self._fingerprint, self._clock, self._epoch
        )

    def _open_baseline(self) -> Session:
        if self._baseline is None:
            original = self._subject.original
            built = self._build(original, self._run.engine_folder("baseline"), "baseline")
            self._baseline = self._bench.backend.load(built.engine, self._target)
        return self._baseline

    def _build(
        self, model: fx.GraphModule, folder: Path, name: str, *, narrowed: bool = False
    ) -> building.Built:
        watch = timing.Stopwatch()
        exported = self._export(model, folder, narrowed=narrowed)
        built = building.build(exported, self._bench, folder, structure_only=True)
        self._emit(Event("note", "engine", f"built {name}", seconds=watch.seconds))
        return built

    def _export(self, model: fx.GraphModule, folder: Path, *, narrowed: bool) -> Path:
        """A candidate's file; of one that is the original but for its widths, cut from the original's file.

        That takes a small part of an export's time. The first is exported too: only where both are of one
        structure are the others cut.
        """
        original = self._run.engine_folder("baseline") / building.ONNX
        if narrowed and self._cuts and (cut := building.narrow(original, model, folder)) is not None:
            return cut
        exported = building.export(model, self._bench, folder)
        if narrowed and self._cuts is None:
            self._cuts = original.exists() and building.narrows(original, model, exported)
        return exported

    def _build_candidate(
        self, model: fx.GraphModule, folder: Path, *, narrowed: bool
    ) -> tuple[Engine, float | None]:
        """The engine, and for the first candidate what building it once more takes."""
        built = self._build(model, folder, folder.name[:12], narrowed=narrowed)
        again = self._bench.backend.CACHES_BUILDS and all(
            record.second_build_s is None or origin == "cached" for record, origin in self._engines.values()
        )
        if not again:
            return built.engine, None
        second = self._bench.backend.build(built.source, self._target, folder)
        return replace(second, build_s=built.engine.build_s), second.build_s


def _is_narrowed(plan: Plan) -> bool:
    """Whether a plan changes widths and nothing else."""
    return bool(plan.keep_channels) and not plan.drop_blocks and plan.input_hw is None


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
