"""Whether cutting the spike out changes anything: the masked network beside the one that was cut."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx

from optpipe import graph
from optpipe.methods.dllp import particles
from optpipe.methods.dllp.training import Frame, particles_of
from optpipe.types import Answer, Cell, Fitted, Images, Plan, Request, Step, StepResult, Table

IMAGES = 1000
BATCH = 250
DRAWS = 4
"""Sampled masks of each image's class."""

Logits = Callable[[Tensor], Tensor]


def lossless(
    frame: Frame, found: Fitted | None, last: Fitted, kept: Sequence[Tensor], plan: Plan | None
) -> Generator[Sequence[Request], Sequence[Answer], Table]:
    """Accuracies of the first particle before and after the cut, and how far their logits are apart.

    Before it: with masks sampled as at the end of the gates' training, with those units on that are above
    the threshold, and after settling. ``plan`` is the cut; None where units are zeros.
    """
    scene = frame.scene
    images = scene.calibration if scene.validation is None else scene.validation
    what = "calibration" if scene.validation is None else "validation"
    measure = partial(_measured, frame, found, last, kept, plan, images)
    depends = repr((2, None if found is None else found.digest, last.digest, plan, images.digest, IMAGES))
    (answer,) = yield [Step("masked and cut", depends, measure)]
    masked, cut, apart, largest, *before = cast(StepResult, answer).values
    names = (f"masks sampled, mean of {DRAWS}", "masks by the threshold, before settling")
    rows: list[tuple[Cell, ...]] = [(name, value, None) for name, value in zip(names, before, strict=False)]
    rows += [("masks by the threshold, at the end", masked, None), ("cut, nothing trained since", cut, apart)]
    title = f"Cutting the spike out ({min(IMAGES, len(images))} {what} images; logits up to {largest:.1f})"
    return Table(title, ("network", "accuracy", "largest difference of a logit"), tuple(rows))


@torch.no_grad()
def _measured(
    frame: Frame,
    found: Fitted | None,
    last: Fitted,
    kept: Sequence[Tensor],
    plan: Plan | None,
    images: Images,
) -> tuple[float, ...]:
    masks, network = frame.masks, particles_of(last).network(0)
    mask = [one.float() for one in kept]
    shape = frame.scene.graph.input_shape
    if plan is not None:
        cut: fx.GraphModule = graph.apply(network, plan, shape)
    else:
        cut = graph.trace(network, shape)
        cut.load_state_dict(graph.with_weights(network, masks.weights(network, mask)))
    before_settling: tuple[float, ...] = ()
    if found is not None:
        before = particles_of(found)
        own, gates = before.network(0), before.logits_of(0)
        heat = frame.config.temperature[1]
        generator = torch.Generator().manual_seed(frame.scene.seed)
        draws = [
            particles.sampled(gates, masks.granularity, heat, generator, hard=True) for _ in range(DRAWS)
        ]
        sampled = sum(_accuracy(_logits(own, masks, draw, images), images) for draw in draws) / DRAWS
        before_settling = (sampled, _accuracy(_logits(own, masks, mask, images), images))
    masked = _logits(network, masks, mask, images)
    after = _run(cut, images)
    apart = float((masked - after).abs().max())
    values = (_accuracy(masked, images), _accuracy(after, images), apart, float(masked.abs().max()))
    return (*values, *before_settling)


def _logits(network: fx.GraphModule, masks: graph.Masks, mask: Sequence[Tensor], images: Images) -> Tensor:
    return _run(lambda batch: particles.logits(network, masks, mask, batch), images)


def _run(logits: Logits, images: Images) -> Tensor:
    """Logits of the first images, batch-norm in eval mode."""
    count = min(IMAGES, len(images))
    parts = [
        logits(images.batch(slice(start, min(start + BATCH, count)))) for start in range(0, count, BATCH)
    ]
    return torch.cat(parts)


def _accuracy(logits: Tensor, images: Images) -> float:
    assert images.labels is not None
    return float((logits.argmax(1) == images.labels[: len(logits)]).float().mean())
