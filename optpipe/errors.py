"""The few kinds of failure that a user meets, each with its exit code.

Every message says what was wrong, the value, where, and how to mend it; the command line prints it as
one line and shows a traceback only under ``--debug``.
"""


class OptpipeError(Exception):
    """A failure that optpipe explains in one line."""

    exit_code = 4


class GateError(OptpipeError):
    """A finished run does not meet the limits of ``optpipe gate`` (exit code 1)."""

    exit_code = 1


class UsageError(OptpipeError):
    """A recipe, path or argument that cannot be used as given (exit code 2)."""

    exit_code = 2


class MissingError(OptpipeError):
    """Something that this machine lacks: a package, a device, a driver (exit code 3)."""

    exit_code = 3


class RunError(OptpipeError):
    """A stage that could not be completed (exit code 4)."""

    exit_code = 4


_NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "bad_alloc", "bad allocation"),
    *("Failed to allocate memory", "could not create a primitive", "could not create a memory object"),
)
"""What torch, oneDNN and ONNX Runtime call it where memory is refused to them, in errors of other kinds."""


_NO_THREAD = ("Resource temporarily unavailable", "can't start new thread")
"""What a library and Python say where there is no memory for a thread, which needs some of its own."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, or what it was raised for, is one of memory that is not there.

    A GPU's own is told by torch's kind of error.
    """
    if isinstance(error, MemoryError) or any(word in str(error) for word in _NO_MEMORY):
        return True
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_THREAD):
        return True
    return error.__cause__ is not None and lacks_memory(error.__cause__)
