"""``backend = "fastest"``: build the original with every backend that loads, and take the fastest.

An engine that does not compute what torch does is out, however fast it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe import building, timing
from optpipe.errors import OptpipeError, RunError
from optpipe.types import Emit, Event, Latency, Session, Table

if TYPE_CHECKING:
    from torch import fx

REFERENCE = "onnxruntime"
"""What the others are timed in turn with, where it runs."""


@dataclass(frozen=True, slots=True)
class Entry:
    """How one backend did; ``latency`` has the ratio to the reference, None where the backend is out."""

    backend: str
    latency: Latency | None
    max_rel: float | None
    build_s: float | None
    out_because: str = ""


@dataclass(frozen=True, slots=True)
class Contest:
    """All entries and the name of the fastest."""

    chosen: str
    reference: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class _Runner:
    bench: building.Workbench
    session: Session
    parity: float
    build_s: float


def hold(
    original: fx.GraphModule,
    benches: Sequence[building.Workbench],
    folder: Path,
    *,
    budget_s: float,
    seed: int,
    emit: Emit,
) -> Contest:
    """Time the original on every backend, each in turn with the reference for ``budget_s`` seconds.

    Raises:
        RunError: no backend computes what torch does.
    """
    entries: dict[str, Entry] = {}
    runners: dict[str, _Runner] = {}
    try:
        for bench in benches:
            name = bench.target.backend
            try:
                runners[name] = _enter(original, bench, folder / name)
                emit(Event("note", name, "built", seconds=runners[name].build_s))
            except OptpipeError as error:
                entries[name] = Entry(name, None, None, None, str(error))
                emit(Event("warning", name, f"is out: {error}"))
        if not runners:
            reasons = "; ".join(f"{entry.backend}: {entry.out_because}" for entry in entries.values())
            raise RunError(f'backend = "fastest": no backend computes what torch does: {reasons}')
        reference = REFERENCE if REFERENCE in runners else next(iter(runners))
        with timing.device_lock(benches[0].target.device):
            for name, runner in runners.items():
                latency = _time(runners[reference], runner, budget_s, seed)
                entries[name] = Entry(name, latency, runner.parity, runner.build_s)
                for warning in latency.warnings:
                    emit(Event("warning", name, warning))
    finally:
        for runner in runners.values():
            runner.session.close()
    ratios = {name: _ratio(entry) for name, entry in entries.items() if entry.latency is not None}
    chosen = min(ratios, key=lambda name: ratios[name])
    emit(Event("note", "fastest", f"{chosen}: {ratios[chosen]:.3f} of {reference}'s latency"))
    ordered = tuple(entries[bench.target.backend] for bench in benches)
    return Contest(chosen, reference, ordered)


def table(contest: Contest, absent: Sequence[tuple[str, str]] = ()) -> Table:
    """The contest for the report, with the name of each backend that did not take part and why."""
    rows = tuple(
        (
            entry.backend,
            None if entry.latency is None else entry.latency.median_ms,
            _percent(entry, contest.reference),
            entry.max_rel,
            entry.build_s,
            "chosen" if entry.backend == contest.chosen else entry.out_because,
        )
        for entry in contest.entries
    )
    rows += tuple((name, None, None, None, None, why) for name, why in absent)
    columns = ("backend", "median ms", f"against {contest.reference}", "largest difference", "build s", "")
    return Table("Backends: the original on each, timed in turn", columns, rows)


def _enter(original: fx.GraphModule, bench: building.Workbench, folder: Path) -> _Runner:
    folder.mkdir(parents=True, exist_ok=True)
    exported = building.export(original, bench, folder)
    # A builder times kernels too: nobody else measures meanwhile.
    with timing.device_lock(bench.target.device):
        built = building.build(exported, bench, folder)
    session = bench.backend.load(built.engine, bench.target)
    try:
        found = building.parity(original, session, bench)
        if not found.passed:
            raise RunError(
                f"differs from torch by {found.max_rel:.3g} of the largest logit, allowed is {found.rtol:g}"
            )
    except OptpipeError:
        session.close()
        raise
    return _Runner(bench, session, found.max_rel, built.engine.build_s)


def _time(reference: _Runner, runner: _Runner, budget_s: float, seed: int) -> Latency:
    fingerprint = runner.bench.backend.fingerprint(runner.bench.target)
    if runner is reference:
        alone = timing.single(runner.session, budget_s=budget_s, seed=seed)
        return alone.latency(fingerprint)
    both = timing.paired(reference.session, runner.session, budget_s=budget_s, seed=seed)
    return both.candidate(fingerprint)


def _ratio(entry: Entry) -> float:
    assert entry.latency is not None
    ratio = entry.latency.ratio_to_original
    return 1.0 if ratio is None else ratio


def _percent(entry: Entry, reference: str) -> str | None:
    if entry.latency is None or entry.backend == reference:
        return None
    ratio, ci95 = entry.latency.ratio_to_original, entry.latency.ratio_ci95
    assert ratio is not None and ci95 is not None
    return f"{ratio - 1:+.1%} ({ci95[0] - 1:+.1%} to {ci95[1] - 1:+.1%})"
