"""From the original to the recovered network: ingest, analyze, prune, recover."""

from __future__ import annotations

import dataclasses
import shutil

from optpipe import building, files, graph, onnx_export, quality, store, tune
from optpipe.errors import UsageError
from optpipe.lab import begin, drive, refuse_other_size
from optpipe.lab.engines import EngineRecord
from optpipe.pipeline import engines, recovering, whole, workers
from optpipe.pipeline.laboratory import laboratory
from optpipe.preparation import Setup
from optpipe.results import Analyzed, Ingested, Pruned, Recovered
from optpipe.types import Choice, Emit, Engine, Event


def ingest(setup: Setup, opened: store.Run, emit: Emit) -> Ingested:
    """Export, build, score and time the original, or take what another run of the sweep found of it."""
    found = _borrowed(setup, opened, emit) or _left(setup, opened, emit)
    if found is not None:
        return found
    folder = opened.stage_folder("ingest")
    engine = engines.build_original(setup, opened)
    with engines.session(setup.backend, setup.target, engine) as session:
        onnx_export.check_parity(building.parity(setup.original, session, setup.bench))
        logits = engines.logits(session, setup.evaluation)
        latency = engines.time_alone(setup, session)
    logits_sha256 = engines.store_logits(opened, logits)
    measured = quality.score(logits, engines.labels(setup.evaluation), logits, "evaluation")
    onnx = folder / building.ONNX
    if not onnx.exists():
        onnx_export.export(setup.original, setup.target.input_shape, setup.target.batch, onnx)
    found = Ingested(
        graph=setup.graph,
        quality=measured,
        latency=latency,
        onnx_bytes=onnx.stat().st_size,
        engine=str(engine.path.relative_to(opened.folder)),
        engine_sha256=engine.sha256,
        epoch=_epoch(opened),
        seconds=0.0,
        logits_sha256=logits_sha256,
    )
    _lend(setup, opened, found)
    return found


def _epoch(opened: store.Run) -> int:
    """0; or, where an ingest was lost that latencies were held against, the epoch of the latest of them."""
    there = [store.read_answer(path, EngineRecord) for path in opened.folder.glob("engines/*/latency.json")]
    return max((one.epoch for one in there if one is not None), default=0)


def score_again(setup: Setup, opened: store.Run, ingested: Ingested, emit: Emit) -> Ingested:
    """An ingest whose logits were lost or damaged, with those of its engine once more."""
    emit(Event("warning", "ingest", "logits.npy is lost or damaged: the original is scored again"))
    with engines.session(setup.backend, setup.target, engines.original(setup, opened, ingested)) as session:
        logits = engines.logits(session, setup.evaluation)
    renewed = dataclasses.replace(ingested, logits_sha256=engines.store_logits(opened, logits))
    opened.finish_stage("ingest", renewed)
    return renewed


_LENT = "lent.json"
"""What an ingest came to, among the files that go with it to other runs."""


def _lend(setup: Setup, opened: store.Run, found: Ingested, *, anew: bool = False) -> None:
    """Let the other runs of a sweep have an ingest; ``anew`` where it was timed again since."""
    folder = opened.stage_folder("ingest")
    key = _original_key(setup)
    files.write_atomically(folder / _LENT, store.to_sealed(found, key))
    opened.lend("ingest", key, folder, anew=anew)


def _original_key(setup: Setup) -> str:
    """sha256 over all that the original's engine, its logits and its latency depend on.

    Calibration images decide an engine only where they choose its ranges, or what it keeps in float.
    """
    target, clock = setup.target, setup.recipe.timing
    converts = target.precision not in {"fp32", "bf16"}
    return store.digest(
        "ingest 1",
        setup.model_digest,
        graph.structure_key(setup.original, target.input_shape, target.batch),
        setup.evaluation.digest,
        target,
        setup.backend.fingerprint(target),
        (clock.tolerance, clock.budget_s),
        setup.recipe.run.seed,
        *((setup.recipe.export.quantize, setup.calibration.digest) if converts else ()),
    )


def _left(setup: Setup, opened: store.Run, emit: Emit) -> Ingested | None:
    """What this run's own ingest came to, where its result was lost and the copy for other runs was not."""
    path = opened.stage_folder("ingest") / _LENT
    found = store.read_answer(path, Ingested)
    if found is None or opened.lends or store.source_of(path) != _original_key(setup):
        return None
    if not whole.ingest_is_whole(opened, found):
        return None
    emit(Event("note", "ingest", "the original as this run measured it before"))
    return found


