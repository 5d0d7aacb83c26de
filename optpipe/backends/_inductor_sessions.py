"""Opened packages: one that runs on the CPU, one that runs on CUDA."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpipe import interruption
from optpipe.backends import _nvml, _processor
from optpipe.backends._images import batches, shape_text
from optpipe.backends._inductor_settings import in_blocks_of_their_own, threads_of_torch, true_fp32
from optpipe.errors import RunError
from optpipe.types import DeviceState, Sample, Target

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class CpuSession:
    """A package whose input stays in the same memory from run to run."""

    headline = "Latency"

    def __init__(self, content: bytes, path: Path, target: Target) -> None:
        import torch

        self.notes = _notes_on_threads()

        self._path = path
        self._shape = (target.batch, *target.input_shape)
        self._threads = _processor.threads_or_all(target.threads)
        self._input = _first_images(self._shape)
        with _explained(path):
            self._package: Any = in_blocks_of_their_own(lambda: _opened(content))
            with torch.inference_mode(), threads_of_torch(self._threads):
                _check_logits(self._package(self._input), self._shape[0], path)

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); the last batch is padded with zeros."""
        import numpy as np
        import torch

        logits: list[NDArray[np.float32]] = []
        with _explained(self._path), torch.inference_mode(), threads_of_torch(self._threads):
            for batch, count in batches(images, self._shape, self._path):
                self._input.copy_(torch.from_numpy(batch))
                logits.append(self._package(self._input)[:count].numpy().copy())
        return np.concatenate(logits)

    def sample(self) -> Sample:
        """Time one inference of the target's batch on the fixed input."""
        import torch

        with _explained(self._path), torch.inference_mode(), threads_of_torch(self._threads):
            begin = time.perf_counter_ns()
            self._package(self._input)
            return Sample(compute_ms=(time.perf_counter_ns() - begin) / 1e6)

    def state(self) -> DeviceState | None:
        """None: the processor's clocks are not ours to read everywhere."""
        return None

    def close(self) -> None:
        """Release the package and its weights."""
        self._package = None


class CudaSession:
    """A package on a stream of its own, with fixed buffers, replayed as a CUDA graph where it can be."""

    headline = "GPU Compute Time"

    def __init__(self, content: bytes, path: Path, target: Target, *, cuda_graph: bool) -> None:
        import torch

        self._path = path
        self._shape = (target.batch, *target.input_shape)
        with _explained(path), torch.inference_mode(), true_fp32():
            self._host_input: Any = _first_images(self._shape).pin_memory()
            self._input: Any = self._host_input.cuda()
            self._package: Any = _opened(content)
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._output: Any = None
                # The first runs load kernels and choose algorithms, which cannot be recorded.
                for _ in range(3):
                    self._output = self._package(self._input)
            self._stream.synchronize()
            _check_logits(self._output, self._shape[0], path)
            self._host_output: Any = torch.empty_like(self._output, device="cpu", pin_memory=True)
            self._events = [
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(4)
            ]
            self._graph: torch.cuda.CUDAGraph | None = None
            self.notes = (
                self._record() if cuda_graph else ("no CUDA graph: target.options.cuda_graph is off",)
            )

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); the last batch is padded with zeros."""
        import numpy as np
        import torch

        logits: list[NDArray[np.float32]] = []
        with _explained(self._path), torch.inference_mode(), true_fp32(), torch.cuda.stream(self._stream):
            for batch, count in batches(images, self._shape, self._path):
                self._host_input.copy_(torch.from_numpy(batch))
                self._input.copy_(self._host_input, non_blocking=True)
                self._enqueue()
                self._host_output.copy_(self._output, non_blocking=True)
                self._stream.synchronize()
                logits.append(self._host_output[:count].numpy().copy())
        return np.concatenate(logits)

    def sample(self) -> Sample:
        """Time one inference of the target's batch, and the copies to and from the device around it."""
        import torch

        with _explained(self._path), torch.inference_mode(), true_fp32(), torch.cuda.stream(self._stream):
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
        """The GPU's clocks now; None where NVML does not answer."""
        return _nvml.state()

    def close(self) -> None:
        """Release the graph, the package and its buffers, so that other libraries too can have the memory."""
        import torch

        self._graph = self._package = None
        self._input = self._output = self._host_input = self._host_output = None
        torch.cuda.empty_cache()

    def _record(self) -> tuple[str, ...]:
        """Record the package's work as a graph; the note says that it did, or why it could not."""
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            # The outer stream's end gives the caller's back, also where a failed graph's does not.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                output = self._package(self._input)
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError as error:
            return (f"no CUDA graph: {_first_line(error)}; each run enqueues its kernels one by one",)
        self._graph, self._output = graph, output
        return ("CUDA graph",)

    def _enqueue(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._output = self._package(self._input)


def _opened(content: bytes) -> Any:
    """The package as a function of the images.

    It is opened from a copy of the checked bytes that nobody else can write to: the engine's own file could
    be another one by now. torch unpacks it elsewhere, so the copy can go.
    """
    import torch

    with interruption.temporary_folder() as folder:
        copy = folder / "engine.pt2"
        copy.write_bytes(content)
        # One thread at a time runs a session: the package's own locks would only get in a graph's way.
        return torch._inductor.aoti_load_package(str(copy), run_single_threaded=True)


def _first_images(shape: tuple[int, ...]) -> torch.Tensor:
    """The contiguous buffer that all images go through, filled with numbers of an image's size."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _notes_on_threads() -> tuple[str, ...]:
    """That idle threads take the cores from other engines, where OpenMP was not told otherwise in time."""
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return ()
    return ("OpenMP's threads spin between runs: set OMP_WAIT_POLICY=PASSIVE before the program starts",)


def _check_logits(logits: torch.Tensor, batch: int, path: Path) -> None:
    if logits.dim() != 2 or len(logits) != batch:
        raise RunError(
            f"{path} returns a tensor of shape {shape_text(tuple(logits.shape))}: optpipe runs networks that "
            f"return logits of shape (N, classes), here with N = {batch}"
        )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What torch raises while opening or running a package, in one line; its logs are held back."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"AOTInductor cannot run {path}: {_first_line(error)}; build it again on this machine"
        ) from error
    finally:
        logging.disable(disabled)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
