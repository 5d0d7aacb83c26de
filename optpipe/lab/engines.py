"""The latencies of candidates: export, engine, paired timing against the baseline."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optpipe import building, files, graph, store, timing
from optpipe.errors import RunError
from optpipe.lab.subject import KEY_VERSION, Clock, Origin, Resolutions, Subject
from optpipe.types import Emit, Engine, EngineCount, Event, Fingerprint, Latency, Plan, Session

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What latency.json holds. ``second_build_s`` is None where a build leaves no cache behind.

    ``epoch`` is the baseline's, as :class:`Engines` counts it.
    """

    latency: Latency
    build_s: float
    second_build_s: float | None
    epoch: int = 0


class Engines:
    """Keeps the baseline's engine open and times each candidate's in turn with it.

    Latencies depend on structure, resolution and target alone, so that trials of equal structure share one
    engine. The baseline runs at the original's resolution, a candidate at its plan's.
    """

    def __init__(
        self,
        run: store.Run,
        subject: Subject,
        resolutions: Resolutions,
        bench: building.Workbench,
        clock: Clock,
        epoch: int,
        emit: Emit,
        *,
        measured_by: Fingerprint | None = None,
    ) -> None:
        """``epoch`` counts how often the baseline drifted; latencies of another epoch are not reused.

        With ``measured_by`` nothing is timed here: latencies are those that such a machine left in the run.
        """
        self._run = run
        self._subject = subject
        self._resolutions = resolutions
        self._bench = bench
        self._clock = clock
        self._epoch = epoch
        self._emit = emit
        self._times = measured_by is None
        self._fingerprint = measured_by or bench.backend.fingerprint(bench.target)
        self._baseline: Session | None = None
        self._asked = 0
        self._records: dict[str, tuple[EngineRecord, Origin]] = {}
        # Whether narrowed candidates can be cut from the original's file; None until one was tried.
        self._cuts: bool | None = None

    def close(self) -> None:
        """Release the baseline's engine."""
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None
        if self._times:  # a process that was killed may have left it too
            shutil.rmtree(self._run.engine_folder("baseline"), ignore_errors=True)

    @property
    def count(self) -> EngineCount:
        """Where the latencies answered so far came from; the same after a replay."""
        records = [record for record, origin in self._records.values() if origin != "cached"]
        twice = next((record for record in records if record.second_build_s is not None), None)
        return EngineCount(
            candidates=self._asked,
            structures=len(self._records),
            cached=len(self._records) - len(records),
            builds_s=tuple(record.build_s for record in records),
            first_build_s=None if twice is None else twice.build_s,
            second_build_s=None if twice is None else twice.second_build_s,
        )

    def latency(self, plan: Plan) -> tuple[Latency, Origin]:
        """The plan's latency beside the baseline's, timed now unless an equal structure was timed before."""
        model = graph.apply(self._subject.original, plan, self._bench.target.input_shape)
        key = self._key(model, plan)
        self._asked += 1
        if key not in self._records:
            stored = self._run.answer("engines", key, "latency.json", EngineRecord)
            if stored is None and not self._times:
                raise RunError(f"{self._run.engine_folder(key)}: a latency that a worker needs is not there")
            if stored is None:
                self._records[key] = self._time(model, plan, key), "computed"
                return self._records[key][0].latency, "computed"
            if self._times:  # a process was killed before it did
                _clear(self._run.engine_folder(key))
            self._records[key] = stored[0], "cached" if stored[1] else "reused"
        record, origin = self._records[key]
        return record.latency, "cached" if origin == "cached" else "reused"

    def _key(self, model: fx.GraphModule, plan: Plan) -> str:
        shape = self._resolutions.shape(plan)
        target = replace(self._bench.target, input_shape=shape)
        structure = graph.structure_key(model, shape, target.batch)
        return store.digest(
            KEY_VERSION, "engine", structure, target, self._fingerprint, self._clock, self._epoch
        )

    def _time(self, model: fx.GraphModule, plan: Plan, key: str) -> EngineRecord:
        folder = self._run.engine_folder(key)
        bench = self._bench_at(plan)
        # A builder times kernels too: nobody else measures meanwhile.
        with timing.device_lock(bench.target.device):
            baseline = self._open_baseline()
            engine, second_build_s = self._build_candidate(model, bench, folder, narrowed=_is_narrowed(plan))
            session = bench.backend.load(engine, bench.target)
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
        record = EngineRecord(latency, engine.build_s, second_build_s, self._epoch)
        self._run.store_answer("engines", key, "latency.json", record)
        _clear(folder)
        return record

    def _bench_at(self, plan: Plan) -> building.Workbench:
        """Where the plan's engine is built; images of its size are made where ranges are taken from them."""
        shape = self._resolutions.shape(plan)
        if shape == self._bench.target.input_shape:
            return self._bench
        converts = self._bench.target.precision in {"fp16", "int8"}
        images = self._resolutions.images(plan) if converts else self._bench.images
        return self._bench.sized(shape, images)

    def _open_baseline(self) -> Session:
        if self._baseline is None:
            folder = self._run.engine_folder("baseline")
            built = self._build(self._subject.original, self._bench, folder, "baseline")
            self._baseline = self._bench.backend.load(built.engine, self._bench.target)
        return self._baseline

    def _build(
        self,
        model: fx.GraphModule,
        bench: building.Workbench,
        folder: Path,
        name: str,
        *,
        narrowed: bool = False,
    ) -> building.Built:
        watch = timing.Stopwatch()
        exported = self._export(model, bench, folder, narrowed=narrowed)
        built = building.build(exported, bench, folder, structure_only=True)
        self._emit(Event("note", "engine", f"built {name}", seconds=watch.seconds))
        return built

    def _export(
        self, model: fx.GraphModule, bench: building.Workbench, folder: Path, *, narrowed: bool
    ) -> Path:
        """A candidate's file; of one that is the original but for its widths, cut from the original's file.

        That takes a small part of an export's time. The first is exported too: only where both are of one
        structure are the others cut.
        """
        original = self._run.engine_folder("baseline") / building.ONNX
        if narrowed and self._cuts and (cut := building.narrow(original, model, folder)) is not None:
            return cut
        exported = building.export(model, bench, folder)
        if narrowed and self._cuts is None:
            self._cuts = original.exists() and building.narrows(original, model, exported)
        return exported

    def _build_candidate(
        self, model: fx.GraphModule, bench: building.Workbench, folder: Path, *, narrowed: bool
    ) -> tuple[Engine, float | None]:
        """The engine, and for the first candidate what building it once more takes."""
        built = self._build(model, bench, folder, folder.name[:12], narrowed=narrowed)
        again = bench.backend.CACHES_BUILDS and all(
            record.second_build_s is None or origin == "cached" for record, origin in self._records.values()
        )
        if not again:
            return built.engine, None
        second = bench.backend.build(built.source, bench.target, folder)
        return replace(second, build_s=built.engine.build_s), second.build_s


def _clear(folder: Path) -> None:
    """Remove a candidate's files, which have served: the choice is exported anew with recovered weights."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix not in {".json", ".npy"}:
            path.unlink()


def _is_narrowed(plan: Plan) -> bool:
    """Whether a plan changes widths and nothing else."""
    return bool(plan.keep_channels) and not plan.drop_blocks and plan.input_hw is None
