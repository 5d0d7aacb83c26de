"""Torch-Pruning's L1 importance beside EKG: the same share of channels out of every block, then mimicking.

    python -m benchmarks.ekg_rival RECIPE --share 50 --out FOLDER --set recover.name=practise ...

The recipe gives images, target, clock and recovery. Torch-Pruning chooses the channels; from there on the way
is the pipeline's: the same surgery, training loop, export, engine, parity check, scoring and paired clock.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from benchmarks.ekg_rows import Outcome
from benchmarks.runs import Facts, Figures
from optpipe import building, environment, graph, onnx_export, preparation, quality, store, timing, tune
from optpipe import recipe as recipes
from optpipe.errors import OptpipeError, RunError
from optpipe.files import write_atomically
from optpipe.preparation import Setup
from optpipe.timing import Stopwatch
from optpipe.types import Plan, Quality, Session


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--share", type=int, required=True, help="percent of the channels that go")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    arguments = parser.parse_args(words)
    path = arguments.out / "figures.json"
    recipe = recipes.load(arguments.recipe, arguments.overrides)
    asked = store.digest(arguments.share, sorted(arguments.overrides))
    if path.exists() and store.from_json(Outcome, path.read_bytes()).asked == asked:
        return 0
    found = measure(preparation.prepare(recipe), arguments.share, arguments.out, asked)
    write_atomically(path, store.to_json(found))
    return 0


def plan_of(original: fx.GraphModule, percent: int, shape: tuple[int, int, int]) -> Plan:
    """Every group of channels that can be narrowed without this percentage of lowest group L1 norm.

    As many stay as Torch-Pruning leaves: the whole part of what the percentage leaves, never none.
    """
    import torch_pruning

    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        traced = graph.trace(original, shape).requires_grad_(True)
        ties = torch_pruning.DependencyGraph().build_dependency(
            traced, example_inputs=(torch.zeros(1, *shape),)
        )
    keep = []
    for group in graph.inspect(original, shape).groups:
        if not group.prunable:
            continue
        layer = traced.get_submodule(group.name)
        channels = list(range(group.channels))
        tied = ties.get_pruning_group(layer, ties.get_pruner_of_module(layer).prune_out_channels, channels)
        values: torch.Tensor = importance(tied)
        width = max(1, group.channels * (100 - percent) // 100)
        best = values.argsort(descending=True, stable=True)[:width].sort().values
        keep.append((group.name, tuple(int(channel) for channel in best)))
    return Plan(keep_channels=tuple(keep))


def measure(setup: Setup, percent: int, folder: Path, asked: str) -> Outcome:
    """Prune, score, recover, score and time beside the original, as the pipeline's stages do."""
    shape = setup.target.input_shape
    watch = Stopwatch()
    plan = plan_of(setup.original, percent, shape)
    candidate = graph.apply(setup.original, plan, shape)
    stages = {"analyze": watch.seconds}
    labels = setup.evaluation.labels
    if labels is None:
        raise RunError("the evaluation images have no labels")
    wanted = tune.logits(setup.original, setup.evaluation).numpy()
    before = _score(setup, tune.logits(candidate, setup.evaluation).numpy(), wanted)
    watch = Stopwatch()
    tune.train(candidate, setup.original, setup.calibration, setup.recover, seed=setup.recipe.run.seed)
    stages["recover"] = watch.seconds
    watch = Stopwatch()
    clock = setup.recipe.timing
    with (
        _engine(setup, setup.original, folder / "original") as baseline,
        _engine(setup, candidate, folder / "result") as result,
    ):
        images = setup.evaluation.batch(slice(None)).numpy()
        reference, logits = baseline.run(images), result.run(images)
        with timing.device_lock(setup.target.device):
            timed = timing.paired(
                baseline,
                result,
                tolerance=clock.tolerance,
                budget_s=clock.final_budget_s,
                seed=setup.recipe.run.seed,
            )
    stages["benchmark"] = watch.seconds
    left = graph.inspect(candidate, shape)
    return Outcome(
        Figures(
            saving=100 * (1 - timed.ratio),
            saving_low=100 * (1 - timed.ratio_ci95[1]),
            saving_high=100 * (1 - timed.ratio_ci95[0]),
            macs_saving=100 * (1 - left.macs / setup.graph.macs),
            parameters_saving=100 * (1 - left.parameters / setup.graph.parameters),
            original_top1=100 * _score(setup, reference, reference).value,
            before_recovery=100 * before.value,
            top1=100 * _score(setup, logits, reference).value,
            agreement=100 * quality.agreement(logits, reference, "evaluation").value,
            met=True,
            stages=stages,
            widths=tuple((name, len(kept)) for name, kept in plan.keep_channels),
        ),
        _facts(setup),
        asked,
    )


def _score(setup: Setup, logits: NDArray[np.float32], reference: NDArray[np.float32]) -> Quality:
    assert setup.evaluation.labels is not None
    return quality.score(logits, setup.evaluation.labels.numpy(), reference, "evaluation")


@contextmanager
def _engine(setup: Setup, network: fx.GraphModule, folder: Path) -> Iterator[Session]:
    """A session of the network's engine, which computes what the network does."""
    exported = building.export(network, setup.bench, folder)
    with timing.device_lock(setup.target.device):
        engine = building.build(exported, setup.bench, folder).engine
    session = setup.backend.load(engine, setup.target)
    try:
        onnx_export.check_parity(building.parity(network, session, setup.bench))
        yield session
    finally:
        session.close()


def _facts(setup: Setup) -> Facts:
    shown = environment.describe(setup.backend.fingerprint(setup.target), setup.target.device)
    return Facts(
        shown.executed_on, shown.platform, shown.versions, len(setup.calibration), len(setup.evaluation)
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
