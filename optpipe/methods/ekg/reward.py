"""The reward of a sub-network, and what each filter is worth to it (EKG, Eqs 7 to 9).

    R = - CE(labels; network) - CE(softmax(T); network)                                       (7)
    T_i = mean of the logits of the interim networks 0 .. i                                   (8)
    S(filter) = | sum over images and positions of dR/df * f |                                (9)

f is the input feature map of the next layer. Candidates are masks on those maps: a mask that multiplies f
has the gradient sum(dR/df * f) at one, so that one backward pass scores all filters of all layers.
Batch-norm uses the statistics of the batch, as the authors' search does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx

from optpipe import graph
from optpipe.methods.ekg import layers, scores
from optpipe.types import Images, Plan

Guide = Literal["none", "single", "ensemble"]
Kept = tuple[tuple[int, ...], ...]
"""The channels that each group keeps, ascending."""

BATCH = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """What taking channels out of one group does. ``removed`` are its channels, the lowest score first."""

    group: int
    removed: tuple[int, ...]
    reward: float
    loss: float


@dataclass(frozen=True, slots=True)
class Facts:
    """A network on the validation images and the candidates for its next step.

    ``loss`` is the cross-entropy to the labels. As a tuple of numbers it can be stored.
    """

    reward: float
    loss: float
    candidates: tuple[Candidate, ...]

    def encode(self) -> tuple[float, ...]:
        """reward, loss, then for each candidate: group, reward, loss, how many channels, the channels."""
        values = [self.reward, self.loss]
        for one in self.candidates:
            values += [one.group, one.reward, one.loss, len(one.removed), *one.removed]
        return tuple(map(float, values))

    @staticmethod
    def decode(values: Sequence[float]) -> Facts:
        """What :meth:`encode` made numbers of."""
        found: list[Candidate] = []
        at = 2
        while at < len(values):
            count = int(values[at + 3])
            removed = tuple(int(value) for value in values[at + 4 : at + 4 + count])
            found.append(Candidate(int(values[at]), removed, values[at + 1], values[at + 2]))
            at += 4 + count
        return Facts(values[0], values[1], tuple(found))


class Judge:
    """Evaluates sub-networks of one network on the validation images (D_val).

    It remembers the logits of the interim networks it has seen, so that a search that goes on computes
    each once, and one that is resumed computes them again.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        input_shape: tuple[int, int, int],
        images: Images,
        indices: Sequence[int],
        *,
        score: scores.Score,
        guide: Guide,
        autocast: bool,
        device: str,
        seed: int,
    ) -> None:
        self._network = network
        self._score: scores.Score = score
        self._guide = guide
        self._seed = seed
        self._gated = graph.Gated(network, input_shape, autocast=autocast, device=device)
        # A score by a filter's own output needs gates elsewhere.
        self._own = (
            graph.Gated(network, input_shape, at="own", autocast=autocast, device=device)
            if score == "gbn"
            else None
        )
        assert images.labels is not None
        parts = _balanced(indices, BATCH)
        self._images = [images.batch(part).to(device) for part in parts]
        self._labels = [images.labels[list(part)].to(device) for part in parts]
        self._total = len(indices)
        self._sum: list[torch.Tensor] = []
        self._seen = 0

    def facts(self, history: Sequence[Kept], after: Sequence[int | None], gains: Sequence[float]) -> Facts:
        """The last network of ``history`` and its candidates: group g would keep ``after[g]`` channels.

        None leaves a group alone. ``gains`` is what each candidate would save, in any unit: the layers that
        are tried are those whose filters are cheap for what they save.
        """
        kept = history[-1]
        masks = self._masks(kept)
        knowledge = self._knowledge(history)
        values = self._scores(kept, masks, knowledge)
        changes = []
        for group, count in enumerate(after):
            if count is not None:
                order = sorted(kept[group], key=values[group].tolist().__getitem__)
                changes.append((group, tuple(order[: len(kept[group]) - count])))
        sums = [float(values[group][list(removed)].sum()) / gains[group] for group, removed in changes]
        changes = [changes[index] for index in layers.tried(sums)]
        return self._compare(masks, knowledge, changes)

    def measure(self, history: Sequence[Kept]) -> Facts:
        """The last network of ``history``, no candidates."""
        return self._compare(self._masks(history[-1]), self._knowledge(history), [])

    def plan(self, kept: Kept) -> Plan:
        """What is taken out."""
        return self._gated.plan(self._masks(kept))

    def _masks(self, kept: Kept) -> list[torch.Tensor]:
        masks = [torch.zeros_like(mask) for mask in self._gated.whole()]
        for mask, channels in zip(masks, kept, strict=True):
            mask[list(channels)] = 1.0
        return masks

    def _knowledge(self, history: Sequence[Kept]) -> list[torch.Tensor]:
        """T_i (Eq. 8) for each batch, the probabilities (B, classes); nothing where nobody guides."""
        if self._guide == "none":
            return []
        last = len(history) if self._guide == "ensemble" else 1
        for kept in history[self._seen : last]:
            masks = self._masks(kept)
            with torch.no_grad():
                logits = [self._gated.logits(images, masks) for images in self._images]
            self._sum = [a + b for a, b in zip(self._sum, logits, strict=True)] if self._seen else logits
            self._seen += 1
        assert self._seen == last, "a search only ever goes on"
        return [(total / self._seen).softmax(dim=1) for total in self._sum]

    def _scores(
        self, kept: Kept, masks: list[torch.Tensor], knowledge: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        groups = self._gated.groups
        if not scores.comparable(self._score):
            return scores.of_weights(self._score, self._network, groups, kept, self._seed)
        gated = self._own or self._gated
        leaves = [mask.clone().requires_grad_() for mask in masks]
        for number, images in enumerate(self._images):
            logits = gated.logits(images, leaves)
            reward, _ = self._reward(logits, number, knowledge)
            (reward * (len(images) / self._total)).backward()  # type: ignore[no-untyped-call]
        found = []
        for leaf in leaves:
            assert leaf.grad is not None
            found.append(leaf.grad.abs().cpu())
        return found

    def _reward(
        self, logits: torch.Tensor, number: int, knowledge: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(R (7), cross-entropy to the labels) of one batch's logits (B, classes)."""
        loss = F.cross_entropy(logits, self._labels[number])
        if not knowledge:
            return -loss, loss
        return -loss - F.cross_entropy(logits, knowledge[number]), loss

    @torch.no_grad()
    def _compare(
        self,
        masks: list[torch.Tensor],
        knowledge: list[torch.Tensor],
        changes: Sequence[tuple[int, tuple[int, ...]]],
    ) -> Facts:
        changed = []
        for group, removed in changes:
            mask = masks[group].clone()
            mask[list(removed)] = 0.0
            changed.append((group, mask))
        # The network itself is the candidate that changes nothing.
        asked = [(0, masks[0]), *changed]
        rewards, losses = torch.zeros(len(asked)), torch.zeros(len(asked))
        for number, images in enumerate(self._images):
            share = len(images) / self._total
            for index, logits in enumerate(self._gated.candidates(images, masks, asked)):
                reward, loss = self._reward(logits, number, knowledge)
                rewards[index] += share * float(reward)
                losses[index] += share * float(loss)
        found = tuple(
            Candidate(group, removed, float(rewards[index]), float(losses[index]))
            for index, (group, removed) in enumerate(changes, start=1)
        )
        return Facts(float(rewards[0]), float(losses[0]), found)


def _balanced(indices: Sequence[int], most: int) -> list[list[int]]:
    """Batches of nearly equal size, none above ``most``: a small last one would have poor statistics."""
    count = -(-len(indices) // most)
    return [list(indices[len(indices) * n // count : len(indices) * (n + 1) // count]) for n in range(count)]
