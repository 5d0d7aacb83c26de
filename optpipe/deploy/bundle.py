"""Write, load and verify a deploy bundle.

An optimized model is stored as its original architecture's name, a plan and safetensors: no pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from optpipe import files, seals, store
from optpipe.data import LARGEST, Pixels, Preprocess, check_preprocess, network_input
from optpipe.errors import UsageError
from optpipe.models import ModelSpec
from optpipe.types import Fingerprint, Plan, Precision, Target

if TYPE_CHECKING:
    from torch import Tensor, nn

MANIFEST = "manifest.json"
RUNNER = "run_engine.py"
MOST_IMAGES = 65536
"""In a batch, as in a recipe."""


@dataclass(frozen=True, slots=True)
class Saved:
    """plan.json: how to build the optimized network again.

    ``input_shape`` is (C, H, W) of the original's images, to which the plan is applied; ``preprocess`` is
    how the optimized network's are prepared, at the plan's resolution.
    """

    model: ModelSpec
    search_folder: str
    plan: Plan
    input_shape: tuple[int, int, int]
    preprocess: Preprocess


@dataclass(frozen=True, slots=True)
class BundledFile:
    """One file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class BundledEngine:
    """One engine of the bundle, and the file that it is built from; names are relative to the bundle."""

    precision: Precision
    backend: str
    engine: str
    source: str
    build_s: float
    kept_in_float: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a bundle comes from: the machine, the run's recipe.toml by its sha256, the seed, the images."""

    fingerprint: Fingerprint
    recipe_sha256: str
    seed: int
    calibration_images: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    validation_images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json: what is in the bundle, for what target, and how inputs are prepared.

    ``target`` holds the flags that engines were built with; ``built_on`` is where the present engines were
    built, which after a rebuild is another machine than the origin's.
    """

    schema: str
    target: Target
    preprocess: Preprocess
    files: dict[str, BundledFile]
    engines: tuple[BundledEngine, ...]
    origin: Origin
    built_on: Fingerprint


SCHEMA = "optpipe.manifest/2"


def write_bundle(
    folder: Path,
    model: nn.Module,
    saved: Saved,
    target: Target,
    origin: Origin,
    engines: Sequence[BundledEngine],
) -> dict[str, str]:
    """Add weights, plan, runner and manifest to a folder that holds the ONNX and engine files.

    Returns:
        The sha256 of every file in the bundle, by its name relative to the folder.
    """
    store.save_tensors(folder / "model.safetensors", model.state_dict())
    files.write_atomically(folder / "plan.json", store.to_json(saved))
    files.write_atomically(folder / RUNNER, (Path(__file__).parent / RUNNER).read_text(encoding="utf-8"))
    manifest = Manifest(
        SCHEMA, target, saved.preprocess, bundled_files(folder), tuple(engines), origin, origin.fingerprint
    )
    write_manifest(folder, manifest)
    return {name: file.sha256 for name, file in manifest.files.items()}


def bundled_files(folder: Path) -> dict[str, BundledFile]:
    """Size and sha256 of every file in a bundle but the manifest, by its name relative to the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        path.relative_to(folder).as_posix(): BundledFile(store.file_sha256(path), path.stat().st_size)
        for path in paths
        if path.name != MANIFEST
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; what it lists is in place by then."""
    files.write_atomically(folder / MANIFEST, store.to_sealed(manifest))


def load(run: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The optimized network of a finished run, in eval mode with its recovered weights.

    ``run`` is the run's folder or its ``deploy`` folder. The network takes images of the plan's resolution,
    which may be below the original's: :func:`preprocess` prepares them. ``model`` is the original
    architecture where its name does not make it; it is left as it is.

    Raises:
        UsageError: there is no finished run, a file is not what the manifest says, or the architecture is
            needed, or is another.
    """
    import torch

    from optpipe import graph, models

    folder, _ = open_bundle(Path(run))
    problems = verify(folder)
    if problems:
        raise UsageError(f"{folder}: {problems[0]}")
    saved = _saved(folder, imports=model is None)
    # Which channels go together is read off gradients; a caller may have switched them off.
    with torch.inference_mode(mode=False), torch.enable_grad():
        original = model
        if original is None:
            original = models.load_model(saved.model, Path(saved.search_folder))
        # A network that a program handed over may lie on another device.
        traced = graph.trace(original, saved.input_shape).cpu()
        candidate = graph.apply(traced, saved.plan, saved.input_shape)
        store.load_tensors(candidate, folder / "model.safetensors")
    return candidate.eval()


