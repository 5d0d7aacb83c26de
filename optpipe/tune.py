"""The only training loop: a candidate learns to mimic the original's features.

The batch of a step is a function of seed and step alone, so a checkpoint is weights, optimizer state and
the number of steps, and a run that was killed ends with the weights of one that was not.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import fx, nn

from optpipe import graph
from optpipe.augment import augment
from optpipe.errors import RunError
from optpipe.losses import mimicking_loss
from optpipe.types import Emit, Event, Images, Tune

EVALUATION_BATCH = 128

T = TypeVar("T", bound=nn.Module)


class Checkpoint(Protocol):
    """Where training leaves its state; ``save`` is called after every ``every`` steps."""

    @property
    def every(self) -> int:
        """Steps between two checkpoints."""

    def load(self) -> dict[str, torch.Tensor] | None:
        """The last state saved, or None."""

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the state."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The loss of the first step and of the last."""

    loss_first: float
    loss_last: float


def train(
    student: fx.GraphModule,
    original: fx.GraphModule,
    calibration: Images,
    tune: Tune,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    emit: Emit | None = None,
    device: str = "cpu",
) -> Trained:
    """Train ``student`` in place until it mimics ``original`` (PRACTISE, Eqs 31 and 34).

    Goes on from the checkpoint where there is one. Only batch-norm layers are ever put in train mode. On
    another ``device`` the student goes there and comes back; the original stays where it is.

    Raises:
        RunError: the loss is no number any more; the checkpoint before it stays.
    """
    readers = graph.stage_readers(original) if tune.stage_weight else ()
    layout = torch.channels_last
    pupil = graph.observe(student.to(device), readers).to(memory_format=layout)
    teacher = _there(graph.observe(original, readers).eval(), device)
    parameters = _trainable(student, pupil, tune)
    optimizer = _optimizer(list(parameters.values()), tune)
    saved = checkpoint.load() if checkpoint is not None else None
    start = _restore(saved, student, optimizer, parameters) if saved is not None else 0
    first = last = float(saved["loss_first"]) if saved is not None else math.nan
    for step in range(start, tune.steps):
        for group in optimizer.param_groups:
            group["lr"] = tune.lr * rate(step, tune)
        images = _view(calibration, tune, seed, step).to(device, memory_format=layout)
        with _autocast(tune, device):
            with torch.no_grad():
                wanted = teacher(images)
            got = pupil(images)
        loss = mimicking_loss(got, wanted, tune.stage_weight)
        before, last = last, float(loss.detach())
        if not math.isfinite(last):
            raise RunError(
                f"training diverged at step {step} of {tune.steps}: the loss is {last}, it was {before:.4g} "
                f"before; lower [recover] lr = {tune.lr:g}"
            )
        first = last if math.isnan(first) else first
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done = step + 1
        if checkpoint is not None and done % checkpoint.every == 0 and done < tune.steps:
            checkpoint.save(_state(student, optimizer, parameters, done, first))
        if emit is not None and (done % 10 == 0 or done == tune.steps):
            emit(Event("progress", "training", f"loss {last:.4g}", done, tune.steps))
    optimizer.zero_grad(set_to_none=True)
    student.to("cpu").eval().requires_grad_(False)
    return Trained(first, last)


def training_device(device: str) -> str:
    """Where to train for a target's device: on the GPU where torch can use it, else on the CPU."""
    return "cuda" if device == "cuda" and torch.cuda.is_available() else "cpu"


def on_this_machine(tune: Tune, device: str = "cpu") -> Tune:
    """``tune`` with ``autocast = "auto"`` resolved: bfloat16 where the hardware has instructions for it."""
    if tune.autocast != "auto":
        return tune
    if device == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dataclasses.replace(tune, autocast="bf16" if native else "off")


