"""The six stages, straight-line: ingest, analyze, prune, recover, export, benchmark.

Each stage is a function of the prepared :class:`Setup` and of the results before it; what it returns is
stored when it is complete and read back when the run is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from optpipe import (
    data,
    deploy,
    environment,
    graph,
    onnx_export,
    quality,
    store,
    timing,
    tune,
)
from optpipe.errors import RunError, UsageError
from optpipe.lab import Clock, Lab, Subject, drive
from optpipe.preparation import Setup
from optpipe.report import build, schema
from optpipe.results import Analyzed, Benchmarked, Exported, Ingested, Inputs, Pruned, Recovered, Results
from optpipe.types import (
    Choice,
    Emit,
    Event,
    Latency,
    Scene,
    Session,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import fx

T = TypeVar("T", Ingested, Analyzed, Pruned, Recovered, Exported, Benchmarked)


# ---------------------------------------------------------------- the run


def run(setup: Setup, folder: Path, *, fresh: bool, emit: Emit) -> schema.Report:
    """Take a prepared recipe through the six stages; a run that was interrupted goes on where it was.

    Raises:
        UsageError: the folder holds another run.
        RunError: a stage failed; what was done before it stays done.
    """
    cache = folder.resolve().parent / ".optpipe-cache" if setup.recipe.run.cache and not fresh else None
    with store.open_run(folder, setup.frozen, fresh=fresh, cache=cache) as opened:

        def tell(event: Event) -> None:
            opened.emit(event)
            emit(event)

        described = environment.describe(setup.backend.fingerprint(setup.target))
        store.write_atomically(opened.folder / "environment.json", store.to_json(described))
        _check_inputs(setup, opened)
        for warning in _skipped(setup):
            tell(Event("warning", "data", warning))
        stages = Stages(opened, tell)
        ingested = stages.take("ingest", Ingested, lambda: ingest(setup, opened, 0))
        if opened.stage_result("analyze", Analyzed) is None:
            ingested = _check_drift(setup, opened, ingested, tell)
        analyzed = stages.take("analyze", Analyzed, lambda: analyze(setup, opened, ingested, tell))
        pruned = stages.take("prune", Pruned, lambda: prune(setup, opened, analyzed.choice))
        recovered = stages.take("recover", Recovered, lambda: recover(setup, opened, analyzed.choice, tell))
        exported = stages.take("export", Exported, lambda: export(setup, opened, analyzed.choice))
        final = stages.take("benchmark", Benchmarked, lambda: benchmark(setup, opened, exported))
        results = Results(ingested, analyzed, pruned, recovered, exported, final)
        report = _report(setup, results, described)
        build.write(opened.folder, report)
        return report


def _check_inputs(setup: Setup, opened: store.Run) -> None:
    """Refuse to go on with another model or other images than the run was begun with."""
    inputs = Inputs(setup.model_digest, setup.calibration.digest, setup.evaluation.digest)
    path = opened.folder / "inputs.json"
    if not path.exists():
        store.write_atomically(path, store.to_json(inputs))
        return
    begun = store.from_json(Inputs, path.read_bytes())
    changed = [
        field.name
        for field in dataclasses.fields(Inputs)
        if getattr(begun, field.name) != getattr(inputs, field.name)
    ]
    if changed:
        raise UsageError(
            f"{opened.folder}: was begun with other {' and '.join(changed)} data under the same name; name "
            "another folder with --out, or move that run aside with --fresh"
        )


class Stages:
    """Takes each stage once: reads its stored result, or runs it and stores what it returns."""

    def __init__(self, opened: store.Run, emit: Emit) -> None:
        self._run = opened
        self._emit = emit

    def take(self, name: str, cls: type[T], work: Callable[[], T]) -> T:
        """The stage's result, from the store where it is done."""
        total = len(store.STAGES)
        number = store.STAGES.index(name) + 1
        stored = self._run.stage_result(name, cls)
        if stored is not None:
            self._emit(Event("stage", name, "reused", number, total))
            return stored
        self._emit(Event("stage", name, "started", number, total))
        watch = timing.Stopwatch()
        try:
            result = work()
        except Exception as error:
            self._run.fail_stage(name, error)
            raise
        result = dataclasses.replace(result, seconds=watch.seconds)
        self._run.finish_stage(name, result)
        self._emit(Event("stage", name, "finished", number, total, watch.seconds))
        return result


# ---------------------------------------------------------------- stages


def ingest(setup: Setup, opened: store.Run, epoch: int) -> Ingested:
    """Export, build, score and time the original."""
    folder = opened.stage_folder("ingest")
    onnx = folder / "model.onnx"
    shape, batch = setup.target.input_shape, setup.target.batch
    onnx_export.export(setup.original, shape, batch, onnx)
    with _session(setup, setup.backend.build(onnx, setup.target, folder)) as session:
        _check_parity(setup.original, session, setup.calibration)
        logits = _logits(session, setup.evaluation)
        latency = _time_alone(setup, session)
    with store.replacing(folder / "logits.npy") as path, path.open("wb") as file:
        np.save(file, logits)
    measured = quality.score(logits, _labels(setup.evaluation), logits, "evaluation")
    return Ingested(setup.graph, measured, latency, onnx.stat().st_size, epoch, 0.0)


