"""ONNX Runtime on the CPU, and with its CUDA provider on an NVIDIA GPU (``_onnxruntime_cuda``).

The engine is the ONNX file itself, where it lies: nothing is built and nothing is copied. ONNX Runtime can
also store its optimised graph, but at the level that is timed here that graph holds kernels and weight
layouts chosen for the CPU that wrote it: it may not run on another one, nor under another release. All that
it would save is the optimisation when loading. The batch is fixed when the engine is loaded, not in the file;
the precision is that of the file.

On the CPU two sessions in one process must not disturb each other, nor differ by where their threads happen
to lie:

- threads never spin: two sessions whose threads spin take the cores from each other, the same network then
  takes about twice as long and savings look smaller than they are;
- a session's own threads are each bound to one core, the same in every session, while the calling thread
  stays free. Unbound, on two cores that others use too, the same engine in two sessions differed by
  far more than the noise for as long as they lived, because one session's thread had settled on the
  busier core; bound, on the same machine, such differences were gone, and the time itself was the same.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optpipe import interruption
from optpipe.backends import _processor
from optpipe.backends._engine import engine_of
from optpipe.backends._images import batches
from optpipe.backends._onnxruntime import failure, open_session, runtime_errors, times_of_profile
from optpipe.backends._onnxruntime_cuda import CudaSession, fingerprint_cuda, missing_cuda, options_of
from optpipe.errors import MissingError, UsageError
from optpipe.types import DeviceState, Engine, Fingerprint, LayerTime, Precision, Sample, Session, Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SOURCE: Literal["onnx", "program"] = "onnx"
CACHES_BUILDS = False
INT8_REST: Literal["fp32", "fp16"] = "fp32"

_PROVIDER = "CPUExecutionProvider"
_WARM_UP = 3
# The CUDA provider has few int8 kernels: it would compute most of such a file in fp32, between conversions.
_PRECISIONS: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")}


def precisions(device: str) -> tuple[Precision, ...]:
    """The precisions of ONNX files that it runs on ``device``."""
    return _PRECISIONS.get(device, ())


def missing(target: Target) -> str | None:
    """What this machine lacks to run ``target`` and how to mend it; None if nothing.

    Raises UsageError for a target that this backend runs on no machine.
    """
    _check_target(target)
    if target.device == "cuda":
        return missing_cuda()
    if importlib.util.find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed: pip install 'optpipe[cpu]'"
    return None


def fingerprint(target: Target) -> Fingerprint:
    """The device, its driver and ONNX Runtime, with the number of threads used."""
    if target.device == "cuda":
        return fingerprint_cuda()
    import onnxruntime

    model, stepping = _processor.processor()
    return Fingerprint(
        device=model,
        driver=_processor.operating_system(),
        versions=(("onnxruntime", onnxruntime.__version__), ("processor", stepping)),
        threads=_processor.threads_or_all(target.threads),
        clocks=_processor.governor(),
    )


def build(source: Path, target: Target, folder: Path) -> Engine:
    """The ONNX file itself as the engine (see above why), where it lies; ``folder`` stays empty.

    Raises:
        UsageError: this backend does not run the target.
        RunError: the file cannot be read.
    """
    _check_target(target)
    return engine_of(source, build_s=0.0)


def load(engine: Engine, target: Target) -> Session:
    """Open an engine with the target's batch and threads.

    Raises:
        UsageError: this backend does not run the target.
        MissingError: this machine has no GPU that ONNX Runtime could use, and the target wants one.
        RunError: the file is not the one that was built, or ONNX Runtime refuses it.
    """
    _check_target(target)
    if target.device == "cpu":
        return _CpuSession(engine, target)
    if lacking := missing_cuda():
        raise MissingError(lacking)
    return CudaSession(engine, target)


def layer_times(engine: Engine, target: Target, repeats: int) -> tuple[LayerTime, ...]:
    """The layers with their median times by ONNX Runtime's profiler; none on a GPU, whose work it cannot see.

    Raises as :func:`load` does.
    """
    _check_target(target)
    if target.device != "cpu":
        return ()
    with interruption.temporary_folder() as folder:
        session = _CpuSession(engine, target, profile=folder / "profile")
        try:
            for _ in range(_WARM_UP + repeats):
                session.sample()
            return times_of_profile(session.end_profile(), repeats)
        finally:
            session.close()


class _CpuSession:
    """One ONNX Runtime session whose input and output stay in the same memory from run to run."""

    headline = "Latency"
    notes: tuple[str, ...] = ()

    def __init__(self, engine: Engine, target: Target, profile: Path | None = None) -> None:
        """With ``profile``, the beginning of a file's name, it writes down how long each layer takes."""
        import numpy as np
        import onnxruntime

        self._path = engine.path
        self._shape = (target.batch, *target.input_shape)
        self._errors = runtime_errors()
        try:
            self._session: Any = open_session(engine, target, lambda: _options(target, profile), [_PROVIDER])
            source, sink = self._session.get_inputs()[0], self._session.get_outputs()[0]
            images = np.random.default_rng(0).standard_normal(self._shape, dtype=np.float32)
            self._input: Any = onnxruntime.OrtValue.ortvalue_from_numpy(images)
            self._binding: Any = self._session.io_binding()
            self._binding.bind_ortvalue_input(source.name, self._input)
            self._binding.bind_output(sink.name, "cpu")
            self._session.run_with_iobinding(self._binding)
            # The output of the first run has the shape that all later ones write into.
            self._output: Any = self._binding.get_outputs()[0]
            self._binding.bind_ortvalue_output(sink.name, self._output)
        except self._errors as error:
            raise failure(self._path, error) from error

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); the last batch is padded with zeros."""
        import numpy as np

        logits: list[NDArray[np.float32]] = []
        for batch, count in batches(images, self._shape, self._path):
            try:
                self._input.update_inplace(batch)
                self._session.run_with_iobinding(self._binding)
            except self._errors as error:
                raise failure(self._path, error) from error
            logits.append(np.array(self._output.numpy()[:count], dtype=np.float32))
        return np.concatenate(logits)

    def sample(self) -> Sample:
        """Time one inference of the target's batch on the fixed buffers."""
        begin = time.perf_counter_ns()
        try:
            self._session.run_with_iobinding(self._binding)
        except self._errors as error:
            raise failure(self._path, error) from error
        return Sample(compute_ms=(time.perf_counter_ns() - begin) / 1e6)

    def end_profile(self) -> Path:
        """The file of what was written down, which is whole now."""
        return Path(self._session.end_profiling())

    def state(self) -> DeviceState | None:
        """None: the processor's clocks are not ours to read everywhere."""
        return None

    def close(self) -> None:
        """Release the session, its threads and its buffers."""
        self._binding = self._session = self._input = self._output = None


