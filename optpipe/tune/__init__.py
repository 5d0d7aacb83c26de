"""The only training loop, and what follows from it: a network's errors and logits.

What is minimised is an :class:`Objective`: to be like the original, or to know the labels. The images
of a step and their views are a function of seed and step alone, so a checkpoint is weights, optimizer state,
the objective's running state and the number of steps, and a run that was killed ends with the weights of one
that was not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from optpipe import interruption
from optpipe.errors import RunError
from optpipe.tune.checkpoint import Checkpoint, restore, snapshot
from optpipe.tune.evaluation import BatchNorm, batches_of, distance, logit_batches, logits
from optpipe.tune.machine import native_bf16, on_this_machine, release, training_device, usable
from optpipe.tune.objective import Teachers, objective_of
from optpipe.tune.parameters import optimizer_of, trainable
from optpipe.tune.parts import Gradients
from optpipe.tune.peers import ALONE, Peers, own_part
from optpipe.tune.schedule import batch_indices, rate, steps_of, with_steps
from optpipe.types import Emit, Event, Images, Objective, Tune

__all__ = [
    "ALONE",
    "BatchNorm",
    "Checkpoint",
    "Objective",
    "Peers",
    "Teachers",
    "Trained",
    "batch_indices",
    "batches_of",
    "distance",
    "fit",
    "logit_batches",
    "logits",
    "native_bf16",
    "on_this_machine",
    "own_part",
    "rate",
    "release",
    "steps_of",
    "train",
    "training_device",
    "usable",
    "with_steps",
]


@dataclass(frozen=True, slots=True)
class Trained:
    """The loss of the first step and of the last."""

    loss_first: float
    loss_last: float


def train(
    student: fx.GraphModule,
    original: fx.GraphModule | None,
    calibration: Images,
    tune: Tune,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    emit: Emit | None = None,
    device: str = "cpu",
    teachers: Teachers | None = None,
    peers: Peers = ALONE,
    most: int | None = None,
) -> Trained:
    """Train ``student`` in place: until it is like ``original``, or on the labels with ``teachers``.

    ``tune.loss`` says which: "mimic" (PRACTISE, Eqs 31 and 34), "kd" and "cross" need the original, "labels"
    (EKG, Eqs 12 and 13) the images' labels, and the teachers where ``tune.teachers`` is not "none". Goes on
    from the checkpoint where there is one. Only batch-norm layers are ever put in train mode. On another
    ``device`` the student goes there and comes back; the original stays where it is. A batch for which a GPU
    has no memory is taken in parts (:class:`~optpipe.tune.parts.Gradients`), which an event tells; ``most``
    is how many images may be taken at once from the beginning.

    With ``peers`` it is one of several processes that train the network together, each of which calls this
    with the same arguments and ends with the same weights; the first one saves the checkpoints.

    Raises:
        UsageError: the original, the labels or the teachers that the loss needs are missing.
        RunError: the loss is no number any more, or the GPU has no memory for a single image; the checkpoint
            before it stays.
        OutOfMemoryError: one of several processes has no memory for its share.
        KeyboardInterrupt: one of several processes was asked to stop.
    """
    student.to(device).to(memory_format=torch.channels_last)
    objective = objective_of(student, original, calibration, tune, teachers, device)
    parameters = trainable(student, tune)
    return _descend(
        student,
        parameters,
        objective,
        calibration,
        tune,
        seed,
        checkpoint,
        emit=emit,
        device=device,
        peers=peers,
        most=most,
    )


def fit(
    student: nn.Module,
    objective: Objective,
    calibration: Images,
    tune: Tune,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    emit: Emit | None = None,
    device: str = "cpu",
) -> Trained:
    """Train all parameters of ``student`` in place by an objective that is given; all else as :func:`train`.

    Parameters that ask for no gradient are left as they are. Only the batches of an objective that is
    :class:`~optpipe.types.Divisible` can be taken in parts.

    Raises:
        RunError: the loss is no number any more, or the GPU has no memory; the checkpoint before it stays.
    """
    student.to(device).to(memory_format=torch.channels_last)
    parameters = {name: one for name, one in student.named_parameters() if one.requires_grad}
    for module in student.eval().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and tune.batch_norm == "train":
            module.train()
    return _descend(
        student, parameters, objective, calibration, tune, seed, checkpoint, emit=emit, device=device
    )


def _descend(
    student: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    calibration: Images,
    tune: Tune,
    seed: int,
    checkpoint: Checkpoint | None,
    *,
    emit: Emit | None,
    device: str,
    peers: Peers = ALONE,
    most: int | None = None,
) -> Trained:
    """Follow the objective's gradient for the steps of ``tune``; the student comes back to the CPU."""
    optimizer = optimizer_of(list(parameters.values()), tune)
    saved = checkpoint.load() if checkpoint is not None else None
    start = restore(saved, student, optimizer, parameters, objective) if saved is not None else 0
    first = last = float(saved["loss_first"]) if saved is not None else math.nan
    gradients = Gradients(student, objective, calibration, tune, seed, device, emit, peers, most)
    for step in range(start, tune.steps):
        # A step is whole or not at all, so that an interrupted training loses none.
        with interruption.held_back() as asked_to_stop:
            for group in optimizer.param_groups:
                group["lr"] = tune.lr * rate(step, tune)
            optimizer.zero_grad(set_to_none=True)
            before = last
            last = gradients.add(batch_indices(len(calibration), tune.batch, seed, step), step)
            if not math.isfinite(last):
                raise RunError(
                    f"training diverged at step {step} of {tune.steps}: the loss is {last}, it was "
                    f"{before:.4g} before; lower lr = {tune.lr:g}, in [recover] or where the method trains "
                    "by itself"
                )
            first = last if math.isnan(first) else first
            optimizer.step()
            done = step + 1
            stop = peers.agreed(asked_to_stop()) and done < tune.steps
            if checkpoint is not None and done < tune.steps and (stop or not done % checkpoint.every):
                state = snapshot(student, optimizer, parameters, objective, done, first)
                if peers.rank == 0:
                    checkpoint.save(state)
        if emit is not None and (done % 10 == 0 or done == tune.steps):
            emit(Event("progress", "training", f"loss {last:.4g}", done, tune.steps))
        if stop:  # another process was asked, or else the signal has ended this one
            raise KeyboardInterrupt
    optimizer.zero_grad(set_to_none=True)
    student.to("cpu").eval().requires_grad_(False)
    return Trained(first, last)
