"""``optpipe rebuild``: a bundle's engines built anew on this machine, from the sources that it holds.

An engine belongs to the machine that built it: another GPU, driver or release refuses it, or runs it slower
than one of its own. The new bundle is made in a folder beside the old one and takes its place when all of it
is there; until then the old one stays whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optpipe import building, deploy, plugins, precision, selection, timing
from optpipe.deploy import bundle
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.types import Backend, Emit, Event, Latency, Precision, Session, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGES = 32
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True, slots=True)
class Compared:
    """How far an engine's logits are from ONNX Runtime's of the fp32 file, on random images.

    ``max_rel`` is the largest difference of a logit as a fraction of its image's largest logit.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float
    count: int


@dataclass(frozen=True, slots=True)
class RebuiltEngine:
    """One engine as it was built, compared and timed here; ``failed`` says why there is none."""

    precision: Precision
    engine: str = ""
    build_s: float = 0.0
    latency: Latency | None = None
    compared: Compared | None = None
    notes: tuple[str, ...] = ()
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A bundle whose engines were built on this machine; ``note`` says which backend was taken and why."""

    folder: Path
    target: Target
    engines: tuple[RebuiltEngine, ...]
    note: str = ""


def rebuild(
    run: Path,
    *,
    gpu: bool,
    out: Path | None = None,
    backend: str | None = None,
    emit: Emit,
) -> Rebuilt:
    """Build every engine of a run's bundle anew, compare and time it, and write the bundle's manifest.

    With ``gpu`` the engines are for the NVIDIA GPU, and with ``backend`` of that backend; else they are what
    they were. The bundle is replaced, or with ``out`` left as it is and the new one written there. An engine
    of another precision than the target's that cannot be built, or computes something else, is left out.

    Raises:
        UsageError: there is no bundle, or another of its files than an engine is not what its manifest says.
        MissingError: this machine lacks what it takes.
        RunError: the engine of the target's precision cannot be built, or computes something else.
    """
    folder, manifest = bundle.open_bundle(run)
    _refuse_changed(folder, manifest)
    target, note = _target(manifest, gpu, backend)
    if note:
        emit(Event("note", "rebuild", note))
    final = folder if out is None else out
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already; name a new folder with --out")
    with _beside(final) as made:
        _copy_sources(folder, made, manifest)
        maker = _Maker(made, manifest, plugins.backend(target.backend), target, emit)
        found = tuple(maker.engine(wanted) for wanted in maker.precisions())
        (made / TIMING_CACHE).unlink(missing_ok=True)
        maker.keep_timing_cache()
        bundle.write_manifest(
            made,
            replace(
                manifest,
                target=target,
                files=bundle.bundled_files(made),
                engines=tuple(maker.entries),
                built_on=maker.backend.fingerprint(target),
            ),
        )
        _put_in_place(made, final)
    return Rebuilt(final, target, found, note)


def as_text(rebuilt: Rebuilt) -> str:
    """What was built, a line for each engine."""
    lines = [f"{rebuilt.folder}: engines of {rebuilt.target.backend} on {rebuilt.target.device}"]
    for engine in rebuilt.engines:
        if engine.latency is None:
            lines.append(f"{engine.precision}: left out: {engine.failed}")
            continue
        lines.append(
            f"{engine.precision}: {engine.latency.headline} {engine.latency.median_ms:.3f} ms (median of "
            f"{engine.latency.samples}), built in {engine.build_s:.1f} s, {_difference(engine.compared)}"
        )
        lines += [f"  note: {note}" for note in engine.notes]
        lines += [f"  warning: {warning}" for warning in engine.latency.warnings]
    return "\n".join(lines) + "\n"


def _difference(compared: Compared | None) -> str:
    if compared is None:
        return "not compared: onnxruntime is not installed"
    return (
        f"logits within {compared.max_rel:.2g} of the largest of ONNX Runtime's in fp32, the same class for "
        f"{compared.top1_agreement:.0%} of {compared.count} random images"
    )


class _Maker:
    """Builds engines into a folder that holds a bundle's sources. ``entries`` are those that passed."""

    def __init__(
        self, folder: Path, manifest: bundle.Manifest, backend: Backend, target: Target, emit: Emit
    ) -> None:
        self.backend = backend
        self.entries: list[bundle.BundledEngine] = []
        self._folder = folder
        self._manifest = manifest
        self._target = target
        self._emit = emit
        self._caches: list[Path] = []
        self._images = _random_images(manifest, target)
        self._expected = _expected(folder, target, self._images)

    def precisions(self) -> tuple[Precision, ...]:
        """Which engines to build, the target's own first: those there were, or all that can be made."""
        offered = self.backend.precisions(self._target.device)
        before = [entry.precision for entry in self._manifest.engines]
        moved = self._target.backend != self._manifest.target.backend
        wanted = [name for name in offered if name != "int8" or self._has("int8")] if moved else before
        return tuple(dict.fromkeys((self._target.precision, *wanted)))

    def engine(self, wanted: Precision) -> RebuiltEngine:
        """Build, compare and time one engine; RunError only where it is the target's own."""
        self._emit(Event("note", "rebuild", f"{self._target.backend} at {wanted}"))
        try:
            return self._engine(wanted)
        except OptpipeError as error:
            if wanted == self._target.precision:
                raise
            shutil.rmtree(self._folder / "engines" / wanted, ignore_errors=True)
            self._emit(Event("warning", "rebuild", f"{wanted} is left out: {error}"))
            return RebuiltEngine(wanted, failed=str(error))

    def keep_timing_cache(self) -> None:
        """Put the cache that sped the builds up into the bundle."""
        for path in self._caches[-1:]:
            shutil.copyfile(path, self._folder / TIMING_CACHE)

    def _engine(self, wanted: Precision) -> RebuiltEngine:
        source, kept, notes = self._source(wanted)
        target = replace(self._target, precision=wanted)
        engine = self.backend.build(source, target, self._folder / "engines" / wanted)
        session = self.backend.load(engine, target)
        try:
            compared = self._compare(session, wanted)
            with timing.device_lock(target.device, on_wait=self._tell_of_waiting):
                measured = timing.single(session, tolerance=0.01, budget_s=2.0, seed=0)
        finally:
            session.close()
        name = engine.path.relative_to(self._folder).as_posix()
        source_name = source.relative_to(self._folder).as_posix()
        self.entries.append(
            bundle.BundledEngine(
                wanted, target.backend, name, source_name, engine.build_s, kept, engine.flags
            )
        )
        if engine.timing_cache is not None:
            self._caches.append(engine.timing_cache)
        latency = measured.latency(self.backend.fingerprint(target))
        notes += (*engine.notes, *latency.notes)
        return RebuiltEngine(wanted, name, engine.build_s, latency, compared, notes)

    def _tell_of_waiting(self) -> None:
        self._emit(Event("note", "rebuild", "waiting for another process that measures on this device"))

    def _source(self, wanted: Precision) -> tuple[Path, tuple[str, ...], tuple[str, ...]]:
        """The file that an engine is built from, what it keeps in float, and what there is to say of it."""
        if self.backend.SOURCE == "program":
            return self._at_hand(building.PROGRAM), (), ()
        fp32 = self._at_hand(building.ONNX)
        if wanted in ("fp32", "bf16"):
            return fp32, (), ()
        if self._has(wanted):
            kept = [entry.kept_in_float for entry in self._manifest.engines if entry.precision == wanted]
            note = ""
            if wanted == "int8" and self._target.backend != self._manifest.target.backend:
                note = f"its ranges, and what is not quantized, are those chosen for {self._was()}"
            return self._folder / _converted(wanted), kept[0] if kept else (), (note,) if note else ()
        if wanted == "int8":
            raise UsageError(
                f"the bundle has no {_converted(wanted)}, and int8 needs the calibration images: run the "
                "recipe on this machine"
            )
        made = precision.convert(fp32, self._folder / _converted(wanted), wanted, None)
        note = "made without images: whether activations overflow in fp16 was looked for on random ones only"
        return made.path, made.kept_in_float, (note,)

    def _has(self, wanted: Precision) -> bool:
        return _converted(wanted) in self._manifest.files

    def _was(self) -> str:
        return self._manifest.target.backend

    def _at_hand(self, name: str) -> Path:
        if name not in self._manifest.files:
            raise UsageError(
                f"the bundle has no {name}, which {self._target.backend} builds from: name another --backend "
                f'or run the recipe on this machine with target.backend = "{self._target.backend}"'
            )
        return self._folder / name

    def _compare(self, session: Session, wanted: Precision) -> Compared | None:
        if self._expected is None:
            return None
        found = session.run(self._images)
        compared, allowed = _compare(found, self._expected, wanted)
        if not allowed:
            atol, rtol = building.TOLERANCES[wanted]
            raise RunError(
                f"the {wanted} engine differs from ONNX Runtime in fp32 by up to {compared.max_abs:.3g} "
                f"(relative {compared.max_rel:.3g}) on {compared.count} random images; allowed is {atol:g} + "
                f"{rtol:g} of an image's largest logit; it is not shipped"
            )
        return compared


