"""A recovery on a machine of a Ray cluster: the driver may be a small one, which can but time.

The worker loads the recipe and reads the run as one of a search does; what it tells on the way comes by a
mailbox beside the driver. Where all see the run's folder, a worker that takes the place of one that died goes
on from its last checkpoint.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from typing import Any

from optpipe import errors, store, tune
from optpipe.errors import OptpipeError, RunError
from optpipe.pipeline import recovering
from optpipe.pipeline.workers import devices
from optpipe.pipeline.workers.cluster import TRIES, join, one_line, refuse_small
from optpipe.pipeline.workers.replica import Assignment, opened_by, prepared
from optpipe.preparation import Setup
from optpipe.results import Analyzed, Ingested
from optpipe.types import Choice, Emit, Event

HEAR_S = 1.0
"""How often what the worker tells is passed on."""


class Mailbox:
    """What a worker tells and the driver has not heard yet."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=1000)

    def put(self, event: Event) -> None:
        """Tell something."""
        self._events.append(event)

    def take(self) -> list[Event]:
        """All that was told since the last time."""
        found = list(self._events)
        self._events.clear()
        return found


class Recoverer:
    """What Ray runs on a node: one recovery."""

    def __init__(self, assignment: Assignment, mailbox: Any) -> None:
        self._assignment = assignment
        self._mailbox = mailbox

    def recover(self, key: str) -> tuple[str, str, str, float, float]:
        """Recover the choice of that key.

        Returns the node's name, the kind and text of an error, empty if none, and the first and last loss.
        """
        node = socket.gethostname()
        try:
            trained = carried_out(self._assignment, key, self._mailbox.put.remote)
        except OptpipeError as error:
            return node, type(error).__name__, str(error), math.nan, math.nan
        return node, "", "", trained.loss_first, trained.loss_last


def carried_out(assignment: Assignment, key: str, emit: Emit) -> tune.Trained:
    """Recover what was chosen in an assignment's run, on this machine; the weights lie as the driver's would.

    Raises:
        OptpipeError: the run cannot be seen, or it holds another choice than that of ``key``.
    """
    with opened_by(assignment) as opened:
        for stage in ("ingest", "analyze"):
            opened.has(opened.stage_folder(stage) / "result.json")
        setup = prepared(assignment, opened, emit)
        analyzed = opened.stage_result("analyze", Analyzed)
        if analyzed is None or recovering.key_of(setup, analyzed.choice) != key:
            raise RunError(f"{assignment.folder}: holds another choice than the one that is recovered")
        teachers = recovering.teachers_of(setup, opened, analyzed.choice, emit)
        train = recovering.train if setup.recipe.run.devices == 1 else devices.train
        trained = train(setup, opened, analyzed.choice, teachers, emit)
        if opened.shared is not None:
            opened.shared.give(_name(key), opened.stage_folder("recover") / store.WEIGHTS)
        return trained


def train(setup: Setup, opened: store.Run, choice: Choice, emit: Emit) -> tune.Trained:
    """As :func:`~optpipe.pipeline.recovering.train`, by a worker of the cluster at ``[run] address``.

    Raises:
        MissingError: Ray is not installed, or no cluster listens there.
        RunError: the cluster is too small, or three workers died.
        OptpipeError: what the worker failed with.
    """
    ingested = opened.stage_result("ingest", Ingested)
    assert ingested is not None, "what was chosen was measured against the original"
    assignment, key = Assignment.of(setup, opened, ingested), recovering.key_of(setup, choice)
    for stage in ("ingest", "analyze"):
        opened.give(opened.stage_folder(stage) / "result.json")
    ray = join(setup.recipe.run.address)
    try:
        trained = _ordered(ray, setup, assignment, key, emit)
    finally:
        ray.shutdown()
    path = opened.stage_folder("recover") / store.WEIGHTS
    if opened.shared is not None and not opened.shared.take(_name(key), path):
        raise RunError(f'[run] store = "{opened.shared.address}": the recovered weights are not there')
    return trained


def _ordered(ray: Any, setup: Setup, assignment: Assignment, key: str, emit: Emit) -> tune.Trained:
    """What a worker came to, another where one dies."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    run = setup.recipe.run
    gpus = max(run.worker_gpus, float(run.devices)) if setup.device == "cuda" else run.worker_gpus
    refuse_small(ray, {"CPU": float(run.worker_cpus), "GPU": gpus})
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    kind = ray.remote(num_cpus=run.worker_cpus, num_gpus=gpus, max_restarts=0)(Recoverer)
    emit(Event("note", "recover", "by a worker of the cluster"))
    for _ in range(TRIES):
        worker = kind.remote(assignment, mailbox)
        answer = worker.recover.remote(key)
        try:
            node, failed, said, first, last = _heard(ray, answer, mailbox, emit)
        except ray.exceptions.RayActorError as error:
            why = one_line(error)
            emit(Event("warning", "recover", f"the worker died; another takes its place: {why}"))
            continue
        finally:
            ray.kill(worker)
        if failed:
            raise getattr(errors, failed, RunError)(f"{node}: {said}")
        return tune.Trained(first, last)
    raise RunError(f"[run] workers: {TRIES} workers died over the recovery: {why}")


def _heard(ray: Any, answer: Any, mailbox: Any, emit: Emit) -> tuple[str, str, str, float, float]:
    """A worker's answer; what it tells until then is passed on."""
    while True:
        ready, _ = ray.wait([answer], timeout=HEAR_S)
        for event in ray.get(mailbox.take.remote()):
            emit(event)
        if ready:
            found: tuple[str, str, str, float, float] = ray.get(answer)
            return found


def _name(key: str) -> str:
    """What recovered weights are called at ``[run] store``."""
    return f"recovered/{key}.safetensors"
