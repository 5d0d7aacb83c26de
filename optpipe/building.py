"""From a network to an engine: the file that a backend reads, the engine, and the proof that it computes
the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optpipe import onnx_export, precision, program_export
from optpipe.types import Backend, Emit, Engine, Images, Precision, Session, Target

if TYPE_CHECKING:
    from torch import nn

ONNX = "model.onnx"
PROGRAM = "model.program.pt2"

# An engine passes where no logit is further from torch's than atol + rtol * the image's largest logit.
# Rounding errors of each format, grown through the depth of a network; what int8 costs is measured as
# accuracy, its limit here only catches an engine that computes something else.
TOLERANCES: dict[Precision, tuple[float, float]] = {
    "fp32": (1e-4, 1e-3),
    "fp16": (1e-3, 2e-2),
    "bf16": (1e-2, 1e-1),
    "int8": (1e-1, 5e-1),
}


@dataclass(frozen=True, slots=True)
class Workbench:
    """Where engines are built: a backend with its target, and what choosing ranges for int8 takes.

    Not JSON-able.
    """

    backend: Backend
    target: Target
    images: Images
    quantize: precision.Settings
    seed: int

    def at(self, wanted: Precision) -> Workbench:
        """The same for another precision."""
        return replace(self, target=replace(self.target, precision=wanted))

    def sized(self, input_shape: tuple[int, int, int], images: Images) -> Workbench:
        """The same for images of another size, (C, H, W)."""
        return replace(self, target=replace(self.target, input_shape=input_shape), images=images)


@dataclass(frozen=True, slots=True)
class Built:
    """An engine with the file it was built from and, below fp32, what was converted. Not JSON-able."""

    engine: Engine
    source: Path
    converted: precision.Converted | None = None


def export(model: nn.Module, bench: Workbench, folder: Path) -> Path:
    """Write the network as the file that the backend reads, in fp32."""
    target = bench.target
    if bench.backend.SOURCE == "program":
        path = folder / PROGRAM
        program_export.export(model, target.input_shape, target.batch, path)
    else:
        path = folder / ONNX
        onnx_export.export(model, target.input_shape, target.batch, path)
    return path


def narrow(original: Path, model: nn.Module, folder: Path) -> Path | None:
    """The file of a network that is the original but for its widths, cut from the original's ONNX file.

    Good for its time alone; None where it cannot be had that way.
    """
    path = folder / ONNX
    return path if onnx_export.narrow(original, model, path) else None


def narrows(original: Path, model: nn.Module, exported: Path) -> bool:
    """Whether cutting the original's file gives the structure of ``exported``, an export of ``model``."""
    cut = exported.with_name("narrowed.onnx")
    if not onnx_export.narrow(original, model, cut):
        return False
    alike = onnx_export.structure_digest(cut) == onnx_export.structure_digest(exported)
    cut.unlink()
    return alike


def build(
    exported: Path,
    bench: Workbench,
    folder: Path,
    *,
    structure_only: bool = False,
    emit: Emit | None = None,
) -> Built:
    """An engine at the target's precision from what :func:`export` wrote, in ``folder``.

    ``structure_only``: only its time will count, so int8 ranges need not be good ones.
    """
    source, converted, target = exported, None, bench.target
    if bench.backend.SOURCE == "onnx" and target.precision in {"fp16", "int8"}:
        converted = precision.convert(
            exported,
            exported.with_name(f"{exported.stem}.{target.precision}.onnx"),
            target.precision,
            bench.images,
            bench.quantize,
            rest=bench.backend.INT8_REST,
            structure_only=structure_only,
            seed=bench.seed,
            emit=emit,
        )
        source = converted.path
    return Built(bench.backend.build(source, target, folder), source, converted)


def parity(model: nn.Module, session: Session, bench: Workbench) -> onnx_export.Parity:
    """How far the engine's logits are from torch's on calibration images, by its precision's tolerance."""
    atol, rtol = TOLERANCES[bench.target.precision]
    return onnx_export.parity(model, session, bench.images, atol=atol, rtol=rtol, count=64)
