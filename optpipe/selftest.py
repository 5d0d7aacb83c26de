"""``optpipe doctor``'s self-test: engines of a small network, built, compared and timed.

Each is compared with torch and, where it is installed, with ONNX Runtime on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optpipe import building, data, interruption, onnx_export, plugins, precision, timing
from optpipe.environment import Finding
from optpipe.errors import OptpipeError, RunError
from optpipe.types import Session, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

SHAPE = (3, 32, 32)
BATCH = 4


def check(device: str) -> Iterator[Finding]:
    """An engine in each precision of each backend that loads on "cpu" or "cuda", a finding for each."""
    network, images = _network(), _images()
    reference = _reference(network, images)
    for name in plugins.names("backends"):
        backend = plugins.backend(name)
        offered = backend.precisions(device)
        target = Target(name, BATCH, SHAPE, device=device)
        if not offered or backend.missing(target) is not None:
            continue
        bench = building.Workbench(
            backend, target, images, precision.Settings(range_methods=("minmax",)), seed=0
        )
        with interruption.temporary_folder() as folder:
            for wanted in offered:
                subject = f"self-test {name} {wanted}"
                try:
                    detail = _engine(network, bench.at(wanted), folder, reference)
                except OptpipeError as error:
                    yield Finding(subject, False, str(error), needed=True)
                except Exception as error:  # an engine is others' code, and the other engines are to be tried
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    yield Finding(subject, False, reason, needed=True)
                else:
                    yield Finding(subject, True, detail)


def _reference(network: nn.Module, images: data.ImageSet) -> NDArray[np.float32] | None:
    """The logits (N, classes) of ONNX Runtime on the CPU in fp32; None where it does not run."""
    target = Target("onnxruntime", BATCH, SHAPE)
    if target.backend not in plugins.names("backends"):
        return None
    backend = plugins.backend(target.backend)
    if backend.missing(target) is not None:
        return None
    bench = building.Workbench(backend, target, images, precision.Settings(), seed=0)
    with interruption.temporary_folder() as folder:
        try:
            built = building.build(building.export(network, bench, folder), bench, folder)
            session = backend.load(built.engine, target)
        except Exception:  # the finding of its own engine tells of it
            return None
        try:
            return session.run(images.batch(slice(0, len(images))).numpy())
        finally:
            session.close()


def _engine(
    network: nn.Module, bench: building.Workbench, folder: Path, reference: NDArray[np.float32] | None
) -> str:
    """Build one engine, compare and time it; RunError where it computes something else."""
    exported = building.export(network, bench, folder)
    built = building.build(exported, bench, folder / bench.target.precision)
    session = bench.backend.load(built.engine, bench.target)
    try:
        parity = building.parity(network, session, bench)
        onnx_export.check_parity(parity)
        beside = _against(session, bench, reference)
        with timing.device_lock(bench.target.device):
            measured = timing.single(session, tolerance=0.01, budget_s=0.5, seed=0)
        notes = "".join(f"; {note}" for note in session.notes)
        figure = f"{session.headline} {timing.median(measured.samples_ms):.3f} ms"
    finally:
        session.close()
    return (
        f"built in {built.engine.build_s:.1f} s, logits within {parity.max_rel:.1g} of torch's{beside}, "
        f"{figure}{notes}"
    )


def _against(session: Session, bench: building.Workbench, reference: NDArray[np.float32] | None) -> str:
    """How far the logits are from ONNX Runtime's, in words; RunError where it is too far."""
    if reference is None:
        return ""
    got = session.run(bench.images.batch(slice(0, len(reference))).numpy())
    difference = float(np.abs(got - reference).max() / np.abs(reference).max())
    _, allowed = building.TOLERANCES[bench.target.precision]
    if not difference <= allowed:
        raise RunError(
            f"the engine differs from ONNX Runtime by {difference:.3g} of the largest logit, allowed is "
            f"{allowed:g}"
        )
    return f" and {difference:.1g} of ONNX Runtime's"


def _network() -> nn.Module:
    """Convolutions with batch-norm and a classifier, the same weights each time."""
    import torch
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def _images() -> data.ImageSet:
    """Random images, in memory."""
    import torch

    pixels = np.random.default_rng(0).integers(0, 256, (32, *SHAPE), dtype=np.uint8)
    names = tuple(f"random {index}" for index in range(len(pixels)))
    return data.ImageSet(torch.from_numpy(pixels), None, names, (0.5,) * 3, (0.25,) * 3, "random")
