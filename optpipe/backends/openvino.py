"""OpenVINO on the CPU.

The engine is the ONNX file itself, where it lies. OpenVINO can also export a compiled blob, but that is
bound to the processor and the release that wrote it, and all that it would save is compiling when the engine
is loaded. The batch is fixed then, too.

Precision is a property of the engine and never the library's choice. Left alone it computes an fp32 network
in bf16 wherever the processor can, which reads like a speed-up of the engine; here the hint is always set,
read back, and compared with the precision that each convolution and fully connected layer was compiled to:

- fp32: the ONNX file in fp32, computed in f32;
- bf16: the same file, computed in bf16, only on processors with instructions for it;
- int8: a file with quantize and dequantize nodes, and what they leave out in f32, or in bf16 where
  ``target.options.int8_rest = "bf16"`` says so.

One stream of the target's threads serves one inference at a time. OpenVINO's threads spin only briefly after
an inference and then sleep, and all sessions of a process share them, so two sessions leave each other the
cores. They are pinned, as those of the onnxruntime backend are, each
to the same core in every session, while the calling thread stays free.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from optpipe.backends import _processor
from optpipe.backends._engine import checked_bytes, engine_of
from optpipe.backends._images import batches, shape_text
from optpipe.errors import RunError, UsageError
from optpipe.types import DeviceState, Engine, Fingerprint, LayerTime, Precision, Sample, Session, Target

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

SOURCE: Literal["onnx", "program"] = "onnx"
CACHES_BUILDS = False
INT8_REST: Literal["fp32", "fp16"] = "fp32"

_SERVED: tuple[Precision, ...] = ("fp32", "bf16", "int8")
_RESTS = ("f32", "bf16")
_WARM_UP = 3
_PARTS = 5
_BF16_FLAGS = ("avx512_bf16", "amx_bf16")
_INT8_TYPES = ("i8", "u8")


def precisions(device: str) -> tuple[Precision, ...]:
    """The precisions that it runs on ``device``; bf16 only where this processor has instructions for it."""
    if device != "cpu":
        return ()
    return tuple(precision for precision in _SERVED if precision != "bf16" or _native_bf16())


def missing(target: Target) -> str | None:
    """What this machine lacks to run ``target`` and how to mend it; None if nothing.

    Raises UsageError for a target that this backend runs on no machine.
    """
    _check_target(target)
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino is not installed: pip install 'optpipe[openvino]'"
    if "bf16" in (target.precision, _rest(target)) and not _native_bf16():
        return 'this processor has no instructions for bf16: set target.precision = "fp32" or "int8"'
    return None


def fingerprint(target: Target) -> Fingerprint:
    """The processor, the operating system and OpenVINO, with the number of threads used."""
    model, stepping = _processor.processor()
    return Fingerprint(
        device=model,
        driver=_processor.operating_system(),
        versions=(("openvino", _import_openvino().get_version()), ("processor", stepping)),
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
    """Compile an engine for the target's batch, threads and precision.

    Raises:
        UsageError: this backend does not run the target.
        RunError: the file is not the one that was built, OpenVINO refuses it, or it would compute in
            another precision than the target's.
    """
    return _open(engine, target, tells=False)


def layer_times(engine: Engine, target: Target, repeats: int) -> tuple[LayerTime, ...]:
    """The layers that OpenVINO runs, with their times by its own counters.

    Those tell the mean of all inferences so far, in whole microseconds, and cannot be set back. So what one
    inference took would be lost in the rounding; the medians are of means over a few inferences each.

    Raises as :func:`load` does.
    """
    session = _open(engine, target, tells=True)
    try:
        for _ in range(_WARM_UP):
            session.sample()
        told = [session.layers(repeats // _PARTS or 1) for _ in range(_PARTS + 1)]
        executed = {name for name, _, mean_ms, _ in told[-1] if mean_ms > 0}
        return tuple(
            LayerTime(layers[0][0], layers[0][1], _median_ms(layers))
            for layers in zip(*told, strict=True)
            if layers[0][0] in executed
        )
    finally:
        session.close()


_Told = tuple[str, str, float, int]
"""A layer's name, its kind, the mean of its times in milliseconds, and of how many inferences."""


