"""What TensorRT says while it works, kept for the message of a failure.

A process has one log: TensorRT takes the logger of its first builder or runtime and goes on using it, also
when later ones bring their own, so the lines of all would end up in the first. It must also outlive every
object that was made with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from optpipe.errors import RunError

_SHOWN = 3


class Log:
    """TensorRT's errors and warnings since :meth:`clear`. ``logger`` is what its objects are made with."""

    def __init__(self, trt: Any) -> None:
        self.logger = _logger(trt, self._add)
        self._severity = trt.ILogger.Severity
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def clear(self) -> None:
        """Forget the lines so far, at the start of something new."""
        self.errors.clear()
        self.warnings.clear()

    def failure(self, what: str, mend: str) -> RunError:
        """An error that says what failed, TensorRT's last lines about it, and what to do."""
        lines = self.errors or self.warnings or ["TensorRT says nothing about it"]
        if len(lines) > _SHOWN:  # the first is often the cause of the others
            lines = [lines[0], *lines[1 - _SHOWN :]]
        return RunError(f"{what}: {'; '.join(lines)}; {mend}")

    def made(self, make: Callable[[], Any], what: str, mend: str) -> Any:
        """What ``make`` returns, once it is something.

        Where TensorRT fails, methods answer None, a few raise RuntimeError, and constructors raise TypeError
        because the library gave them a null pointer.
        """
        try:
            found = make()
        except (TypeError, RuntimeError) as error:
            if isinstance(error, TypeError) and "nullptr" not in str(error):
                raise
            if not self.errors:
                self.errors.append(" ".join(str(error).split()))
            found = None
        if found is None:
            raise self.failure(f"TensorRT cannot {what}", mend)
        return found

    def _add(self, severity: Any, message: str) -> None:
        line = " ".join(message.split()).rstrip(".")
        if severity in (self._severity.INTERNAL_ERROR, self._severity.ERROR):
            self.errors.append(line)
        elif severity == self._severity.WARNING:
            self.warnings.append(line)


@functools.cache
def log_of(trt: Any) -> Log:
    """The log of the module ``tensorrt``."""
    return Log(trt)


def _logger(trt: Any, add: Callable[[Any, str], None]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants its own called, not super()'s

        def log(self, severity: Any, msg: str) -> None:
            add(severity, msg)

    return Logger()
