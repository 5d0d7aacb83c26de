"""``exact`` and ``fast`` side by side: seconds a block, and how well each foretells the recovered error.

    python -m benchmarks.scoring                      # a scale at which two cores end within the hour
    python -m benchmarks.scoring --exact-steps 1000 --recover-steps 2000     # the paper's, for a GPU or a night
    python -m benchmarks.scoring --again --draws 1 2  # fast anew, for rows that are there
    OMP_NUM_THREADS=1 python -m benchmarks.scoring --time 6                  # six blocks of each network

Every droppable block of ResNet-20 and ResNet-56 is dropped alone, scored by each scorer on the calibration
images, and then fully recovered. The error after recovery is measured on images that neither a scorer nor a
recovery saw: feature error and disagreement on 1,000 held-out training images, and top-1 error on the test
images, which on 423 images is coarse. Nothing is chosen by any of them. Rows are written as they come and a
run that was stopped goes on.

``--again`` scores the blocks of stored rows by ``fast`` anew, and by ``--draws`` on other draws of the
calibration images, against the same recovered errors. ``--time`` times the scorers in turn: ``fast`` on all
blocks of a network, then ``exact`` on one, the other way round for the next block. Both keep the stored scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from optpipe import data, graph, preparation, tune
from optpipe import recipe as recipes
from optpipe.files import write_atomically
from optpipe.methods import practise
from optpipe.timing import Stopwatch
from optpipe.types import Plan, Tune

Numbers: TypeAlias = NDArray[np.float64]

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
HELD_OUT = 1000
SCORERS = ("exact", "fast", "L2 distance")
GAIN = "fast less exact"
ERRORS = ("feature error", "disagreement", "test error")


@dataclass(frozen=True, slots=True)
class Row:
    """One dropped block: its scores, the seconds they took, and its errors after recovery."""

    network: str
    block: str
    exact: float
    fast: float
    l2: float
    exact_s: float
    fast_s: float
    recover_s: float
    feature_error: float
    disagreement: float
    test_error: float


@dataclass(frozen=True, slots=True)
class Timing:
    """The scorers in turn: ``exact`` on one block, ``fast`` on all of the network's, by the block.

    ``cpu_s`` is what the process computed for, which other work on the machine hardly changes; with one
    thread it is the wall time of an idle machine.
    """

    network: str
    block: str
    exact_steps: int
    threads: int
    exact_s: float
    fast_s: float
    exact_cpu_s: float
    fast_cpu_s: float
    on: str


@dataclass(frozen=True, slots=True)
class Draw:
    """Fast scores on another draw of the calibration images, by block in the order of the rows."""

    network: str
    seed: int
    fast: tuple[float, ...]


@dataclass(slots=True)
class Record:
    """All that is published. ``fast_on`` is the day on which stored rows were scored by ``fast`` anew."""

    scale: dict[str, int]
    rows: list[Row]
    timings: list[Timing]
    draws: list[Draw]
    date: str = ""
    platform: str = ""
    fast_on: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--exact-steps", type=int, default=100)
    parser.add_argument("--recover-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="score stored rows by fast anew")
    parser.add_argument("--draws", nargs="+", type=int, default=[], help="seeds of other draws for fast")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="time the scorers in turn, N blocks")
    parser.add_argument("--time-steps", type=int, help="exact's steps there; default: the stored scale's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    asked = {key: getattr(arguments, key) for key in ("exact_steps", "recover_steps", "seed")}
    path = arguments.out / "scoring.json"
    stored = load(path)
    if arguments.again or arguments.draws or arguments.time:
        if stored is None:
            parser.error(f"{path} is not there: measure the rows first, without --again, --draws and --time")
        for network in arguments.networks:
            refresh(network, arguments, stored, path)
        record = stored
    else:
        record = stored if stored and stored.scale == asked else Record(asked, [], [], [])
        for network in arguments.networks:
            measure(network, arguments, record, path)
    print(markdown(record))


def load(path: Path) -> Record | None:
    """What was published before; None if nothing was."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return Record(
        found["scale"],
        [Row(**row) for row in found["rows"]],
        [Timing(**timing) for timing in found.get("timings", ())],
        [Draw(draw["network"], draw["seed"], tuple(draw["fast"])) for draw in found.get("draws", ())],
        found["date"],
        found["platform"],
        found.get("fast_on", ""),
    )


