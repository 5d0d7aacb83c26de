"""ONNX Runtime on the CPU.

The engine is the ONNX file itself. ONNX Runtime can also store its optimised graph, but at the level that
is timed here that graph holds kernels and weight layouts chosen for the CPU that wrote it: it may not run
on another one, nor under another release. What it would save is the optimisation when loading, tens of
milliseconds for a ResNet. The batch is fixed when the engine is loaded, not in the file.

Two sessions in one process must not disturb each other, nor differ by where their threads happen to lie:

- threads never spin: two sessions whose threads spin take the cores from each other, the same network then
  takes about twice as long and savings look smaller than they are;
- a session's own threads are each bound to one core, the same in every session, while the calling thread
  stays free. Unbound, on two cores that others use too, the same engine in two sessions differed by
  far more than the noise for as long as they lived, because one session's thread had settled on the
  busier core; bound, on the same machine, such differences were gone, and the time itself was the same.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpipe.errors import RunError, UsageError
from optpipe.types import Fingerprint, Sample, Session, Target

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PROVIDER = "CPUExecutionProvider"


def missing(target: Target) -> str | None:
    """What this machine lacks to run ``target`` and how to mend it; None if nothing.

    Raises UsageError for a target that this backend runs on no machine.
    """
    if target.device != "cpu":
        return (
            f"target.device = {target.device!r}: the onnxruntime backend runs on the CPU, and no backend for "
            'another device is installed; leave out --gpu, or set device = "cpu"'
        )
    _check_target(target)
    if importlib.util.find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed: pip install 'optpipe[cpu]'"
    return None


def fingerprint(target: Target) -> Fingerprint:
    """The processor, the operating system and ONNX Runtime, with the number of threads used."""
    import onnxruntime

    model, stepping = _processor()
    return Fingerprint(
        device=model,
        driver=f"{platform.system()} {platform.release()}",
        versions=(("onnxruntime", onnxruntime.__version__), ("processor", stepping)),
        threads=_threads(target),
        clocks=_governor(),
    )


def build(onnx: Path, target: Target, folder: Path) -> Path:
    """Copy the ONNX file into ``folder`` as ``engine.onnx`` (see above why); returns its path."""
    _check_target(target)
    engine = folder / "engine.onnx"
    temporary = folder / f".engine.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx, temporary)
        temporary.replace(engine)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot copy {onnx} to {engine}: {error.strerror}") from error
    return engine


def load(engine: Path, target: Target) -> Session:
    """Open an engine with the target's batch and threads; RunError if ONNX Runtime refuses it."""
    _check_target(target)
    return _CpuSession(engine, target)


class _CpuSession:
    """One ONNX Runtime session whose input and output stay in the same memory from run to run."""

    def __init__(self, engine: Path, target: Target) -> None:
        import numpy as np
        import onnxruntime

        if not engine.is_file():
            raise RunError(f"no engine at {engine}: build it first")
        self._engine = engine
        self._shape = (target.batch, *target.input_shape)
        self._errors = _runtime_errors()
        try:
            self._session: Any = _open(engine, target)
            source, sink = self._session.get_inputs()[0], self._session.get_outputs()[0]
            if tuple(source.shape) != self._shape:
                raise RunError(
                    f"{engine} takes inputs of shape {_text(source.shape)}, the target has "
                    f"{_text(self._shape)}: set target.batch and target.input_shape to the engine's, "
                    "or export the network anew"
                )
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
            raise _failure(engine, error) from error

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); the last batch is padded with zeros."""
        import numpy as np

        if images.ndim != 4 or images.shape[1:] != self._shape[1:] or not len(images):
            raise RunError(
                f"{self._engine} takes images of shape {_text(self._shape)}, got {_text(images.shape)}"
            )
        batch = self._shape[0]
        logits: list[NDArray[np.float32]] = []
        for start in range(0, len(images), batch):
            part = np.ascontiguousarray(images[start : start + batch], dtype=np.float32)
            padded = np.zeros(self._shape, np.float32)
            padded[: len(part)] = part
            try:
                self._input.update_inplace(padded)
                self._session.run_with_iobinding(self._binding)
            except self._errors as error:
                raise _failure(self._engine, error) from error
            logits.append(np.array(self._output.numpy()[: len(part)], dtype=np.float32))
        return np.concatenate(logits)

    def sample(self) -> Sample:
        """Time one inference of the target's batch on the fixed buffers."""
        begin = time.perf_counter_ns()
        try:
            self._session.run_with_iobinding(self._binding)
        except self._errors as error:
            raise _failure(self._engine, error) from error
        return Sample(compute_ms=(time.perf_counter_ns() - begin) / 1e6)

    def close(self) -> None:
        """Release the session, its threads and its buffers."""
        self._binding = self._session = self._input = self._output = None


