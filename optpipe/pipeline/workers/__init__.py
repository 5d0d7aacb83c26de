"""Workers beside the process that drives a search: on this machine, or on a Ray cluster.

Nothing of a search is sent to a worker. It loads the same recipe, replays the same search from the same
store, and so comes to the same requests; all that it is told is the place of the one it is to answer. Its
answer lies in the store as the driver's own would, under the same key.
"""

from __future__ import annotations

from optpipe import store
from optpipe.data import SYNTHESIZED
from optpipe.errors import UsageError
from optpipe.lab import Pool
from optpipe.pipeline.workers import cluster
from optpipe.pipeline.workers.local import LocalPool
from optpipe.pipeline.workers.replica import Assignment
from optpipe.preparation import Setup
from optpipe.results import Ingested
from optpipe.shared import SharedStore
from optpipe.types import Emit


def refuse(setup: Setup) -> None:
    """Refuse what no worker could do.

    Raises:
        UsageError: workers could not load the network, or there is no such kind of store.
        MissingError: Ray is not installed, or the package for the store.
    """
    recipe = setup.recipe
    if recipe.run.store:
        SharedStore(recipe.run.store, "")
    if recipe.run.workers == "ray":
        cluster.installed()
    if recipe.run.workers != "serial" and recipe.model.name.startswith("live:"):
        raise UsageError(
            f'{recipe.path}: [run] workers = "{recipe.run.workers}": each loads the network by its name, and '
            'this one has none; give architecture = "package.module:function", or take workers = "serial"'
        )


def pool_of(setup: Setup, opened: store.Run, ingested: Ingested, emit: Emit) -> Pool | None:
    """The workers that the recipe asks for; None where this process computes alone.

    Raises:
        MissingError: Ray is not installed, or no cluster listens at the address.
    """
    run = setup.recipe.run
    if run.workers == "serial":
        return None
    _give(opened)
    assignment = Assignment.of(setup, opened, ingested)
    if run.local_workers is not None:
        return LocalPool(assignment, run.local_workers, emit)
    return cluster.RayPool(assignment, run.address, run.worker_cpus, run.worker_gpus, emit)


def _give(opened: store.Run) -> None:
    """What workers need of a run beside its answers."""
    for path in (opened.stage_folder("ingest") / "result.json", opened.folder / SYNTHESIZED):
        if path.exists():
            opened.give(path)
