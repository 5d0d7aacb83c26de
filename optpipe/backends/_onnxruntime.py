"""What ONNX Runtime's sessions share on every device: opening a file at a fixed shape, and its errors."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optpipe.backends._engine import checked_bytes
from optpipe.backends._images import shape_text
from optpipe.errors import RunError
from optpipe.types import Engine, LayerTime, Target

Provider = str | tuple[str, dict[str, str]]


def open_session(
    engine: Engine, target: Target, options: Callable[[], Any], providers: Sequence[Provider]
) -> Any:
    """An InferenceSession whose free dimensions, the batch first of all, are set to the target's.

    ``options`` makes the session's options anew each time. Raises RunError where the file is not the one
    that was built, or takes other images than the target's; what ONNX Runtime raises passes through.
    """
    import onnxruntime

    content = checked_bytes(engine)
    # A first look without optimisation only reads the names of the dimensions; any exporter's will do.
    look = onnxruntime.SessionOptions()
    look.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    look.intra_op_num_threads = 1
    look.log_severity_level = 4
    found = onnxruntime.InferenceSession(content, look, providers=["CPUExecutionProvider"]).get_inputs()
    if len(found) != 1:
        raise RunError(
            f"{engine.path} has {len(found)} inputs: optpipe runs networks with one input of images"
        )
    fixed = options()
    wanted = (target.batch, *target.input_shape)
    for size, dimension in zip(wanted, found[0].shape, strict=False):
        if isinstance(dimension, str):
            fixed.add_free_dimension_override_by_name(dimension, size)
    # Else a provider that fails is replaced by the CPU, with a message on stdout.
    session = onnxruntime.InferenceSession(content, fixed, providers=list(providers), enable_fallback=0)
    shape = tuple(session.get_inputs()[0].shape)
    if shape != wanted:
        raise RunError(
            f"{engine.path} takes inputs of shape {shape_text(shape)}, the target has {shape_text(wanted)}: "
            "set target.batch and target.input_shape to the engine's, or export the network anew"
        )
    return session


def times_of_profile(path: Path, repeats: int) -> tuple[LayerTime, ...]:
    """The layers of a profile, each with the median of its last ``repeats`` times, in their order.

    Raises RunError where ONNX Runtime could not write all of it, of which it does not tell.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{path}: ONNX Runtime has not written its profile; is the disk full?") from None
    found: dict[tuple[str, str], list[float]] = {}
    kinds: dict[tuple[str, str], str] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") != "Node" or name == event["name"]:
            continue
        key = name, str(event["args"].get("node_index", ""))  # names may be empty, or the same
        kinds[key] = str(event["args"]["op_name"])
        found.setdefault(key, []).append(event["dur"] / 1e3)
    return tuple(
        LayerTime(key[0] or kinds[key], kinds[key], statistics.median(times[-repeats:]))
        for key, times in found.items()
    )


def runtime_errors() -> tuple[type[Exception], ...]:
    """All that ONNX Runtime raises; its exceptions share no base class. Names may be no text."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*own, RuntimeError, UnicodeDecodeError)


def failure(engine: Path, error: Exception) -> RunError:
    """ONNX Runtime's own message in one line, with what to do."""
    reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split())).rstrip(".")
    return RunError(
        f"ONNX Runtime cannot run {engine}: {reason}; export the network anew, "
        "or check that this ONNX Runtime is recent enough for it"
    )
