"""``optpipe bench``: one engine by itself or two in turn, with figures named as trtexec names them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from optpipe import interruption, plugins, store, timing
from optpipe.deploy.bundle import Manifest, open_bundle
from optpipe.errors import UsageError
from optpipe.selection import AUTO, FASTEST, select
from optpipe.types import Latency, Session, Target

TOLERANCE = 0.001
"""Half-width at which a paired measurement ends early: what is asked for here is the duration."""


MOST_VALUES = 2**32
"""Of a batch; more than any device holds beside a network."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One model's figures; ``throughput_qps`` counts batches, ``images_per_s`` images."""

    model: str
    target: Target
    latency: Latency
    throughput_qps: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class Benched:
    """``other`` is what ``--vs`` named; the model's latency then holds the ratio to it."""

    model: Timed
    other: Timed | None = None


def bench(
    model: Path,
    other: Path | None,
    *,
    batch: int | None,
    threads: int | None,
    warmup_ms: int,
    duration_s: float,
    backend: str | None = None,
    gpu: bool = False,
) -> Benched:
    """Time ``model``, in turn with ``other`` where one is given; both are ONNX files or runs.

    Raises:
        UsageError: a path is neither, or the two models take images of different channels.
        MissingError: this machine cannot run the target.
    """
    if backend == FASTEST:
        raise UsageError(f'--backend {backend}: one engine is timed here; name a backend, or "{AUTO}"')
    source, target = _locate(model, batch, threads, backend, gpu)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(_session(source, target))
        fingerprint = plugins.backend(target.backend).fingerprint(target)
        if other is None:
            stack.enter_context(timing.device_lock(target.device))
            alone = timing.single(
                session, tolerance=TOLERANCE, budget_s=duration_s, warmup_s=warmup_ms / 1000, seed=0
            )
            return Benched(_timed(model, target, alone.latency(fingerprint)))
        other_source, other_target = _locate(other, target.batch, target.threads, backend, gpu)
        # Images of another size are another way to do the same; of other channels they are other images.
        if other_target.input_shape[0] != target.input_shape[0]:
            raise UsageError(
                f"{other}: takes {other_target.input_shape}, {model} {target.input_shape}: not comparable"
            )
        baseline = stack.enter_context(_session(other_source, other_target))
        other_fingerprint = plugins.backend(other_target.backend).fingerprint(other_target)
        stack.enter_context(timing.device_lock(target.device))
        both = timing.paired(
            baseline, session, tolerance=TOLERANCE, budget_s=duration_s, warmup_s=warmup_ms / 1000, seed=0
        )
    return Benched(
        _timed(model, target, both.candidate(fingerprint)),
        _timed(other, other_target, both.baseline(other_fingerprint)),
    )


def as_json(benched: Benched) -> str:
    """The figures as JSON."""
    return store.to_json(benched)


def as_text(benched: Benched) -> str:
    """The figures as trtexec prints them, and the ratio where two were timed."""
    lines = _summary(benched.model)
    if benched.other is not None:
        lines += ["", *_summary(benched.other)]
        latency = benched.model.latency
        assert latency.ratio_to_original is not None and latency.ratio_ci95 is not None
        low, high = latency.ratio_ci95
        lines += [
            "",
            f"Ratio {benched.model.model} / {benched.other.model}: {latency.ratio_to_original:.4f} "
            f"(95% interval {low:.4f} to {high:.4f}, {latency.samples} runs of each, in turn)",
        ]
    return "\n".join(lines) + "\n"


def _summary(timed: Timed) -> list[str]:
    latency, machine = timed.latency, timed.latency.fingerprint
    # A GPU's figures do not hang on the host's threads.
    threads = "" if timed.target.device == "cuda" else f", {machine.threads} threads"
    engine = f"{timed.target.backend}, batch {timed.target.batch}, {machine.device}{threads}"
    return [
        f"=== {timed.model} ({engine}) ===",
        f"Throughput: {timed.throughput_qps:.2f} qps ({timed.images_per_s:.1f} images/s), by the mean "
        f"{latency.headline}",
        f"{latency.headline}: min = {latency.min_ms:.4f} ms, max = {latency.max_ms:.4f} ms, "
        f"mean = {latency.mean_ms:.4f} ms, median = {latency.median_ms:.4f} ms, "
        f"percentile(90%) = {latency.p90_ms:.4f} ms, percentile(95%) = {latency.p95_ms:.4f} ms, "
        f"percentile(99%) = {latency.p99_ms:.4f} ms",
        *_transfers(latency),
        f"Samples: {latency.samples}, after {latency.warmup} of warm-up",
        *[f"Note: {note}" for note in latency.notes],
        *[f"Warning: {warning}" for warning in latency.warnings],
    ]


