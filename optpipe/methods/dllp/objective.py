"""The gradient that the particles follow (Eqs 13 to 15), as the one training loop takes it.

For particle i with weights Theta_i and masks z_i sampled from its gates, on a batch of B of N images:

    grad J_i = grad CE(f(z_i * Theta_i), Y)  -  (beta / N) phi_i                                      (15)

with phi_i the Stein direction (Eq. 14) of log p(Theta | Y, X) = N / B times the log-likelihood of the batch
(Eq. 9) + the log of the spike-and-slab prior at z_i * Theta_i (Eq. 10), of
:mod:`~optpipe.methods.dllp.prior`: an unbiased estimate of the posterior of all N images, to which
Algorithm 1, line 6, gives the batch alone. Divided by N, as the cross-entropy is a mean, beta weighs one
against the other; the posterior of a batch would pull weights to zero N / B times as hard.

Deviations. A filter's length is nothing that the network knows where a batch-norm follows it. The slab pulls
along that length alone, and with lambda following the shorter weights there is no end to it; so there the
prior moves gates and lambda, and not the weights. The kernel is of the weights alone, as Eq. 14 has it;
gates, lambda and d follow their own scores. Those are few, and their gradients differ by orders of magnitude,
so each moves by its gradient over the root of its running mean square (Kingma and Ba, 2015), lambda and d
by far less than gates. The expected cost (see :mod:`~optpipe.methods.dllp.pressure`) is kept from falling
below the budget's, and from exceeding what is allowed, which falls evenly from the whole network's to the
budget's over the first :data:`FALL` of the steps. The log-odds are sharpened by and by, so that the last
masks are nearly certain: the masks' temperature makes them of zeros and ones, and does not settle which.

What they were measured to do (``benchmarks/results/dllp_*``, ResNet-20, three seeds). Settling: at the end of
the gates' training the networks of sampled masks are right in 79 to 82% of the training images at -55% MACs
and in 73 to 78% at -30% latency; after it, with their masks fixed, in 92% and in 87 to 90%, and the cut
changes no logit. Holding the expected cost up to the budget is there because a thousand images of digits let
far more units close than the budget asked for; leading the cost along the schedule from below as well was
tried on the table at equal MACs, looked no better, and is not done. Sharpening, the levels of the rates and
what of the prior moves weights were not measured apart.

With one particle there is no kernel, and phi_i is its score. With beta = 0 neither is computed, and lambda
and d rest. With fixed masks, the limit of temperature zero, gates rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from optpipe import graph
from optpipe.methods.dllp import concrete, particles, prior, stein
from optpipe.methods.dllp.particles import Particles
from optpipe.methods.dllp.pressure import Pressure, multiplier

FALL = 0.7
"""The share of the steps over which the allowed cost falls to the budget."""
DECAY = 0.98
"""Of the running mean square of what is no weight."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an objective needs of the recipe.

    ``aim`` is the cost that the budget allows, a fraction.

    ``gate_rate`` and ``scale_rate`` are the steps of gates, and of log lambda and log d, over the learning
    rate; ``sharpen`` is the factor that log-odds have at the last step.
    """

    steps: int
    seed: int
    images: int
    beta: float
    kernel: stein.Kernel
    spike: float
    temperature: tuple[float, float]
    aim: float
    gate_rate: float
    scale_rate: float
    sharpen: float


@dataclass(slots=True)
class Stein:
    """The objective of particles; a :class:`~optpipe.types.Objective`.

    ``fixed`` are the masks of each particle where they are no longer sampled. ``pressure`` is None where
    nothing is to go.
    """

    of: Particles
    masks: graph.Masks
    labels: Tensor
    settings: Settings
    pressure: Pressure | None = None
    fixed: Sequence[Sequence[Tensor]] | None = None
    step: int = 0
    squares: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, which: Sequence[int], images: Tensor) -> Tensor:
        """The mean cross-entropy of the particles, with the gradient of Eq. 15 in every parameter."""
        labels = self.labels[torch.tensor(which)].to(images.device)
        labels = labels.repeat(len(images) // len(labels))
        count = len(self.of.networks)
        tasks: list[dict[str, Tensor]] = []
        scores: list[dict[str, Tensor]] = []
        errors = []
        for index in range(count):
            error, task, score = self._gradients(index, images, labels)
            errors.append(error)
            tasks.append(task)
            scores.append(score)
        weights = [dict(self.of.network(index).named_parameters()) for index in range(count)]
        towards = self._directions(weights, scores)
        share = self.settings.beta / self.settings.images
        total = torch.zeros((), device=images.device)
        for index in range(count):
            for name, weight in weights[index].items():
                total = total + (weight * (tasks[index][name] - share * towards[index][name])).sum()
            for name, parameter in self.of.hyper(index).items():
                if self.fixed is not None and name.startswith("gates."):
                    continue
                gradient = tasks[index].get(name, 0.0) - share * scores[index][name]
                total = total + (parameter * self._levelled(f"{index}.{name}", gradient)).sum()
        self.step += 1
        # The sum has the right gradient and no meaning: what is reported is the task's loss.
        return total - total.detach() + torch.stack(errors).mean()

    def state(self) -> dict[str, Tensor]:
        """The step and the running mean squares."""
        squares = {f"squares.{name}": value for name, value in self.squares.items()}
        return {"step": torch.tensor(self.step), **squares}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where a training was stopped."""
        self.step = int(saved["step"])
        device = self.of.log_scale[0].device
        begun = "squares."
        self.squares = {
            name.removeprefix(begun): value.to(device)
            for name, value in saved.items()
            if name.startswith(begun)
        }

    def _gradients(
        self, index: int, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The cross-entropy of a particle, its gradients and those of the log posterior, by name."""
        network, own = self.of.network(index), self.of.hyper(index)
        self._press(index)
        mask = self._mask(index, self.of.logits_of(index))
        logits = particles.logits(network, self.masks, mask, images).float()
        error = F.cross_entropy(logits, labels)
        wanted: dict[str, Tensor] = {**dict(network.named_parameters()), **own}
        if self.settings.beta == 0:
            task = _gradients(error, wanted)
            return error.detach(), task, {name: torch.zeros_like(value) for name, value in wanted.items()}
        posterior = self._likelihood(logits, labels, own["log_precision"]) + self._prior(index, mask)
        task = _gradients(error, wanted, again=True)
        score = _gradients(posterior, wanted)
        return (
            error.detach(),
            task,
            {name: score.get(name, torch.zeros_like(p)) for name, p in wanted.items()},
        )

    def _likelihood(self, logits: Tensor, labels: Tensor, log_precision: Tensor) -> Tensor:
        """log of Eq. 9 for all images, estimated from the batch."""
        scale = self.settings.images / len(labels)
        return scale * prior.log_likelihood(logits, labels, log_precision)

    def _mask(self, index: int, odds: Sequence[Tensor]) -> list[Tensor]:
        if self.fixed is not None:
            return [mask.to(logit) for mask, logit in zip(self.fixed[index], odds, strict=True)]
        settings = self.settings
        heat = concrete.temperature(self.step, settings.steps, *settings.temperature)
        # Every step and particle draws its own, whatever was drawn before: a resumed training goes on alike.
        seed = (settings.seed * 1_000_003 + self.step) * 64 + index
        generator = torch.Generator().manual_seed(seed)
        return particles.sampled(odds, self.masks.granularity, heat, generator)

    def _prior(self, index: int, mask: Sequence[Tensor]) -> Tensor:
        """log of Eq. 10 at the masked weights, the sum over all units."""
        network, scales = self.of.network(index), self.of.log_scale[index]
        odds, blind = self.of.logits_of(index), self.masks.blind
        sums = []
        for number, (values, count) in enumerate(
            zip(self.masks.squares(network), self.masks.counts(network), strict=True)
        ):
            logit = odds[number]
            if self.masks.granularity == "2:4":
                logit = torch.logit(particles.theta(logit, "2:4"), eps=1e-6)
            squares = (values.detach() if blind[number] else values) * mask[number].square()
            counts = torch.tensor(count, device=squares.device)
            sums.append(prior.log_mixture(squares, counts, logit, scales[number], self.settings.spike).sum())
        return torch.stack(sums).sum()

    def _press(self, index: int) -> None:
        """Move mu to where the expected cost is what the schedule allows."""
        if self.pressure is None or self.fixed is not None:
            return
        share = self.step / max(1, self.settings.steps - 1)
        sharp = self.settings.sharpen**share
        self.of.sharpness.fill_(sharp)
        pressure, sizes = self.pressure, [shape.numel() for shape in self.masks.shapes]
        odds = torch.cat([gate.detach().flatten().double() for gate in self.of.gates_of(index)])
        sets = torch.repeat_interleave(torch.tensor(sizes, device=odds.device))
        lowered = self.of.unit_costs.double()[sets]
        empty = torch.zeros(len(sizes), dtype=torch.float64, device=odds.device)

        def cost(mu: float) -> float:
            counts = empty.index_add(0, sets, torch.sigmoid(sharp * (odds - mu * lowered)))
            return pressure.cost(counts.cpu())

        allowed = self._allowed()
        self.of.mu[index] = multiplier(cost, min(self.settings.aim, allowed), allowed)

    def _allowed(self) -> float:
        """The most that is allowed to be expected at this step."""
        share = min(1.0, self.step / max(1.0, FALL * self.settings.steps))
        return 1.0 - share * (1.0 - self.settings.aim)

    def _directions(
        self, weights: Sequence[Mapping[str, Tensor]], scores: Sequence[Mapping[str, Tensor]]
    ) -> Sequence[Mapping[str, Tensor]]:
        """phi of every particle (Eq. 14)."""
        own = [{name: score[name] for name in weights[0]} for score in scores]
        if len(weights) < 2 or self.settings.beta == 0:
            return own
        return stein.directions(weights, own, self.settings.kernel)

    def _levelled(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient over the root of its running mean square, times the rate."""
        before = self.squares.get(name)
        now = gradient.square()
        if before is None:
            before = now.clone()
        self.squares[name] = DECAY * before + (1 - DECAY) * now
        rate = self.settings.gate_rate if ".gates." in name else self.settings.scale_rate
        return rate * gradient / (self.squares[name].sqrt() + 1e-12)


def _gradients(value: Tensor, wanted: Mapping[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
    """The gradients of a value in those parameters that it depends on."""
    found = torch.autograd.grad(value, list(wanted.values()), retain_graph=again, allow_unused=True)
    named = zip(wanted, cast("Sequence[Tensor | None]", found), strict=True)
    return {name: gradient for name, gradient in named if gradient is not None}
