"""The particles: networks, their gates, their slabs' scales, their likelihood's precision (Algorithm 1)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from optpipe import graph
from optpipe.methods.dllp import concrete

PART = "networks.{}."
"""Where a particle's weights are among those of all, by its number."""


class Particles(nn.Module):
    """M = {Theta, d, lambda, {theta}} for each particle, all of them parameters.

    ``networks[i]`` hold Theta; ``gates[i][k]`` are the evidence phi of the units of set k, whose theta is
    sigmoid(s (phi - mu[i] c[k])) (see :mod:`~optpipe.methods.dllp.pressure`), s being the ``sharpness``;
    ``log_scale[i]`` (sets,) are log lambda of each set; ``log_precision[i]`` is log d.
    """

    mu: Tensor
    sharpness: Tensor
    unit_costs: Tensor

    def __init__(
        self,
        networks: Sequence[fx.GraphModule],
        masks: graph.Masks,
        keep: float,
        unit_costs: Sequence[float],
    ) -> None:
        super().__init__()
        self.register_buffer("sharpness", torch.ones(()))
        self.register_buffer("mu", torch.zeros(len(networks), dtype=torch.float64))
        self.register_buffer("unit_costs", torch.tensor(unit_costs, dtype=torch.float32))
        self.networks = nn.ModuleList(networks)
        logit = torch.logit(torch.tensor(keep)).item()
        self.gates = nn.ModuleList(
            nn.ParameterList(nn.Parameter(torch.full(shape, logit)) for shape in masks.shapes)
            for _ in networks
        )
        # The slab begins as wide as the weights are: where d log p / d log lambda is zero.
        self.log_scale = nn.ParameterList(nn.Parameter(_log_scales(network, masks)) for network in networks)
        self.log_precision = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in networks)

    def network(self, index: int) -> fx.GraphModule:
        """The network of a particle, unmasked."""
        return cast("fx.GraphModule", self.networks[index])

    def gates_of(self, index: int) -> list[Tensor]:
        """The evidence phi of a particle's units, one tensor for each set."""
        return list(cast("nn.ParameterList", self.gates[index]))

    def logits_of(self, index: int) -> list[Tensor]:
        """s (phi - mu c): the log-odds of a particle's units, one tensor a set; differentiable in phi."""
        lowered, sharp = (self.mu[index] * self.unit_costs).tolist(), float(self.sharpness)
        return [sharp * (gate - less) for gate, less in zip(self.gates_of(index), lowered, strict=True)]

    def hyper(self, index: int) -> dict[str, Tensor]:
        """The parameters of a particle beside its weights, by name."""
        gates = {f"gates.{number}": gate for number, gate in enumerate(self.gates_of(index))}
        return {
            **gates,
            "log_scale": self.log_scale[index],
            "log_precision": self.log_precision[index],
        }

    def ranks(self, index: int, granularity: graph.Granularity) -> list[Tensor]:
        """What a particle's units are ordered by, in each set's shape: log-odds, double, on the CPU.

        Of sharpened units theta is 0 or 1 to the last bit, and would order them no more. Of 2:4 it is theta.
        """
        if granularity == "2:4":
            return self.probabilities(index, granularity)
        return [logit.detach().cpu().double() for logit in self.logits_of(index)]

    def probabilities(self, index: int, granularity: graph.Granularity) -> list[Tensor]:
        """theta of a particle's units, in each set's shape, detached, on the CPU."""
        return [theta(logit.detach().cpu(), granularity) for logit in self.logits_of(index)]


def begin(
    model: fx.GraphModule,
    masks: graph.Masks,
    count: int,
    *,
    start: Literal["pretrained", "scratch"],
    keep: float,
    jitter: float,
    seed: int,
    unit_costs: Sequence[float],
) -> Particles:
    """Particles as they are before training.

    Pretrained, the first is the model itself and the others are ``jitter`` away from it: particles in one
    place would never part, since the kernel's gradient there is zero. From scratch each has weights of its
    own.
    """
    networks = []
    for number in range(count):
        network = copy.deepcopy(model).requires_grad_(True)
        if start == "scratch":
            _initialise(network, seed + number)
        elif number:
            _shake(network, jitter, torch.Generator().manual_seed(seed + number))
        networks.append(network)
    return Particles(networks, masks, keep, unit_costs)


def theta(logit: Tensor, granularity: graph.Granularity) -> Tensor:
    """The probability that a unit stays, of its log-odds."""
    if granularity == "2:4":
        return graph.from_fours(concrete.inclusion(graph.fours(logit)), logit.shape)
    return torch.sigmoid(logit)


def sampled(
    gates: Sequence[Tensor],
    granularity: graph.Granularity,
    temperature: float,
    generator: torch.Generator,
    *,
    hard: bool = False,
) -> list[Tensor]:
    """Masks of a particle's units, one tensor for each set, differentiable in the gates."""
    if granularity == "2:4":
        return [
            graph.from_fours(
                concrete.two_of_four(graph.fours(gate), temperature, generator, hard), gate.shape
            )
            for gate in gates
        ]
    return [concrete.sample(gate, temperature, generator, hard) for gate in gates]


def logits(network: fx.GraphModule, masks: graph.Masks, mask: Sequence[Tensor], images: Tensor) -> Tensor:
    """Logits (N, classes) of a masked network, differentiable in its weights and in the mask."""
    return cast("Tensor", functional_call(network, masks.weights(network, mask), (images,)))


def _log_scales(network: fx.GraphModule, masks: graph.Masks) -> Tensor:
    """log lambda of each set at which the slab's variance is the mean square of the set's weights."""
    found = [
        values.detach().mean() / count
        for values, count in zip(masks.squares(network), masks.counts(network), strict=True)
    ]
    return -0.5 * torch.log(torch.stack(found).clamp(min=1e-12))


@torch.no_grad()
def _shake(network: nn.Module, jitter: float, generator: torch.Generator) -> None:
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(jitter * parameter.square().mean().sqrt() * noise)


@torch.no_grad()
def _initialise(network: nn.Module, seed: int) -> None:
    """New weights: uniform within the bounds that PyTorch has for these layers, norms as they begin.

    Other layers with parameters of their own keep them.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters(recurse=False):
                parameter.uniform_(-bound, bound, generator=generator)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
