"""A network's logits and feature errors over a whole set of images, without augmentation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import fx, nn

from optpipe import graph
from optpipe.errors import RunError
from optpipe.tune.machine import there
from optpipe.types import Images

EVALUATION_BATCH = 128
STATISTICS_BATCH = 256
"""Images whose statistics a batch-norm takes; EKG's evaluations use as many."""

BatchNorm = Literal["running", "batch"]


def distance(
    student: fx.GraphModule, original: fx.GraphModule, calibration: Images, device: str = "cpu"
) -> float:
    """The mean squared feature error on all calibration images, without augmentation (PRACTISE, Eq. 31)."""
    pupil, teacher = (there(graph.observe(network).eval(), device) for network in (student, original))
    total, elements = 0.0, 0
    with torch.inference_mode():
        for images in _batches(calibration, device, EVALUATION_BATCH):
            (own,), (other,) = pupil(images), teacher(images)
            total += float((own - other).square().sum(dtype=torch.float64))
            elements += own.numel()
    return total / elements


def logits(
    network: nn.Module,
    images: Images,
    device: str = "cpu",
    batch_norm: BatchNorm = "running",
    *,
    half: bool = False,
) -> torch.Tensor:
    """A network's logits (N, classes) of all images, on the CPU.

    ``batch_norm`` "batch" normalises with each batch's own statistics (batches of about 256 images, in the
    set's order, which should be a random one), as EKG does in its search: a network whose filters were just
    taken out has running statistics of another network. The running statistics stay as they are. ``half``
    computes in bfloat16.

    Raises:
        RunError: statistics of a single image are asked for.
    """
    return torch.cat(list(logit_batches(network, images, device, batch_norm, half=half)))


def logit_batches(
    network: nn.Module,
    images: Images,
    device: str = "cpu",
    batch_norm: BatchNorm = "running",
    *,
    half: bool = False,
) -> Iterator[torch.Tensor]:
    """The rows of :func:`logits` batch by batch, in order, for a set whose logits do not fit in memory."""
    size = EVALUATION_BATCH
    if batch_norm == "batch":
        if len(images) < 2:
            raise RunError(f"batch statistics of {len(images)} image: give at least 2")
        network, size = _on_batch_statistics(network).to(device), STATISTICS_BATCH
    else:
        network = there(network, device)
    layout = torch.channels_last if half else torch.preserve_format
    if half:  # the layout in which bfloat16 is quick; the caller's network keeps its own
        network = copy.deepcopy(network).to(memory_format=layout)
    for batch in _batches(images, device, size):
        # Not around the loop: a generator would leave its caller in inference mode.
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=half):
            found: torch.Tensor = network(batch.to(memory_format=layout))
        yield found.float().cpu() if half else found.cpu()


def _on_batch_statistics(network: nn.Module) -> nn.Module:
    """A copy whose batch-norms, in eval mode, have no running statistics to use or to change."""
    copied = copy.deepcopy(network)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = None
    return copied


def _batches(images: Images, device: str, size: int) -> Iterator[torch.Tensor]:
    """Batches of at most ``size`` images, none more than one image smaller than another.

    A last batch of a few images would have statistics that tell nothing.
    """
    count = -(-len(images) // size)
    for number in range(count):
        begin, end = (len(images) * edge // count for edge in (number, number + 1))
        yield images.batch(slice(begin, end)).to(device)