def _converted(wanted: Precision) -> str:
    return Path(building.ONNX).with_suffix(f".{wanted}.onnx").name


def _refuse_changed(folder: Path, manifest: bundle.Manifest) -> None:
    """UsageError unless all that engines are built from is as the manifest says; the engines may differ."""
    engines = _replaced(manifest)
    changed = [line for line in deploy.verify(folder) if line.partition(": ")[0] not in engines]
    if changed:
        raise UsageError(f"{folder}: {changed[0]}; get the bundle anew: what is changed is not built from")


def _replaced(manifest: bundle.Manifest) -> set[str]:
    """The files that are engines and nothing else; an ONNX file that is run as it is is a source too."""
    return {entry.engine for entry in manifest.engines} - {entry.source for entry in manifest.engines}


def _target(manifest: bundle.Manifest, gpu: bool, backend: str | None) -> tuple[Target, str]:
    """What the engines are built for on this machine, and why."""
    before = manifest.target
    device = "cuda" if gpu else before.device
    name = backend or (before.backend if device == before.device else selection.AUTO)
    if name == selection.FASTEST:
        raise UsageError(f'--backend {name}: a bundle is of one backend; name it, or "{selection.AUTO}"')
    options = before.options if name == before.backend and device == before.device else ()
    asked = replace(before, backend=name, device=device, options=options)
    if name == selection.AUTO:
        asked = replace(asked, precision="fp32")  # which every backend has, to see which one loads
    elif before.precision not in plugins.backend(name).precisions(device):
        asked = replace(asked, precision="fp32")
    selected = selection.select(asked)
    (name,) = selected.names
    offered = plugins.backend(name).precisions(device)
    kept: Precision = before.precision if before.precision in offered else "fp32"
    notes = [selected.note] if selected.note else []
    if kept != before.precision:
        notes.append(f"{name} does not run {before.precision} on {device}, so the target is {kept}")
    return replace(asked, backend=name, precision=kept), "; ".join(notes)


