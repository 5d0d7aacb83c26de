"""The reward of a sub-network, and what each filter is worth to it (EKG, Eqs 7 to 9).

    R = - CE(labels; network) - CE(softmax(T); network)                                       (7)
    T_i = mean of the logits of the interim networks 0 .. i                                   (8)
    S(filter) = | sum over images and positions of dR/df * f |                                (9)

f is the input feature map of the next layer. Candidates are masks on those maps: a mask that multiplies f
has the gradient sum(dR/df * f) at one, so that one backward pass scores all filters of all layers.
Batch-norm uses the statistics of the batch, as the authors' search does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import fx

from optpipe import graph
from optpipe.methods._norms import of_weights
from optpipe.methods.ekg import layers, scores
from optpipe.types import Images

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
        widths: graph.WidthMap,
        score: scores.Score,
        guide: Guide,
        autocast: bool,
        device: str,
        seed: int,
        most: int = 0,
    ) -> None:
        """``most`` limits how many layers are tried in a step; 0 leaves it to their scores."""
        self._network = network
        self._most = most
        self._score: scores.Score = score
        self._guide = guide
        self._seed = seed
        self._gated = graph.Gated(network, input_shape, autocast=autocast, device=device, widths=widths)
        # A score by a filter's own output needs gates elsewhere, one for each layer of a group.
        self._own: graph.Gated | None = None
        self._groups: tuple[int, ...] = tuple(range(len(widths.groups)))
        if score == "gbn":
            each, self._groups = _each_layer(widths)
            self._own = graph.Gated(
                network, input_shape, at="own", autocast=autocast, device=device, widths=each
            )
        assert images.labels is not None
        self._set, self._device = images, device
        self._parts = _balanced(indices, BATCH)
        self._labels = [images.labels[part].to(device) for part in self._parts]
        self._total = len(indices)
        self._sum: list[torch.Tensor] = []
        self._seen = 0

    def facts(self, history: Sequence[Kept], after: Sequence[int | None], gains: Sequence[float]) -> Facts:
        """The last network of ``history`` and its candidates: group g would keep ``after[g]`` channels.

        None leaves a group alone. ``gains`` is what each candidate would save, in any unit: the layers that
        are tried are those whose filters are cheap for what they save.
        """
        kept = history[-1]
        reward, loss, knowledge, values = self._look(history, scored=True)
        changes = []
        for group, count in enumerate(after):
            if count is not None:
                channels, blocks = self._gated.groups[group].channels, self._gated.widths.blocks[group]
                order = layers.ascending(kept[group], values[group].tolist(), channels, blocks)
                changes.append((group, tuple(order[: len(kept[group]) - count])))
        sums = [float(values[group][list(removed)].sum()) / gains[group] for group, removed in changes]
        tried = [changes[index] for index in layers.tried(sums, self._most)]
        return Facts(reward, loss, self._compare(self._masks(kept), knowledge, tried))

    def measure(self, history: Sequence[Kept]) -> Facts:
        """The last network of ``history``, no candidates."""
        reward, loss, _, _ = self._look(history, scored=False)
        return Facts(reward, loss, ())

    def _batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The validation images batch by batch; all at once, ImageNet's would take 19 GB of the device."""
        for number, part in enumerate(self._parts):
            yield number, self._set.batch(part).to(self._device)

    def _masks(self, kept: Kept) -> list[torch.Tensor]:
        masks = [torch.zeros_like(mask) for mask in self._gated.whole()]
        for mask, channels in zip(masks, kept, strict=True):
            mask[list(channels)] = 1.0
        return masks

    def _look(
        self, history: Sequence[Kept], *, scored: bool
    ) -> tuple[float, float, list[torch.Tensor], list[torch.Tensor]]:
        """(reward, loss, knowledge of each batch, scores of each group) of the last network, in one pass.

        Knowledge is T_i (Eq. 8) as probabilities (B, classes); none where nobody guides.
        """
        masks = self._masks(history[-1])
        joins = self._catch_up(history)
        by_gradient = scored and not scores.of_weights_alone(self._score)
        leaves = [masks[group].clone().requires_grad_(by_gradient) for group in self._groups]
        scoring = self._gated if self._own is None else self._own
        reward = loss = 0.0
        knowledge: list[torch.Tensor] = []
        for number, images in self._batches():
            share = len(images) / self._total
            traced = scoring.logits(images, leaves)
            # Gates elsewhere are there for their gradient; they do not stand for the network that is cut.
            logits = traced.detach() if self._own is None else self._gated.logits(images, masks)
            if self._guide != "none":
                knowledge.append(self._known(number, logits if joins else None))
            if by_gradient:
                (self._reward(traced, number, knowledge)[0] * share).backward()  # type: ignore[no-untyped-call]
            own_reward, own_loss = self._reward(logits, number, knowledge)
            reward += share * float(own_reward)
            loss += share * float(own_loss)
        if joins:
            self._seen += 1
        return reward, loss, knowledge, self._scores(history[-1], leaves) if scored else []

    def _catch_up(self, history: Sequence[Kept]) -> bool:
        """Bring the sum of logits to the networks before the last, as after a resumption.

        True where the last one is to join them, which it does once.
        """
        guides = {"none": (), "single": history[:1], "ensemble": history}[self._guide]
        if self._seen > len(guides):
            self._sum, self._seen = [], 0
        joins = len(guides) == len(history) > self._seen
        for kept in guides[self._seen : -1 if joins else None]:
            masks = self._masks(kept)
            for number, images in self._batches():
                self._add(number, self._gated.logits(images, masks))
            self._seen += 1
        return joins

    def _add(self, number: int, logits: torch.Tensor) -> None:
        if number == len(self._sum):
            self._sum.append(logits)
        else:
            self._sum[number] = self._sum[number] + logits

    def _known(self, number: int, newest: torch.Tensor | None) -> torch.Tensor:
        """The probabilities of the ensemble's mean logits, the newest network's joining it."""
        if newest is None:
            return (self._sum[number] / self._seen).softmax(dim=1)
        self._add(number, newest)
        return (self._sum[number] / (self._seen + 1)).softmax(dim=1)

    def _scores(self, kept: Kept, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Every group's scores (channels,): Eq. 9 from the masks' gradients, or from the weights.

        Where each layer has its own gates they add up, as GBN has it for layers that are tied; a single
        gate for all of them would be Eq. 9 again, for what lies between is linear or a ReLU.
        """
        if scores.of_weights_alone(self._score):
            return of_weights(self._score, self._network, self._gated.groups, kept, self._seed)
        found = [torch.zeros(group.channels) for group in self._gated.groups]
        for group, leaf in zip(self._groups, leaves, strict=True):
            assert leaf.grad is not None
            found[group] += leaf.grad.abs().cpu()
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
    ) -> tuple[Candidate, ...]:
        changed = []
        for group, removed in changes:
            mask = masks[group].clone()
            mask[list(removed)] = 0.0
            changed.append((group, mask))
        rewards, losses = torch.zeros(len(changed)), torch.zeros(len(changed))
        for number, images in self._batches():
            share = len(images) / self._total
            for index, logits in enumerate(self._gated.candidates(images, masks, changed)):
                reward, loss = self._reward(logits, number, knowledge)
                rewards[index] += share * float(reward)
                losses[index] += share * float(loss)
        return tuple(
            Candidate(group, removed, float(reward), float(loss))
            for (group, removed), reward, loss in zip(changes, rewards, losses, strict=True)
        )


def _each_layer(widths: graph.WidthMap) -> tuple[graph.WidthMap, tuple[int, ...]]:
    """A map in which every layer of a group is a group of its own, and of which group each of them is."""
    groups, parts, found = [], [], []
    for index, (group, reached) in enumerate(zip(widths.groups, widths.parts, strict=True)):
        for path in group.layers:
            groups.append(replace(group, name=path, layers=(path,)))
            parts.append(tuple(part for part in reached if part.outputs and part.layer == path))
            found.append(index)
    blocks = tuple(widths.blocks[index] for index in found)
    alone = (1,) * len(found)
    return graph.WidthMap(tuple(groups), tuple(parts), blocks, alone, widths.fixed), tuple(found)


def _balanced(indices: Sequence[int], most: int) -> list[list[int]]:
    """Batches of nearly equal size, none above ``most``: a small last one would have poor statistics."""
    count = -(-len(indices) // most)
    return [list(indices[len(indices) * n // count : len(indices) * (n + 1) // count]) for n in range(count)]