def _check_drift(setup: Setup, opened: store.Run, ingested: Ingested, emit: Emit) -> Ingested:
    """On resume, time the original again; where it moved too far, begin a new epoch of latencies."""
    folder = opened.stage_folder("ingest")
    if not any((opened.folder / "engines").glob("*/latency.json")):
        return ingested
    with _session(setup, setup.backend.build(folder / "model.onnx", setup.target, folder)) as session:
        now = _time_alone(setup, session)
    moved = now.median_ms / ingested.latency.median_ms - 1.0
    limit = setup.recipe.timing.drift
    if abs(moved) <= limit and now.fingerprint == ingested.latency.fingerprint:
        emit(Event("note", "baseline", f"moved {moved:+.1%} since the run began: latencies stay"))
        return ingested
    emit(Event("warning", "baseline", f"moved {moved:+.1%} since the run began: latencies are taken afresh"))
    renewed = dataclasses.replace(ingested, latency=now, epoch=ingested.epoch + 1)
    opened.finish_stage("ingest", renewed)
    return renewed


def analyze(setup: Setup, opened: store.Run, ingested: Ingested, emit: Emit) -> Analyzed:
    """Drive the method's search against the budget."""
    recipe = setup.recipe
    subject = Subject(setup.original, setup.model_digest, setup.calibration, recipe.run.seed)
    clock = Clock(recipe.timing.tolerance, recipe.timing.budget_s)
    lab = Lab(opened, subject, setup.backend, setup.target, clock, ingested.epoch, emit)
    scene = Scene(
        model=setup.original,
        graph=setup.graph,
        calibration=setup.calibration,
        baseline=ingested.latency,
        budget=recipe.budget,
        recover=setup.recover,
        seed=recipe.run.seed,
    )
    try:
        return Analyzed(drive(setup.method.search(scene, setup.config), lab), 0.0)
    finally:
        lab.close()


def prune(setup: Setup, opened: store.Run, choice: Choice) -> Pruned:
    """Apply the chosen plan to the original."""
    shape = setup.target.input_shape
    candidate = graph.apply(setup.original, choice.plan, shape)
    parameters, macs = graph.count(candidate, shape)
    store.save_tensors(opened.stage_folder("prune") / "weights.safetensors", candidate.state_dict())
    logits = tune.logits(candidate, setup.evaluation).numpy()
    measured = quality.score(logits, _labels(setup.evaluation), _reference(opened), "evaluation")
    return Pruned(parameters, macs, measured, 0.0)


def recover(setup: Setup, opened: store.Run, choice: Choice, emit: Emit) -> Recovered:
    """Train the pruned network to mimic the original; goes on from the last checkpoint."""
    folder = opened.stage_folder("recover")
    candidate = graph.apply(setup.original, choice.plan, setup.target.input_shape)
    # A checkpoint of another plan or schedule must not be taken up: its name says what it belongs to.
    key = store.digest(choice.plan, choice.recover, setup.recipe.run.seed, setup.calibration.digest)[:16]
    checkpoint = store.DiskCheckpoint(
        folder / f"checkpoint-{key}.safetensors", setup.recipe.run.checkpoint_every
    )
    trained = tune.train(
        candidate,
        setup.original,
        setup.calibration,
        choice.recover,
        seed=setup.recipe.run.seed,
        checkpoint=checkpoint,
        emit=emit,
    )
    path = folder / "weights.safetensors"
    store.save_tensors(path, candidate.state_dict())
    return Recovered(store.file_sha256(path), trained.loss_first, trained.loss_last, 0.0)


def export(setup: Setup, opened: store.Run, choice: Choice) -> Exported:
    """Write the deploy bundle: ONNX checked against torch, engine, weights, plan and manifest."""
    folder = opened.folder / "deploy"
    candidate = graph.apply(setup.original, choice.plan, setup.target.input_shape)
    deploy.load_weights(candidate, opened.stage_folder("recover") / "weights.safetensors")
    onnx = folder / "model.onnx"
    onnx_export.export(candidate, setup.target.input_shape, setup.target.batch, onnx)
    engine = setup.backend.build(onnx, setup.target, folder)
    with _session(setup, engine) as session:
        parity = _check_parity(candidate, session, setup.calibration)
    saved = deploy.Saved(
        model=dataclasses.replace(setup.recipe.model, weights=None),
        search_folder=str(setup.recipe.folder),
        plan=choice.plan,
        input_shape=setup.target.input_shape,
        preprocess=setup.recipe.data.preprocess,
    )
    sha256 = deploy.write_bundle(folder, candidate, saved, setup.target, setup.calibration.names)
    return Exported(str(engine.relative_to(opened.folder)), onnx.stat().st_size, parity, sha256, 0.0)


