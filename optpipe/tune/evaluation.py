"""A network's logits and feature errors over a whole set of images, without augmentation."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import fx, nn

from optpipe import graph
from optpipe.errors import RunError
from optpipe.tune.machine import release, there
from optpipe.tune.parts import parts_of
from optpipe.types import Emit, Event, Images

EVALUATION_BATCH = 128
STATISTICS_BATCH = 256
"""Images whose statistics a batch-norm takes; EKG's evaluations use as many."""

FEWEST = 3
"""The most images that such a batch may be cut down to: evenly cut, none is then of a single image."""

BatchNorm = Literal["running", "batch"]
T = TypeVar("T")


def distance(
    student: fx.GraphModule, original: fx.GraphModule, calibration: Images, device: str = "cpu"
) -> float:
    """The mean squared feature error on all calibration images, without augmentation (PRACTISE, Eq. 31).

    Raises:
        RunError: the GPU has no memory for a single image.
    """
    pupil, teacher = (there(graph.observe(network).eval(), device) for network in (student, original))

    @torch.inference_mode()
    def error(images: torch.Tensor) -> tuple[float, int]:
        (own,), (other,) = pupil(images), teacher(images)
        return float((own - other).square().sum(dtype=torch.float64)), own.numel()

    found = list(_each_batch(error, calibration, device, batches_of(len(calibration))))
    return sum(total for total, _ in found) / sum(elements for _, elements in found)


def logits(
    network: nn.Module,
    images: Images,
    device: str = "cpu",
    batch_norm: BatchNorm = "running",
    *,
    half: bool = False,
    emit: Emit | None = None,
) -> torch.Tensor:
    """A network's logits (N, classes) of all images, on the CPU.

    ``batch_norm`` "batch" normalises with each batch's own statistics (batches of about 256 images, in the
    set's order, which should be a random one), as EKG does in its search: a network whose filters were just
    taken out has running statistics of another network. The running statistics stay as they are. ``half``
    computes in bfloat16. Where a GPU has no memory for a batch, smaller ones are taken; ``emit`` is told.

    Raises:
        RunError: statistics of a single image are asked for, or the GPU has no memory for a single image.
    """
    return torch.cat(list(logit_batches(network, images, device, batch_norm, half=half, emit=emit)))


def logit_batches(
    network: nn.Module,
    images: Images,
    device: str = "cpu",
    batch_norm: BatchNorm = "running",
    *,
    half: bool = False,
    emit: Emit | None = None,
    batches: Sequence[range] | None = None,
) -> Iterator[torch.Tensor]:
    """The rows of :func:`logits` batch by batch, in order, for a set whose logits do not fit in memory.

    ``batches`` are some of :func:`batches_of`, which follow each other; all by default.
    """
    if batch_norm == "batch":
        if len(images) < 2:
            raise RunError(f"batch statistics of {len(images)} image: give at least 2")
        network = _on_batch_statistics(network).to(device)
    else:
        network = there(network, device)
    layout = torch.channels_last if half else torch.preserve_format
    if half:  # the layout in which bfloat16 is quick; the caller's network keeps its own
        network = copy.deepcopy(network).to(memory_format=layout)

    def answer(batch: torch.Tensor) -> torch.Tensor:
        # Not around the loop: a generator would leave its caller in inference mode.
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            found: torch.Tensor = network(batch.to(memory_format=layout))
        return found.float().cpu() if half else found.cpu()

    least = FEWEST if batch_norm == "batch" else 1
    whole = batches_of(len(images), batch_norm) if batches is None else batches
    yield from _each_batch(answer, images, device, whole, least=least, emit=emit)


def batches_of(count: int, batch_norm: BatchNorm = "running") -> list[range]:
    """The batches in which so many images are evaluated."""
    return parts_of(count, STATISTICS_BATCH if batch_norm == "batch" else EVALUATION_BATCH)


def _on_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy whose batch-norms, in eval mode, have no running statistics to use or to change."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None
    return copied


def _each_batch(
    compute: Callable[[torch.Tensor], T],
    images: Images,
    device: str,
    batches: Sequence[range],
    *,
    least: int = 1,
    emit: Emit | None = None,
) -> Iterator[T]:
    """What comes of each batch of images; those that a GPU has no memory for are halved.

    Batches are evenly large: a last one of a few images would have statistics that tell nothing.
    """
    waiting = deque(batches)
    while waiting:
        places = waiting[0]
        found = _tried(compute, images, places, device)
        if found is None:
            release(device)
            size, begin = _halved(len(places), least, emit), places.start
            rest = parts_of(waiting[-1].stop - begin, size)
            waiting = deque(range(begin + part.start, begin + part.stop) for part in rest)
            continue
        waiting.popleft()
        yield found


def _tried(compute: Callable[[torch.Tensor], T], images: Images, places: range, device: str) -> T | None:
    """What comes of those images; None where the GPU has no memory for them."""
    try:
        return compute(images.batch(slice(places.start, places.stop)).to(device))
    except torch.OutOfMemoryError:
        return None


def _halved(count: int, least: int, emit: Emit | None) -> int:
    """Half as many images at once, which is told; RunError where that is fewer than ``least``, or none."""
    half = (count + 1) // 2
    if count == 1 or half < least:
        raise RunError(
            f"out of memory on the GPU with {count} images at once; set a smaller [data.preprocess] size, or "
            "run on a larger GPU"
        )
    if emit is not None:
        text = f"out of memory on the GPU with {count} images at once: goes on with {half} at once"
        normed = "; batch-norms see so many at once" if least > 1 else ""
        emit(Event("warning", "evaluation", text + normed))
    return half
