"""A TensorRT engine with fixed buffers, replayed as a CUDA graph.

Input and output stay at the same addresses on the GPU and in page-locked memory of the host, and all work
goes through one stream. The engine's kernels are recorded once as a CUDA graph: a small network's kernels may
take less time than it takes to enqueue them one by one, and that time would then be what is measured.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from optpipe.backends import _nvml
from optpipe.backends._cuda import (
    CaptureError,
    CudaError,
    DeviceBuffer,
    Event,
    Graph,
    HostBuffer,
    Stream,
    capture,
    copy_to_device,
    copy_to_host,
    elapsed_ms,
)
from optpipe.backends._engine import checked_bytes
from optpipe.backends._images import batches, shape_text
from optpipe.backends._tensorrt_log import log_of
from optpipe.backends._tensorrt_options import Options
from optpipe.errors import RunError
from optpipe.types import DeviceState, Engine, LayerTime, Sample, Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_REBUILD = "build it again on this machine"
_WARM_UP = 3
_NO_GRAPH = "enqueued layer by layer, without a CUDA graph"


class TensorrtSession:
    """An engine loaded for one batch. It is used by one thread at a time.

    Raises:
        RunError: the file is not the one that was built; TensorRT cannot open it, because another release or
            GPU built it; or it takes other images than the target's.
    """

    def __init__(self, trt: Any, engine: Engine, target: Target, options: Options) -> None:
        content = checked_bytes(engine)
        self._path = engine.path
        self._trt = trt
        self._log = log_of(trt)
        self._log.clear()
        self._shape = (target.batch, *target.input_shape)
        self._graph: Graph | None = None
        self._notes: tuple[str, ...] = ()
        with contextlib.ExitStack() as held:
            held.callback(self._drop_engine)
            self._open_engine(content)
            source, sink = self._names()
            classes = self._bind_shapes(source, sink)
            self._open_buffers(held, classes)
            self._bind_addresses(source, sink)
            self._warm_up(held, options)
            # Released in the reverse order: graph, events, buffers, stream, context, engine, runtime.
            self._held = held.pop_all()

    @property
    def headline(self) -> str:
        """What the time of a sample is, as trtexec calls it."""
        return "GPU Compute Time"

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether a CUDA graph is replayed, or why not."""
        return self._notes

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); the last batch is padded with zeros."""
        import numpy as np

        logits: list[NDArray[np.float32]] = []
        for batch, count in batches(images, self._shape, self._path):
            self._host_images.array[:] = batch
            copy_to_device(self._host_images, self._images, self._stream)
            self._enqueue()
            copy_to_host(self._logits, self._host_logits, self._stream)
            self._stream.synchronize()
            logits.append(self._host_logits.array[:count].copy())
        return np.concatenate(logits)

    def sample(self) -> Sample:
        """Time one inference of the target's batch with its copies, by the GPU's own clock."""
        begin, copied, computed, end = self._events
        begin.record(self._stream)
        copy_to_device(self._host_images, self._images, self._stream)
        copied.record(self._stream)
        start_ns = time.perf_counter_ns()
        self._enqueue()
        enqueue_ns = time.perf_counter_ns() - start_ns
        computed.record(self._stream)
        copy_to_host(self._logits, self._host_logits, self._stream)
        end.record(self._stream)
        end.synchronize()
        return Sample(
            compute_ms=elapsed_ms(copied, computed),
            enqueue_ms=enqueue_ns / 1e6,
            h2d_ms=elapsed_ms(begin, copied),
            d2h_ms=elapsed_ms(computed, end),
        )

    def state(self) -> DeviceState | None:
        """The GPU's clocks now; None where NVML does not answer."""
        return _nvml.state()

    def layers(self) -> str:
        """The engine's layers as TensorRT fused them, JSON; its keys differ between TensorRT 10 and 11."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def layer_times(self, repeats: int) -> tuple[LayerTime, ...]:
        """The layers with their median times over so many inferences, each of which waits for the GPU.

        For a session that replays no graph and times nothing afterwards: its context goes on telling.
        """
        told: dict[str, list[float]] = {}
        profiler = _profiler(self._trt, lambda name, ms: told.setdefault(name, []).append(ms))
        self._context.profiler = profiler
        for _ in range(_WARM_UP + repeats):
            self._enqueue()
            self._stream.synchronize()
        kinds = _kinds(self.layers())
        return tuple(
            LayerTime(name, kinds.get(name, "layer"), statistics.median(times[-repeats:]))
            for name, times in told.items()
        )

    def close(self) -> None:
        """Release the GPU's memory and all else that the session holds."""
        self._held.close()

    def _open_engine(self, content: bytes) -> None:
        what, log = f"open {self._path}", self._log
        self._runtime: Any = log.made(
            lambda: self._trt.Runtime(log.logger), what, "check optpipe doctor --gpu"
        )
        mend = f"another TensorRT release or another GPU may have built it: {_REBUILD}"
        self._engine: Any = log.made(lambda: self._runtime.deserialize_cuda_engine(content), what, mend)
        mend = "the GPU's memory may be full: close what else uses it, or lower target.batch"
        self._context: Any = log.made(self._engine.create_execution_context, what, mend)

    def _drop_engine(self) -> None:
        # A context must go before its engine, and an engine before its runtime.
        self._context = None
        self._engine = None
        self._runtime = None

    def _names(self) -> tuple[str, str]:
        """The names of the one input and the one output, both float32."""
        trt = self._trt
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1:
            raise RunError(
                f"{self._path} has {len(inputs)} inputs and {len(outputs)} outputs: "
                "optpipe runs networks with one input of images and one output of logits"
            )
        for name in names:
            kind = self._engine.get_tensor_dtype(name)
            if kind != trt.DataType.FLOAT:
                raise RunError(
                    f"{self._path}: {name} is {kind.name}, not FLOAT: a network of any precision takes and "
                    "returns float32; export it anew"
                )
        return inputs[0], outputs[0]

    def _bind_shapes(self, source: str, sink: str) -> int:
        """Set the context to the target's batch; returns the number of classes."""
        found = tuple(self._engine.get_tensor_shape(source))
        wanted = self._shape
        fits = len(found) == len(wanted) and all(a in (-1, b) for a, b in zip(found, wanted, strict=True))
        if not fits or not self._context.set_input_shape(source, wanted):
            raise RunError(
                f"{self._path} takes inputs of shape {shape_text(found)}, the target has "
                f"{shape_text(wanted)}{self._reasons()}: set target.batch and target.input_shape to the "
                f"engine's, or {_REBUILD}"
            )
        unknown = self._log.made(self._context.infer_shapes, f"run {self._path}", _REBUILD)
        result = tuple(self._context.get_tensor_shape(sink))
        if unknown or len(result) != 2 or result[0] != wanted[0]:
            raise RunError(
                f"{self._path} returns logits of shape {shape_text(result)} for {shape_text(wanted)} images"
                f"{self._reasons()}: a classifier returns (images, classes); export the network anew"
            )
        return int(result[1])

    def _open_buffers(self, held: contextlib.ExitStack, classes: int) -> None:
        import numpy as np

        self._stream = Stream()
        held.callback(self._stream.close)
        self._host_images = HostBuffer(self._shape)
        held.callback(self._host_images.close)
        self._host_logits = HostBuffer((self._shape[0], classes))
        held.callback(self._host_logits.close)
        self._images = DeviceBuffer(self._host_images.nbytes)
        held.callback(self._images.close)
        self._logits = DeviceBuffer(self._host_logits.nbytes)
        held.callback(self._logits.close)
        self._host_images.array[:] = np.random.default_rng(0).standard_normal(self._shape, dtype=np.float32)
        events = []
        for _ in range(4):
            events.append(Event())
            held.callback(events[-1].close)
        self._events = tuple(events)
        held.callback(self._settle)

    def _settle(self) -> None:
        """Wait for what a failure left on the stream: it must not write into memory that is freed."""
        with contextlib.suppress(CudaError):
            self._stream.synchronize()

    def _bind_addresses(self, source: str, sink: str) -> None:
        for name, buffer in ((source, self._images), (sink, self._logits)):
            if not self._context.set_tensor_address(name, buffer.pointer):
                raise self._log.failure(f"TensorRT cannot bind {name} of {self._path}", _REBUILD)

    def _warm_up(self, held: contextlib.ExitStack, options: Options) -> None:
        """Run once, so that all is allocated, then record the run as a graph and run that."""
        copy_to_device(self._host_images, self._images, self._stream)
        self._enqueue()
        self._stream.synchronize()
        self._notes = self._record(held) if options.cuda_graph else (f"{_NO_GRAPH}: cuda_graph is off",)
        self._enqueue()
        self._stream.synchronize()

    def _record(self, held: contextlib.ExitStack) -> tuple[str, ...]:
        try:
            graph = capture(self._stream, lambda: bool(self._context.execute_async_v3(self._stream.handle)))
        except CaptureError as error:
            note = f"{_NO_GRAPH}: {error}{self._reasons()}"
            self._log.clear()
            return (note,)
        held.callback(graph.close)
        self._graph = graph
        return ("CUDA graph",)

    def _enqueue(self) -> None:
        if self._graph is not None:
            self._graph.launch(self._stream)
        elif not self._context.execute_async_v3(self._stream.handle):
            raise self._log.failure(f"TensorRT cannot run {self._path}", f"run again, or {_REBUILD}")

    def _reasons(self) -> str:
        """TensorRT's errors so far, in brackets; empty where there are none."""
        return f" ({'; '.join(self._log.errors[-3:])})" if self._log.errors else ""


def _profiler(trt: Any, tell: Callable[[str, float], object]) -> Any:
    """What a context tells the times of its layers to, one call for each layer of each inference."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)  # pybind11 wants its own called, not super()'s

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            tell(layer_name, ms)

    return Profiler()


def _kinds(layers: str) -> dict[str, str]:
    """The kind of each layer by its name, as far as the inspector's JSON says it."""
    found = json.loads(layers).get("Layers", [])
    return {one["Name"]: one["LayerType"] for one in found if isinstance(one, dict) and "LayerType" in one}