def _check_target(target: Target) -> None:
    if target.device != "cpu":
        raise UsageError(
            f'target.device = {target.device!r}: the onnxruntime backend runs on the CPU; set device = "cpu"'
        )
    if target.precision != "fp32":
        raise UsageError(
            f'target.precision = {target.precision!r}: this backend runs fp32; set precision = "fp32"'
        )
    if target.batch < 1 or (target.threads is not None and target.threads < 1):
        raise UsageError(
            f"target.batch = {target.batch}, target.threads = {target.threads}: both must be at least 1"
        )
    for name, value in target.options:
        raise UsageError(
            f"target.options.{name} = {value!r}: the onnxruntime backend has no options; remove it"
        )


def _open(engine: Path, target: Target) -> Any:
    """An InferenceSession whose free dimensions, the batch first of all, are set to the target's."""
    import onnxruntime

    # A first look without optimisation only reads the names of the dimensions; any exporter's will do.
    look = _options(target)
    look.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = onnxruntime.InferenceSession(str(engine), look, providers=[_PROVIDER]).get_inputs()
    if len(found) != 1:
        raise RunError(f"{engine} has {len(found)} inputs: optpipe runs networks with one input of images")
    options = _options(target)
    wanted = (target.batch, *target.input_shape)
    for size, dimension in zip(wanted, found[0].shape, strict=False):
        if isinstance(dimension, str):
            options.add_free_dimension_override_by_name(dimension, size)
    return onnxruntime.InferenceSession(str(engine), options, providers=[_PROVIDER])


def _options(target: Target) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads(target)
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if binding := _binding(_threads(target)):
        options.add_session_config_entry("session.intra_op_thread_affinities", binding)
    options.log_severity_level = 4  # what goes wrong arrives as an exception, once
    return options


def _threads(target: Target) -> int:
    return target.threads or os.cpu_count() or 1


def _binding(threads: int) -> str:
    """The core of each thread but the calling one, counted from 1; empty where they cannot have their own."""
    if not hasattr(os, "sched_getaffinity"):
        return ""
    cores: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        # Hardware threads of one core would share it: one of them is enough.
        cores.setdefault(_siblings(core), core)
    own = list(cores.values())[1:threads]
    return ";".join(str(core + 1) for core in own) if len(own) == threads - 1 else ""


def _siblings(core: int) -> str:
    try:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return str(core)


def _runtime_errors() -> tuple[type[Exception], ...]:
    """All that ONNX Runtime raises; its exceptions share no base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError)


def _failure(engine: Path, error: Exception) -> RunError:
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split())).rstrip(".")
    return RunError(
        f"ONNX Runtime cannot run {engine}: {reason}; delete the file to have it built again, "
        "or check that this ONNX Runtime is recent enough for it"
    )


def _processor() -> tuple[str, str]:
    """The processor's name, and what tells two of the same name apart (virtual machines hide the rest)."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    name = fields.get("model name") or platform.processor() or platform.machine()
    known = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
    return name, ", ".join(known) or platform.machine()


def _governor() -> str:
    try:
        path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return f"governor {path.read_text(encoding='utf-8').strip()}"
    except OSError:
        return ""


def _text(shape: Sequence[int | str | None]) -> str:
    return "x".join(str(size) for size in shape)