def _check_target(target: Target) -> None:
    supported = precisions(target.device)
    if not supported:
        raise UsageError(
            f"target.device = {target.device!r}: the onnxruntime backend runs on 'cpu' and 'cuda'; "
            "set one of these"
        )
    if target.precision not in supported:
        raise UsageError(
            f"target.precision = {target.precision!r}: the onnxruntime backend runs {', '.join(supported)} "
            f"on {target.device!r}; set one of these"
        )
    if target.batch < 1 or (target.threads is not None and target.threads < 1):
        raise UsageError(
            f"target.batch = {target.batch}, target.threads = {target.threads}: both must be at least 1"
        )
    if target.device == "cuda":
        options_of(target)
        return
    for name, value in target.options:
        raise UsageError(
            f"target.options.{name} = {value!r}: on 'cpu' the onnxruntime backend has no options; remove it"
        )


def _options(target: Target, profile: Path | None) -> Any:
    import onnxruntime

    threads = _processor.threads_or_all(target.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if cores := _processor.own_cores(threads):
        # ONNX Runtime counts cores from 1.
        binding = ";".join(str(core + 1) for core in cores)
        options.add_session_config_entry("session.intra_op_thread_affinities", binding)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.log_severity_level = 4  # what goes wrong arrives as an exception, once
    return options
