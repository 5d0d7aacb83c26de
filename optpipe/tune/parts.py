"""The gradient of a step: of its whole batch at once, or in parts where the device has no memory for that."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import nn

from optpipe.errors import RunError
from optpipe.tune.machine import on_this_machine, release
from optpipe.tune.peers import ALONE, Peers, own_part
from optpipe.tune.views import views_of
from optpipe.types import Divisible, Emit, Event, Images, Objective, Tune


class Gradients:
    """The gradients of a training's steps, each taken in as few parts as the device has memory for.

    A batch that does not fit is halved, and stays halved for the rest of the training; the step is taken
    again from where it began. Losses and gradients are those of the whole batch, the mean over its images;
    so is the one update that running statistics get in a step, but for the variance between the parts. What
    differs is a batch-norm in train mode: it normalises each part with the part's own statistics.

    Of several processes each takes its own share of every part, and the gradients that are added are the
    whole batch's in all of them. They cannot begin a step again by themselves: who has no memory left says so
    to whoever began the processes.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective,
        calibration: Images,
        tune: Tune,
        seed: int,
        device: str,
        emit: Emit | None,
        peers: Peers = ALONE,
        most: int | None = None,
    ) -> None:
        """All ``peers`` begin with the state that the student has now, ``most`` images at once if given."""
        self._student = student
        self._objective = objective
        self._divisible = objective if isinstance(objective, Divisible) else None
        self._calibration = calibration
        self._tune = tune
        self._seed = seed
        self._device = device
        self._emit = emit
        self._half = on_this_machine(tune, device).autocast == "bf16"
        self._statistics = Statistics(student)
        self._peers = peers
        self._most = min(tune.batch, len(calibration), most or tune.batch)
        self._loss = peers.joined(_Loss(student, objective))

    def add(self, chosen: Sequence[int], step: int) -> float:
        """Add the gradient of a step's images to the parameters, which have none yet; returns the loss.

        Raises:
            RunError: the device has no memory for a single image, or for a batch that cannot be divided.
            OutOfMemoryError: one of several processes has no memory for its share.
        """
        self._statistics.keep()
        while True:
            try:
                return self._whole(chosen, step)
            except torch.OutOfMemoryError:
                if self._peers.size > 1:
                    raise
            # Not within the except: what it has caught holds on to all that the step had in memory.
            self._begin_again(step)

    def _whole(self, chosen: Sequence[int], step: int) -> float:
        parts = parts_of(len(chosen), self._most, self._peers.size)
        total = torch.zeros((), device=self._device)
        noted: list[tuple[range, torch.Tensor]] = []
        for rows in parts:
            self._statistics.begin()
            own = own_part(rows, self._peers)
            with contextlib.nullcontext() if rows is parts[-1] else self._peers.apart(self._loss):
                total = total + self._part(own, chosen, step)
            self._statistics.end(len(rows) / len(chosen))
            if self._divisible is not None:
                noted.append((own, self._divisible.noted()))
        self._statistics.update()
        if self._divisible is not None:
            self._divisible.remember(self._of_all(noted, len(chosen)))
        return float(self._peers.total(total))

    def _part(self, rows: range, chosen: Sequence[int], step: int) -> torch.Tensor:
        """Add what these of the step's images have of its gradient; returns what they have of its loss."""
        views = views_of(
            self._calibration, chosen, self._tune, self._seed, step, rows=rows, device=self._device
        )
        with self._peers.normalised(), torch.autocast(self._device, torch.bfloat16, enabled=self._half):
            loss = self._loss(
                [chosen[row] for row in rows], views.contiguous(memory_format=torch.channels_last)
            )
        share = len(rows) / len(chosen)
        # Of the gradients of all processes the mean is taken, and the sum is wanted.
        self._peers.backward(loss * (share * self._peers.size))
        found: torch.Tensor = share * loss.detach()
        return found

    def _of_all(self, noted: Sequence[tuple[range, torch.Tensor]], count: int) -> torch.Tensor:
        """What the processes noted of a step's images, in the batch's order."""
        _, first = noted[0]
        if not len(first):
            return first
        whole = first.new_zeros(count)
        for rows, found in noted:
            whole[rows.start : rows.stop] = found
        return self._peers.total(whole)

    def _begin_again(self, step: int) -> None:
        """Put everything back to where the step began, and halve what is taken at once."""
        for parameter in self._student.parameters():
            parameter.grad = None
        release(self._device)
        self._statistics.put_back()
        if self._divisible is None:
            raise RunError(
                f"out of memory on the GPU at step {step} of {self._tune.steps}, and this training takes its "
                f"batches of {self._most} images whole; set a smaller batch where the method trains by itself"
            )
        self._divisible.noted()  # of a part that was taken in vain
        before, self._most = self._most, (self._most + 1) // 2
        if before == 1:
            raise RunError(
                f"out of memory on the GPU at step {step} of {self._tune.steps}, with one image at a time "
                f'(views = {self._tune.views}); set fewer views, autocast = "bf16" or a smaller '
                "[data.preprocess] size, or train on a larger GPU"
            )
        if self._emit is not None:
            self._emit(Event("warning", "training", self._told(before)))

    def _told(self, before: int) -> str:
        text = (
            f"out of memory on the GPU with {before} images at once: goes on with {self._most} at once, in "
            f"batches of {min(self._tune.batch, len(self._calibration))} as before"
        )
        return text + ("; batch-norms see so many at once" if self._statistics else "")


