"""What an NVIDIA GPU offers through cuda.bindings: memory, streams, events, graphs.

The bindings share the primary context of the current device with torch and with every engine. Each of their
calls returns ``(error, values...)``; here an error is raised, except where something is released: that
happens also after a failure, which it must not hide.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optpipe.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INSTALL = "pip install 'optpipe[nvidia]'"
"""The command that installs all that runs engines on an NVIDIA GPU, but the driver."""


class CudaError(RunError):
    """A call to CUDA that failed; ``name`` is the error's, "cudaErrorMemoryAllocation" say."""

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class CaptureError(RunError):
    """Work that CUDA could not record as a graph; it can still be enqueued each time."""


_MENDS = {
    "cudaErrorMemoryAllocation": "the GPU's memory is full: close what else uses it, or lower target.batch",
    "cudaErrorInsufficientDriver": "update the NVIDIA driver",
    "cudaErrorNoDevice": "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "cudaErrorDevicesUnavailable": "another process holds the GPU for itself: end it, or wait for it",
    "cudaErrorIllegalAddress": "this process cannot use the GPU any more: run again",
    "cudaErrorLaunchFailure": "this process cannot use the GPU any more: run again",
}


@dataclass(frozen=True, slots=True)
class Device:
    """The current GPU. ``bus_id`` tells it from its neighbours, whatever CUDA_VISIBLE_DEVICES says.

    ``driver_cuda`` is the newest CUDA that the driver serves, ``runtime_cuda`` the one that the bindings use.
    """

    name: str
    capability: str
    bus_id: str
    driver_cuda: str
    runtime_cuda: str


def device_problem() -> str | None:
    """Why no GPU can be used here and how to mend it; None if one can."""
    try:
        runtime = _runtime()
    except ImportError:
        return f"the package cuda-python is not installed: {INSTALL}"
    error, count = runtime.cudaGetDeviceCount()
    if int(error) == 0:
        return None if count else "no NVIDIA GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    name = _name(runtime, error)
    if name == "cudaErrorInsufficientDriver":
        _, served = runtime.cudaDriverGetVersion()
        if not served:
            return "no NVIDIA driver is installed: install the one for your GPU, then check with nvidia-smi"
        _, needed = runtime.cudaRuntimeGetVersion()
        return (
            f"the NVIDIA driver serves CUDA {_version(served)} and CUDA {_version(needed)} is installed: "
            "update the driver"
        )
    return f"CUDA finds no GPU ({name}): {_MENDS.get(name, 'check nvidia-smi')}"


def device() -> Device:
    """The current GPU.

    Raises:
        CudaError: there is none; :func:`device_problem` tells why without raising.
    """
    runtime = _runtime()
    (number,) = _checked("cudaGetDevice", runtime.cudaGetDevice())
    (properties,) = _checked("cudaGetDeviceProperties", runtime.cudaGetDeviceProperties(number))
    (bus_id,) = _checked("cudaDeviceGetPCIBusId", runtime.cudaDeviceGetPCIBusId(32, number))
    (served,) = _checked("cudaDriverGetVersion", runtime.cudaDriverGetVersion())
    (used,) = _checked("cudaRuntimeGetVersion", runtime.cudaRuntimeGetVersion())
    return Device(
        name=_text(properties.name),
        capability=f"{properties.major}.{properties.minor}",
        bus_id=_text(bus_id),
        driver_cuda=_version(served),
        runtime_cuda=_version(used),
    )


def driver() -> str:
    """The driver by the newest CUDA that it serves, "CUDA 13.2" say; "unknown" without the bindings."""
    try:
        runtime = _runtime()
    except ImportError:
        return "unknown"
    error, served = runtime.cudaDriverGetVersion()
    return f"CUDA {_version(served)}" if int(error) == 0 and served else "unknown"


class Stream:
    """A stream of its own, which does not wait for the default one.

    ``handle`` is its ``cudaStream_t`` as a number, for TensorRT, ONNX Runtime or torch; ``raw`` is the
    bindings' own object.
    """

    def __init__(self) -> None:
        self._runtime = _runtime()
        flags = self._runtime.cudaStreamNonBlocking
        (self.raw,) = _checked("cudaStreamCreateWithFlags", self._runtime.cudaStreamCreateWithFlags(flags))
        self.handle = int(self.raw)

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done; an error in it is raised here."""
        _checked("cudaStreamSynchronize", self._runtime.cudaStreamSynchronize(self.raw))

    def idle(self) -> bool:
        """Whether all that was enqueued is done already; an error in it is raised here."""
        answer = self._runtime.cudaStreamQuery(self.raw)
        if int(answer[0]) != 0 and _name(self._runtime, answer[0]) == "cudaErrorNotReady":
            return False
        _checked("cudaStreamQuery", answer)
        return True

    def close(self) -> None:
        """Release the stream once its work is done."""
        if self.raw is not None:
            self._runtime.cudaStreamDestroy(self.raw)
            self.raw = None


class Event:
    """A point in a stream's work, stamped with the GPU's time when it is reached.

    ``raw`` is the bindings' own object.
    """

    def __init__(self) -> None:
        self._runtime = _runtime()
        (self.raw,) = _checked("cudaEventCreate", self._runtime.cudaEventCreate())

    def record(self, stream: Stream) -> None:
        """Put the event behind what was enqueued so far."""
        _checked("cudaEventRecord", self._runtime.cudaEventRecord(self.raw, stream.raw))

    def synchronize(self) -> None:
        """Wait until the GPU has reached the event."""
        _checked("cudaEventSynchronize", self._runtime.cudaEventSynchronize(self.raw))

    def close(self) -> None:
        """Release the event."""
        if self.raw is not None:
            self._runtime.cudaEventDestroy(self.raw)
            self.raw = None


def elapsed_ms(start: Event, end: Event) -> float:
    """Milliseconds of the GPU's time between two events that it has reached."""
    runtime = _runtime()
    (elapsed,) = _checked("cudaEventElapsedTime", runtime.cudaEventElapsedTime(start.raw, end.raw))
    return float(elapsed)