def _transfers(latency: Latency) -> list[str]:
    """The medians that stand beside a GPU's compute time, a line each."""
    figures = (
        ("Latency", latency.end_to_end_ms),
        ("Enqueue Time", latency.enqueue_ms),
        ("H2D Latency", latency.h2d_ms),
        ("D2H Latency", latency.d2h_ms),
    )
    return [f"{name}: median = {value:.4f} ms" for name, value in figures if value is not None]


def _timed(path: Path, target: Target, latency: Latency) -> Timed:
    rate = 1000.0 / latency.mean_ms
    return Timed(str(path), target, latency, rate, rate * target.batch)


@contextlib.contextmanager
def _session(source: Path, target: Target) -> Iterator[Session]:
    backend = plugins.backend(target.backend)
    if backend.SOURCE == "program" and source.suffix == ".onnx":
        raise UsageError(
            f"{source}: {target.backend} builds from torch programs, not from ONNX files; name a run that "
            "was made with it, or another backend"
        )
    with interruption.temporary_folder() as folder:
        session = backend.load(backend.build(source, target, folder), target)
        try:
            yield session
        finally:
            session.close()


def _locate(
    path: Path, batch: int | None, threads: int | None, backend: str | None, gpu: bool
) -> tuple[Path, Target]:
    """The file that the engine is built from, and the target to time it on: the run's own, or as asked."""
    if path.is_dir():
        folder, manifest = open_bundle(path)
        target, entry = manifest.target, manifest.engines[0]
        source = folder / entry.source
        if backend not in (None, target.backend) or (gpu and target.device != "cuda"):
            # Another backend's options would mean nothing here, and all read the fp32 file.
            source = folder / "model.onnx"
            target = dataclasses.replace(target, backend=backend or AUTO, precision="fp32", options=())
        _refuse_changed(source, manifest, folder)
        target = dataclasses.replace(
            target,
            batch=batch or target.batch,
            threads=threads or target.threads,
            device="cuda" if gpu else target.device,
        )
    elif path.is_file():
        fixed, shape = _input_shape(path)
        if fixed and batch not in (None, fixed):
            raise UsageError(f"{path}: takes batches of {fixed} only, not {batch}")
        device = "cuda" if gpu else "cpu"
        source = path
        target = Target(backend or AUTO, batch or fixed or 1, shape, device=device, threads=threads)
    else:
        raise UsageError(f"{path}: there is no such file or run")
    names = select(target).names
    return source, dataclasses.replace(target, backend=names[0])


def _refuse_changed(source: Path, manifest: Manifest, folder: Path) -> None:
    """UsageError unless a bundle's file is there and is the one that was measured."""
    if not source.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{source}: is a link out of the bundle; get the bundle anew")
    listed = manifest.files.get(source.relative_to(folder).as_posix())
    if listed is None or not source.is_file() or store.file_sha256(source) != listed.sha256:
        raise UsageError(f"{source}: is missing or not what the manifest says; get the bundle anew")


def _inside(model: Path, location: str) -> bool:
    folder = model.resolve().parent
    return (folder / location).resolve().is_relative_to(folder)


def _input_shape(path: Path) -> tuple[int, tuple[int, int, int]]:
    """The batch (0 where it is free) and (C, H, W)."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UsageError(f"{path}: is no ONNX model: {error}") from None
    if not model.graph.input or not model.graph.output:
        raise UsageError(f"{path}: is no ONNX model: it has no input, or no output")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not _inside(path, entry.value):
                raise UsageError(f"{path}: keeps weights in {entry.value}, outside of its own folder")
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    if len(dims) != 4 or min(dims[1:]) < 1 or dims[0] < 0:
        raise UsageError(f"{path}: its first input is {dims}; images (N, C, H, W) of a fixed size are needed")
    if math.prod(dims[1:]) * max(1, dims[0]) > MOST_VALUES:
        raise UsageError(f"{path}: its first input is {dims}: too large to be images")
    return dims[0], (dims[1], dims[2], dims[3])
