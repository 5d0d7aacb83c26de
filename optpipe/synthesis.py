"""Images from a network alone, by DeepInversion (Yin et al., "Dreaming to Distill", CVPR 2020). Pure.

Pixels are what is trained: until the network takes each image for its class, until batch statistics at every
batch-norm are those that it keeps of its training data, and until neighbours are alike.

Deliberate deviations. A network keeps the statistics of its training images *as they were augmented*: one
that was trained on crops with black borders asks for black where no image has any, and images that are only
rolled put it inside. So the jitter may be such crops, and by default a short trial says which of the two the
network has seen (:func:`settled`). Images begin as noise with the spectrum of photographs, which is nearer
to what is wanted than white noise (:func:`natural_noise`), and Adam averages over more steps.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from optpipe.augment import crop, flip
from optpipe.errors import RunError, UsageError
from optpipe.types import Jitter, Synthesis

HALVED_FROM = 224
"""Images of this size and above are first made at half of it."""

HALF_SHARE = 2 / 3
"""The share of the steps at half the size; the details take fewer."""

JITTER_SHARE = 1 / 8
"""How far an image is moved before a step: 4 pixels of 32."""

TRIAL_STEPS = 40
TRIAL_IMAGES = 64
TRIAL_VIEWS = 4
"""What it takes to see which jitter a network's statistics are of."""

JITTERS: tuple[Literal["roll", "pad"], ...] = ("roll", "pad")

TOLD_EVERY = 50

