"""A GPU that is not there: the calls of ``cuda.bindings.runtime`` that are made, on the host's memory.

Only calls that the installed bindings have are let through, with the arguments that they name, and handles
and enums are the bindings' own. Work on a stream waits in its queue until the host waits for it, so that what
reads a result too early reads the old one. Time is the sum of what the work says it takes.
"""
# ruff: noqa: N802  # methods are named after the calls that they stand for

from __future__ import annotations

import ctypes
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_tensorrt import StrictError

_REAL: Any = pytest.importorskip("cuda.bindings.runtime", reason="the package cuda-bindings is not installed")

Work = Callable[[], float]
COPY_MS = 0.25


@dataclass
class StreamState:
    """What waits on a stream, and what is being recorded (None when nothing is)."""

    queue: list[Work] = field(default_factory=list)
    recorded: list[Work] | None = None


class FakeCuda:
    """The module ``cuda.bindings.runtime``. ``failing`` names the error that a call returns, once or more."""

    __spec__ = None

    def __init__(self) -> None:
        self.real = _REAL
        self.failing: dict[str, str] = {}
        self.calls: list[str] = []
        self.clock_ms = 0.0
        self.memory: dict[int, tuple[Any, int, str]] = {}
        self.streams: dict[int, StreamState] = {}
        self.events: dict[int, float | None] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self._handles = 0
        self.cudaStreamNonBlocking = self.real.cudaStreamNonBlocking
        self.cudaMemcpyKind = self.real.cudaMemcpyKind
        self.cudaStreamCaptureMode = self.real.cudaStreamCaptureMode
        self.cudaGetErrorName = self.real.cudaGetErrorName
        self.cudaGetErrorString = self.real.cudaGetErrorString

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        simulated = getattr(type(self), f"_{name}", None)
        if simulated is None or not hasattr(self.real, name):
            raise StrictError(f"cuda.bindings.runtime.{name} is not simulated, or does not exist")

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            self._check(name, args)
            if name in self.failing and name != "cudaStreamEndCapture":
                return self._failed(name)
            return self._answer(simulated(self, *args))

        return call

    def live(self) -> dict[str, int]:
        """How many of each thing are not released."""
        kinds: dict[str, dict[int, Any]] = {
            "memory": self.memory,
            "streams": self.streams,
            "events": self.events,
        }
        kinds |= {"graphs": self.graphs, "executables": self.executables}
        return {name: len(found) for name, found in kinds.items() if found}

    def enqueue(self, handle: int, work: Work) -> None:
        """Put work on a stream: recorded where it is recording, else in its queue."""
        state = self.streams[handle]
        (state.queue if state.recorded is None else state.recorded).append(work)

    def view(self, address: int, nbytes: int) -> Any:
        """The bytes at an address, which must lie in one allocation."""
        for start, (buffer, size, _) in self.memory.items():
            if start <= address and address + nbytes <= start + size:
                return (ctypes.c_char * nbytes).from_buffer(buffer, address - start)
        raise StrictError(f"{nbytes} bytes at {address:#x} are not allocated")

    def _check(self, name: str, args: tuple[Any, ...]) -> None:
        """Arguments as the bindings declare them: C integers are ints, enums and handles their classes."""
        real = getattr(self.real, name)
        names = list(inspect.signature(real).bind(*args).arguments)
        declared = re.search(rf"{name}\((.*?)\)", real.__doc__)
        assert declared is not None
        handles = {
            "stream": "cudaStream_t",
            "event": "cudaEvent_t",
            "start": "cudaEvent_t",
            "end": "cudaEvent_t",
        }
        handles |= {"graph": "cudaGraph_t", "graphExec": "cudaGraphExec_t"}
        for parameter, text, value in zip(names, filter(None, declared[1].split(", ")), args, strict=True):
            enum = re.fullmatch(r"\w+: (\w+)", text)
            if enum:
                wanted = getattr(self.real, enum[1])
            elif parameter in handles:
                wanted = getattr(self.real, handles[parameter])
            else:
                wanted = int
            if not isinstance(value, wanted):
                raise StrictError(f"{name}: {parameter} is {wanted.__name__}, got {value!r}")

    def _answer(self, values: Any) -> tuple[Any, ...]:
        if isinstance(values, str):
            return getattr(self.real.cudaError_t, values), None
        return (self.real.cudaError_t.cudaSuccess, *(values or ()))

    def _failed(self, name: str) -> tuple[Any, ...]:
        error = getattr(self.real.cudaError_t, self.failing[name])
        gives = re.search("Get|Malloc|Create|EndCapture|Instantiate|Elapsed", name)
        return (error, None) if gives else (error,)

    def _handle(self) -> int:
        self._handles += 16
        return self._handles

    def _cudaGetDeviceCount(self) -> Any:
        return (1,)

    def _cudaGetDevice(self) -> Any:
        return (0,)

    def _cudaGetDeviceProperties(self, device: int) -> Any:
        found = self.real.cudaDeviceProp()
        found.name = b"NVIDIA Test 100".ljust(256, b"\0")
        found.major, found.minor = 9, 0
        return (found,)

    def _cudaDeviceGetPCIBusId(self, length: int, device: int) -> Any:
        return (b"0000:3B:00.0".ljust(length, b"\0"),)

    def _cudaDriverGetVersion(self) -> Any:
        return (13020,)

    def _cudaRuntimeGetVersion(self) -> Any:
        return (13050,)

    def _cudaMalloc(self, size: int) -> Any:
        return (self._allocate(size, "device"),)

    def _cudaMallocHost(self, size: int) -> Any:
        return (self._allocate(size, "host"),)

    def _allocate(self, size: int, kind: str) -> int:
        buffer = ctypes.create_string_buffer(b"\xff" * size, size)  # NaN, where nothing was written
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer, size, kind
        return address

    def _cudaFree(self, address: int) -> Any:
        return self._free(address, "device")

    def _cudaFreeHost(self, address: int) -> Any:
        return self._free(address, "host")

    def _free(self, address: int, kind: str) -> Any:
        if address not in self.memory or self.memory[address][2] != kind:
            raise StrictError(f"{address:#x} is no {kind} memory, or was freed before")
        if any(state.queue for state in self.streams.values()):
            raise StrictError("memory is freed under work that still waits")
        del self.memory[address]
        return ()

    def _cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: Any) -> Any:
        down = kind == self.real.cudaMemcpyKind.cudaMemcpyDeviceToHost
        if self._kind(source) != ("device" if down else "host") or self._kind(target) == self._kind(source):
            raise StrictError(f"{kind} does not fit the two addresses")

        def copy() -> float:
            ctypes.memmove(self.view(target, nbytes), self.view(source, nbytes), nbytes)
            return COPY_MS

        self.enqueue(int(stream), copy)
        return ()

    def _kind(self, address: int) -> str:
        return self.memory[address][2]

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:
        if flags != self.cudaStreamNonBlocking:
            raise StrictError("a stream that waits for the default one")
        handle = self._handle()
        self.streams[handle] = StreamState()
        return (self.real.cudaStream_t(handle),)

    def _cudaStreamSynchronize(self, stream: Any) -> Any:
        state = self.streams[int(stream)]
        if state.recorded is not None:
            return "cudaErrorStreamCaptureUnsupported"
        for work in state.queue:
            self.clock_ms += work()
        state.queue.clear()
        return ()

    def _cudaStreamQuery(self, stream: Any) -> Any:
        return "cudaErrorNotReady" if self.streams[int(stream)].queue else ()

    def _cudaStreamDestroy(self, stream: Any) -> Any:
        del self.streams[int(stream)]
        return ()

    def _cudaEventCreate(self) -> Any:
        handle = self._handle()
        self.events[handle] = None
        return (self.real.cudaEvent_t(handle),)

    def _cudaEventRecord(self, event: Any, stream: Any) -> Any:
        def stamp() -> float:
            self.events[int(event)] = self.clock_ms
            return 0.0

        self.events[int(event)] = None
        self.enqueue(int(stream), stamp)
        return ()

    def _cudaEventSynchronize(self, event: Any) -> Any:
        for handle in self.streams:
            self._cudaStreamSynchronize(handle)
        return ()

    def _cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        first, last = self.events[int(start)], self.events[int(end)]
        return "cudaErrorNotReady" if first is None or last is None else (last - first,)

    def _cudaEventDestroy(self, event: Any) -> Any:
        del self.events[int(event)]
        return ()

    def _cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Any:
        state = self.streams[int(stream)]
        if state.queue or mode != self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            raise StrictError("recording begins on a busy stream, or in another mode than thread-local")
        state.recorded = []
        return ()

    def _cudaStreamEndCapture(self, stream: Any) -> Any:
        state = self.streams[int(stream)]
        recorded, state.recorded = state.recorded, None
        if "cudaStreamEndCapture" in self.failing:
            return self.failing["cudaStreamEndCapture"]
        if recorded is None:
            return "cudaErrorStreamCaptureUnmatched"
        handle = self._handle()
        self.graphs[handle] = recorded
        return (self.real.cudaGraph_t(handle),)

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        handle = self._handle()
        self.executables[handle] = list(self.graphs[int(graph)])
        return (self.real.cudaGraphExec_t(handle),)

    def _cudaGraphDestroy(self, graph: Any) -> Any:
        del self.graphs[int(graph)]
        return ()

    def _cudaGraphLaunch(self, executable: Any, stream: Any) -> Any:
        for work in self.executables[int(executable)]:
            self.enqueue(int(stream), work)
        return ()

    def _cudaGraphExecDestroy(self, executable: Any) -> Any:
        del self.executables[int(executable)]
        return ()
