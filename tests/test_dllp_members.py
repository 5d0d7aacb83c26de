"""The ensemble of sampled masks: whose networks its members are, and particles brought back from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest
import torch
from torch import fx, nn

from optpipe import graph, uncertainty
from optpipe.errors import RunError
from optpipe.methods.dllp import members, particles
from optpipe.methods.dllp.particles import Particles

SHAPE = (3, 8, 8)


@dataclass(frozen=True)
class Noise:
    """Images of noise."""

    pixels: torch.Tensor
    labels: torch.Tensor | None = None
    digest: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Sequence[int] | slice) -> torch.Tensor:
        return self.pixels[indices if isinstance(indices, slice) else list(indices)]


def images(count: int = 5) -> Noise:
    return Noise(torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3)))


def model() -> fx.GraphModule:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return graph.trace(network.eval(), SHAPE)


def masks_of(network: fx.GraphModule) -> graph.Masks:
    return graph.Masks(network, graph.width_map(network, SHAPE), "filter")


def learnt(network: fx.GraphModule, masks: graph.Masks, logit: float, count: int = 2) -> Particles:
    """Particles from scratch of which every unit has these log-odds."""
    found = particles.begin(
        network,
        masks,
        count,
        start="scratch",
        keep=0.5,
        jitter=0.0,
        seed=0,
        unit_costs=[1.0] * len(masks.names),
    )
    with torch.no_grad():
        for index in range(count):
            for gate in found.gates_of(index):
                gate.fill_(logit)
    return found.eval()


def sampled(of: Particles, masks: graph.Masks, draws: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return members.sampled_probabilities(of, masks, images(), draws, generator)


def test_where_all_units_stay_the_members_are_the_particles_networks() -> None:
    network = model()
    masks = masks_of(network)
    of = learnt(network, masks, 40.0)
    found = sampled(of, masks, 3)
    assert found.shape == (6, 5, 4) and found.dtype == torch.float64
    for index in range(2):
        expected = cast("torch.Tensor", of.network(index)(images().pixels)).double().softmax(1)
        for draw in range(3):
            torch.testing.assert_close(found[3 * index + draw], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], found[3], atol=1e-3)


def test_masks_of_an_open_theta_differ_from_draw_to_draw_and_are_those_of_the_seed() -> None:
    network = model()
    masks = masks_of(network)
    of = learnt(network, masks, 0.0, count=1)
    found = sampled(of, masks, 4)
    torch.testing.assert_close(found, sampled(of, masks, 4), rtol=0, atol=0)
    assert not torch.allclose(found, sampled(of, masks, 4, seed=1))
    assert uncertainty.decompose(found.numpy()).epistemic.min() > 0


def test_a_lower_theta_by_mu_is_what_the_masks_are_drawn_from() -> None:
    """Evidence of 40 and costs that take 80: no unit is drawn, so that all images look the same."""
    network = model()
    masks = masks_of(network)
    of = learnt(network, masks, 40.0, count=1)
    of.mu.fill_(80.0)
    found = sampled(of, masks, 1)
    torch.testing.assert_close(found, found[:, :1].expand_as(found))


def test_images_beyond_a_batch_are_all_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()
    masks = masks_of(network)
    of = learnt(network, masks, 0.0)
    whole = sampled(of, masks, 2)
    monkeypatch.setattr(members, "BATCH", 2)
    np.testing.assert_allclose(sampled(of, masks, 2).numpy(), whole.numpy(), rtol=1e-5, atol=1e-7)


def test_a_file_brings_the_particles_back() -> None:
    network = model()
    masks = masks_of(network)
    of = learnt(network, masks, 0.7)
    of.mu.fill_(0.3)
    again = members.restored(network, masks, of.state_dict())
    assert not again.training and not any(parameter.requires_grad for parameter in again.parameters())
    torch.testing.assert_close(sampled(again, masks, 2), sampled(of, masks, 2), rtol=0, atol=0)


def test_weights_of_something_else_are_refused() -> None:
    network = model()
    masks = masks_of(network)
    with pytest.raises(RunError, match="not those of particles of this network"):
        members.restored(network, masks, network.state_dict())
    state = learnt(network, masks, 0.0).state_dict()
    state["gates.0.0"] = state["gates.0.0"][:2]
    with pytest.raises(RunError, match=r"gates\.0\.0"):
        members.restored(network, masks, state)
