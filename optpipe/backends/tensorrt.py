"""TensorRT on an NVIDIA GPU, releases 10 and 11.

The engine is a plan: kernels that TensorRT timed on this GPU and chose. It opens only under the release and
on the GPU that built it. The precision lies in the ONNX file: one in fp16 gives an engine in fp16, one with
quantize and dequantize nodes gives one in int8, and images and logits are float32 in all of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from optpipe.backends import _cuda, _nvml
from optpipe.backends._tensorrt_build import build_engine
from optpipe.backends._tensorrt_options import PRECISIONS, options_of
from optpipe.backends._tensorrt_session import TensorrtSession
from optpipe.types import Engine, Fingerprint, LayerTime, Precision, Session, Target

SOURCE: Literal["onnx"] = "onnx"
CACHES_BUILDS = True
INT8_REST: Literal["fp16"] = "fp16"

_OLDEST = 10


def precisions(device: str) -> tuple[Precision, ...]:
    """Every precision on a GPU, none on a CPU."""
    return PRECISIONS if device == "cuda" else ()


def missing(target: Target) -> str | None:
    """What this machine lacks to run ``target`` and how to mend it; None if nothing.

    Raises UsageError for a target or an option that this backend runs on no machine.
    """
    options_of(target)
    problems = [problem for problem in (_cuda.device_problem(), _library_problem()) if problem]
    return "; ".join(problems) or None


def fingerprint(target: Target) -> Fingerprint:
    """The GPU, its driver and the libraries. One thread of the host enqueues, whatever the target says."""
    device = _cuda.device()
    return Fingerprint(
        device=device.name,
        driver=_nvml.driver_version() or f"CUDA {device.driver_cuda}",
        versions=(
            ("tensorrt", str(_tensorrt().__version__)),
            ("cuda", device.runtime_cuda),
            ("compute capability", device.capability),
        ),
        threads=1,
        clocks=_nvml.highest_clocks(),
    )


def build(source: Path, target: Target, folder: Path) -> Engine:
    """Build an engine from an ONNX file at the target's precision; RunError with TensorRT's own words."""
    return build_engine(_tensorrt(), source, target, options_of(target), folder)


def load(engine: Engine, target: Target) -> Session:
    """Open an engine for running and timing; RunError where its bytes are not those of its sha256."""
    return _session(engine, target)


def layers(engine: Engine, target: Target) -> str:
    """The engine's layers with their kernels and precisions, as JSON: what TensorRT made of the network."""
    session = _session(engine, target)
    try:
        return session.layers()
    finally:
        session.close()


def layer_times(engine: Engine, target: Target, repeats: int) -> tuple[LayerTime, ...]:
    """The layers that TensorRT made, with their median times by its profiler, enqueued without a CUDA graph.

    Raises as :func:`load` does.
    """
    options = replace(options_of(target), cuda_graph=False)  # a graph's kernels tell no profiler
    session = TensorrtSession(_tensorrt(), engine, target, options)
    try:
        return session.layer_times(repeats)
    finally:
        session.close()


def _session(engine: Engine, target: Target) -> TensorrtSession:
    return TensorrtSession(_tensorrt(), engine, target, options_of(target))


def _tensorrt() -> Any:
    return importlib.import_module("tensorrt")


def _library_problem() -> str | None:
    if importlib.util.find_spec("tensorrt") is None:
        return f"TensorRT is not installed: {_cuda.INSTALL}"
    try:
        version = str(_tensorrt().__version__)
    except (ImportError, OSError) as error:
        return (
            f"TensorRT's libraries cannot be loaded ({error}): {_cuda.INSTALL}, "
            "or put the folder of libnvinfer.so on LD_LIBRARY_PATH"
        )
    if int(version.split(".", maxsplit=1)[0]) < _OLDEST:
        return f"TensorRT {version} is older than {_OLDEST}: pip install -U 'optpipe[nvidia]'"
    return None