class DeviceBuffer:
    """Memory on the GPU, at an address that stays the same."""

    def __init__(self, nbytes: int) -> None:
        self._runtime = _runtime()
        (address,) = _checked("cudaMalloc", self._runtime.cudaMalloc(nbytes))
        self.nbytes = nbytes
        self.pointer = int(address)

    def close(self) -> None:
        """Free the memory."""
        if self.pointer:
            self._runtime.cudaFree(self.pointer)
            self.pointer = 0


class HostBuffer:
    """Page-locked memory of the host as a float32 array, which the GPU copies from and to by itself.

    ``array`` is gone, and views of it must not be used, once the buffer is closed.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        import numpy as np

        self._runtime = _runtime()
        self.nbytes = 4 * math.prod(shape)
        (address,) = _checked("cudaMallocHost", self._runtime.cudaMallocHost(self.nbytes))
        self.pointer = int(address)
        memory = (ctypes.c_float * math.prod(shape)).from_address(self.pointer)
        self.array: NDArray[np.float32] = np.ctypeslib.as_array(memory).reshape(shape)

    def close(self) -> None:
        """Free the memory."""
        if self.pointer:
            del self.array
            self._runtime.cudaFreeHost(self.pointer)
            self.pointer = 0


def copy_to_device(host: HostBuffer, device: DeviceBuffer, stream: Stream) -> None:
    """Enqueue the copy of the whole host buffer into the GPU's; ``host`` must stay as it is until done."""
    runtime = _runtime()
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    _checked(
        "cudaMemcpyAsync",
        runtime.cudaMemcpyAsync(device.pointer, host.pointer, host.nbytes, kind, stream.raw),
    )


def copy_to_host(device: DeviceBuffer, host: HostBuffer, stream: Stream) -> None:
    """Enqueue the copy of the GPU's buffer that fills the whole host buffer."""
    runtime = _runtime()
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
    _checked(
        "cudaMemcpyAsync",
        runtime.cudaMemcpyAsync(host.pointer, device.pointer, host.nbytes, kind, stream.raw),
    )


class Graph:
    """Recorded work that one call enqueues again, at the same addresses. Made by :func:`capture`."""

    def __init__(self, executable: Any) -> None:
        self._runtime = _runtime()
        self._executable = executable

    def launch(self, stream: Stream) -> None:
        """Enqueue the recorded work."""
        _checked("cudaGraphLaunch", self._runtime.cudaGraphLaunch(self._executable, stream.raw))

    def close(self) -> None:
        """Release the graph."""
        if self._executable is not None:
            self._runtime.cudaGraphExecDestroy(self._executable)
            self._executable = None


def capture(stream: Stream, enqueue: Callable[[], bool]) -> Graph:
    """What ``enqueue`` puts into the stream, recorded instead of run.

    Run the work once before and synchronize: what it allocates on its first run cannot be recorded. Calls of
    this thread that are unsafe while recording fail, those of other threads are let through.

    Raises:
        CaptureError: ``enqueue`` returned False or raised, or the work cannot be recorded. The stream is no
            longer recording and can be used.
    """
    runtime = _runtime()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    _checked("cudaStreamBeginCapture", runtime.cudaStreamBeginCapture(stream.raw, mode))
    problem = ""
    try:
        if not enqueue():
            problem = "the work could not be enqueued while recording"
    except RunError as error:
        problem = str(error)
    finally:
        ended, recorded = runtime.cudaStreamEndCapture(stream.raw)
    # A recording that was broken off ends with an error and an empty handle; another holds a graph.
    kept = int(ended) == 0 and recorded is not None and int(recorded) != 0
    if not kept:
        problem = problem or ("nothing was recorded" if int(ended) == 0 else _name(runtime, ended))
        raise CaptureError(problem)
    try:
        if problem:
            raise CaptureError(problem)
        refused, executable = runtime.cudaGraphInstantiate(recorded, 0)
        if int(refused) != 0:
            raise CaptureError(f"cudaGraphInstantiate failed with {_name(runtime, refused)}")
    finally:
        runtime.cudaGraphDestroy(recorded)
    return Graph(executable)


def _runtime() -> Any:
    return importlib.import_module("cuda.bindings.runtime")


def _checked(call: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values that a call returned beside its error, which is raised."""
    error, *values = answer
    if int(error) != 0:
        runtime = _runtime()
        name = _name(runtime, error)
        _, words = runtime.cudaGetErrorString(error)
        mend = _MENDS.get(name, "check the GPU with nvidia-smi and run again")
        raise CudaError(f"{call} failed with {name} ({_text(words)}); {mend}", name)
    return tuple(values)


def _name(runtime: Any, error: Any) -> str:
    _, name = runtime.cudaGetErrorName(error)
    return _text(name)


def _text(words: bytes) -> str:
    return words.split(b"\0")[0].decode(errors="replace")


def _version(number: int) -> str:
    """13020 as "13.2"."""
    return f"{number // 1000}.{number % 1000 // 10}"
