"""From the recovered network to engines that are held against the original: export, benchmark."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe import (
    building,
    deploy,
    environment,
    graph,
    onnx_export,
    precision,
    quality,
    store,
    timing,
    uncertainty,
)
from optpipe.errors import OptpipeError
from optpipe.pipeline import engines, ensembles, layers
from optpipe.preparation import Setup
from optpipe.results import Benchmarked, Exported, Ingested, Scored, Shipped
from optpipe.types import Choice, Emit, Engine, Event, Latency, Reliability

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import fx


def export(setup: Setup, opened: store.Run, choice: Choice, emit: Emit) -> Exported:
    """Write the deploy bundle: ONNX and engine at each precision, weights, plan, runner and manifest.

    An engine of another precision than the target's that cannot be built, or computes something else, is
    left out with the reason. With ``[export] uncertainty`` the ensemble is there too.
    """
    folder = opened.folder / "deploy"
    shutil.rmtree(folder, ignore_errors=True)
    candidate = graph.apply(setup.original, choice.plan, setup.target.input_shape)
    store.load_tensors(candidate, opened.stage_folder("recover") / store.WEIGHTS)
    resolved = setup.at(choice.plan)
    sized = resolved.bench()
    exported = building.export(candidate, sized, folder)
    onnx = folder / building.ONNX
    if not onnx.exists():
        onnx_export.export(candidate, resolved.shape, sized.target.batch, onnx)
    shipped: list[Shipped] = []
    for wanted in setup.precisions:
        bench = sized.at(wanted)
        emit(Event("note", "export", f"{bench.target.backend} at {wanted}"))
        try:
            shipped.append(_ship(candidate, bench, exported, opened.folder, emit))
        except OptpipeError as error:
            if wanted == setup.target.precision:
                raise
            emit(Event("warning", "export", f"{wanted} is left out: {error}"))
            shipped.append(Shipped(wanted, failed=str(error)))
    joined = ensembles.ship(setup, opened, choice, candidate, emit)
    saved = deploy.Saved(
        model=dataclasses.replace(setup.recipe.model, weights=None),
        search_folder=str(setup.recipe.folder),
        plan=choice.plan,
        input_shape=setup.target.input_shape,
        preprocess=resolved.preprocess,
    )
    described = environment.describe(setup.backend.fingerprint(setup.target), setup.target.device)
    origin = deploy.Origin(
        fingerprint=setup.backend.fingerprint(setup.target),
        recipe_sha256=store.file_sha256(opened.folder / store.RECIPE),
        seed=setup.recipe.run.seed,
        calibration_images=setup.calibration.names,
        validation_images=() if setup.validation is None else setup.validation.names,
        versions={"optpipe": described.optpipe, "python": described.python} | described.versions,
    )
    bundled = [
        deploy.BundledEngine(
            one.precision,
            setup.target.backend,
            Path(one.engine).relative_to("deploy").as_posix(),
            Path(one.source).relative_to("deploy").as_posix(),
            one.build_s,
            one.kept_in_float,
            one.flags,
        )
        for one in shipped
        if not one.failed
    ]
    sha256 = deploy.write_bundle(folder, candidate, saved, resolved.target, origin, bundled)
    return Exported(tuple(shipped), onnx.stat().st_size, sha256, 0.0, joined)


def _ship(
    candidate: fx.GraphModule, bench: building.Workbench, exported: Path, run: Path, emit: Emit
) -> Shipped:
    """Build one engine of the bundle and hold it against torch."""
    wanted = bench.target.precision
    folder = exported.parent / "engines" / wanted
    with timing.device_lock(bench.target.device):
        built = building.build(exported, bench, folder, emit=emit)
    engine = built.engine
    try:
        with engines.session(bench.backend, bench.target, engine) as session:
            parity = building.parity(candidate, session, bench)
        onnx_export.check_parity(parity)
    except OptpipeError:
        # What is wrong is not left lying in the bundle; some engines are the file itself.
        shutil.rmtree(folder, ignore_errors=True)
        if engine.path != exported:
            engine.path.unlink(missing_ok=True)
        raise
    if bench.backend.SOURCE == "program" and wanted in {"fp16", "int8"}:
        # The engine is built from the program; its ONNX twin is for other engines.
        onnx = exported.with_name(building.ONNX)
        precision.convert(onnx, onnx.with_name(f"model.{wanted}.onnx"), wanted, bench.images, bench.quantize)
    if engine.timing_cache is not None:
        shutil.copyfile(engine.timing_cache, exported.parent / "timing.cache")
    return Shipped(
        precision=wanted,
        source=str(built.source.relative_to(run)),
        source_bytes=built.source.stat().st_size,
        engine=str(engine.path.relative_to(run)),
        engine_sha256=engine.sha256,
        engine_bytes=engine.path.stat().st_size,
        build_s=engine.build_s,
        parity=parity,
        kept_in_float=() if built.converted is None else built.converted.kept_in_float,
        tables=() if built.converted is None else precision.tables(built.converted),
        flags=engine.flags,
        notes=engine.notes,
    )


def benchmark(
    setup: Setup, opened: store.Run, ingested: Ingested, choice: Choice, exported: Exported, emit: Emit
) -> Benchmarked:
    """The original and each shipped engine side by side: latency in turn, and accuracy.

    The original runs at its own resolution, the engines at the chosen plan's.
    """
    first: Latency | None = None
    scored: list[Scored] = []
    fingerprint = setup.backend.fingerprint(setup.target)
    reference, labels = engines.reference(opened), engines.labels(setup.evaluation)
    resolved = setup.at(choice.plan)
    images = resolved.evaluation()
    original_engine = engines.original(setup, opened, ingested)
    with engines.session(setup.backend, setup.target, original_engine) as baseline:
        built = [one for one in exported.engines if not one.failed]
        for number, one in enumerate(built, start=1):
            engine = Engine(opened.folder / one.engine, one.engine_sha256, one.build_s)
            target = dataclasses.replace(resolved.target, precision=one.precision)
            with engines.session(setup.backend, target, engine) as result:
                measured = engines.time_beside(setup, baseline, result)
                logits = engines.logits(result, images)
            name = "samples.npy" if first is None else f"samples-{one.precision}.npy"
            engines.store_samples(opened, name, measured)
            first = first or measured.baseline(fingerprint)
            latency = measured.candidate(fingerprint)
            emit(Event("progress", "engines", one.precision, number, len(built), fields=latency.fields))
            scored.append(
                Scored(
                    one.precision,
                    latency,
                    quality.score(logits, labels, reference, "evaluation"),
                    quality.agreement(logits, reference, "evaluation"),
                    _reliability(logits, labels),
                )
            )
        joined = ensembles.score(setup, opened, choice, exported.ensemble, baseline)
    assert first is not None, "the target's precision is always shipped"
    original = quality.score(reference, labels, reference, "evaluation")
    doubt = _reliability(reference, labels)
    shipped = built[0]
    told = layers.times(
        setup.backend,
        (original_engine, setup.target),
        (Engine(opened.folder / shipped.engine, shipped.engine_sha256, shipped.build_s), resolved.target),
        max(first, scored[0].latency, key=lambda latency: latency.median_ms),
    )
    return Benchmarked(first, original, doubt, tuple(scored), 0.0, joined, told)


def _reliability(logits: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Reliability | None:
    """What the logits' probabilities are worth, where there are labels to tell."""
    return None if labels is None else uncertainty.reliability(uncertainty.probabilities(logits), labels)