def prepared(network: str, seed: int | None = None) -> tuple[recipes.Recipe, preparation.Setup]:
    """A network's recipe and setup; ``seed`` draws other calibration images."""
    sets = () if seed is None else (f"data.calibration.seed={seed}",)
    recipe = recipes.load(ROOT / f"recipes/cifar10/practise_{network}.toml", sets)
    return recipe, preparation.prepare(recipe)


def fast_errors(setup: preparation.Setup, blocks: list[str]) -> tuple[float, ...]:
    images = practise.Config().fast_images
    shape = setup.target.input_shape
    return graph.refit_errors(setup.original, Plan(), blocks, setup.calibration, shape, images)


def refresh(network: str, arguments: argparse.Namespace, record: Record, path: Path) -> None:
    """Score the stored blocks of one network by ``fast`` anew, on other draws too, and time both scorers."""
    blocks = [row.block for row in record.rows if row.network == network]
    if arguments.again:
        watch, errors = Stopwatch(), dict(zip(blocks, fast_errors(prepared(network)[1], blocks), strict=True))
        record.rows = [
            dataclasses.replace(row, fast=errors[row.block], fast_s=watch.seconds / len(blocks))
            if row.network == network
            else row
            for row in record.rows
        ]
        record.fast_on = today()
        publish(path, record)
    for seed in arguments.draws:
        found = Draw(network, seed, fast_errors(prepared(network, seed)[1], blocks))
        record.draws = [d for d in record.draws if (d.network, d.seed) != (network, seed)] + [found]
        publish(path, record)
    if arguments.time:
        time_in_turn(network, arguments, record, path)