def _borrowed(setup: Setup, opened: store.Run, emit: Emit) -> Ingested | None:
    """What another run of the sweep found of the same original, its engine held against torch once more.

    The images that it is held against are this run's own.
    """
    folder = opened.stage_folder("ingest")
    if not opened.borrow("ingest", _original_key(setup), folder):
        return None
    found: Ingested | None
    try:
        found = store.from_json(Ingested, (folder / _LENT).read_bytes())
    except (OSError, ValueError):
        found = None
    if found is None or not whole.ingest_is_whole(opened, found):
        # Damaged, or of another version: measured anew, in a folder without remains of it.
        opened.withdraw("ingest", _original_key(setup))
        shutil.rmtree(folder, ignore_errors=True)
        return None
    engine = Engine(opened.folder / found.engine, found.engine_sha256, build_s=0.0)
    with engines.session(setup.backend, setup.target, engine) as session:
        onnx_export.check_parity(building.parity(setup.original, session, setup.bench))
    emit(Event("note", "ingest", "the original as another run of this sweep measured it"))
    return dataclasses.replace(found, graph=setup.graph, borrowed=True)


def check_drift(setup: Setup, opened: store.Run, ingested: Ingested, emit: Emit) -> Ingested:
    """Time the original again where it was timed in another sitting, or for another run.

    Where it moved too far, a new epoch of latencies begins.
    """
    if not ingested.borrowed and not any((opened.folder / "engines").glob("*/latency.json")):
        return ingested
    engine = engines.original(setup, opened, ingested)
    limit = setup.recipe.timing.drift
    with engines.session(setup.backend, setup.target, engine) as session:
        now = engines.time_alone(setup, session, tolerance=limit / 10)
        moved = now.median_ms / ingested.latency.median_ms - 1.0
        stays = abs(moved) <= limit and now.fingerprint == ingested.latency.fingerprint
        if not stays:  # what takes its place is measured as well as it was
            now = engines.time_alone(setup, session)
    if stays:
        emit(Event("note", "baseline", f"moved {moved:+.1%} since the run began: latencies stay"))
        return ingested
    emit(Event("warning", "baseline", f"moved {moved:+.1%} since the run began: latencies are taken afresh"))
    renewed = dataclasses.replace(ingested, latency=now, epoch=ingested.epoch + 1)
    opened.finish_stage("ingest", renewed)
    _lend(setup, opened, renewed, anew=True)
    return renewed


def analyze(setup: Setup, opened: store.Run, ingested: Ingested, emit: Emit) -> Analyzed:
    """Drive the method's search against the budget."""
    recipe = setup.recipe
    pool = workers.pool_of(setup, opened, ingested, emit)
    lab, scene = laboratory(setup, opened, ingested, emit, pool=pool)
    try:
        choice = drive(setup.method.search(scene, setup.config), lab)
        if choice.recover.loss != "labels":
            refuse_other_size(choice.plan, setup.target.input_shape, choice.recover.loss)
        if recipe.export.uncertainty and not choice.members:
            raise UsageError(
                f"{recipe.path}: [export] uncertainty = true: {recipe.method_name} left the chosen network "
                "alone, and an ensemble takes several; set it to false, or search with a method that samples "
                "networks"
            )
        return Analyzed(choice, lab.engines, 0.0, lab.candidates(choice.plan))
    finally:
        lab.close()
        if pool is not None:
            pool.close()


def prune(setup: Setup, opened: store.Run, choice: Choice) -> Pruned:
    """Apply the chosen plan to the weights that the search chose it for."""
    resolved = setup.at(choice.plan)
    shape = setup.target.input_shape
    begun, left = begin(setup.original, choice.start, choice.plan, shape, opened)
    candidate = graph.apply(begun, left, shape)
    parameters, macs = graph.count(candidate, resolved.shape)
    path = opened.stage_folder("prune") / store.WEIGHTS
    store.save_tensors(path, candidate.state_dict())
    logits = tune.logits(candidate, resolved.evaluation(), tune.usable(setup.device)).numpy()
    measured = quality.score(
        logits, engines.labels(setup.evaluation), engines.reference(opened), "evaluation"
    )
    sparsity = graph.sparsity(candidate)
    return Pruned(parameters, macs, measured, 0.0, sparsity, store.file_sha256(path))


def recover(setup: Setup, opened: store.Run, choice: Choice, emit: Emit) -> Recovered:
    """Train the pruned network as the choice says, where the recipe does."""
    path = opened.stage_folder("recover") / store.WEIGHTS
    if not choice.recover.steps:
        store.save_tensors(path, recovering.candidate_of(setup, opened, choice).state_dict())
        return Recovered(store.file_sha256(path), None, None, 0.0)
    trained = workers.recover(setup, opened, choice, emit)
    return Recovered(store.file_sha256(path), trained.loss_first, trained.loss_last, 0.0)
