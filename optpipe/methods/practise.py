"""PRACTISE: drop residual blocks, recover from a tiny unlabelled set (Wang and Wu, "Practical Network
Acceleration with Tiny Sets").

Each droppable block B is given its saving tau(B) on the target (Eq. 32) and its recoverability R(B)
(Eq. 31); blocks of low R/tau (Eq. 33) go first, until the measured latency of the combined candidate meets
the budget. Recovery mimics the original's features (Eq. 34).

Deliberate deviations. A block whose saving is not clearly above zero is never dropped: R/tau would put one
whose removal made the engine slower first. Latencies do not add up, so every prefix is built and timed.
``rescore`` scores the remaining blocks anew after each drop, by the error that each adds; it is off, as in
the paper's Algorithm 1: in trials on CIFAR-10 ResNet-56 with equal recovery, scoring once chose the better
nine blocks.

Recovery departs from the paper's settings too: a higher rate, a cosine schedule, shifts and CutMix for
resized crops, and the stages' outputs in the loss. The recipe ``cifar10/practise_resnet56_paper.toml`` takes
all of it back; ``benchmarks/budgets.py`` measures either.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

from optpipe import graph
from optpipe.errors import RunError, UsageError
from optpipe.methods._meter import refuse_sparsity
from optpipe.types import (
    Answer,
    Ask,
    Block,
    Budget,
    Cell,
    Choice,
    Images,
    Interim,
    ModelGraph,
    Plan,
    Request,
    Scene,
    Search,
    Step,
    StepResult,
    Table,
    Trial,
    Tune,
)

NEEDS_LABELS = False

RECOVER = Tune(
    steps=1200,
    lr=0.1,
    nesterov=True,
    schedule="cosine",
    warmup=0.05,
    stage_weight=1.0,
    augment="shift_cutmix",
    autocast="auto",
)


@dataclass(frozen=True, slots=True)
class Config:
    """The keys of ``[method]``.

    ``scorer``: "exact" trains adaptors for ``exact_steps`` as the paper does, "fast" fits one layer in
    closed form on ``fast_images`` images (``optpipe.graph.refit_errors``).
    """

    scorer: Literal["fast", "exact"] = "fast"
    rescore: bool = False
    exact_steps: int = 1000
    fast_images: int = 256


@dataclass(frozen=True, slots=True)
class _Saving:
    """tau of one block (Eq. 32): the share of the original's latency, with its 95% interval."""

    tau: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Drop:
    """One step of the selection: the block, its score when it was chosen, the combined candidate."""

    block: str
    recoverability: float
    score: float
    trial: Trial


def check(
    shown: ModelGraph,
    calibration: Images,
    budget: Budget,
    config: Config,
    recover: Tune,
    validation: Images | None = None,
) -> None:
    """UsageError where there is nothing to drop, or zeros are asked for."""
    refuse_sparsity(budget, "practise")
    if not shown.droppable:
        raise UsageError(
            "[method] practise: the network has no droppable block (a residual block with an identity "
            "shortcut); `optpipe inspect` says why not for each"
        )


