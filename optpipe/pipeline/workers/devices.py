"""A recovery on several devices of this machine: a process for each, all of which do the same steps.

Each loads the recipe and reads the run's folder; nothing of a network is sent to it. The first one writes
checkpoints and weights, where a recovery in this process would have. All of them end with one that dies, and
with the driver.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from optpipe import errors, interruption, store, tune
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.pipeline import recovering
from optpipe.pipeline.workers.child import Child, died
from optpipe.pipeline.workers.replica import Assignment
from optpipe.preparation import Setup
from optpipe.results import Ingested
from optpipe.types import Choice, Emit, Event, Plan

STOP_S = 0.7
"""How long an interrupted recovery has to finish and store its step, of the time that an interrupt leaves."""
LAST_WORDS_S = 2.0
"""How long the others may still say why after the first has ended: one that dies takes them with it."""

End = tuple[str, ...]
"""How a process ended: "done", "stopped", "memory", "died" with how, "failed" with the kind and the text."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the processes of a recovery are told, all of them the same.

    They meet by the file ``meeting``. ``key`` is that of the recovery, ``teachers`` the plans of the networks
    that teach, ``most`` how many images all of them together take at once.
    """

    assignment: Assignment
    size: int
    meeting: Path
    key: str
    teachers: tuple[Plan, ...]
    most: int


def train(
    setup: Setup, opened: store.Run, choice: Choice, teachers: Sequence[Plan], emit: Emit
) -> tune.Trained:
    """As :func:`~optpipe.pipeline.recovering.train`, on as many devices as the recipe says.

    Out of memory on one of them begins all anew at the last checkpoint, with half as many images at once.

    Raises:
        UsageError: there are more devices than images in a batch.
        RunError: a process died, or a device has no memory for a single image.
    """
    size = setup.recipe.run.devices
    most = min(choice.recover.batch, len(setup.calibration))
    if size > most:
        raise UsageError(
            f"{setup.recipe.path}: [run] devices = {size}: a batch of the recovery has {most} images, "
            "too few for all of them"
        )
    ingested = opened.stage_result("ingest", Ingested)
    assert ingested is not None, "what was chosen was measured against the original"
    assignment, key = Assignment.of(setup, opened, ingested), recovering.key_of(setup, choice)
    tune.release(setup.device)
    emit(Event("note", "recover", f"{size} processes, each with a device and its share of every batch"))
    while True:
        with interruption.temporary_folder() as folder:
            order = Order(assignment, size, folder / "meeting", key, tuple(teachers), most)
            ranks = Ranks(order, emit)
            try:
                trained = ranks.trained()
            finally:
                ranks.end()
        if trained is not None:
            return trained
        most = _halved(most, size, emit)


def _halved(most: int, size: int, emit: Emit) -> int:
    """Half as many images at once, which is told; RunError where each device had but one."""
    if most <= size:
        raise RunError(
            f"out of memory on a GPU with one image at a time on each of {size}; set fewer views, "
            'autocast = "bf16" or a smaller [data.preprocess] size, or train on larger GPUs'
        )
    half = max((most + 1) // 2, size)
    text = f"out of memory on a GPU with {most} images at once on {size}"
    emit(
        Event(
            "warning",
            "training",
            f"{text}: begins at the last checkpoint with {half} at once, in the same batches; batch-norms in "
            "train mode see so many at once",
        )
    )
    return half


class Ranks:
    """The processes of one recovery, by their places."""

    def __init__(self, order: Order, emit: Emit) -> None:
        """Begin them."""
        self._size = order.size
        self._emit = emit
        threads = max(1, (os.cpu_count() or 1) // order.size)
        here = {name: os.environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
        self._ranks: list[Child] = []
        self._ends: dict[int, End] = {}
        self._losses: tuple[float, float] | None = None
        for rank in range(order.size):
            names = {**here, "OMP_NUM_THREADS": str(threads), "LOCAL_RANK": str(rank)}
            self._ranks.append(Child("optpipe.pipeline.workers.rank", names))
        for rank in range(order.size):
            self._say(rank, order)

    def trained(self) -> tune.Trained | None:
        """What they came to; None where a device was out of memory.

        Raises:
            OptpipeError: what one of them has failed with.
            RunError: one of them died, or failed for a reason of its own.
        """
        try:
            self._hear_all()
        except KeyboardInterrupt:
            for rank in range(self._size):
                self._say(rank, "stop")
            self._hear_until(time.monotonic() + STOP_S)
            raise
        kinds = {end[0] for end in self._ends.values()}
        if kinds == {"done"} and self._losses is not None:
            return tune.Trained(*self._losses)
        self._refuse_failure()
        return None

    def end(self) -> None:
        """End those that still run."""
        for child in self._ranks:
            child.end()

    def _hear_all(self) -> None:
        """Listen until all have ended, or for a while after the first that did not end well."""
        while len(self._ends) < self._size:
            self._hear(None)
            if any(end[0] != "done" for end in self._ends.values()):
                self._hear_until(time.monotonic() + LAST_WORDS_S)
                return

    def _hear_until(self, moment: float) -> None:
        while len(self._ends) < self._size and (left := moment - time.monotonic()) > 0:
            self._hear(left)

    def _hear(self, seconds: float | None) -> None:
        """Take what each of them has to say next, or nothing after some seconds."""
        listening = {
            child.connection: rank for rank, child in enumerate(self._ranks) if rank not in self._ends
        }
        for ready in wait(list(listening), seconds):
            rank = next(rank for connection, rank in listening.items() if connection is ready)
            try:
                message = self._ranks[rank].connection.recv()
            except (EOFError, OSError):
                self._ends[rank] = ("died", died(self._ranks[rank].end()))
                continue
            match message:
                case ("event", Event() as event):
                    self._emit(event)
                case ("done", float() as first, float() as last):
                    self._losses, self._ends[rank] = (first, last), ("done",)
                case (str(), *_):
                    self._ends[rank] = message

    def _say(self, rank: int, message: object) -> None:
        with contextlib.suppress(OSError):  # where it is gone, which is heard too
            self._ranks[rank].connection.send(message)

    def _refuse_failure(self) -> None:
        """Raise what is behind the ends, unless it is that a device had too little memory."""
        ends = sorted(self._ends.items())
        for _, end in ends:
            known = getattr(errors, end[1], None) if end[0] == "failed" else None
            if isinstance(known, type) and issubclass(known, OptpipeError):
                raise known(end[2])
        if any(end[0] == "memory" for _, end in ends):
            return
        rest = f"[run] devices = {self._size}"
        for rank, end in ends:
            if end[0] == "died":
                raise RunError(
                    f"{rest}: the process of device {rank} died ({end[1]}), perhaps for want of memory; the "
                    "same command goes on from the last checkpoint"
                )
        for rank, end in ends:
            if end[0] == "failed":
                raise RunError(f"{rest}: device {rank}: {end[1]}: {end[2]}")
        raise RunError(f"{rest}: the processes ended without a result")
