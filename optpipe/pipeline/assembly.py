"""The report from the results of all stages."""

from __future__ import annotations

from optpipe import contest, store
from optpipe.pipeline import curves, synthesizing
from optpipe.preparation import Setup
from optpipe.report import build, schema
from optpipe.results import Ingested, Results
from optpipe.types import Table


def assemble(
    setup: Setup,
    results: Results,
    described: schema.EnvironmentReport,
    held: contest.Contest | None,
    drawn: curves.Curves | None = None,
    leaked: schema.LeakageReport | None = None,
) -> schema.Report:
    """The whole report; ``held`` is how the backends did, where the fastest was sought.

    ``drawn`` are the losses between networks where the recipe asks for them, ``leaked`` is what more images
    would do, where recovery was by mimicking.
    """
    recipe, choice, final = setup.recipe, results.analyze.choice, results.benchmark
    chosen = final.results[0]
    contested = () if held is None else (contest.table(held, setup.selected.absent),)
    original = schema.NetworkReport(
        final.original_quality,
        final.original,
        setup.graph.parameters,
        setup.graph.macs,
        results.ingest.onnx_bytes,
        reliability=final.original_reliability,
    )
    result = schema.NetworkReport(
        chosen.quality,
        chosen.latency,
        results.prune.parameters,
        results.prune.macs,
        results.export.onnx_bytes,
        chosen.agreement,
        chosen.reliability,
        results.prune.sparsity,
    )
    return schema.Report(
        schema=schema.SCHEMA,
        name=recipe.run.name,
        method=recipe.method_name,
        model=recipe.model.name,
        seed=recipe.run.seed,
        target=setup.target,
        budget=build.judge(recipe.budget, original, result, choice.plan),
        original=original,
        result=result,
        quality_before_recovery=results.prune.quality,
        plan=choice.plan,
        recover=choice.recover,
        reason=choice.reason,
        tables=(*contested, *choice.tables, *_layer_tables(results), *(drawn.tables if drawn else ())),
        data=_data(setup),
        stages={name: schema.StageReport(getattr(results, name).seconds) for name in store.STAGES},
        environment=described,
        sha256={"original weights": setup.model_digest, "recovered weights": results.recover.weights_sha256}
        | results.export.sha256,
        precisions=_precisions(results),
        engines=results.analyze.engines,
        warnings=_warnings(setup, results),
        notes=(*((setup.selected.note,) if setup.selected.note else ()), *(drawn.notes if drawn else ())),
        figures=(*choice.figures, *(drawn.figures if drawn else ())),
        ensemble=_ensemble(results),
        leakage=leaked,
        candidates=results.analyze.candidates,
        layers=final.layers,
    )


def _data(setup: Setup) -> schema.DataReport:
    validation = setup.validation
    return schema.DataReport(
        calibration_count=len(setup.calibration),
        calibration_sha256=setup.calibration.digest,
        evaluation_count=len(setup.evaluation),
        evaluation_sha256=setup.evaluation.digest,
        validation_count=0 if validation is None else len(validation),
        validation_sha256=None if validation is None else validation.digest,
        contact_sheet=None if setup.recipe.data.synthesize is None else synthesizing.SHEET,
    )


def _precisions(results: Results) -> tuple[schema.PrecisionReport, ...]:
    """Every precision that was asked for, in the order of the export, as it measured or why it is absent."""
    scored = {one.precision: one for one in results.benchmark.results}
    found: list[schema.PrecisionReport] = []
    for shipped in results.export.engines:
        measured = scored.get(shipped.precision)
        found.append(
            schema.PrecisionReport(
                precision=shipped.precision,
                latency=None if measured is None else measured.latency,
                quality=None if measured is None else measured.quality,
                agreement=None if measured is None else measured.agreement,
                source_bytes=shipped.source_bytes,
                engine_bytes=shipped.engine_bytes,
                build_s=shipped.build_s,
                max_rel=None if shipped.parity is None else shipped.parity.max_rel,
                kept_in_float=shipped.kept_in_float,
                notes=shipped.notes,
                failed=shipped.failed,
                reliability=None if measured is None else measured.reliability,
            )
        )
    return build.with_advice(tuple(found))


def _ensemble(results: Results) -> schema.EnsembleReport | None:
    shipped, measured = results.export.ensemble, results.benchmark.ensemble
    if shipped is None:
        return None
    return schema.EnsembleReport(
        members=shipped.members,
        onnx_bytes=shipped.bytes,
        build_s=shipped.build_s,
        latency=None if measured is None else measured.latency,
        quality=None if measured is None else measured.quality,
        agreement=None if measured is None else measured.agreement,
        reliability=None if measured is None else measured.reliability,
        aleatoric_variance=None if measured is None else measured.aleatoric_variance,
        expected_entropy=None if measured is None else measured.expected_entropy,
        mutual_information=None if measured is None else measured.mutual_information,
        by_information=() if measured is None else measured.by_information,
        max_abs=shipped.max_abs,
        failed=shipped.failed,
    )


def _layer_tables(results: Results) -> tuple[Table, ...]:
    return tuple(table for shipped in results.export.engines for table in shipped.tables)


def _warnings(setup: Setup, results: Results) -> tuple[str, ...]:
    final = results.benchmark
    left_out = (f"{one.precision} is left out: {one.failed}" for one in results.export.engines if one.failed)
    timed = [(f"the original at {setup.target.precision}", final.original)]
    timed += [(f"the result at {one.precision}", one.latency) for one in final.results]
    if final.ensemble is not None:
        timed.append(("the ensemble", final.ensemble.latency))
    misleading = (f"{name}: {warning}" for name, latency in timed for warning in latency.warnings)
    joined = results.export.ensemble
    unpriced = (f"the ensemble has no price: {joined.failed}",) if joined and joined.failed else ()
    return (*known_beforehand(setup), *_drifted(results.ingest), *left_out, *unpriced, *misleading)


def known_beforehand(setup: Setup) -> tuple[str, ...]:
    """What to warn of from the start: images that cannot be read, a GPU that torch cannot use."""
    lines: list[str] = []
    if setup.device != setup.target.device and setup.recipe.run.trainer == "target":
        lines.append(
            f"torch cannot use the GPU: recovery trains on the {setup.device.upper()}, which takes longer; "
            "optpipe doctor --gpu says what is missing"
        )
    sets = (
        ("calibration", setup.calibration),
        ("validation", setup.validation),
        ("evaluation", setup.evaluation),
    )
    for split, images in sets:
        if images is not None and images.skipped:
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