class _Loss(nn.Module):
    """The objective as a module of the student's parameters, whose gradients processes can join."""

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self._objective = objective

    def forward(self, which: Sequence[int], images: torch.Tensor) -> torch.Tensor:
        """As :meth:`~optpipe.types.Objective.loss`."""
        return self._objective.loss(which, images)


def parts_of(count: int, most: int, least: int = 1) -> list[range]:
    """A batch's places in as few runs of at most ``most`` as there can be, none more than one longer.

    None is shorter than ``least`` either, for which ``count`` must do; that comes first.
    """
    number = min(-(-count // most), count // least)
    edges = [count * part // number for part in range(number + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(edges)]


class Statistics:
    """The running statistics that a training moves: one update a step, in whatever parts it is taken.

    Each part moves them from where the step began; the step moves them to the mean of where its parts did.
    Empty, and so false, where no batch-norm is in train mode.
    """

    def __init__(self, student: nn.Module) -> None:
        self._live = [
            buffer
            for module in student.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
            for buffer in module.buffers(recurse=False)
        ]
        self._before: list[torch.Tensor] = []
        self._ends: list[tuple[float, list[torch.Tensor]]] = []

    def __bool__(self) -> bool:
        return bool(self._live)

    def keep(self) -> None:
        """Remember them as they are before a step."""
        self._before = [buffer.clone() for buffer in self._live]
        self._ends = []

    def put_back(self) -> None:
        """Have them as they were before the step, of which nothing is left."""
        self._ends = []
        self._set(self._before)

    def begin(self) -> None:
        """Before a part of the step."""
        if self._ends:
            self._set(self._before)

    def end(self, share: float) -> None:
        """After a part that is this share of the step."""
        self._ends.append((share, [] if share == 1 else [buffer.clone() for buffer in self._live]))

    def update(self) -> None:
        """After the last part."""
        if len(self._ends) < 2:
            return
        for place, buffer in enumerate(self._live):
            if buffer.is_floating_point():  # the others count steps, of which each part did one
                ends = torch.stack([share * end[place] for share, end in self._ends])
                buffer.copy_(ends.sum(dim=0))

    def _set(self, values: Sequence[torch.Tensor]) -> None:
        for buffer, value in zip(self._live, values, strict=True):
            buffer.copy_(value)