def _median_ms(layers: Sequence[_Told]) -> float:
    """The median of what a layer took between one telling and the next."""
    means = [
        (after[2] * after[3] - before[2] * before[3]) / (after[3] - before[3])
        for before, after in itertools.pairwise(layers)
    ]
    return max(statistics.median(means), 0.0)


def _open(engine: Engine, target: Target, *, tells: bool) -> _CpuSession:
    _check_target(target)
    content = checked_bytes(engine)
    try:
        compiled = _compile(content, engine.path, target, tells=tells)
    except RuntimeError as error:
        raise _failure(engine.path, error) from error
    return _CpuSession(compiled, engine.path, target)


class _CpuSession:
    """One inference request whose input and output stay in the same memory from run to run."""

    headline = "Latency"

    def __init__(self, compiled: Any, path: Path, target: Target) -> None:
        import numpy as np

        openvino = _import_openvino()
        self._path = path
        self._shape = (target.batch, *target.input_shape)
        self._inferences = 0
        self.notes = (_check_precision(compiled, path, target), *_thread_notes(compiled, target))
        try:
            self._request: Any = compiled.create_infer_request()
            output = tuple(compiled.outputs[0].get_shape())
            # The tensors are views of these arrays, which therefore live as long as the request does.
            self._input = np.random.default_rng(0).standard_normal(self._shape, dtype=np.float32)
            self._output = np.zeros(output, np.float32)
            self._request.set_input_tensor(openvino.Tensor(self._input, shared_memory=True))
            self._request.set_output_tensor(openvino.Tensor(self._output, shared_memory=True))
            self._infer()
        except RuntimeError as error:
            raise _failure(path, error) from error

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N, classes) of images (N, C, H, W); the last batch is padded with zeros."""
        import numpy as np

        logits: list[NDArray[np.float32]] = []
        for batch, count in batches(images, self._shape, self._path):
            self._input[:] = batch
            try:
                self._infer()
            except RuntimeError as error:
                raise _failure(self._path, error) from error
            logits.append(self._output[:count].copy())
        return np.concatenate(logits)

    def sample(self) -> Sample:
        """Time one inference of the target's batch on the fixed buffers."""
        begin = time.perf_counter_ns()
        try:
            self._infer()
        except RuntimeError as error:
            raise _failure(self._path, error) from error
        return Sample(compute_ms=(time.perf_counter_ns() - begin) / 1e6)

    def layers(self, more: int) -> list[_Told]:
        """What each layer took on the mean after so many more inferences, in a session that tells."""
        for _ in range(more):
            self.sample()
        return [
            (layer.node_name, layer.node_type, layer.real_time.total_seconds() * 1e3, self._inferences)
            for layer in self._request.profiling_info
        ]

    def state(self) -> DeviceState | None:
        """None: the processor's clocks are not ours to read everywhere."""
        return None

    def close(self) -> None:
        """Release the request and the compiled network."""
        self._request = None

    def _infer(self) -> None:
        self._request.infer(share_inputs=True, share_outputs=True)
        self._inferences += 1


def _check_target(target: Target) -> None:
    if target.device != "cpu":
        raise UsageError(
            f'target.device = {target.device!r}: the openvino backend runs on the CPU; set device = "cpu"'
        )
    if target.precision not in _SERVED:
        raise UsageError(
            f"target.precision = {target.precision!r}: the openvino backend runs {', '.join(_SERVED)}; "
            "set one of these"
        )
    if target.batch < 1 or (target.threads is not None and target.threads < 1):
        raise UsageError(
            f"target.batch = {target.batch}, target.threads = {target.threads}: both must be at least 1"
        )
    for name, value in target.options:
        if name != "int8_rest":
            raise UsageError(
                f"target.options.{name} = {value!r}: the openvino backend knows only int8_rest; remove it"
            )
        if value not in _RESTS:
            raise UsageError(f"target.options.int8_rest = {value!r}: set one of {', '.join(_RESTS)}")


def _rest(target: Target) -> str:
    """The type in which an int8 network computes what is not quantized."""
    return dict(target.options).get("int8_rest", "f32") if target.precision == "int8" else "f32"


