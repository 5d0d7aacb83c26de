"""A process beside this one, at the other end of a socket pair that nobody else can reach."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Child:
    """A fresh interpreter that runs a module; what it has to say comes by ``connection``.

    The module is given the number of its end of the pair, and calls :func:`die_with` at once.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        """Begin it, with these variables beside this process's own."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **environment},
                # Ctrl-C is the driver's to handle: it ends its workers.
                start_new_session=True,
            )
        self.connection: Connection = Connection(ours.detach())

    def end(self) -> int:
        """End it now; returns its exit code."""
        self._process.kill()
        code = self._process.wait()
        self.connection.close()
        return code


def died(code: int) -> str:
    """How a process ended, in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def die_with(parent: int) -> None:
    """End this process when its parent is gone, in the middle of a training too.

    Linux does it at once, so that no worker is still writing when the run is begun again.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
