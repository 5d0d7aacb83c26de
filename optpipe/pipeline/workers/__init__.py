"""Workers beside the process that drives a run: on this machine, or on a Ray cluster.

Nothing of a search is sent to a worker. It loads the same recipe, replays the same search from the same
store, and so comes to the same requests; all that it is told is the place of the one it is to answer. Its
answer lies in the store as the driver's own would, under the same key.
"""

from __future__ import annotations

import importlib.util

import torch

from optpipe import store, tune
from optpipe.data import SYNTHESIZED
from optpipe.errors import MissingError, UsageError
from optpipe.lab import Pool
from optpipe.pipeline import recovering
from optpipe.pipeline.workers import afar, cluster, devices
from optpipe.pipeline.workers.local import LocalPool
from optpipe.pipeline.workers.replica import Assignment
from optpipe.preparation import Setup
from optpipe.results import Ingested
from optpipe.shared import SharedStore
from optpipe.types import Choice, Emit

__all__ = ["pool_of", "recover", "refuse"]


def refuse(setup: Setup) -> None:
    """Refuse what no worker or device could do.

    Raises:
        UsageError: they could not load the network, there is no such kind of store, or a batch or this
            machine has too few for so many devices.
        MissingError: Ray is not installed, or the package for the store or for several devices.
    """
    recipe, run = setup.recipe, setup.recipe.run
    if run.store:
        SharedStore(run.store, "")
    if run.workers == "ray":
        cluster.installed()
    asked = f'workers = "{run.workers}"' if run.workers != "serial" else f"devices = {run.devices}"
    if (run.workers != "serial" or run.devices > 1) and recipe.model.name.startswith("live:"):
        raise UsageError(
            f"{recipe.path}: [run] {asked}: each loads the network by its name, and this one has none; give "
            'architecture = "package.module:function", or take workers = "serial" and devices = 1'
        )
    if run.devices > 1:
        _refuse_devices(setup)


def _refuse_devices(setup: Setup) -> None:
    count, batch = setup.recipe.run.devices, min(setup.recover.batch, len(setup.calibration))
    place = f"{setup.recipe.path}: [run] devices = {count}"
    if count > batch:
        raise UsageError(f"{place}: a batch of the recovery has {batch} images, too few for all of them")
    if setup.recipe.run.workers == "ray":
        return  # what a worker's machine has is seen there
    if setup.device == "cuda" and count > torch.cuda.device_count():
        raise UsageError(f"{place}: this machine has {torch.cuda.device_count()} GPUs")
    if importlib.util.find_spec("lightning_fabric") is None:
        raise MissingError(
            f"{place}: the package lightning-fabric is not installed; pip install 'optpipe[multi]'"
        )


def recover(setup: Setup, opened: store.Run, choice: Choice, emit: Emit) -> tune.Trained:
    """Train the pruned network where the recipe says: here, on several devices, or on the cluster.

    Its weights are in the run's folder then.
    """
    run = setup.recipe.run
    if run.workers == "ray":
        return afar.train(setup, opened, choice, emit)
    teachers = recovering.teachers_of(setup, opened, choice, emit)
    if run.devices > 1:
        return devices.train(setup, opened, choice, teachers, emit)
    return recovering.train(setup, opened, choice, teachers, emit)


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
