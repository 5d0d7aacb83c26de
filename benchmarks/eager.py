"""torch as it comes, timed as engines are: the sessions that ``benchmarks/gpu.py`` puts beside theirs.

The network runs with its batch-norms unfolded, operator by operator. As with every engine, images and logits
are fp32 and contiguous: converting them to the precision and the layout of the network is part of the time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.roofline import DTYPES
from optpipe.backends import _cuda, _nvml, _processor
from optpipe.backends._images import batches
from optpipe.backends._inductor_settings import threads_of_torch, true_fp32
from optpipe.types import DeviceState, Fingerprint, Sample, Session, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAME = Path("torch eager")


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run a network without compiling it."""

    channels_last: bool = False
    cuda_graph: bool = False

    @property
    def name(self) -> str:
        """As it stands in tables."""
        layout = " channels_last" if self.channels_last else ""
        return f"torch eager{layout}{' + CUDA graph' if self.cuda_graph else ''}"


def variants(device: str) -> tuple[Variant, ...]:
    """Every way on a device, the plain one first and the one expected to be fastest last."""
    graphs = (False, True) if device == "cuda" else (False,)
    return tuple(Variant(last, graph) for graph in graphs for last in (False, True))


def fingerprint(target: Target) -> Fingerprint:
    """The device as torch sees it."""
    threads = _processor.threads_or_all(target.threads)
    if target.device == "cpu":
        model, stepping = _processor.processor()
        versions = (("torch", torch.__version__), ("processor", stepping))
        return Fingerprint(model, _processor.operating_system(), versions, threads, _processor.governor())
    properties = torch.cuda.get_device_properties()
    return Fingerprint(
        properties.name,
        _nvml.driver_version() or _cuda.driver(),
        (
            ("torch", torch.__version__),
            ("cuda", str(torch.version.cuda)),
            ("cudnn", str(torch.backends.cudnn.version())),  # type: ignore[no-untyped-call]
            ("compute capability", f"{properties.major}.{properties.minor}"),
        ),
        threads,
        _nvml.highest_clocks(),
    )


def state(device: str) -> DeviceState | None:
    """The device's clocks now; None where there is nothing to read."""
    return _nvml.state() if device == "cuda" else None


def load(model: nn.Module, target: Target, variant: Variant) -> Session:
    """The network on the target's device, ready to be run and timed; RuntimeError where torch refuses."""
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    dtype = DTYPES[target.precision]
    network = copy.deepcopy(model).eval().requires_grad_(False)
    network = network.to(device=target.device, dtype=dtype).to(memory_format=layout)

    def logits(images: Tensor) -> Tensor:
        found: Tensor = network(images.to(dtype=dtype, memory_format=layout))
        return found.float()

    if target.device == "cpu":
        return _CpuSession(logits, target)
    return _CudaSession(logits, target, variant.cuda_graph)


class _CpuSession:
    headline = "Latency"
    notes: tuple[str, ...] = ()

    def __init__(self, logits: Callable[[Tensor], Tensor], target: Target) -> None:
        self._logits = logits
        self._shape = (target.batch, *target.input_shape)
        self._threads = _processor.threads_or_all(target.threads)
        self._input = _images(self._shape)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        found = []
        with torch.inference_mode(), threads_of_torch(self._threads):
            for batch, count in batches(images, self._shape, _NAME):
                found.append(self._logits(torch.from_numpy(batch))[:count].numpy())
        return np.concatenate(found)

    def sample(self) -> Sample:
        with torch.inference_mode(), threads_of_torch(self._threads):
            begin = time.perf_counter_ns()
            self._logits(self._input)
            return Sample(compute_ms=(time.perf_counter_ns() - begin) / 1e6)

    def state(self) -> DeviceState | None:
        return None

    def close(self) -> None:
        del self._logits, self._input


class _CudaSession:
    """On a stream of its own with fixed buffers, as the engines' sessions are."""

    headline = "GPU Compute Time"

    def __init__(self, logits: Callable[[Tensor], Tensor], target: Target, cuda_graph: bool) -> None:
        self._logits = logits
        self._shape = (target.batch, *target.input_shape)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.notes = ("CUDA graph" if cuda_graph else "each operator enqueued by itself",)
        with torch.inference_mode(), true_fp32():
            self._host_input = _images(self._shape).pin_memory()
            self._input = self._host_input.cuda()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                # The first runs load kernels and try cuDNN's algorithms, which cannot be recorded.
                for _ in range(3):
                    self._output = self._logits(self._input)
            self._stream.synchronize()
            if cuda_graph:
                self._graph = torch.cuda.CUDAGraph()
                # The outer stream's end gives the caller's back, also where a failed graph's does not.
                with (
                    torch.cuda.stream(self._stream),
                    torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
                ):
                    self._output = self._logits(self._input)
            self._host_output = torch.empty_like(self._output, device="cpu").pin_memory()
        self._events = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(4)
        ]

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        found = []
        with torch.inference_mode(), true_fp32(), torch.cuda.stream(self._stream):
            for batch, count in batches(images, self._shape, _NAME):
                self._input.copy_(torch.from_numpy(batch))
                self._enqueue()
                found.append(self._output[:count].cpu().numpy())
        return np.concatenate(found)

    def sample(self) -> Sample:
        with torch.inference_mode(), true_fp32(), torch.cuda.stream(self._stream):
            begin, copied, computed, end = self._events
            begin.record()
            self._input.copy_(self._host_input, non_blocking=True)
            copied.record()
            before = time.perf_counter_ns()
            self._enqueue()
            enqueue_ms = (time.perf_counter_ns() - before) / 1e6
            computed.record()
            self._host_output.copy_(self._output, non_blocking=True)
            end.record()
            end.synchronize()
        return Sample(
            compute_ms=copied.elapsed_time(computed),
            enqueue_ms=enqueue_ms,
            h2d_ms=begin.elapsed_time(copied),
            d2h_ms=computed.elapsed_time(end),
        )

    def state(self) -> DeviceState | None:
        return _nvml.state()

    def close(self) -> None:
        self._graph = None
        del self._logits, self._input, self._output, self._host_input, self._host_output
        torch.cuda.empty_cache()  # for the engines of other libraries, which torch's own cache would starve

    def _enqueue(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._output = self._logits(self._input)


def _images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