def _saved(folder: Path, *, imports: bool) -> Saved:
    """What plan.json holds; UsageError where it ``imports`` and would do so from beside itself.

    A bundle is data. The folder of the user's own recipe is another one, by its whole path.
    """
    path = folder / "plan.json"
    try:
        saved = store.from_json(Saved, path.read_bytes())
    except (OSError, ValueError):
        raise UsageError(f"{path}: is missing or no plan of optpipe; get the bundle anew") from None
    _refuse_unmeant(path, saved.input_shape, saved.preprocess)
    home = Path(saved.search_folder)
    if imports and (not home.is_absolute() or home.resolve().is_relative_to(folder.resolve())):
        raise UsageError(
            f'{path}: search_folder = "{home}": modules are imported from the recipe\'s folder, by its whole '
            "path, never from a bundle; give the architecture, optpipe.load(run, model=module)"
        )
    return saved


def preprocess(run: str | Path) -> Callable[[Pixels | Sequence[Pixels]], Tensor]:
    """A function that prepares images for the network that :func:`load` gives, as the manifest says.

    It takes one uint8 image (H, W, C) and gives float32 (C, h, w), or a sequence of images, or one array
    (N, H, W, C), and gives (N, C, h, w): resized by the rule of the run's own images and of
    ``run_engine.py``, scaled and normalised. It raises UsageError for anything else.

    Raises:
        UsageError: there is no finished run.
    """
    _, manifest = open_bundle(Path(run))
    return partial(network_input, preprocess=manifest.preprocess)


def verify(run: Path) -> list[str]:
    """What is wrong with a bundle, a line each; nothing when every file is as the manifest says.

    Raises:
        UsageError: there is no bundle.
    """
    folder, manifest = open_bundle(run)
    problems: list[str] = []
    for name, file in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{name}: is a link out of the bundle")
        elif not path.is_file():
            problems.append(f"{name}: is missing")
        else:
            try:
                found = store.file_sha256(path)
            except OSError as error:
                problems.append(f"{name}: cannot be read: {error.strerror}")
                continue
            if found != file.sha256:
                problems.append(f"{name}: sha256 is {found[:16]}..., the manifest says {file.sha256[:16]}...")
    return problems


def open_bundle(run: Path) -> tuple[Path, Manifest]:
    """The bundle's folder and its manifest; ``run`` is the run's folder or its ``deploy`` folder.

    Raises:
        UsageError: there is no bundle, or its manifest cannot be read.
    """
    for folder in (run / "deploy", run):
        path = folder / MANIFEST
        if path.is_file():
            try:
                manifest = store.from_json(Manifest, path.read_bytes())
            except OSError as error:
                raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
            except seals.DamagedError as error:
                raise UsageError(f"{path}: {error}; get the bundle anew") from None
            except ValidationError as error:
                raise UsageError(f"{path}: is no manifest of optpipe: {error.error_count()} errors") from None
            _check(path, manifest)
            return folder, manifest
    raise UsageError(f"{run}: holds no deploy bundle (no {MANIFEST}); has the run finished?")


def _check(path: Path, manifest: Manifest) -> None:
    """UsageError for a manifest that no optpipe wrote, or one that reaches out of its bundle."""
    if manifest.schema != SCHEMA:
        raise UsageError(f"{path}: is of version {manifest.schema}; this optpipe reads {SCHEMA}")
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"{path}: lists {name}, which lies outside the bundle")
    if not manifest.engines:
        raise UsageError(f"{path}: lists no engine; get the bundle anew")
    for engine in manifest.engines:
        for name in (engine.engine, engine.source):
            if name not in manifest.files:
                raise UsageError(f"{path}: has no sha256 of {name}; get the bundle anew")
    if not 0 < manifest.target.batch <= MOST_IMAGES:
        raise UsageError(f"{path}: target.batch = {manifest.target.batch}: cannot be meant")
    _refuse_unmeant(path, manifest.target.input_shape, manifest.preprocess)


def _refuse_unmeant(path: Path, shape: tuple[int, int, int], preprocess: Preprocess) -> None:
    """UsageError for images that no network takes, before memory is asked for them."""
    if not 0 < min(shape) <= max(shape) <= LARGEST:
        raise UsageError(f"{path}: input_shape = {list(shape)}: cannot be meant")
    try:
        check_preprocess(preprocess, shape[0])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
