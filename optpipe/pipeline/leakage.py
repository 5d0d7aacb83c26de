"""How much more images would help: errors on images that the recovery saw and on others, once a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from optpipe import data, graph, landscape, store, tune
from optpipe.errors import UsageError
from optpipe.preparation import Setup
from optpipe.report import leakage, schema
from optpipe.results import Recovered
from optpipe.types import Choice

MOST_IMAGES = 500
"""Of each set at the most; they are spread over it."""
_BATCH = 128
_ANSWER = "leakage.json"


def measure(
    setup: Setup, opened: store.Run, choice: Choice, recovered: Recovered, halves: schema.HalvesReport | None
) -> schema.LeakageReport | None:
    """The gap between seen and unseen images, and the advice it implies; None without mimicking, or errors.

    ``halves`` are loss leakage proper (Eq. 11), where it was measured. What was measured before is read.
    """
    if choice.recover.loss != "mimic" or not choice.recover.steps:
        return None
    key = measured_key("leakage 1", setup, choice, recovered)
    stored = opened.answer("leakage", key, _ANSWER, schema.LeakageReport)
    if stored is None:
        try:
            found = _gap(setup, opened, choice)
        except UsageError:  # a network that has no error, or no finite one, has no ratio of errors
            return None
        opened.store_answer("leakage", key, _ANSWER, found)
    else:
        found = stored[0]
    found = dataclasses.replace(found, halves=halves)
    return dataclasses.replace(found, advice=leakage.advice(found))


def measured_key(what: str, setup: Setup, choice: Choice, recovered: Recovered) -> str:
    """sha256 over all that depends on a recovery: the original, the images, the recovered weights."""
    images = (setup.calibration.digest, setup.evaluation.digest)
    seed = setup.recipe.run.seed
    return store.digest(what, setup.model_digest, *images, choice.plan, recovered.weights_sha256, seed)


def _gap(setup: Setup, opened: store.Run, choice: Choice) -> schema.LeakageReport:
    networks = [load(setup, opened, choice, stage) for stage in ("prune", "recover")]
    errors = []
    for images in (spread(setup.calibration, MOST_IMAGES), spread(setup.evaluation, MOST_IMAGES)):
        device = tune.usable(setup.device)
        wanted = features(setup.original, images, device)
        before, after = (feature_errors(one, wanted, images, device) for one in networks)
        errors.append((before, after))
    seen, unseen = errors
    found = landscape.gap(seen, unseen, np.random.default_rng(setup.recipe.run.seed))
    return schema.LeakageReport(
        advice="",
        seen=found.seen,
        unseen=found.unseen,
        seen_images=len(seen[0]),
        unseen_images=len(unseen[0]),
        ratio=interval(found.ratio),
        control=interval(found.control),
        doubling=interval(found.doubling),
    )


def interval(found: landscape.Estimate) -> schema.Interval:
    """An estimate as the report has it."""
    return schema.Interval(found.value, found.ci95)


def load(setup: Setup, opened: store.Run, choice: Choice, stage: str) -> fx.GraphModule:
    """The chosen network with the weights that a stage, "prune" or "recover", left."""
    network = graph.apply(setup.original, choice.plan, setup.target.input_shape)
    store.load_tensors(network, opened.stage_folder(stage) / store.WEIGHTS)
    return network.eval()


def spread(images: data.ImageSet, most: int) -> data.ImageSet:
    """The images themselves, or ``most`` of them, evenly spread: sets are often sorted by class."""
    if len(images) <= most:
        return images
    return data.part(images, [index * len(images) // most for index in range(most)])


def features(network: fx.GraphModule, images: data.ImageSet, device: str) -> list[torch.Tensor]:
    """The features (N, C, H, W) of each batch of images, on the device."""
    observed = graph.observe(network).eval().to(device)
    with torch.inference_mode():
        found = [observed(images.batch(batch).to(device))[0] for batch in batches(len(images))]
    network.to("cpu")  # it shares its weights with what observes it
    return found


def feature_errors(
    network: fx.GraphModule, wanted: Sequence[torch.Tensor], images: data.ImageSet, device: str
) -> NDArray[np.float64]:
    """The mean squared feature error of each image (N,), without augmentation (PRACTISE, Eq. 31)."""
    own = features(network, images, device)
    return np.concatenate([squares(one, other) for one, other in zip(own, wanted, strict=True)])


def squares(own: torch.Tensor, wanted: torch.Tensor) -> NDArray[np.float64]:
    """The mean squared difference of each image's features, (N,)."""
    found: NDArray[np.float64] = (own - wanted).double().square().flatten(1).mean(1).cpu().numpy()
    return found


def batches(count: int) -> list[slice]:
    """Slices of as many images as fit beside each other."""
    return [slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH)]