def search(scene: Scene, config: Config) -> Search:
    """Score every droppable block, then drop the lowest scores until the measured budget is met.

    Raises:
        UsageError: the network has no droppable block, or fewer than the budget asks for.
        RunError: no plan meets the budget; says what can be reached.
    """
    check(scene.graph, scene.calibration, scene.budget, config, scene.recover)
    blocks = scene.graph.droppable
    savings = yield from _time_each(blocks)
    eligible = [block.name for block in blocks if savings[block.name].low > 0]
    yield from _check_reachable(scene, eligible, len(blocks))
    first: dict[str, float] = {}
    drops: list[_Drop] = []
    while not drops or not _met(scene, drops[-1].trial, len(drops)):
        dropped = [drop.block for drop in drops]
        if config.rescore or not first:
            remaining = [block.name for block in blocks if block.name not in dropped]
            errors = yield from _score(scene, config, dropped, remaining)
            first = first or errors
        before = drops[-1].recoverability if drops and config.rescore else 0.0
        scores = {
            name: (errors[name] - before) / savings[name].tau for name in eligible if name not in dropped
        }
        best = min(scores, key=scores.__getitem__)
        plan = _plan(scene, [*dropped, best])
        (answer,) = yield [Ask(plan)]
        drops.append(_Drop(best, errors[best], scores[best], cast(Trial, answer)))
    plan = drops[-1].trial.ask.plan
    tables = (_block_table(blocks, savings, first, drops), _prefix_table(scene, savings, drops))
    interim = (Interim(Plan()), *(Interim(drop.trial.ask.plan) for drop in drops))
    return Choice(plan, scene.recover, _reason(scene, drops), tables, interim=interim)


def _time_each(blocks: Sequence[Block]) -> Generator[Sequence[Request], Sequence[Answer], dict[str, _Saving]]:
    trials = yield [Ask(Plan(drop_blocks=(block.name,))) for block in blocks]
    return {block.name: _saving(cast(Trial, trial)) for block, trial in zip(blocks, trials, strict=True)}


def _saving(trial: Trial) -> _Saving:
    latency = trial.latency
    assert latency is not None and latency.ratio_to_original is not None and latency.ratio_ci95 is not None
    low, high = latency.ratio_ci95
    return _Saving(1.0 - latency.ratio_to_original, 1.0 - high, 1.0 - low)


def _check_reachable(
    scene: Scene, eligible: Sequence[str], droppable: int
) -> Generator[Sequence[Request], Sequence[Answer], None]:
    """Time the smallest candidate first: a budget that even it misses is refused before any scoring."""
    budget = scene.budget
    if budget.drop_blocks is not None:
        if budget.drop_blocks > len(eligible):
            raise UsageError(
                f"[budget] drop_blocks = {budget.drop_blocks}: only {len(eligible)} of the {droppable} "
                "droppable blocks save measurable time"
            )
        return
    if not eligible:
        raise RunError("no block saves measurable time on this target: there is nothing to drop for speed")
    (answer,) = yield [Ask(_plan(scene, eligible))]
    if _met(scene, cast(Trial, answer), len(eligible)):
        return
    every = f"dropping all {len(eligible)} blocks that save time"
    size = _size(scene, cast(Trial, answer))
    if size is not None:
        what, reduced, asked = size
        raise RunError(
            f"no plan meets the budget: {every} reduces the {what} by {reduced:.1%}, {asked:.1%} is asked: "
            f"it misses by {asked - reduced:.1%}; lower the budget"
        )
    best = _saving(cast(Trial, answer))
    allowed = budget.allowed_ratio(scene.baseline)
    assert allowed is not None
    raise RunError(
        f"no plan meets the budget: {every} reduces the latency by {best.tau:.1%} (at least "
        f"{best.low:.1%}), {1 - allowed:.1%} is asked: it misses by {1 - allowed - best.low:.1%}; lower the "
        "budget"
    )


def _size(scene: Scene, trial: Trial) -> tuple[str, float, float] | None:
    """What a budget in size counts, the share that a candidate saves of it, the share that is asked."""
    budget = scene.budget
    if budget.macs_reduction is not None:
        return "MACs", 1.0 - trial.macs / scene.graph.macs, budget.macs_reduction
    if budget.parameters_reduction is not None:
        return "parameters", 1.0 - trial.parameters / scene.graph.parameters, budget.parameters_reduction
    return None