def benchmark(setup: Setup, opened: store.Run, exported: Exported) -> Benchmarked:
    """Original and result side by side on their engines: latency in turn, and accuracy."""
    recipe = setup.recipe
    folder = opened.stage_folder("ingest")
    original = setup.backend.build(folder / "model.onnx", setup.target, folder)
    with _session(setup, original) as baseline, _session(setup, opened.folder / exported.engine) as result:
        with timing.device_lock(setup.target.device):
            measured = timing.paired(
                baseline,
                result,
                tolerance=recipe.timing.tolerance,
                budget_s=recipe.timing.final_budget_s,
                seed=recipe.run.seed,
            )
        logits = _logits(result, setup.evaluation)
    reference, labels = _reference(opened), _labels(setup.evaluation)
    fingerprint = setup.backend.fingerprint(setup.target)
    path = opened.stage_folder("benchmark") / "samples.npy"
    with store.replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, measured.samples_ms)
    return Benchmarked(
        original=measured.baseline(fingerprint),
        result=measured.candidate(fingerprint),
        original_quality=quality.score(reference, labels, reference, "evaluation"),
        quality=quality.score(logits, labels, reference, "evaluation"),
        agreement=quality.agreement(logits, reference, "evaluation"),
        seconds=0.0,
    )


# ---------------------------------------------------------------- what they share


@contextmanager
def _session(setup: Setup, engine: Path) -> Iterator[Session]:
    session = setup.backend.load(engine, setup.target)
    try:
        yield session
    finally:
        session.close()


def _time_alone(setup: Setup, session: Session) -> Latency:
    clock = setup.recipe.timing
    with timing.device_lock(setup.target.device):
        measured = timing.single(
            session,
            tolerance=clock.tolerance,
            budget_s=min(clock.budget_s, 3.0),
            seed=setup.recipe.run.seed,
        )
    return measured.latency(setup.backend.fingerprint(setup.target))


def _check_parity(model: fx.GraphModule, session: Session, images: data.ImageSet) -> onnx_export.Parity:
    found = onnx_export.parity(model, session, images, atol=1e-4, rtol=1e-3, count=64)
    onnx_export.check_parity(found)
    return found


def _logits(session: Session, images: data.ImageSet) -> NDArray[np.float32]:
    size = 256
    parts = [
        session.run(images.batch(slice(start, start + size)).numpy()) for start in range(0, len(images), size)
    ]
    return np.concatenate(parts)


def _labels(images: data.ImageSet) -> NDArray[np.int64] | None:
    return None if images.labels is None else images.labels.numpy()


def _reference(opened: store.Run) -> NDArray[np.float32]:
    """The original engine's logits on the evaluation images."""
    path = opened.stage_folder("ingest") / "logits.npy"
    try:
        return cast("NDArray[np.float32]", np.load(path))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); start anew with --fresh") from error


def _skipped(setup: Setup) -> tuple[str, ...]:
    """A line for each image set of which some images could not be read."""
    lines: list[str] = []
    for split, images in (("calibration", setup.calibration), ("evaluation", setup.evaluation)):
        if images.skipped:
            names = ", ".join(images.skipped[:3]) + (", ..." if len(images.skipped) > 3 else "")
            total = len(images) + len(images.skipped)
            lines.append(
                f"{len(images.skipped)} of {total} {split} images cannot be read and are left out: {names}"
            )
    return tuple(lines)


def _drifted(ingested: Ingested) -> tuple[str, ...]:
    """A line where the original's latency drifted between two sittings."""
    if not ingested.epoch:
        return ()
    return (
        f"the original's latency drifted between sittings: latencies taken afresh {ingested.epoch} times",
    )


def _report(setup: Setup, results: Results, described: schema.EnvironmentReport) -> schema.Report:
    recipe, choice, final = setup.recipe, results.analyze.choice, results.benchmark
    stages = {name: schema.StageReport(getattr(results, name).seconds) for name in store.STAGES}
    return schema.Report(
        schema=schema.SCHEMA,
        name=recipe.run.name,
        method=recipe.method_name,
        model=recipe.model.name,
        seed=recipe.run.seed,
        target=setup.target,
        budget=build.judge(recipe.budget, final.original, final.result, choice.plan),
        original=schema.NetworkReport(
            final.original_quality,
            final.original,
            setup.graph.parameters,
            setup.graph.macs,
            results.ingest.onnx_bytes,
        ),
        result=schema.NetworkReport(
            final.quality,
            final.result,
            results.prune.parameters,
            results.prune.macs,
            results.export.onnx_bytes,
            final.agreement,
        ),
        quality_before_recovery=results.prune.quality,
        plan=choice.plan,
        recover=choice.recover,
        reason=choice.reason,
        tables=choice.tables,
        data=schema.DataReport(
            len(setup.calibration), setup.calibration.digest, len(setup.evaluation), setup.evaluation.digest
        ),
        stages=stages,
        environment=described,
        sha256={"original weights": setup.model_digest, "recovered weights": results.recover.weights_sha256}
        | results.export.sha256,
        warnings=(*_skipped(setup), *_drifted(results.ingest)),
    )
