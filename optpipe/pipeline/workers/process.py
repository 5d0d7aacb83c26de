"""What a local worker's process runs: ``python -m optpipe.pipeline.workers.process FD``.

It reads from the socket that it inherits as FD: an :class:`Assignment`, then pairs of a batch and a place.
It sends back events, and for each pair whether it is done.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection

from optpipe.errors import OptpipeError
from optpipe.pipeline.workers.child import die_with
from optpipe.pipeline.workers.replica import Assignment, Replica
from optpipe.types import Event


def main(descriptor: int) -> None:
    """Serve until the driver is gone."""
    die_with(os.getppid())
    connection: Connection = Connection(descriptor)
    sending = threading.Lock()

    def send(*message: object) -> None:
        with sending:
            connection.send(message)

    def emit(event: Event) -> None:
        send("event", event)

    try:
        assignment: Assignment = connection.recv()
        replica: Replica | None = None
        while True:
            batch, place = connection.recv()
            try:
                replica = replica or Replica(assignment, emit)
                replica.compute(batch, place)
            except OptpipeError as error:
                send("failed", type(error).__name__, str(error))
            except Exception as error:
                send("failed", type(error).__name__, " ".join(str(error).split())[:300])
            else:
                send("done")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
