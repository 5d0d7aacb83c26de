"""fp32, fp16 and int8 ONNX from one fp32 ONNX file.

Importing this is light; ONNX and ONNX Runtime come in when a file is converted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe.errors import MissingError, UsageError
from optpipe.precision.outcome import (
    Converted,
    LayerError,
    PlacementTrial,
    RangeMethod,
    Rest,
    Settings,
    check,
    tables,
)
from optpipe.types import Emit, Event, Images, Precision

if TYPE_CHECKING:
    from optpipe.precision.network import Network

__all__ = [
    "Converted",
    "LayerError",
    "PlacementTrial",
    "RangeMethod",
    "Rest",
    "Settings",
    "check",
    "convert",
    "tables",
]

_DEFAULTS = Settings()


def convert(
    source: Path,
    path: Path,
    precision: Precision,
    images: Images | None,
    settings: Settings = _DEFAULTS,
    *,
    rest: Rest = "fp32",
    seed: int = 0,
    structure_only: bool = False,
    emit: Emit | None = None,
) -> Converted:
    """The network of the fp32 file ``source`` at a precision, in ``path``; any batch, fp32 input and output.

    fp32 and bf16 are the file itself (bf16 is how an engine computes it), and nothing is written. fp16
    keeps in fp32 what overflows on the calibration ``images``; without images only what its weights show.
    int8 needs images; ``rest`` is the precision of what it leaves unquantized. With ``structure_only``
    everything is quantized by the ranges of a few images and no error is measured: right to be timed, not to
    be used. The same arguments give the same bytes.

    Raises:
        UsageError: int8 without images, or settings out of range.
        MissingError: onnxruntime, which converts and judges, is not installed.
        RunError: the file cannot be read, converted or written.
    """
    check(settings)
    if precision in ("fp32", "bf16"):
        return Converted(source, precision)
    if precision == "int8" and (images is None or not len(images)):
        raise UsageError("int8 needs calibration images: give [data] calibration at least one")
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingError(
            f"{precision} files are made with onnxruntime, which is not there: pip install 'optpipe[cpu]'"
        )
    from optpipe.precision import network

    graph = network.read(source)
    if precision == "fp16":
        return _fp16(graph, path, images, settings, seed, structure_only, emit)
    assert images is not None
    return _int8(graph, path, images, settings, rest, seed, structure_only, _notes(emit))


def _fp16(
    graph: Network,
    path: Path,
    images: Images | None,
    settings: Settings,
    seed: int,
    structure_only: bool,
    emit: Emit | None,
) -> Converted:
    from optpipe.files import write_atomically
    from optpipe.precision import fp16, int8, network

    note = _notes(emit, "fp16")
    peaks: dict[str, float] = {}
    judge = None
    if images is not None and len(images) and not structure_only:
        ranging, judging = int8.split(len(images), settings.max_images, seed)
        note(f"overflow on {len(ranging)} images")
        peaks = network.largest(graph, graph.float_tensors, images, ranging)
        judge = int8.Judge(images, judging, network.logits(graph.proto, images, judging))
    keep = fp16.overflowing(graph.proto, peaks, settings.fp16_margin)
    proto = fp16.to_fp16(graph.proto, keep)
    error = None if judge is None else judge.error(proto)[0]
    write_atomically(path, proto.SerializeToString(deterministic=True))
    return Converted(path, "fp16", fp16.kept_names(graph, keep), error=error)


def _int8(
    graph: Network,
    path: Path,
    images: Images,
    settings: Settings,
    rest: Rest,
    seed: int,
    structure_only: bool,
    note: Callable[[str], None],
) -> Converted:
    from optpipe.files import write_atomically
    from optpipe.precision import fp16, int8, network, placement

    smallest_scale = placement.SMALLEST_FP16_SCALE if rest == "fp16" else 0.0
    judge, error = None, None
    layers: tuple[LayerError, ...] = ()
    if structure_only:
        found = int8.quantize_structure(graph, images, smallest_scale)
    else:
        found, judge = int8.quantize(graph, images, settings, smallest_scale, seed, note)
        layers = int8.layer_errors(graph, found, images, judge.indices)
    proto = found.proto
    kept = found.placement.in_float(graph)
    if rest == "fp16":
        used = sorted(
            {index for part in int8.split(len(images), settings.max_images, seed) for index in part}
        )
        peaks = {} if structure_only else network.largest(graph, graph.float_tensors, images, used)
        keep = fp16.overflowing(proto, peaks, settings.fp16_margin)
        proto = fp16.to_fp16(proto, keep)
    if judge is not None:
        error = judge.error(proto)[0]
    write_atomically(path, proto.SerializeToString(deterministic=True))
    return Converted(path, "int8", kept, found.range_method, error, found.trials, layers)


def _notes(emit: Emit | None, name: str = "int8") -> Callable[[str], None]:
    def note(text: str) -> None:
        if emit is not None:
            emit(Event("note", name, text))

    return note