def rate(step: int, tune: Tune) -> float:
    """The factor on the learning rate at a step, from 0 to 1."""
    warmup = round(tune.warmup * tune.steps)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if tune.schedule == "cosine":
        return rise * 0.5 * (1.0 + math.cos(math.pi * step / tune.steps))
    return rise * 0.1 ** (step // max(1, math.ceil(0.4 * tune.steps)))


def batch_indices(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The images of a step: the next ``batch`` of an endless row of seeded permutations of all images."""
    size = min(batch, count)
    begin = step * size
    epochs = range(begin // count, (begin + size - 1) // count + 1)
    row = np.concatenate([np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs])
    offset = begin - epochs[0] * count
    return [int(index) for index in row[offset : offset + size]]


def distance(
    student: fx.GraphModule, original: fx.GraphModule, calibration: Images, device: str = "cpu"
) -> float:
    """The mean squared feature error on all calibration images, without augmentation (PRACTISE, Eq. 31)."""
    pupil, teacher = (_there(graph.observe(network).eval(), device) for network in (student, original))
    total, elements = 0.0, 0
    with torch.inference_mode():
        for images in _batches(calibration, device):
            (own,), (other,) = pupil(images), teacher(images)
            total += float((own - other).square().sum(dtype=torch.float64))
            elements += own.numel()
    return total / elements


def logits(network: nn.Module, images: Images, device: str = "cpu") -> torch.Tensor:
    """A network's logits (N, classes) of all images, on the CPU."""
    there = _there(network, device)
    with torch.inference_mode():
        return torch.cat([there(batch) for batch in _batches(images, device)]).cpu()


def _there(network: T, device: str) -> T:
    """The network itself on the CPU, a copy of it on another device: the caller's stays where it is."""
    return network if device == "cpu" else copy.deepcopy(network).to(device)


def _batches(images: Images, device: str) -> Iterator[torch.Tensor]:
    for start in range(0, len(images), EVALUATION_BATCH):
        yield images.batch(slice(start, min(start + EVALUATION_BATCH, len(images)))).to(device)


def _view(calibration: Images, tune: Tune, seed: int, step: int) -> torch.Tensor:
    indices = batch_indices(len(calibration), tune.batch, seed, step)
    state = np.random.SeedSequence([seed, step]).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
    return augment(tune.augment, calibration.batch(indices), generator)


def _trainable(student: fx.GraphModule, pupil: fx.GraphModule, tune: Tune) -> dict[str, nn.Parameter]:
    """The parameters to train by name, with modes and gradients set accordingly."""
    student.eval().requires_grad_(False)
    if tune.trainable == "adaptors":
        found = {
            f"{path}.{name}": parameter
            for path, adaptor in graph.adaptors(student).items()
            for name, parameter in adaptor.named_parameters()
        }
    else:
        found = dict(pupil.named_parameters())
    if not found:
        raise RunError(f"nothing to train: the candidate has no {tune.trainable}")
    for parameter in found.values():
        parameter.requires_grad_(True)
    if tune.batch_norm == "train":
        for module in pupil.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
    return found


def _optimizer(parameters: Sequence[nn.Parameter], tune: Tune) -> torch.optim.Optimizer:
    if tune.optimizer == "adamw":
        return torch.optim.AdamW(parameters, tune.lr, weight_decay=tune.weight_decay)
    return torch.optim.SGD(
        parameters,
        tune.lr,
        momentum=tune.momentum,
        nesterov=tune.nesterov,
        weight_decay=tune.weight_decay,
    )


@contextmanager
def _autocast(tune: Tune, device: str) -> Iterator[None]:
    with torch.autocast(device, torch.bfloat16, enabled=on_this_machine(tune, device).autocast == "bf16"):
        yield


def _state(
    student: fx.GraphModule,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    step: int,
    loss_first: float,
) -> dict[str, torch.Tensor]:
    """Everything that training needs to go on, as one flat dictionary."""
    state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                state[f"optimizer.{kind}.{name}"] = value
    state["step"] = torch.tensor(step)
    state["loss_first"] = torch.tensor(loss_first, dtype=torch.float64)
    return {name: tensor.cpu() for name, tensor in state.items()}


def _restore(
    saved: Mapping[str, torch.Tensor],
    student: fx.GraphModule,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
) -> int:
    """Put a saved state back; returns the steps that were done."""
    prefix = "model."
    student.load_state_dict(
        {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    )
    for key, value in saved.items():
        if key.startswith("optimizer."):
            _, kind, name = key.split(".", 2)
            parameter = parameters[name]
            like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
            optimizer.state[parameter][kind] = like.copy_(value)
    return int(saved["step"])