def _native_bf16() -> bool:
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "").split()
    return any(flag in flags for flag in _BF16_FLAGS)


def _import_openvino() -> Any:
    """The package openvino, which would send a usage report over the network when it is imported.

    Without its telemetry package it does not, and says nothing either; so that one is hidden meanwhile.
    """
    if "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules:
        modules = cast("dict[str, ModuleType | None]", sys.modules)
        modules["openvino_telemetry"] = None
        try:
            importlib.import_module("openvino")
        finally:
            del modules["openvino_telemetry"]
    return importlib.import_module("openvino")


def _compile(content: bytes, path: Path, target: Target, *, tells: bool) -> Any:
    """The network at the target's shape, compiled with every setting that decides speed or precision.

    With ``tells`` it counts the time of its layers, too.
    """
    openvino = _import_openvino()
    core = openvino.Core()
    model = core.read_model(content)
    wanted = (target.batch, *target.input_shape)
    if len(model.inputs) != 1:
        raise RunError(
            f"{path} has {len(model.inputs)} inputs: optpipe runs networks with one input of images"
        )
    shape = model.inputs[0].get_partial_shape()
    if not shape.compatible(openvino.PartialShape(list(wanted))):
        text = shape_text(["?" if size.is_dynamic else size.get_length() for size in shape])
        raise RunError(
            f"{path} takes inputs of shape {text}, the target has {shape_text(wanted)}: "
            "set target.batch and target.input_shape to the engine's, or export the network anew"
        )
    model.reshape(list(wanted))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": _processor.threads_or_all(target.threads),
        "ENABLE_CPU_PINNING": True,
        "INFERENCE_PRECISION_HINT": _hint(target),
        # Nor may it quantize what reaches a fully connected layer.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "PERF_COUNT": tells,
    }
    return core.compile_model(model, "CPU", settings)


def _hint(target: Target) -> str:
    return {"fp32": "f32", "bf16": "bf16"}.get(target.precision, _rest(target))


def _check_precision(compiled: Any, path: Path, target: Target) -> str:
    """How the network is computed, in words; RunError unless that is the target's precision."""
    wanted = _hint(target)
    found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if found != wanted:
        raise RunError(
            f"{path}: OpenVINO computes in {found} on this processor, {wanted} was asked for; set another "
            "target.precision"
        )
    layers = [_layer(node) for node in compiled.get_runtime_model().get_ops()]
    types = [type_ for kind, type_ in layers if kind in ("Convolution", "FullyConnected", "MatMul")]
    quantized = sum(type_ in _INT8_TYPES for type_ in types)
    if target.precision == "int8":
        if not quantized:
            raise RunError(
                f"{path}: OpenVINO computes none of its {len(types)} layers in int8; target.precision = "
                "'int8' takes an ONNX file with quantize and dequantize nodes"
            )
        return f"{quantized} of {len(types)} layers in int8, the rest in {wanted}"
    if other := sorted({type_ for type_ in types if type_ != wanted}):
        raise RunError(
            f"{path}: OpenVINO computes layers in {', '.join(other)} where target.precision = "
            f"{target.precision!r} wants {wanted}: give the ONNX file in fp32"
        )
    return f"computed in {wanted}"


def _layer(node: Any) -> tuple[str, str]:
    """A compiled layer's kind and the type that it computes in."""
    info = node.get_rt_info()
    return str(info["layerType"].value), str(info["runtimePrecision"].value)


def _thread_notes(compiled: Any, target: Target) -> tuple[str, ...]:
    asked = _processor.threads_or_all(target.threads)
    used = compiled.get_property("INFERENCE_NUM_THREADS")
    return (
        ()
        if used == asked
        else (f"{used} threads, as many as there are cores, where {asked} were asked for",)
    )


def _failure(path: Path, error: RuntimeError) -> RunError:
    """OpenVINO's own message without the places in its source, with what to do."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception from ")]
    reason = " ".join(said).rstrip(".") or type(error).__name__
    return RunError(
        f"OpenVINO cannot run {path}: {reason}; export the network anew, or check that this OpenVINO is "
        "recent enough for it"
    )