def _met(scene: Scene, trial: Trial, dropped: int) -> bool:
    """Whether a candidate meets the budget: in size, or with the whole interval of its latency's ratio."""
    if scene.budget.drop_blocks is not None:
        return dropped >= scene.budget.drop_blocks
    shown = scene.graph
    in_size = scene.budget.met_in_size(trial.macs / shown.macs, trial.parameters / shown.parameters)
    if in_size is not None:
        return in_size
    allowed = scene.budget.allowed_ratio(scene.baseline)
    assert allowed is not None and trial.latency is not None and trial.latency.ratio_ci95 is not None
    return trial.latency.ratio_ci95[1] <= allowed


def _score(
    scene: Scene, config: Config, dropped: Sequence[str], remaining: Sequence[str]
) -> Generator[Sequence[Request], Sequence[Answer], dict[str, float]]:
    """R of dropping each remaining block beside those already dropped (Eq. 31)."""
    if config.scorer == "exact":
        plans = [_plan(scene, [*dropped, name]) for name in remaining]
        tune = Tune(steps=config.exact_steps, trainable="adaptors", batch_norm="eval")
        trials = yield [Ask(plan, wants=("distance",), tune=tune) for plan in plans]
        errors = [cast(float, cast(Trial, trial).distance) for trial in trials]
    else:
        shape = scene.graph.input_shape
        base = _plan(scene, dropped)
        work = partial(
            graph.refit_errors, scene.model, base, remaining, scene.calibration, shape, config.fast_images
        )
        name = f"scores after {len(dropped)} drops"
        (result,) = yield [Step(name, f"refit 2, {config.fast_images} images, {base}, {remaining}", work)]
        errors = list(cast(StepResult, result).values)
    return dict(zip(remaining, errors, strict=True))


def _plan(scene: Scene, names: Sequence[str]) -> Plan:
    """The names in execution order, so that equal sets are equal plans."""
    order = [block.name for block in scene.graph.blocks]
    return Plan(drop_blocks=tuple(sorted(names, key=order.index)))


def _reason(scene: Scene, drops: Sequence[_Drop]) -> str:
    saving = _saving(drops[-1].trial)
    names = ", ".join(drop.block for drop in drops)
    return (
        f"{len(drops)} of {len(scene.graph.droppable)} droppable blocks, in order of R/tau: {names}. "
        f"Together they save {saving.tau:.1%} ({saving.low:.1%} to {saving.high:.1%}) of the measured latency"
    )


def _block_table(
    blocks: Sequence[Block], savings: dict[str, _Saving], errors: dict[str, float], drops: Sequence[_Drop]
) -> Table:
    order = {drop.block: number for number, drop in enumerate(drops, start=1)}
    rows: list[tuple[Cell, ...]] = []
    for block in blocks:
        saving, error = savings[block.name], errors[block.name]
        clear = saving.low > 0
        if block.name in order:
            verdict = f"dropped as number {order[block.name]}"
        else:
            verdict = "kept: not needed for the budget" if clear else "kept: saves no measurable time"
        score = error / saving.tau if clear else None
        rows.append((block.name, error, saving.tau, saving.low, saving.high, score, block.macs, verdict))
    columns = ("block", "R", "tau", "tau low", "tau high", "R/tau", "MACs", "verdict")
    return Table("Blocks", columns, tuple(rows))


def _prefix_table(scene: Scene, savings: dict[str, _Saving], drops: Sequence[_Drop]) -> Table:
    """What each further drop was predicted to save and what the engine measured."""
    rows: list[tuple[Cell, ...]] = []
    total = 0.0
    for number, drop in enumerate(drops, start=1):
        total += savings[drop.block].tau
        measured = _saving(drop.trial)
        macs = 1.0 - drop.trial.macs / scene.graph.macs
        rows.append(
            (
                number,
                drop.block,
                drop.recoverability,
                drop.score,
                macs,
                total,
                measured.tau,
                measured.low,
                measured.high,
            )
        )
    columns = (
        "dropped", "block", "R of the set", "score when chosen", "MACs saved", "sum of tau",
        "measured saving", "low", "high",
    )  # fmt: skip
    return Table("Predicted and measured saving", columns, tuple(rows))
