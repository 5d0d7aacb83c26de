"""``exact`` and ``fast`` side by side: seconds a block, and how well each foretells the recovered error.

    python -m benchmarks.scoring                      # a scale at which two cores end within the hour
    python -m benchmarks.scoring --exact-steps 1000 --recover-steps 2000     # the paper's, for a GPU or a night

Every droppable block of ResNet-20 and ResNet-56 is dropped alone, scored by each scorer on the calibration
images, and then fully recovered. The error after recovery is measured on images that neither a scorer nor a
recovery saw: feature error and disagreement on 1,000 held-out training images, and top-1 error on the test
images, which on 423 images is coarse. Nothing is chosen by any of them. Rows are written as they come and a
run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from optpipe import data, graph, preparation, tune
from optpipe import recipe as recipes
from optpipe.files import write_atomically
from optpipe.methods import practise
from optpipe.timing import Stopwatch
from optpipe.types import Plan, Tune

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
HELD_OUT = 1000
SCORERS = ("exact", "fast", "L2 distance")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--exact-steps", type=int, default=100)
    parser.add_argument("--recover-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scale = {key: getattr(arguments, key) for key in ("exact_steps", "recover_steps", "seed")}
    path = arguments.out / "scoring.json"
    rows: list[Row] = []
    if path.exists() and (stored := json.loads(path.read_text()))["scale"] == scale:
        rows = [Row(**row) for row in stored["rows"]]
    for network in arguments.networks:
        measure(network, arguments, rows, lambda: publish(path, scale, rows))
    print(markdown(scale, rows))


def measure(
    network: str, arguments: argparse.Namespace, rows: list[Row], publish: Callable[[], None]
) -> None:
    """Append the rows of one network that are not there yet."""
    recipe = recipes.load(ROOT / f"recipes/cifar10/practise_{network}.toml")
    setup = preparation.prepare(recipe)
    spec = dataclasses.replace(recipe.data.calibration, skip=len(setup.calibration), count=HELD_OUT)
    held_out = data.load_images(spec, recipe.data.preprocess, setup.target.input_shape[0], recipe.folder)
    original, shape = setup.original, setup.target.input_shape
    blocks = [block.name for block in setup.graph.droppable]
    done = {row.block for row in rows if row.network == network}
    if not set(blocks) - done:
        return
    watch = Stopwatch()
    config = practise.Config()
    errors = graph.refit_errors(original, Plan(), blocks, setup.calibration, shape, config.fast_images)
    fast_s = watch.seconds / len(blocks)
    exact = Tune(steps=arguments.exact_steps, trainable="adaptors", batch_norm="eval")
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
        adapted = graph.with_adaptors(original, plan, shape)
        watch = Stopwatch()
        tune.train(adapted, original, setup.calibration, exact, seed=arguments.seed)
        score = tune.distance(adapted, original, setup.calibration)
        exact_s = watch.seconds
        watch = Stopwatch()
        tune.train(candidate, original, setup.calibration, recovery, seed=arguments.seed)
        recover_s = watch.seconds
        agreeing = tune.logits(candidate, held_out).argmax(dim=1) == wanted
        right = tune.logits(candidate, setup.evaluation).argmax(dim=1) == labels
        rows.append(
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
        publish()


def correlations(rows: list[Row]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Spearman's coefficient of each scorer with each error, with a bootstrap 95% interval over blocks."""
    table = np.array([[row.exact, row.fast, row.l2] for row in rows])
    truth = np.array([[row.feature_error, row.disagreement, row.test_error] for row in rows])
    draws = np.random.default_rng(0).integers(0, len(rows), (1000, len(rows)))
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for number, scorer in enumerate(SCORERS):
        found[scorer] = {}
        for column, error in enumerate(ERRORS):
            resampled = [
                spearmanr(table[draw, number], truth[draw, column]).statistic
                for draw in draws
                if np.ptp(truth[draw, column]) > 0
            ]
            low, high = np.nanpercentile(resampled, [2.5, 97.5])
            whole = spearmanr(table[:, number], truth[:, column]).statistic
            found[scorer][error] = (float(whole), float(low), float(high))
    return found


def publish(path: Path, scale: dict[str, int], rows: list[Row]) -> None:
    """Write all rows so far as JSON and Markdown."""
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "scale": scale,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "rows": [asdict(row) for row in rows],
    }
    write_atomically(path, json.dumps(facts, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(scale, rows))


def markdown(scale: dict[str, int], rows: list[Row]) -> str:
    lines = [
        "# Scorers of droppable blocks",
        "",
        f"{datetime.now(UTC).date().isoformat()}, {platform.platform()}, {os.cpu_count()} cores, torch "
        f"{version('torch')}. Scale: exact trains adaptors for {scale['exact_steps']} steps a block (the paper: "
        f"1000), recovery {scale['recover_steps']} steps with the default settings (paper: 2000), seed "
        f"{scale['seed']}. Held out: {HELD_OUT} training images for feature error and disagreement, the test "
        "images for test error.",
    ]
    for network in dict.fromkeys(row.network for row in rows):
        mine = [row for row in rows if row.network == network]
        exact_s, fast_s = statistics.median(row.exact_s for row in mine), mine[0].fast_s
        lines += [
            "",
            f"## {network}, {len(mine)} blocks",
            "",
            f"Seconds a block: exact {exact_s:.2f} (median), fast {fast_s:.3f}, that is {exact_s / fast_s:.1f} "
            "times less.",
            "",
        ]
        if len(mine) >= 5:
            found = correlations(mine)
            lines += [
                "| Spearman with | " + " | ".join(ERRORS) + " |",
                "|---|" + "---|" * len(ERRORS),
                *[
                    f"| {scorer} | "
                    + " | ".join(
                        "{:.3f} ({:.2f} to {:.2f})".format(*found[scorer][error]) for error in ERRORS
                    )
                    + " |"
                    for scorer in SCORERS
                ],
                "",
            ]
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


if __name__ == "__main__":
    main()
