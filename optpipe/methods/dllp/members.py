"""The networks that the particles stand for: masks drawn from each particle's theta, to ask them one by one.

A particle and a mask are one draw from the posterior that a training left (Eqs 10 and 11): where the draws
agree, the images and the training have settled the answer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from optpipe import graph
from optpipe.errors import RunError
from optpipe.methods.dllp import particles
from optpipe.methods.dllp.particles import Particles
from optpipe.types import Images

BATCH = 250


def restored(model: fx.GraphModule, masks: graph.Masks, state: Mapping[str, Tensor]) -> Particles:
    """The particles that a training left in its file, in eval mode; ``masks`` are of ``model``'s units.

    Raises:
        RunError: these are not the parameters of particles of this network.
    """
    try:
        count, costs = len(state["mu"]), state["unit_costs"].tolist()
        found = Particles([copy.deepcopy(model) for _ in range(count)], masks, 0.5, costs)
        found.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise RunError(f"these weights are not those of particles of this network: {error}") from error
    return found.eval().requires_grad_(False)


@torch.no_grad()
def sampled_probabilities(
    of: Particles, masks: graph.Masks, images: Images, draws: int, generator: torch.Generator
) -> Tensor:
    """Probabilities (S, N, C), float64, of S = particles * ``draws`` networks on all N images.

    Member p * draws + k has the weights of particle p, and the k-th mask drawn from its theta, of zeros and
    ones and the same for all images. Which temperature such masks are drawn at makes no difference
    (:mod:`~optpipe.methods.dllp.concrete`). ``generator`` is on the CPU, as the particles are.
    """
    members = []
    for index in range(len(of.networks)):
        odds = [logit.detach() for logit in of.logits_of(index)]
        for _ in range(draws):
            mask = particles.sampled(odds, masks.granularity, 1.0, generator, hard=True)
            parts = [
                particles.logits(
                    of.network(index),
                    masks,
                    mask,
                    images.batch(slice(start, min(start + BATCH, len(images)))),
                )
                for start in range(0, len(images), BATCH)
            ]
            members.append(torch.cat(parts).double().softmax(dim=-1))
    return torch.stack(members)
