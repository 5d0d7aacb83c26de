"""What the process of one device runs: ``python -m optpipe.pipeline.workers.rank FD``.

It reads from the socket that it inherits as FD: an :class:`Order`, and perhaps "stop". It sends back events,
and how it ended.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection

import torch

from optpipe import store, tune
from optpipe.errors import OptpipeError, RunError
from optpipe.pipeline import recovering
from optpipe.pipeline.workers.child import die_with
from optpipe.pipeline.workers.devices import Order
from optpipe.pipeline.workers.replica import prepared
from optpipe.results import Analyzed
from optpipe.tune.together import Together
from optpipe.types import Emit, Event


def main(descriptor: int) -> None:
    """Train with the others, and stay until the driver has heard of it."""
    die_with(os.getppid())
    connection: Connection = Connection(descriptor)
    sending = threading.Lock()
    asked = threading.Event()
    first = os.environ["LOCAL_RANK"] == "0"

    def send(*message: object) -> None:
        with sending:
            connection.send(message)

    def emit(event: Event) -> None:
        # All of them come to the same events, but for a device that has trouble of its own.
        if first or event.kind == "warning":
            send("event", event)

    order: Order = connection.recv()
    listening = threading.Thread(target=_listen, args=(connection, asked), daemon=True)
    listening.start()
    try:
        trained = _train(order, emit, asked)
    except torch.OutOfMemoryError:
        send("memory")
    except KeyboardInterrupt:
        send("stopped")
    except OptpipeError as error:
        send("failed", type(error).__name__, str(error))
    except Exception as error:
        send("failed", type(error).__name__, " ".join(str(error).split())[:300])
    else:
        send("done", trained.loss_first, trained.loss_last)
    listening.join()


def _train(order: Order, emit: Emit, asked: threading.Event) -> tune.Trained:
    if order.assignment.device == "cuda":  # before anything asks for memory on the first one
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    opened = store.Run(order.assignment.folder, order.assignment.cache)
    setup = prepared(order.assignment, opened, emit)
    analyzed = opened.stage_result("analyze", Analyzed)
    if analyzed is None or recovering.key_of(setup, analyzed.choice) != order.key:
        raise RunError(f"{order.assignment.folder}: holds another choice than the one that is recovered")
    peers = Together(order.size, setup.device, order.meeting, asked)
    trained = recovering.train(
        setup, opened, analyzed.choice, order.teachers, emit, peers=peers, most=order.most
    )
    peers.leave()
    return trained


def _listen(connection: Connection, asked: threading.Event) -> None:
    """Hear whether to stop; end the process when the driver has done with it."""
    try:
        while True:
            if connection.recv() == "stop":
                asked.set()
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
