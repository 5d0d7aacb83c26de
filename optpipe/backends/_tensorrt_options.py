"""What a recipe's ``[target.options]`` may say to the tensorrt backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optpipe.errors import UsageError
from optpipe.types import Precision, Target

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one target; None leaves it to TensorRT.

    ``profile`` is the smallest, the best and the largest batch of an engine whose ONNX file leaves the batch
    free. All three are the target's batch unless said otherwise: the session runs no other (it pads), and an
    engine for one shape need not take kernels that also serve the rest of a range, so that what is timed is
    the best TensorRT has for this batch. ``avg_timing_iterations`` is how often a kernel is timed before one
    is chosen: 8 as in trtexec, not 1 as in the API.
    """

    profile: tuple[int, int, int]
    optimization_level: int | None = None
    workspace_mb: int | None = None
    max_aux_streams: int | None = None
    avg_timing_iterations: int = 8
    sparse_weights: bool = False
    cuda_graph: bool = True
    timing_cache: Path | None = None


_KNOWN = (
    "optimization_level",
    "workspace_mb",
    "max_aux_streams",
    "avg_timing_iterations",
    "sparse_weights",
    "cuda_graph",
    "timing_cache",
    "profile",
)


def options_of(target: Target) -> Options:
    """The target's options, once the target is one that TensorRT serves.

    Raises:
        UsageError: the device, precision, batch or an option is not one of those it has.
    """
    _check_target(target)
    given = dict(target.options)
    for name, value in given.items():
        if name not in _KNOWN:
            raise _refused(
                name, value, f"the tensorrt backend has no such option; it has {', '.join(_KNOWN)}"
            )
    cache = given.get("timing_cache")
    if cache == "":
        raise _refused("timing_cache", cache, "must be the path of a file")
    return Options(
        profile=_profile(given.get("profile"), target.batch),
        optimization_level=_whole(given, "optimization_level", 0, 5),
        workspace_mb=_whole(given, "workspace_mb", 1, 2**20),
        max_aux_streams=_whole(given, "max_aux_streams", 0, 64),
        avg_timing_iterations=_whole(given, "avg_timing_iterations", 1, 1000) or 8,
        sparse_weights=_switch(given, "sparse_weights", default=False),
        cuda_graph=_switch(given, "cuda_graph", default=True),
        timing_cache=None if cache is None else Path(cache).expanduser(),
    )


def flags_of(options: Options) -> tuple[tuple[str, str], ...]:
    """What an engine is built with, defaults included, in words; the timing cache decides nothing."""
    return (
        ("profile", ",".join(str(batch) for batch in options.profile)),
        ("optimization_level", _given(options.optimization_level)),
        ("workspace_mb", _given(options.workspace_mb)),
        ("max_aux_streams", _given(options.max_aux_streams)),
        ("avg_timing_iterations", str(options.avg_timing_iterations)),
        ("sparse_weights", "on" if options.sparse_weights else "off"),
        ("cuda_graph", "on" if options.cuda_graph else "off"),
    )


def _given(value: int | None) -> str:
    return "TensorRT's default" if value is None else str(value)


def _check_target(target: Target) -> None:
    if target.device != "cuda":
        raise UsageError(
            f"target.device = {target.device!r}: the tensorrt backend runs on an NVIDIA GPU; "
            'add --gpu, or set device = "cuda"'
        )
    if target.precision not in PRECISIONS:
        raise UsageError(
            f"target.precision = {target.precision!r}: the tensorrt backend runs {', '.join(PRECISIONS)}"
        )
    if target.batch < 1:
        raise UsageError(f"target.batch = {target.batch}: must be at least 1")


def _whole(given: dict[str, str], name: str, low: int, high: int) -> int | None:
    if name not in given:
        return None
    value = given[name]
    if not (value.isascii() and value.isdigit()) or not low <= int(value) <= high:
        raise _refused(name, value, f"must be a whole number from {low} to {high}")
    return int(value)


def _switch(given: dict[str, str], name: str, *, default: bool) -> bool:
    value = given.get(name)
    if value is None:
        return default
    # A boolean of the recipe arrives as a word, of TOML's spelling or of Python's.
    if value.lower() not in ("on", "off", "true", "false"):
        raise _refused(name, value, 'must be "on" or "off"')
    return value.lower() in ("on", "true")


def _profile(value: str | None, batch: int) -> tuple[int, int, int]:
    if value is None:
        return batch, batch, batch
    parts = [part.strip() for part in value.split(",")]
    wanted = (
        f"must be three whole numbers, smallest, best and largest batch, around {batch}: 1,{batch},{batch}"
    )
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise _refused("profile", value, wanted)
    smallest, best, largest = (int(part) for part in parts)
    if not (1 <= smallest <= best <= largest and smallest <= batch <= largest):
        raise _refused("profile", value, wanted)
    return smallest, best, largest


def _refused(name: str, value: str, why: str) -> UsageError:
    return UsageError(f"target.options.{name} = {value!r}: {why}")