def time_in_turn(network: str, arguments: argparse.Namespace, record: Record, path: Path) -> None:
    """Append the timings of blocks spread evenly over the network."""
    setup = prepared(network)[1]
    blocks = [row.block for row in record.rows if row.network == network]
    steps = arguments.time_steps or record.scale["exact_steps"]
    for number in range(arguments.time):
        block = blocks[(2 * number + 1) * len(blocks) // (2 * arguments.time)]
        turns: list[Callable[[], object]] = [partial(exact_error, setup, block, steps, record.scale["seed"])]
        turns.insert(number % 2, partial(fast_errors, setup, blocks))
        taken = [clocked(turn) for turn in turns]
        (fast_s, fast_cpu_s), (exact_s, exact_cpu_s) = taken if number % 2 == 0 else taken[::-1]
        share = len(blocks)
        record.timings.append(
            Timing(
                network=network,
                block=block,
                exact_steps=steps,
                threads=torch.get_num_threads(),
                exact_s=exact_s,
                fast_s=fast_s / share,
                exact_cpu_s=exact_cpu_s,
                fast_cpu_s=fast_cpu_s / share,
                on=today(),
            )
        )
        publish(path, record)


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time and of computing that some work takes."""
    watch, before = Stopwatch(), time.process_time()
    work()
    return watch.seconds, time.process_time() - before


def exact_error(setup: preparation.Setup, block: str, steps: int, seed: int) -> float:
    """The paper's score of one block: what is left once the adaptors around it are trained (Eq. 31)."""
    plan, exact = Plan(drop_blocks=(block,)), Tune(steps=steps, trainable="adaptors", batch_norm="eval")
    adapted = graph.with_adaptors(setup.original, plan, setup.target.input_shape)
    tune.train(adapted, setup.original, setup.calibration, exact, seed=seed)
    return tune.distance(adapted, setup.original, setup.calibration)


def measure(network: str, arguments: argparse.Namespace, record: Record, path: Path) -> None:
    """Append the rows of one network that are not there yet."""
    recipe, setup = prepared(network)
    spec = dataclasses.replace(recipe.data.calibration, skip=len(setup.calibration), count=HELD_OUT)
    held_out = data.load_images(spec, recipe.data.preprocess, setup.target.input_shape[0], recipe.folder)
    original, shape = setup.original, setup.target.input_shape
    blocks = [block.name for block in setup.graph.droppable]
    done = {row.block for row in record.rows if row.network == network}
    if not set(blocks) - done:
        return
    watch = Stopwatch()
    errors = fast_errors(setup, blocks)
    fast_s = watch.seconds / len(blocks)
    recovery = tune.on_this_machine(dataclasses.replace(practise.RECOVER, steps=arguments.recover_steps))
    wanted = tune.logits(original, held_out).argmax(dim=1)
    labels = setup.evaluation.labels
    assert labels is not None
    for block, fast in zip(blocks, errors, strict=True):
        if block in done:
            continue
        plan = Plan(drop_blocks=(block,))
        candidate = graph.apply(original, plan, shape)
        l2 = tune.distance(candidate, original, setup.calibration)
        watch = Stopwatch()
        score = exact_error(setup, block, arguments.exact_steps, arguments.seed)
        exact_s = watch.seconds
        watch = Stopwatch()
        tune.train(candidate, original, setup.calibration, recovery, seed=arguments.seed)
        recover_s = watch.seconds
        agreeing = tune.logits(candidate, held_out).argmax(dim=1) == wanted
        right = tune.logits(candidate, setup.evaluation).argmax(dim=1) == labels
        record.date, record.platform = today(), platform.platform()
        record.rows.append(
            Row(
                network=network,
                block=block,
                exact=score,
                fast=fast,
                l2=l2,
                exact_s=exact_s,
                fast_s=fast_s,
                recover_s=recover_s,
                feature_error=tune.distance(candidate, original, held_out),
                disagreement=1.0 - float(agreeing.float().mean()),
                test_error=1.0 - float(right.float().mean()),
            )
        )
        publish(path, record)


def correlations(rows: list[Row]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Spearman's coefficient of each scorer with each error, with a bootstrap 95% interval over blocks.

    The last entry is fast's less exact's, on the same resampled blocks.
    """
    scores = np.array([[row.exact, row.fast, row.l2] for row in rows]).T
    truth = np.array([[row.feature_error, row.disagreement, row.test_error] for row in rows]).T
    draws = np.random.default_rng(0).integers(0, len(rows), (1000, len(rows)))
    found: dict[str, dict[str, tuple[float, float, float]]] = {name: {} for name in (*SCORERS, GAIN)}
    for error, wanted in zip(ERRORS, truth, strict=True):
        whole = dict(zip(SCORERS, (spearman(score, wanted) for score in scores), strict=True))
        drawn = dict(zip(SCORERS, (resampled(score, wanted, draws) for score in scores), strict=True))
        whole[GAIN], drawn[GAIN] = whole["fast"] - whole["exact"], drawn["fast"] - drawn["exact"]
        for name, row in found.items():
            low, high = np.nanpercentile(drawn[name], [2.5, 97.5])
            row[error] = (whole[name], float(low), float(high))
    return found


def spearman(score: Numbers, wanted: Numbers) -> float:
    return float(spearmanr(score, wanted).statistic)


def resampled(score: Numbers, wanted: Numbers, draws: NDArray[np.intp]) -> Numbers:
    """Spearman's coefficients of resampled pairs (draws, pairs); NaN where either side's values are equal."""
    ranked = [rankdata(values[draws], axis=1) for values in (score, wanted)]
    one, other = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in ranked)
    lengths = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    found: Numbers = (one * other).sum(axis=1) / np.where(lengths > 0, lengths, np.nan)
    return found


def publish(path: Path, record: Record) -> None:
    """Write all there is so far as JSON and Markdown."""
    facts = {
        **asdict(record),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "fast_images": practise.Config().fast_images,
    }
    write_atomically(path, json.dumps(facts, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(record))


def markdown(record: Record) -> str:
    scale = record.scale
    lines = [
        "# Scorers of droppable blocks",
        "",
        f"{record.date}, {record.platform}, {os.cpu_count()} cores, torch {version('torch')}. Scale: exact "
        f"trains adaptors for {scale['exact_steps']} steps a block (the paper: 1000), recovery "
        f"{scale['recover_steps']} steps with the default settings (paper: 2000), seed {scale['seed']}. Held "
        f"out: {HELD_OUT} training images for feature error and disagreement, the test images for test error."
        + (f" The blocks were scored by fast anew on {record.fast_on}." if record.fast_on else ""),
    ]
    for network in dict.fromkeys(row.network for row in record.rows):
        mine = [row for row in record.rows if row.network == network]
        lines += ["", f"## {network}, {len(mine)} blocks", ""]
        lines += seconds([timing for timing in record.timings if timing.network == network])
        if len(mine) >= 5:
            lines += ranks(mine, [draw for draw in record.draws if draw.network == network])
        lines += [
            "| block | exact | fast | L2 | feature error | disagreement | test error |",
            "|---|---|---|---|---|---|---|",
            *[
                f"| {row.block} | {row.exact:.4f} | {row.fast:.4f} | {row.l2:.4f} | {row.feature_error:.4f} | "
                f"{row.disagreement:.2%} | {row.test_error:.2%} |"
                for row in mine
            ],
        ]
    return "\n".join(lines) + "\n"


def seconds(timings: list[Timing]) -> list[str]:
    """What each scorer took where both were timed in turn, by exact's steps."""
    lines: list[str] = []
    for steps in sorted({timing.exact_steps for timing in timings}):
        mine = [timing for timing in timings if timing.exact_steps == steps]
        wall = times_less([(timing.exact_s, timing.fast_s) for timing in mine])
        computing = times_less([(timing.exact_cpu_s, timing.fast_cpu_s) for timing in mine])
        exact_s = statistics.mean(timing.exact_cpu_s for timing in mine)
        fast_s = statistics.mean(timing.fast_cpu_s for timing in mine)
        names = ", ".join(timing.block for timing in mine)
        lines += [
            f"Timed in turn on {mine[-1].on} with {mine[0].threads} thread(s), exact with {steps} steps on {names}: exact "
            f"{exact_s:.1f} s of computing a block, fast {fast_s:.2f} s, that is {computing} times less; by "
            f"wall time {wall}.",
            "",
        ]
    return lines


def times_less(pairs: list[tuple[float, float]]) -> str:
    """Mean seconds of exact over those of fast, with a bootstrap 95% interval where pairs allow one."""
    table = np.array(pairs)
    exact, fast = table.mean(axis=0)
    if len(pairs) < 3:
        return f"{exact / fast:.0f}"
    draws = table[np.random.default_rng(0).integers(0, len(table), (1000, len(table)))].mean(axis=1)
    low, high = np.percentile(draws[:, 0] / draws[:, 1], [2.5, 97.5])
    return f"{exact / fast:.1f} ({low:.1f} to {high:.1f})"


def ranks(rows: list[Row], draws: list[Draw]) -> list[str]:
    """The table of rank correlations; fast's on other draws of the images below its own."""
    found = correlations(rows)
    lines = [
        "| Spearman with | " + " | ".join(ERRORS) + " |",
        "|---|" + "---|" * len(ERRORS),
        *[
            f"| {scorer} | "
            + " | ".join("{:.3f} ({:.2f} to {:.2f})".format(*found[scorer][error]) for error in ERRORS)
            + " |"
            for scorer in found
        ],
    ]
    for draw in draws:
        other = [dataclasses.replace(row, fast=fast) for row, fast in zip(rows, draw.fast, strict=True)]
        again = correlations(other)["fast"]
        lines.append(
            f"| fast, images of seed {draw.seed} | "
            + " | ".join("{:.3f} ({:.2f} to {:.2f})".format(*again[error]) for error in ERRORS)
            + " |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
