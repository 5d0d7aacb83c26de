"""The networks that a search left beside the chosen one, shipped as an ensemble that tells how sure it is."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from optpipe import building, graph, onnx_export, quality, store, timing, uncertainty
from optpipe.deploy import run_engine
from optpipe.ensemble import OUTPUTS, Answer, Ensemble
from optpipe.errors import OptpipeError, RunError
from optpipe.lab import begin
from optpipe.pipeline import engines
from optpipe.preparation import Setup
from optpipe.results import ScoredEnsemble, ShippedEnsemble
from optpipe.types import Choice, Emit, Engine, Event, Images, Session, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import fx

_COMPARED = 64


def ship(
    setup: Setup, opened: store.Run, choice: Choice, chosen: fx.GraphModule, emit: Emit
) -> ShippedEnsemble | None:
    """Put the chosen network, recovered, and the choice's members into the bundle as one ONNX file.

    None where the recipe does not ask for it. Beside the bundle an engine of its logits alone is built at
    the target's precision, to be timed; where that fails, the reason is told.

    Raises:
        RunError: a member takes images of another size, its weights are gone, or the file computes something
            else than torch.
    """
    if not setup.recipe.export.uncertainty:
        return None
    resolved = setup.at(choice.plan)
    bench = resolved.bench()
    joined = Ensemble([chosen, *_members(setup, opened, choice)]).eval()
    emit(Event("note", "export", f"{run_engine.ENSEMBLE}: an ensemble of {len(joined.members)} networks"))
    path = opened.folder / "deploy" / run_engine.ENSEMBLE
    onnx_export.export(joined, resolved.shape, bench.target.batch, path, output_names=OUTPUTS)
    shipped = ShippedEnsemble(
        len(joined.members), path.stat().st_size, differences(joined, path, bench.target, bench.images)
    )
    if shipped.max_abs is None:
        emit(Event("warning", "export", f"{path.name} is not compared: onnxruntime is not installed"))
    try:
        engine = _priced(Answer(joined).eval(), bench, opened.stage_folder("export") / "ensemble")
    except OptpipeError as error:
        emit(Event("warning", "export", f"the ensemble has no price: {error}"))
        return dataclasses.replace(shipped, failed=str(error))
    return dataclasses.replace(
        shipped,
        engine=str(engine.path.relative_to(opened.folder)),
        engine_sha256=engine.sha256,
        build_s=engine.build_s,
    )


def _members(setup: Setup, opened: store.Run, choice: Choice) -> list[fx.GraphModule]:
    """The networks beside the chosen one."""
    shape = setup.target.input_shape
    made: list[fx.GraphModule] = []
    for member in choice.members:
        if graph.image_shape(member.plan, shape) != graph.image_shape(choice.plan, shape):
            raise RunError(
                f"a member of the ensemble takes images of {member.plan.input_hw}, the chosen network of "
                f"{choice.plan.input_hw}; set [export] uncertainty = false"
            )
        begun, left = begin(setup.original, member.start, member.plan, shape, opened)
        made.append(graph.apply(begun, left, shape))
    return made


def differences(network: Ensemble, path: Path, target: Target, images: Images) -> tuple[float, float] | None:
    """How far an ensemble's file is from torch on some images: the largest difference of each output.

    None where ONNX Runtime is not installed.

    Raises:
        RunError: a difference is beyond the tolerance of fp32.
    """
    count = min(_COMPARED, len(images))
    batch = images.batch(slice(0, count))
    found = _answered(path, target, images, count)
    if found is None:
        return None
    with torch.inference_mode():
        expected = [output.double().numpy() for output in network(batch)]
    atol, rtol = building.TOLERANCES["fp32"]
    largest: list[float] = []
    for name, got, wanted in zip(OUTPUTS, found, expected, strict=True):
        with np.errstate(invalid="ignore"):
            off = np.abs(got - wanted).max(axis=1)
        # Written so that nan fails too.
        if not (off <= atol + rtol * np.abs(wanted).max(axis=1)).all():
            raise RunError(
                f"{path}: its {name} differ from torch's by up to {off.max():.3g} on {count} images; "
                f"allowed is {atol:g} + {rtol:g} of an image's largest; set [export] uncertainty = false"
            )
        largest.append(float(off.max()))
    return largest[0], largest[1]


def _answered(
    path: Path, target: Target, images: Images, count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Logits and uncertainty of the first images from the bundle's own runner; None without ONNX Runtime."""
    engine = run_engine.Engine(
        path.name,
        "onnxruntime",
        "fp32",
        path.read_bytes(),
        (target.batch, *target.input_shape),
        target.threads or os.cpu_count() or 1,
        {"device": "cpu"},
        "this machine",
    )
    try:
        runner = run_engine.ensemble(engine)
    except run_engine.RunnerError as error:
        if error.code == 3:
            return None
        raise RunError(str(error)) from error
    parts = [
        run_engine.logits(runner, images.batch(slice(start, min(start + 256, count))).numpy(), target.batch)
        for start in range(0, count, 256)
    ]
    found = np.concatenate(parts).astype(np.float64)
    return found[:, :-2], found[:, -2:]


def _priced(answer: Answer, bench: building.Workbench, folder: Path) -> Engine:
    """The engine of an ensemble's logits, held against torch."""
    shutil.rmtree(folder, ignore_errors=True)  # what is there is of an export before, or damaged
    exported = building.export(answer, bench, folder)
    with timing.device_lock(bench.target.device):
        engine = building.build(exported, bench, folder / "engine").engine
    with engines.session(bench.backend, bench.target, engine) as session:
        onnx_export.check_parity(building.parity(answer, session, bench))
    return engine


def score(
    setup: Setup, opened: store.Run, choice: Choice, shipped: ShippedEnsemble | None, baseline: Session
) -> ScoredEnsemble | None:
    """Time the ensemble's engine in turn with the original's, and hold its answers against the labels.

    None where there is no such engine.
    """
    if shipped is None or shipped.failed:
        return None
    resolved = setup.at(choice.plan)
    images, labels = resolved.evaluation(), engines.labels(setup.evaluation)
    reference = engines.reference(opened)
    engine = Engine(opened.folder / shipped.engine, shipped.engine_sha256, shipped.build_s)
    with engines.session(setup.backend, resolved.target, engine) as result:
        measured = engines.time_beside(setup, baseline, result)
        logits = engines.logits(result, images)
    engines.store_samples(opened, "samples-ensemble.npy", measured)
    probabilities = uncertainty.probabilities(logits)
    scored = ScoredEnsemble(
        latency=measured.candidate(setup.backend.fingerprint(setup.target)),
        quality=quality.score(logits, labels, reference, "evaluation"),
        agreement=quality.agreement(logits, reference, "evaluation"),
        reliability=None if labels is None else uncertainty.reliability(probabilities, labels),
        aleatoric_variance=None if labels is None else uncertainty.aleatoric_variance(probabilities, labels),
    )
    path = opened.folder / "deploy" / run_engine.ENSEMBLE
    told = _answered(path, resolved.target, images, len(images))
    if told is None:
        return scored
    logs, (entropy, information) = told[0], told[1].T
    by_information = (
        () if labels is None else uncertainty.selective_accuracy(information, logs.argmax(axis=1) == labels)
    )
    return dataclasses.replace(
        scored,
        expected_entropy=float(entropy.mean()),
        mutual_information=float(information.mean()),
        by_information=by_information,
    )
