"""The networks that ``benchmarks/gpu.py`` times, and what it runs them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, fx, nn

from benchmarks import eager
from optpipe import building, graph, onnx_export, plugins, precision, selection, timing
from optpipe.errors import MissingError, RunError
from optpipe.types import Backend, Engine, Fingerprint, Plan, Precision, Session, Target
from optpipe.zoo.cifar_resnet import resnet20


@dataclass(frozen=True, slots=True)
class Network:
    """A network that is timed, at the shape of one input image."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]


NETWORKS = {
    "resnet34": Network(lambda: torchvision.models.resnet34(weights=None), (3, 224, 224)),
    "resnet50": Network(lambda: torchvision.models.resnet50(weights=None), (3, 224, 224)),
}
SMOKE = {"resnet20": Network(resnet20, (3, 32, 32))}


@dataclass(frozen=True, slots=True)
class Subject:
    """A traced network, and its droppable blocks in groups: any one of a group leaves an equal structure."""

    model: fx.GraphModule
    input_shape: tuple[int, int, int]
    alike: tuple[tuple[str, ...], ...]


def subject(network: Network) -> Subject:
    """The network with random weights; its batch-norms have seen random images.

    Without that, activations would grow from block to block, and overflow in fp16 where they are many.
    """
    torch.manual_seed(0)
    model = network.make().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over what it has seen, which is this one batch
    shape = network.input_shape
    with torch.no_grad():
        model(RandomImages(shape, 8).batch(slice(None)))
    traced = graph.trace(model, shape)
    groups: dict[str, list[str]] = {}
    for block in graph.inspect(traced, shape).droppable:
        candidate = graph.apply(traced, Plan((block.name,)), shape)
        groups.setdefault(graph.structure_key(candidate, shape, 1), []).append(block.name)
    return Subject(traced, shape, tuple(tuple(names) for names in groups.values()))


class RandomImages:
    """A few images of noise."""

    labels: Tensor | None = None
    digest = "noise"

    def __init__(self, input_shape: tuple[int, int, int], count: int = 4) -> None:
        self._pixels = torch.randn(count, *input_shape, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._pixels)

    def batch(self, indices: Sequence[int] | slice) -> Tensor:
        """Images (N, C, H, W) by their places."""
        return self._pixels[indices]


@dataclass(frozen=True, slots=True)
class Opened:
    """A session, and the seconds that its engine took; None where nothing was made for it."""

    session: Session
    fingerprint: Fingerprint
    export_s: float | None = None
    build_s: float | None = None


@dataclass(slots=True)
class Compiled:
    """A backend; the engines that it built are kept for the next row that wants them."""

    name: str
    backend: Backend
    engines: dict[Path, Engine] = field(default_factory=dict)

    def open(self, model: nn.Module, target: Target, folder: Path) -> Opened:
        """The network's engine; ``folder`` is the structure's own, for all backends and precisions."""
        target = replace(target, backend=self.name)
        own = folder / f"{self.name}-{target.precision}-{target.batch}"
        export_s = build_s = None
        if own not in self.engines:
            images = RandomImages(target.input_shape)
            bench = building.Workbench(self.backend, target, images, precision.Settings(), 0)
            export_s, exported = self._exported(model, bench, folder)
            own.mkdir(parents=True, exist_ok=True)
            self.engines[own] = building.build(exported, bench, own, structure_only=True).engine
            build_s = self.engines[own].build_s
        session = self.backend.load(self.engines[own], target)
        return Opened(session, self.backend.fingerprint(target), export_s, build_s)

    def _exported(
        self, model: nn.Module, bench: building.Workbench, folder: Path
    ) -> tuple[float | None, Path]:
        """The seconds it took, None where another row has done it; an ONNX file serves every batch."""
        program = self.backend.SOURCE == "program"
        folder /= f"program-{bench.target.batch}" if program else "onnx"
        path = folder / (building.PROGRAM if program else building.ONNX)
        if path.exists():
            return None, path
        watch = timing.Stopwatch()
        folder.mkdir(parents=True, exist_ok=True)
        path = building.export(model, bench, folder)
        return watch.seconds, path


@dataclass(frozen=True, slots=True)
class Eager:
    """A way of torch eager, which builds nothing."""

    variant: eager.Variant

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return self.variant.name

    def open(self, model: nn.Module, target: Target, folder: Path) -> Opened:
        """The network on the device; nothing is written to ``folder``."""
        return Opened(eager.load(model, target, self.variant), eager.fingerprint(target))


Contender = Compiled | Eager


def compiled(
    device: str, precisions: Sequence[Precision], only: Sequence[str] | None
) -> tuple[dict[Precision, tuple[Compiled, ...]], tuple[tuple[Precision, str, str], ...]]:
    """The backends that load on a device at each precision; and precision, backend and lack of the others.

    ``only`` names those that are wanted, None for all; UsageError for one that does not exist.
    """
    modules = {name: Compiled(name, plugins.backend(name)) for name in only or plugins.names("backends")}
    found: dict[Precision, tuple[Compiled, ...]] = {}
    absent: list[tuple[Precision, str, str]] = []
    for wanted in precisions:
        try:
            chosen = selection.select(Target(selection.FASTEST, 1, (3, 224, 224), wanted, device))
        except MissingError as error:
            found[wanted] = ()
            absent.append((wanted, "every backend", str(error)))
            continue
        names = [name for name in chosen.names if name in modules]
        preferred = selection.ORDER[device]
        names.sort(key=lambda name: preferred.index(name) if name in preferred else len(preferred))
        found[wanted] = tuple(modules[name] for name in names)
        absent += [(wanted, name, why) for name, why in chosen.absent if name in modules]
    return found, tuple(absent)


def check(model: nn.Module, session: Session, target: Target) -> float:
    """The largest difference of a logit from torch's in fp32, as a fraction of its image's largest logit.

    Raises:
        RunError: it is above what the precision's rounding explains.
    """
    atol, rtol = building.TOLERANCES[target.precision]
    images = RandomImages(target.input_shape)
    found = onnx_export.parity(model, session, images, atol=atol, rtol=rtol, count=len(images))
    if not found.passed:
        raise RunError(
            f"it does not compute what torch does: logits differ by up to {found.max_rel:.1%} of an image's "
            f"largest one, {rtol:.1%} is allowed at {target.precision}"
        )
    return found.max_rel
