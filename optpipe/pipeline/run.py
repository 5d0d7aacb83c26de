"""The run: each stage once, then the report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from optpipe import contest, environment, files, locks, selection, store, timing
from optpipe.errors import UsageError
from optpipe.pipeline import curves, leakage, whole, workers
from optpipe.pipeline.assembly import assemble, known_beforehand
from optpipe.pipeline.search import analyze, check_drift, ingest, prune, recover, score_again
from optpipe.pipeline.shipping import benchmark, export
from optpipe.pipeline.synthesizing import synthesized
from optpipe.preparation import Setup
from optpipe.report import build, limits, schema
from optpipe.results import Analyzed, Benchmarked, Exported, Ingested, Inputs, Pruned, Recovered, Results
from optpipe.types import Emit, Event

_INPUTS = "inputs.json"
T = TypeVar("T", Ingested, Analyzed, Pruned, Recovered, Exported, Benchmarked)


def run(setup: Setup, folder: Path, *, fresh: bool, emit: Emit, shared: Path | None = None) -> schema.Report:
    """Take a prepared recipe through the six stages; a run that was interrupted goes on where it was.

    Runs of one parent folder have each other's answers by the cache in it, unless this one is ``fresh``. The
    runs of a sweep have them by ``shared``, and by it the ingest of one original and what each has trained.

    Raises:
        UsageError: the folder holds another run, or the recipe asks for curves that cannot be drawn, or for
            workers that cannot load the network.
        RunError: a stage failed; what was done before it stays done.
    """
    curves.refuse(setup)
    workers.refuse(setup)
    cache = shared
    if shared is None and not fresh:
        cache = folder.resolve().parent / store.CACHE
    if not setup.recipe.run.cache:
        cache = None
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            store.open_run(
                folder,
                setup.frozen,
                fresh=fresh,
                cache=cache,
                lends=shared is not None,
                shared=setup.recipe.run.store,
            )
        )

        def tell(event: Event) -> None:
            opened.emit(event)
            emit(event)

        stack.enter_context(locks.telling(_once(tell)))
        setup = synthesized(setup, opened, tell)
        _check_inputs(setup, opened)
        if setup.selected.note:
            tell(Event("note", "backend", setup.selected.note))
        setup, held = _decide(setup, opened, tell)
        device = setup.target.device
        described = environment.describe(setup.backend.fingerprint(setup.target), device)
        files.write_atomically(opened.folder / "environment.json", store.to_json(described))
        for warning in known_beforehand(setup):
            tell(Event("warning", "run", warning))
        stages = Stages(opened, tell)
        ingested = stages.take("ingest", Ingested, lambda: ingest(setup, opened, tell))
        if not whole.logits_are_whole(opened, ingested):
            ingested = score_again(setup, opened, ingested, tell)
        if opened.stage_result("analyze", Analyzed) is None:
            ingested = check_drift(setup, opened, ingested, tell)
        analyzed = stages.take("analyze", Analyzed, lambda: analyze(setup, opened, ingested, tell))
        choice = analyzed.choice
        searched = whole.of_choice(choice)
        pruned = stages.take("prune", Pruned, lambda: prune(setup, opened, choice), searched)
        recovered = stages.take("recover", Recovered, lambda: recover(setup, opened, choice, tell), searched)
        exported = stages.take(
            "export",
            Exported,
            lambda: export(setup, opened, choice, tell),
            whole.of_recovered(choice, recovered),
        )
        final = stages.take(
            "benchmark",
            Benchmarked,
            lambda: benchmark(setup, opened, ingested, choice, exported, tell),
            whole.of_exported(choice, exported),
        )
        results = Results(ingested, analyzed, pruned, recovered, exported, final)
        # What is reused may have been measured elsewhere than here.
        measured_on = environment.describe(final.original.fingerprint, device)
        drawn = curves.draw(setup, opened, choice, recovered, tell)
        leaked = leakage.measure(setup, opened, choice, recovered, None if drawn is None else drawn.halves)
        report = assemble(setup, results, measured_on, held, drawn, leaked)
        limits.write(opened.folder, setup.recipe.gate)
        build.write(opened.folder, report)
        return report


def _once(emit: Emit) -> Callable[[str], None]:
    """Tells of waiting for others, but not again of the same: a run takes a lock dozens of times."""
    told: set[str] = set()

    def tell(line: str) -> None:
        if line not in told:
            told.add(line)
            emit(Event("note", "device", line))

    return tell


def check(setup: Setup, folder: Path) -> None:
    """Refuse at once what :func:`run`, were it not fresh, would refuse before its first stage.

    Raises:
        UsageError: the folder holds another run, or the recipe asks for curves that cannot be drawn, or for
            workers that cannot load the network.
    """
    curves.refuse(setup)
    workers.refuse(setup)
    store.refuse_other(folder, setup.frozen)
    if setup.recipe.data.synthesize is None:  # images that are to be made have no digest yet
        _refuse_other_inputs(folder, _inputs(setup))


def _check_inputs(setup: Setup, opened: store.Run) -> None:
    """Refuse to go on with another model or other images than the run was begun with."""
    inputs, path = _inputs(setup), opened.folder / _INPUTS
    if not path.exists():
        files.write_atomically(path, store.to_sealed(inputs))
    _refuse_other_inputs(opened.folder, inputs)


def _inputs(setup: Setup) -> Inputs:
    validation = None if setup.validation is None else setup.validation.digest
    return Inputs(setup.model_digest, setup.calibration.digest, setup.evaluation.digest, validation)


def _refuse_other_inputs(folder: Path, inputs: Inputs) -> None:
    path = folder / _INPUTS
    if not path.exists():
        return
    try:
        begun = store.from_json(Inputs, path.read_bytes())
    except ValueError:
        raise UsageError(
            f"{path}: is damaged, and what the run was begun with cannot be told; move it aside with --fresh"
        ) from None
    changed = [
        field.name
        for field in dataclasses.fields(Inputs)
        if getattr(begun, field.name) != getattr(inputs, field.name)
    ]
    if changed:
        raise UsageError(
            f"{folder}: was begun with other {' and '.join(changed)} data under the same name; name "
            "another folder with --out, or move that run aside with --fresh"
        )


class Stages:
    """Takes each stage once: reads its stored result, or runs it and stores what it returns.

    A stage whose files are no longer those that it left is run again.
    """

    def __init__(self, opened: store.Run, emit: Emit) -> None:
        self._run = opened
        self._emit = emit

    def take(self, name: str, cls: type[T], work: Callable[[], T], made_from: str | None = None) -> T:
        """The stage's result, from the store where it is done, and ``made_from`` the same."""
        total = len(store.STAGES)
        number = store.STAGES.index(name) + 1
        stored = self._run.stage_result(name, cls, made_from)
        if stored is not None:
            spoilt = whole.damaged(self._run, stored)
            if spoilt is None:
                self._emit(Event("stage", name, "reused", number, total))
                return stored
            shown = os.path.relpath(spoilt, self._run.folder)
            self._emit(Event("warning", name, f"{shown} is lost or damaged: the stage is done again"))
        self._emit(Event("stage", name, "started", number, total))
        watch = timing.Stopwatch()
        try:
            result = work()
        except Exception as error:
            self._run.fail_stage(name, error)
            raise
        result = dataclasses.replace(result, seconds=watch.seconds)
        self._run.finish_stage(name, result, made_from)
        self._emit(Event("stage", name, "finished", number, total, watch.seconds))
        return result


def _decide(setup: Setup, opened: store.Run, emit: Emit) -> tuple[Setup, contest.Contest | None]:
    """The setup with one backend; where the fastest is sought, what was found is kept for a resumed run."""
    if setup.recipe.target.backend != selection.FASTEST:
        return setup, None
    path = opened.folder / "contest.json"
    if path.exists():
        try:
            held = store.from_json(contest.Contest, path.read_bytes())
        except ValueError:
            raise UsageError(
                f"{path}: is damaged or of another version of optpipe; start anew with --fresh"
            ) from None
    else:
        held = contest.hold(
            setup.original,
            setup.benches,
            opened.folder / "contest",
            budget_s=setup.recipe.timing.budget_s,
            seed=setup.recipe.run.seed,
            emit=emit,
        )
        files.write_atomically(path, store.to_sealed(held))
        shutil.rmtree(opened.folder / "contest", ignore_errors=True)  # what was timed has served
    chosen = tuple(bench for bench in setup.benches if bench.target.backend == held.chosen)
    if not chosen:
        raise UsageError(
            f"{opened.folder}: was begun with {held.chosen}, which does not load here; start anew with "
            "--fresh"
        )
    return dataclasses.replace(setup, benches=chosen), held