Told = Callable[[int, float], None]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Which images: of ``labels`` int64 (N,), ``shape`` (C, H, W), normalised by ``mean`` and ``std``.

    ``halved`` allows a start at half the size; leave it out where the network takes its own size alone.
    """

    labels: NDArray[np.int64]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    halved: bool = True


# ---------------------------------------------------------------- what is minimised


def statistics_distance(features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """How far a batch's statistics are from those kept: ||mu - mean|| + ||sigma^2 - variance|| (Eq. 4).

    ``features`` (N, C, ...) are what comes into a batch-norm, whose kept statistics are (C,).
    """
    own_mean, own_variance = _Moments.apply(features, mean)
    # In one call: norms of few numbers cost what starting them does.
    return _norms(torch.stack([own_mean, own_variance - variance])).sum()


class _Moments(torch.autograd.Function):
    """The mean less ``centre`` and the variance, float32 (C,) each, of features (N, C, ...).

    Few passes over the features, in their own layout, and one backward in their precision: over all but the
    channels ``torch.var_mean`` is the slowest thing in a step on a processor. The centre, where the mean is
    to be, keeps the squares small, so that little cancels.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        places = [0, *range(2, features.dim())]
        centred = features.float() - _over_channels(centre, features)
        mean = centred.mean(places)
        variance = centred.square_().mean(places) - mean.square()
        ctx.save_for_backward(features, centre + mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_mean, of_variance = gradients
        features, mean = ctx.saved_tensors
        count = features.numel() // features.shape[1]
        slope = 2 * of_variance / count
        offset = of_mean / count - slope * mean
        rows = [_over_channels(each, features).to(features.dtype) for each in (offset, slope)]
        return torch.addcmul(rows[0], features, rows[1]), None


def _over_channels(values: Tensor, features: Tensor) -> Tensor:
    """Values (C,) in a shape that goes with features (N, C, ...)."""
    return values.view(1, -1, *[1] * (features.dim() - 2))


def total_variation(images: Tensor) -> Tensor:
    """The l2 norms of the differences of neighbours in four directions, summed; the mean over images.

    The paper has a norm over the batch; the mean of the images' own keeps one weight fit for all batches.
    """
    differences = (
        images[:, :, 1:] - images[:, :, :-1],
        images[..., 1:] - images[..., :-1],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
    )
    return torch.stack([_norms(difference).mean() for difference in differences]).sum()


def l2(images: Tensor) -> Tensor:
    """The mean over images of their l2 norms."""
    return _norms(images).mean()


def _norms(images: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norms


def competition(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - JS of two networks' answers, from logits (N, classes): small where they disagree (Eq. 8).

    JS is the Jensen-Shannon divergence in nats, between 0 and ln 2; the mean over images.
    """
    own, other = F.log_softmax(teacher.float(), dim=1), F.log_softmax(student.float(), dim=1)
    middle = torch.logaddexp(own, other) - math.log(2)
    halves = [F.kl_div(middle, one, reduction="batchmean", log_target=True) for one in (own, other)]
    return 1 - (halves[0] + halves[1]) / 2


def normalisations(network: nn.Module) -> list[_BatchNorm]:
    """The batch-norms that keep statistics of what the network was trained on.

    Raises:
        UsageError: there is none, so that nothing says what the network's images look like.
    """
    found = [
        layer
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None
    ]
    if not found:
        raise UsageError(
            'source = "synthesize": images cannot be made from this network: it has no batch-norm that keeps '
            "running statistics, from which they would be made; give a folder of images, of other things too"
        )
    return found


@contextmanager
def watched(network: nn.Module) -> Iterator[list[Tensor]]:
    """The :func:`statistics_distance` of each batch-norm, appended to the list as the network runs."""
    distances: list[Tensor] = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        assert layer.running_mean is not None and layer.running_var is not None
        distances.append(statistics_distance(inputs[0], layer.running_mean, layer.running_var))

    hooks = [layer.register_forward_pre_hook(measure) for layer in normalisations(network)]
    try:
        yield distances
    finally:
        for hook in hooks:
            hook.remove()


def objective(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Synthesis,
    student: nn.Module | None = None,
    *,
    view: Tensor | None = None,
    half: bool = False,
) -> Tensor:
    """What images (N, C, H, W), normalised, are trained to make small (Eqs 2, 3 and 8).

    The networks look at their ``view``, at the images themselves where there is none; ``half`` has them
    compute in bfloat16. Variation and l2 are of the images: the border of a view is not theirs.
    """
    seen = (images if view is None else view).contiguous(memory_format=torch.channels_last)
    with watched(network) as distances, torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        logits = network(seen)
    loss = F.cross_entropy(logits.float(), labels) + settings.statistics * torch.stack(distances).sum()
    loss = loss + settings.tv * total_variation(images) + settings.l2 * l2(images)
    if student is None or not settings.competition:
        return loss
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        answers = student(seen)
    return loss + settings.competition * competition(logits, answers)


# ---------------------------------------------------------------- images


def even_labels(count: int, classes: int, seed: int) -> NDArray[np.int64]:
    """Labels (N,) of which each class has equally many, within one; which class comes first is drawn."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(classes)
    return order[np.arange(count) % classes].astype(np.int64)


def split(count: int, batch: int) -> tuple[slice, ...]:
    """Where each batch is: as few as there can be of at most ``batch``, their sizes within one.

    A small last batch would have statistics worth little.
    """
    parts = -(-count // batch)
    edges = [count * part // parts for part in range(parts + 1)]
    return tuple(slice(a, b) for a, b in pairwise(edges))


def synthesize(
    network: nn.Module,
    wanted: Wanted,
    settings: Synthesis,
    *,
    first: int = 0,
    device: str = "cpu",
    student: nn.Module | None = None,
    half: bool = False,
    told: Told = lambda done, loss: None,
) -> Iterator[NDArray[np.uint8]]:
    """Batch after batch of pixels (N, H, W, C), beginning with batch ``first`` of :func:`split`.

    Every batch hangs on the seed and its number alone: one that begins later is the same. ``told`` hears the
    steps done since the very first batch and the loss; ``half`` computes in bfloat16. The networks stay as
    they are.

    Raises:
        UsageError: the network has no batch-norm.
        RunError: the loss is no longer finite.
    """
    normalisations(network)
    settings = settled(network, wanted, settings, device=device, half=half)
    network = _frozen(network, device)
    rival = None if student is None or not settings.competition else _frozen(student, device)
    parts = split(len(wanted.labels), settings.batch)
    for number in range(first, len(parts)):
        before = number * settings.steps
        labels = torch.from_numpy(wanted.labels[parts[number]]).to(device)

        def tell(done: int, loss: float, before: int = before) -> None:
            told(before + done, loss)

        generator = _generator(wanted.seed, number)
        images = _batch(network, rival, labels, wanted, settings, generator, half, tell)
        yield to_pixels(images, wanted.mean, wanted.std)


def settled(
    network: nn.Module, wanted: Wanted, settings: Synthesis, *, device: str = "cpu", half: bool = False
) -> Synthesis:
    """The settings with a jitter that is decided: the one under which a short trial comes nearer.

    Both trials begin with the same noise, look at classes and statistics alone, and hang on the seed; nothing
    but the network is asked. RunError where its answers are not finite.
    """
    if settings.jitter != "auto":
        return settings
    network = _frozen(network, device)
    steps = min(settings.steps, TRIAL_STEPS)
    alone = dataclasses.replace(settings, steps=steps, tv=0.0, l2=0.0, statistics=1.0, competition=0.0)
    labels = torch.from_numpy(wanted.labels[: min(settings.batch, TRIAL_IMAGES)]).to(device)
    distances: dict[Jitter, float] = {}
    for jitter in JITTERS:
        trial, generator = dataclasses.replace(alone, jitter=jitter), _generator(wanted.seed, 0)
        images = _batch(network, None, labels, wanted, trial, generator, half, lambda done, loss: None)
        distances[jitter] = _distance(network, images, wanted, jitter, generator)
    return dataclasses.replace(settings, jitter=min(distances, key=distances.__getitem__))


def _distance(
    network: nn.Module, images: Tensor, wanted: Wanted, jitter: Jitter, generator: torch.Generator
) -> float:
    """How far the statistics of a few views of images are from those kept, all layers summed."""
    black, total = _limits(wanted, images.device)[0], 0.0
    for _ in range(TRIAL_VIEWS):
        with torch.inference_mode(), watched(network) as distances:
            network(jittered(jitter, images, black, generator))
        total += torch.stack(distances).sum().item()
    return total


def _generator(seed: int, number: int) -> torch.Generator:
    """The draws of batch ``number``."""
    sequence = np.random.SeedSequence((seed, number))
    entropy = int(sequence.generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(entropy >> 1)


def _frozen(network: nn.Module, device: str) -> nn.Module:
    copied = copy.deepcopy(network).to(device).eval().requires_grad_(False)
    return copied.to(memory_format=torch.channels_last)


def _batch(
    network: nn.Module,
    student: nn.Module | None,
    labels: Tensor,
    wanted: Wanted,
    settings: Synthesis,
    generator: torch.Generator,
    half: bool,
    told: Told,
) -> Tensor:
    """Normalised images (N, C, H, W) of one batch."""
    channels, height, width = wanted.shape
    sizes, steps = [(height, width)], [settings.steps]
    if wanted.halved and min(height, width) >= HALVED_FROM and settings.steps > 1:
        early = round(settings.steps * HALF_SHARE)
        sizes, steps = [(height // 2, width // 2), *sizes], [early, settings.steps - early]
    images = natural_noise((len(labels), channels, *sizes[0]), generator).to(labels.device)
    low, high = _limits(wanted, labels.device)
    done = 0
    for size, count in zip(sizes, steps, strict=True):
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        images = images.detach().clamp(low, high).requires_grad_()
        adam = torch.optim.Adam([images], lr=settings.lr, betas=(0.9, 0.99))
        for step in range(count):
            adam.param_groups[0]["lr"] = settings.lr * (1 + math.cos(math.pi * step / count)) / 2
            view = jittered(settings.jitter, images, low, generator)
            loss = objective(network, images, labels, settings, student, view=view, half=half)
            # Of the images alone: the weights are somebody else's.
            (images.grad,) = torch.autograd.grad(loss, images)
            adam.step()
            with torch.no_grad():
                images.clamp_(low, high)
            done += 1
            if done % TOLD_EVERY == 0 or done == settings.steps:
                told(done, _finite(loss))
    return images.detach()


def natural_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Noise (N, C, H, W) of unit variance whose amplitude falls with frequency as 1/f.

    So it does in photographs (Field, 1987), to which it has a shorter way than white noise has: that leaves
    a grain which the batch-norms hardly see and a few hundred steps do not take out.
    """
    height, width = shape[2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    frequency = (rows.square() + columns.square()).sqrt()
    frequency[0, 0] = 1 / max(height, width)
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator)) / frequency
    noise: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
    return noise / noise.std()


def jittered(kind: Jitter, images: Tensor, black: Tensor, generator: torch.Generator) -> Tensor:
    """A view of each image (N, C, H, W), mirrored or not, moved so that no place is special.

    "roll" rolls the batch one random way (DeepInversion); "pad" crops each image at a random place of its
    own out of a border of ``black`` (C, 1, 1), as is customary in training on small images.
    """
    moves = [max(1, round(side * JITTER_SHARE)) for side in images.shape[2:]]
    if kind == "roll":
        ways = [int(torch.randint(-move, move + 1, (1,), generator=generator)) for move in moves]
        return flip(torch.roll(images, ways, dims=(2, 3)), generator)
    if kind == "pad":
        (tall, wide), (height, width) = moves, images.shape[2:]
        bordered = F.pad(images - black, (wide, wide, tall, tall)) + black
        return flip(crop(bordered, (height, width), generator), generator)
    raise ValueError(f"no jitter is named {kind!r}")


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        # Pixels are clamped after each step, so no rate alone comes to this.
        raise RunError(
            f"[data.synthesize]: the loss of the images is {value}: the network's answers are not finite, or "
            "tv, l2 or statistics is far too large"
        )
    return value


def _limits(wanted: Wanted, device: torch.device) -> tuple[Tensor, Tensor]:
    """What black and white are after normalising, (C, 1, 1) each."""
    mean = torch.tensor(wanted.mean, device=device).view(-1, 1, 1)
    std = torch.tensor(wanted.std, device=device).view(-1, 1, 1)
    return -mean / std, (1 - mean) / std


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Pixels (N, H, W, C) of normalised images (N, C, H, W): the nearest there are, clamped to 0..255."""
    own = images.detach().float().cpu()
    scaled = own * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    pixels = (scaled * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