def _copy_sources(folder: Path, made: Path, manifest: bundle.Manifest) -> None:
    """Copy what the manifest lists, but the engines that are built anew."""
    engines = _replaced(manifest)
    for name in manifest.files:
        if name not in engines:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, made / name)


def _random_images(manifest: bundle.Manifest, target: Target) -> NDArray[np.float32]:
    """Images of random patches, the same each time, normalised as real ones are: float32 (N, C, H, W)."""
    channels, height, width = target.input_shape
    rng = np.random.default_rng(0)
    # Patches as neighbouring pixels are alike in real images, and of half the contrast so that activations
    # stay within the ranges that real images gave: beyond them int8 rightly differs.
    patch = max(1, min(height, width) // 8)
    coarse = rng.integers(64, 192, (IMAGES, channels, -(-height // patch), -(-width // patch)))
    pixels = coarse.repeat(patch, axis=2).repeat(patch, axis=3)[:, :, :height, :width]
    mean, std = (
        np.array(values, np.float32).reshape(-1, 1, 1)
        for values in (manifest.preprocess.mean, manifest.preprocess.std)
    )
    images: NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return images


def _expected(folder: Path, target: Target, images: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """ONNX Runtime's logits of the fp32 file on the CPU; None where it is not installed."""
    judge = plugins.backend("onnxruntime")
    on_cpu = Target("onnxruntime", target.batch, target.input_shape, threads=target.threads)
    if judge.missing(on_cpu) is not None or not (folder / building.ONNX).is_file():
        return None
    session = judge.load(judge.build(folder / building.ONNX, on_cpu, folder), on_cpu)
    try:
        return session.run(images)
    finally:
        session.close()


def _compare(
    found: NDArray[np.float32], expected: NDArray[np.float32], wanted: Precision
) -> tuple[Compared, bool]:
    """How far logits are from what is expected, and whether that is within the precision's tolerance."""
    if found.shape != expected.shape:
        raise RunError(f"the {wanted} engine returns logits {found.shape}, ONNX Runtime {expected.shape}")
    atol, rtol = building.TOLERANCES[wanted]
    with np.errstate(invalid="ignore"):
        difference = np.abs(found.astype(np.float64) - expected).max(axis=1)
    scale = np.abs(expected).max(axis=1).astype(np.float64)
    allowed = bool((difference <= atol + rtol * scale).all())  # what is not a number is not allowed
    compared = Compared(
        max_abs=float(difference.max()),
        max_rel=float((difference / np.maximum(scale, np.finfo(np.float64).tiny)).max()),
        top1_agreement=float((found.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        count=len(found),
    )
    return compared, allowed


@contextlib.contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """An empty folder beside another, gone at the end."""
    final = final.resolve()
    made = final.with_name(f".{final.name}.rebuilt-{os.getpid()}")
    try:
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        yield made
    except OSError as error:
        raise RunError(
            f"{error.filename or made}: {error.strerror or error}; name one that can be written with --out"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _put_in_place(made: Path, final: Path) -> None:
    """Move the new bundle to where the old one is; that is put back if it cannot be."""
    final = final.resolve()
    aside = final.with_name(f".{final.name}.before-{os.getpid()}")
    if final.exists():
        final.rename(aside)
    try:
        made.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)
