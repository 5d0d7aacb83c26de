"""What EKG's search is made of: scores, rewards, the choice of layers, and the counts that a target likes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from conftest import make_latency
from torch import fx, nn

from optpipe import graph
from optpipe.data import ImageSet
from optpipe.methods import _ladder as ladder
from optpipe.methods._ladder import Ladder, Rung
from optpipe.methods._norms import of_weights
from optpipe.methods.ekg import budgets, images, layers, reward, tables
from optpipe.methods.ekg.config import Config
from optpipe.methods.ekg.descent import plan_of
from optpipe.methods.ekg.reward import Candidate, Facts, Guide, Judge, Kept
from optpipe.methods.ekg.scores import Score
from optpipe.types import Ask, Budget, ChannelGroup, Latency, ModelGraph, Scene, Trial, Tune

SHAPE = (3, 8, 8)
COUNT, CLASSES = 12, 4


class Residual(nn.Module):
    """A stem, a residual block and a wider layer: the groups stem and conv2, conv1, wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.wide, self.wide_norm = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        x = F.relu(self.wide_norm(self.wide(x)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Dense(nn.Module):
    """A batch-norm that reads two layers joined: behind it, a channel that was masked before it is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.norm, self.mix = nn.BatchNorm2d(11), nn.Conv2d(11, 7, 3, padding=1)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        logits: torch.Tensor = self.head(F.relu(self.mix(x)).mean((2, 3)))
        return logits


def traced(make: Callable[[], nn.Module]) -> fx.GraphModule:
    """The network with scales and offsets that differ from channel to channel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data = 0.8 + 0.4 * torch.rand(norm.weight.shape, generator=generator)
            norm.bias.data = 0.6 * torch.rand(norm.bias.shape, generator=generator) - 0.2
    head = cast("nn.Linear", model.head)
    head.weight.data *= 4.0  # logits that tell the classes apart
    return graph.trace(model.eval(), SHAPE)


def pictures(count: int = COUNT) -> ImageSet:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=generator).byte()
    names = tuple(map(str, range(count)))
    return ImageSet(pixels, torch.arange(count) % CLASSES, names, (0.5,) * 3, (0.25,) * 3, digest="d")


NETWORK, PICTURES = traced(Residual), pictures()
WIDTHS = graph.width_map(NETWORK, SHAPE)
# The network as it was, and after each of two steps: a channel of conv1's, then two of the tied layers'.
WHOLE: Kept = tuple(tuple(range(group.channels)) for group in WIDTHS.groups)
ONCE: Kept = (WHOLE[0], (0, 1, 3, 4), WHOLE[2])
TWICE: Kept = ((0, 2, 3, 5), ONCE[1], WHOLE[2])
HISTORY = (WHOLE, ONCE, TWICE)
FEWER = (2, 3, 5)
GRADIENTS: tuple[Score, Score] = ("gbn", "taylor")


def judge(
    guide: Guide = "ensemble",
    score: Score = "taylor",
    network: fx.GraphModule = NETWORK,
    widths: graph.WidthMap = WIDTHS,
    indices: Sequence[int] = tuple(range(COUNT)),
    most: int = 0,
) -> Judge:
    return Judge(
        network,
        SHAPE,
        PICTURES,
        indices,
        widths=widths,
        score=score,
        guide=guide,
        autocast=False,
        device="cpu",
        seed=5,
        most=most,
    )


def cut(kept: Kept, network: fx.GraphModule = NETWORK, widths: graph.WidthMap = WIDTHS) -> nn.Module:
    """The network with the channels taken out of it, its batch-norms in train mode."""
    model = copy.deepcopy(graph.apply(network, plan_of(widths.groups, kept), SHAPE))
    for module in model.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    return model


@torch.no_grad()
def outputs(kept: Kept, batch: Sequence[int] = range(COUNT)) -> torch.Tensor:
    """The logits of the network that was cut, by batch statistics."""
    logits: torch.Tensor = cut(kept)(PICTURES.batch(list(batch)))
    return logits


def cross_entropy(logits: torch.Tensor, probabilities: torch.Tensor) -> float:
    """By its definition, the mean over images."""
    return float(-(probabilities * logits.log_softmax(1)).sum(1).mean())


def truth(batch: Sequence[int] = range(COUNT)) -> torch.Tensor:
    assert PICTURES.labels is not None
    return F.one_hot(PICTURES.labels[list(batch)], CLASSES).float()


def reward_by_hand(
    logits: torch.Tensor, guide: Guide, history: Sequence[Kept], batch: Sequence[int] = range(COUNT)
) -> float:
    """EKG, Eq. 7, with T_i as Eq. 8 has it."""
    value = -cross_entropy(logits, truth(batch))
    if guide == "none":
        return value
    known = history if guide == "ensemble" else history[:1]
    mean = torch.stack([outputs(kept, batch) for kept in known]).mean(0)
    return value - cross_entropy(logits, mean.softmax(1))


def assert_same(one: Facts, other: Facts) -> None:
    assert (one.reward, one.loss) == pytest.approx((other.reward, other.loss), rel=1e-5)
    pairs = list(zip(one.candidates, other.candidates, strict=True))
    assert [(a.group, a.removed) for a, _ in pairs] == [(b.group, b.removed) for _, b in pairs]
    for a, b in pairs:
        assert (a.reward, a.loss) == pytest.approx((b.reward, b.loss), rel=1e-5)


# ---------------------------------------------------------------- which layers, how many filters


def test_the_threshold_lies_between_two_clear_classes() -> None:
    # Between-class variance 3 * 3 * (11 - 2)^2 is the largest of the five cuts.
    assert layers.trimmed_otsu([10, 1, 11, 2, 12, 3]) == 3
    assert layers.tried([10, 1, 11, 2, 12, 3]) == (1, 3, 5)


def test_the_threshold_is_where_the_variance_between_the_classes_is_largest() -> None:
    # Cuts after 0, 4, 5: 1 * 3 * (0 - 6)^2 = 108; 2 * 2 * (2 - 7)^2 = 100; 3 * 1 * (3 - 9)^2 = 108.
    assert layers.trimmed_otsu([0, 4, 5, 9]) == 0
    # After 0, 4, 6: 3 * (19/3)^2 = 120.3; 4 * (2 - 7.5)^2 = 121; 3 * (10/3 - 9)^2 = 96.3.
    assert layers.trimmed_otsu([9, 6, 4, 0]) == 4


def test_one_value_far_above_the_rest_does_not_hide_their_two_classes() -> None:
    values = [1.0, 1.1, 1.2, 1.3, 5.0, 5.1, 5.2, 5.3, 5.4, 1000.0]
    # Of ten values one is left out at either end; untrimmed, the nine others would be one class.
    assert layers.trimmed_otsu(values) == 1.3
    assert layers.tried(values) == (0, 1, 2, 3)
    assert layers.trimmed_otsu(values[1:]) == 5.4


def test_of_few_or_equal_layers_all_are_tried() -> None:
    assert layers.tried([7.0]) == (0,)
    assert layers.tried([7.0, 1.0]) == (0, 1)
    assert layers.tried([2.0] * 5) == (0, 1, 2, 3, 4)


def test_of_the_layers_below_the_threshold_a_limit_leaves_the_cheapest() -> None:
    sums = [3.0, 10.0, 1.0, 11.0, 2.0, 12.0]
    assert layers.tried(sums) == (0, 2, 4)
    assert layers.tried(sums, 2) == (2, 4)
    assert layers.tried(sums, 5) == (0, 2, 4)
    assert len(judge(most=1).facts(HISTORY, (2, 2, 2), (1.0,) * 3).candidates) == 1


@pytest.mark.parametrize(
    ("channels", "ratio", "tied", "blocks", "left"),
    [
        (16, 0.2, 1, 1, 13),
        (64, 0.2, 1, 1, 51),
        # A step takes a filter from each tied layer: the ratio is divided by their number.
        (16, 0.2, 4, 1, 15),
        (64, 0.2, 4, 1, 61),
        # At least one goes, though the share would be none.
        (4, 0.01, 1, 1, 3),
        (1, 0.2, 1, 1, 0),
        # Runs of a grouped convolution keep equally many: at least one goes from each.
        (16, 0.2, 1, 4, 12),
        (12, 0.1, 1, 4, 8),
        (4, 0.2, 1, 4, 0),
    ],
)
def test_a_group_loses_its_share_of_filters(
    channels: int, ratio: float, tied: int, blocks: int, left: int
) -> None:
    assert layers.fewer(channels, ratio, tied, blocks) == left


def test_channels_come_by_their_score_and_from_every_run_in_turn() -> None:
    values = [0.4, 0.1, 0.3, 0.2, 0.9, 0.8]
    assert layers.ascending(range(6), values, 6, 1) == [1, 3, 2, 0, 5, 4]
    assert layers.ascending([0, 2, 4], values, 6, 1) == [2, 0, 4]
    # The runs 0 1 2 and 3 4 5: the lowest of each, then the next of each.
    assert layers.ascending(range(6), values, 6, 2) == [1, 3, 2, 5, 0, 4]
    assert layers.ascending([0, 1, 4, 5], values, 6, 2) == [1, 5, 0, 4]


def test_the_first_channels_are_equally_many_of_each_run() -> None:
    assert ladder.first(6, 1, 4) == (0, 1, 2, 3)
    assert ladder.first(6, 2, 4) == (0, 1, 3, 4)
    assert ladder.first(6, 3, 3) == (0, 2, 4)


# ---------------------------------------------------------------- scores


class Tiny(nn.Module):
    """Three filters, and tied to them three others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(1, 3, 1, bias=False)
        self.a.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]]).view(3, 2, 1, 1)
        self.b.weight.data = torch.tensor([-1.0, 2.0, 5.0]).view(3, 1, 1, 1)


def group(name: str, of: tuple[str, ...], channels: int = 3) -> ChannelGroup:
    return ChannelGroup(name, of, (channels, 1, 1, 1), channels, 1, 1, prunable=True)


def test_l1_adds_a_filters_weights_up_over_tied_layers_in_units_of_the_groups_mean() -> None:
    a, both = group("a", ("a",)), group("a", ("a", "b"))
    (found,) = of_weights("l1", Tiny(), [a], [(0, 1, 2)], 0)
    # 7, 0, 7, of mean 14 / 3.
    assert found.tolist() == pytest.approx([1.5, 0.0, 1.5])
    (found,) = of_weights("l1", Tiny(), [both], [(0, 1, 2)], 0)
    # 8, 2, 12, of mean 22 / 3.
    assert found.tolist() == pytest.approx([12 / 11, 3 / 11, 18 / 11])
    (found,) = of_weights("l1", Tiny(), [both], [(1, 2)], 0)
    # What was taken out before is in no mean: 2 and 12 of mean 7.
    assert found[1:].tolist() == pytest.approx([2 / 7, 12 / 7])


def test_fpgm_adds_the_distances_to_the_layers_filters_that_are_left() -> None:
    (found,) = of_weights("fpgm", Tiny(), [group("a", ("a",))], [(0, 1, 2)], 0)
    # Distances: 0-1 5, 0-2 10, 1-2 5. Sums 15, 10, 15 of mean 40 / 3.
    assert found.tolist() == pytest.approx([9 / 8, 6 / 8, 9 / 8])
    (found,) = of_weights("fpgm", Tiny(), [group("b", ("b",))], [(0, 2)], 0)
    # To the filters 0 and 2 alone: 6 and 6.
    assert found[[0, 2]].tolist() == pytest.approx([1.0, 1.0])


def test_random_scores_depend_on_the_seed_alone() -> None:
    groups, kept = [group("a", ("a",)), group("b", ("b",))], [(0, 1, 2), (0, 1, 2)]
    one, again, other = (torch.cat(of_weights("random", Tiny(), groups, kept, n)) for n in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:3], one[3:])
    tiny = Tiny()
    before = torch.random.get_rng_state()
    of_weights("random", tiny, groups, kept, 1)
    assert torch.equal(before, torch.random.get_rng_state())


# ---------------------------------------------------------------- rewards


def test_facts_survive_as_numbers() -> None:
    facts = Facts(-1.5, 0.1, (Candidate(3, (7, 0, 2), -1.25, 1 / 3), Candidate(0, (1,), -2.0, 0.5)))
    assert Facts.decode(facts.encode()) == facts
    assert all(isinstance(value, float) for value in facts.encode())
    assert Facts.decode(Facts(-1.0, 2.0, ()).encode()) == Facts(-1.0, 2.0, ())


@pytest.mark.parametrize("guide", ["none", "single", "ensemble"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_reward_is_minus_both_cross_entropies(guide: Guide, steps: int) -> None:
    history = HISTORY[:steps]
    logits = outputs(history[-1])
    expected = (reward_by_hand(logits, guide, history), cross_entropy(logits, truth()))
    found = judge(guide).facts(history, FEWER, (1.0,) * 3)
    assert (found.reward, found.loss) == pytest.approx(expected, rel=1e-4)
    measured = judge(guide).measure(history)
    assert (measured.reward, measured.loss) == pytest.approx(expected, rel=1e-4)
    assert measured.candidates == ()


def test_the_guides_differ_once_there_was_a_step() -> None:
    rewards = [judge(guide).measure(HISTORY).reward for guide in ("none", "single", "ensemble")]
    assert abs(rewards[1] - rewards[2]) > 1e-3
    assert rewards[0] > max(rewards[1:])
    first = [judge(guide).measure(HISTORY[:1]).reward for guide in ("single", "ensemble")]
    assert first[0] == first[1]


def scores_by_hand(kept: Kept, history: Sequence[Kept]) -> list[torch.Tensor]:
    """EKG, Eq. 9: the reward's gradient at what each layer reads, times what it reads."""
    model, read = cut(kept).requires_grad_(True), dict[str, torch.Tensor]()

    def keep(path: str) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
        def hook(_: nn.Module, given: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            read[path] = given[0].clone()  # each reader's own gradient, and no other's
            read[path].retain_grad()
            return (read[path],)

        return hook

    for index in range(len(WIDTHS.groups)):
        for path in WIDTHS.readers(index):
            model.get_submodule(path).register_forward_pre_hook(keep(path))
    logs = model(PICTURES.batch(slice(None))).log_softmax(1)
    known = torch.stack([outputs(one) for one in history]).mean(0).softmax(1)
    torch.autograd.backward((truth() * logs).sum(1).mean() + (known * logs).sum(1).mean())
    found = []
    for index, group in enumerate(WIDTHS.groups):
        total = torch.zeros(len(kept[index]))
        for path in WIDTHS.readers(index):
            gradient = read[path].grad
            assert gradient is not None
            product = gradient * read[path].detach()
            total += product.sum([0, *range(2, product.ndim)])
        found.append(torch.zeros(group.channels).index_put((torch.tensor(kept[index]),), total.abs()))
    return found


@pytest.mark.parametrize("steps", [1, 3])
def test_a_filters_score_is_gradient_times_what_the_next_layer_reads(steps: int) -> None:
    history = HISTORY[:steps]
    kept = history[-1]
    expected = scores_by_hand(kept, history)
    found = judge()._look(history, scored=True)[3]
    for index, channels in enumerate(kept):
        of = list(channels)
        assert found[index][of].tolist() == pytest.approx(expected[index][of].tolist(), rel=1e-3, abs=1e-6)
        assert float(expected[index][of].max()) > 1e-3
    facts = judge().facts(history, (1, 1, 1), (1.0, 1.0, 1.0))
    orders = [
        layers.ascending(of, expected[index].tolist(), len(WHOLE[index]), 1) for index, of in enumerate(kept)
    ]
    sums = [float(expected[index][order[:-1]].sum()) for index, order in enumerate(orders)]
    tried = layers.tried(sums)
    assert [(one.group, one.removed) for one in facts.candidates] == [
        (index, tuple(orders[index][:-1])) for index in tried
    ]
    # What a candidate saves divides its scores: the first group's become the cheapest by far, or the dearest.
    cheap, dear = (judge().facts(history, (1, 1, 1), (gain, 1.0, 1.0)) for gain in (1e6, 1e-6))
    assert 0 in {one.group for one in cheap.candidates}
    assert {one.group for one in dear.candidates} == {1, 2}


def test_gbn_scores_a_filter_by_what_its_own_layers_make() -> None:
    model, made = cut(WHOLE).requires_grad_(True), dict[str, torch.Tensor]()

    def keep(path: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            output.retain_grad()
            made[path] = output

        return hook

    for path in ("stem_norm", "norm1", "norm2"):
        model.get_submodule(path).register_forward_hook(keep(path))
    logs = model(PICTURES.batch(slice(None))).log_softmax(1)
    torch.autograd.backward((truth() * logs).sum(1).mean())

    def product(path: str) -> torch.Tensor:
        gradient = made[path].grad
        assert gradient is not None
        return (gradient * made[path].detach()).sum((0, 2, 3))

    found, read = (judge("none", score)._look([WHOLE], scored=True)[3] for score in GRADIENTS)
    tied = product("stem_norm").abs() + product("norm2").abs()
    assert found[0].tolist() == pytest.approx(tied.tolist(), rel=1e-3, abs=1e-6)
    assert found[1].tolist() == pytest.approx(product("norm1").abs().tolist(), rel=1e-3, abs=1e-6)
    # Before a ReLU and a single reader that is the same; at a residual sum it is not.
    assert found[1].tolist() == pytest.approx(read[1].tolist(), rel=1e-3, abs=1e-6)
    assert float((found[0] - read[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("score", ["taylor", "gbn", "l1", "fpgm", "random"])
def test_a_candidates_reward_is_that_of_the_network_that_was_cut(score: Score) -> None:
    facts = judge(score=score).facts(HISTORY, FEWER, (1.0,) * 3)
    assert facts.candidates
    for one in facts.candidates:
        assert len(one.removed) == len(TWICE[one.group]) - FEWER[one.group]
        assert set(one.removed) < set(TWICE[one.group])
        left = tuple(channel for channel in TWICE[one.group] if channel not in one.removed)
        logits = outputs((*TWICE[: one.group], left, *TWICE[one.group + 1 :]))
        expected = (reward_by_hand(logits, "ensemble", HISTORY), cross_entropy(logits, truth()))
        assert (one.reward, one.loss) == pytest.approx(expected, abs=1e-4)


def test_a_group_that_has_none_to_give_is_no_candidate() -> None:
    facts = judge().facts(HISTORY, (None, 2, None), (1.0,) * 3)
    assert [(one.group, len(one.removed)) for one in facts.candidates] == [(1, 2)]


def test_several_batches_are_weighed_by_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward, "BATCH", 5)
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 11)
    batches = [order[:3], order[3:7], order[7:]]  # three batches, the smallest no smaller than it need be
    facts = judge(indices=order).facts(HISTORY, FEWER, (1.0,) * 3)
    shares = [len(batch) / len(order) for batch in batches]

    def mean(kept: Kept) -> float:
        rewards = (reward_by_hand(outputs(kept, batch), "ensemble", HISTORY, batch) for batch in batches)
        return sum(share * value for share, value in zip(shares, rewards, strict=True))

    assert facts.reward == pytest.approx(mean(TWICE), rel=1e-4)
    for one in facts.candidates:
        left = tuple(channel for channel in TWICE[one.group] if channel not in one.removed)
        assert one.reward == pytest.approx(
            mean((*TWICE[: one.group], left, *TWICE[one.group + 1 :])), rel=1e-4
        )


@pytest.mark.parametrize("guide", ["none", "single", "ensemble"])
def test_a_search_that_is_resumed_judges_as_one_that_went_step_by_step(guide: Guide) -> None:
    walking = judge(guide)
    for steps in (1, 2, 3):
        facts = walking.facts(HISTORY[:steps], FEWER, (1.0,) * 3)
        assert_same(judge(guide).facts(HISTORY[:steps], FEWER, (1.0,) * 3), facts)
    assert_same(judge(guide).measure(HISTORY), walking.measure(HISTORY))


def test_behind_joined_layers_gbn_judges_the_network_that_was_cut() -> None:
    network = traced(Dense)
    widths = graph.width_map(network, SHAPE)
    whole: Kept = tuple(tuple(range(group.channels)) for group in widths.groups)
    history = (whole, ((0, 2, 4), *whole[1:]))
    fewer = tuple(len(channels) - 1 for channels in history[-1])
    walking = judge("ensemble", "gbn", network, widths)
    walking.facts(history[:1], fewer, (1.0,) * len(fewer))
    facts = walking.facts(history, fewer, (1.0,) * len(fewer))
    assert facts.reward == pytest.approx(judge("ensemble", "taylor", network, widths).measure(history).reward)
    resumed = judge("ensemble", "gbn", network, widths)
    assert_same(resumed.measure((*history, whole)), walking.measure((*history, whole)))


@pytest.mark.parametrize("guide", ["single", "ensemble"])
def test_a_network_that_is_looked_at_twice_joins_the_ensemble_once(guide: Guide) -> None:
    one = judge(guide)
    first = one.facts(HISTORY[:1], FEWER, (1.0,) * 3)
    assert_same(one.facts(HISTORY[:1], FEWER, (1.0,) * 3), first)
    third = one.facts(HISTORY, FEWER, (1.0,) * 3)
    assert_same(one.facts(HISTORY, FEWER, (1.0,) * 3), third)
    assert_same(one.measure(HISTORY), judge(guide).measure(HISTORY))
    # Back to an earlier network: what came later says nothing there.
    assert_same(one.facts(HISTORY[:1], FEWER, (1.0,) * 3), first)


def test_judging_leaves_the_network_as_it_was() -> None:
    before = copy.deepcopy(NETWORK.state_dict())
    judge("ensemble", "gbn").facts(HISTORY, FEWER, (1.0,) * 3)
    assert all(torch.equal(before[key], value) for key, value in NETWORK.state_dict().items())
    assert not NETWORK.training


# ---------------------------------------------------------------- the counts that a target executes well


def rung(count: int, saving: float, half: float = 0.01) -> Rung:
    return Rung(count, saving, saving - half, saving + half)


def test_a_count_is_a_rung_where_it_is_clearly_faster_than_every_larger_one() -> None:
    # An engine that works in eights: 16 to 9 channels cost the same, and so do 8 to 1.
    stairs = (rung(14, 0.0), rung(12, 0.0), rung(10, 0.0), rung(8, 0.4), rung(6, 0.4), rung(4, 0.4))
    assert Ladder(16, (0,), (1.0,), stairs).rungs == (rung(8, 0.4),)
    # Savings whose intervals touch are one rung: the first.
    noisy = (rung(14, 0.005), rung(12, 0.2), rung(10, 0.215), rung(8, 0.23))
    assert [one.count for one in Ladder(16, (0,), (1.0,), noisy).rungs] == [12, 8]
    assert Ladder(16, (0,), (1.0,), (rung(8, -0.1), rung(4, 0.0))).rungs == ()


def test_from_a_count_a_step_goes_to_the_lower_rung_nearest_to_what_was_wanted() -> None:
    one = Ladder(32, (0,), (1.0,), (rung(24, 0.1), rung(16, 0.2), rung(12, 0.2), rung(8, 0.3)))
    assert [one.below(32, wanted) for wanted in (26, 23, 19, 12, 0)] == [24, 24, 16, 8, 8]
    assert [one.below(24, 23), one.below(20, 20), one.below(16, 16), one.below(9, 0)] == [16, 16, 8, 8]
    assert one.below(8, 6) is None


def test_a_groups_saving_is_its_share_of_what_was_timed_at_no_fewer_channels() -> None:
    timed = (rung(12, 0.1), rung(8, 0.4), rung(4, 0.35))
    one = Ladder(16, (2, 5), (0.75, 0.25), timed)
    assert [one.saving(2, count) for count in (16, 13, 12, 9, 8, 5)] == pytest.approx(
        [0, 0, 0.075, 0.075, 0.3, 0.3]
    )
    # Fewer channels are not taken to be slower.
    assert one.saving(5, 4) == pytest.approx(0.1)
    assert Ladder(16, (0,), (1.0,), (rung(8, -0.2),)).saving(0, 8) == 0.0


def test_what_is_no_rung_promises_no_saving_and_is_no_end() -> None:
    # 10 and 4 channels are within the noise of 12 and 8, though they were timed a little faster.
    one = Ladder(16, (0,), (1.0,), (rung(12, 0.1), rung(10, 0.105), rung(8, 0.4), rung(4, 0.405)))
    assert [one.saving(0, count) for count in (10, 4)] == [0.1, 0.4]
    assert one.lowest == 8
    # The search may go nowhere where no count is faster.
    assert Ladder(16, (0,), (1.0,), (rung(8, 0.0), rung(4, -0.1))).lowest == 16
    assert Ladder(1, (0,), (1.0,), ()).lowest == 1


def test_groups_of_equal_width_are_narrowed_together_tied_ones_apart() -> None:
    groups = (
        group("a", ("a",), 16),
        group("b", ("b", "c"), 16),
        group("d", ("d",), 16),
        group("e", ("e",), 8),
        group("f", ("f",), 16),
    )
    widths = graph.WidthMap(groups, ((),) * 5, (1, 1, 1, 1, 2), tuple(len(g.layers) for g in groups), ())
    assert ladder.classes(widths) == [(0, 2), (1,), (3,), (4,)]


def test_groups_that_a_depthwise_convolution_carries_on_are_narrowed_apart_from_plain_ones() -> None:
    groups = (
        group("plain", ("plain",), 16),
        group("expand", ("expand", "depthwise"), 16),
        group("tied", ("tied", "to"), 16),
        group("both", ("both", "to", "depthwise"), 16),
        group("again", ("again", "depthwise"), 16),
    )
    widths = graph.WidthMap(groups, ((),) * 5, (1,) * 5, (1, 1, 2, 2, 1), ())
    assert ladder.classes(widths) == [(0,), (1, 4), (2,), (3,)]


@pytest.mark.parametrize(
    ("channels", "blocks", "expected"),
    [
        (16, 1, (14, 12, 10, 8, 6, 4, 2)),
        (64, 1, (56, 48, 40, 32, 24, 16, 8)),
        (6, 1, (5, 4, 3, 2, 1)),
        (2, 1, (1,)),
        (1, 1, ()),
        (16, 4, (12, 8, 4)),
        (64, 32, (32,)),
    ],
)
def test_the_counts_that_are_timed_divide_a_width_evenly(
    channels: int, blocks: int, expected: tuple[int, ...]
) -> None:
    assert ladder.counts(channels, blocks) == expected


def climb(model: nn.Module, ratio: Callable[[dict[str, int]], float]) -> tuple[list[Ask], list[Ladder]]:
    """The ladders of a network whose latency is made up, and what was asked for them."""
    widths = graph.width_map(model, SHAPE)
    measuring = ladder.measure(widths, graph.Costs(model, SHAPE, widths))
    asks = [cast(Ask, request) for request in next(measuring)]
    trials = []
    for ask in asks:
        value = ratio({name: len(kept) for name, kept in ask.plan.keep_channels})
        trials.append(Trial("t", ask, 1, 1, make_latency(value, value, (value - 0.01, value + 0.01))))
    try:
        measuring.send(trials)
    except StopIteration as stop:
        return asks, list(stop.value)
    raise AssertionError("asks twice")


def test_every_class_of_widths_is_timed_at_its_counts() -> None:
    def ratio(counts: dict[str, int]) -> float:
        ((_, count),) = counts.items()
        return 0.7 if count <= 4 else 1.0

    asks, found = climb(NETWORK, ratio)
    assert [ask.plan.keep_channels[0][0] for ask in asks] == ["stem"] * 5 + ["conv1"] * 4 + ["wide"] * 7
    assert all(ask.wants == ("latency",) and ask.tune is None for ask in asks)
    assert [one.groups for one in found] == [(0,), (1,), (2,)]
    assert [[r.count for r in one.rungs] for one in found] == [[4], [4], [4]]
    assert found[0].shares == (1.0,)


class Twins(nn.Module):
    """Two layers of equal width, of which the second has four times the pixels to read, and one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.gate, self.head = nn.Conv2d(8, 1, 1), nn.Linear(1, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.gate(F.relu(self.two(F.relu(self.one(x))))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def test_layers_of_a_class_share_its_saving_by_their_macs() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = graph.trace(Twins().eval(), SHAPE)
    asks, found = climb(model, lambda counts: min(counts.values()) / 8)
    assert {tuple(name for name, _ in ask.plan.keep_channels) for ask in asks} == {("one", "two")}
    # One channel of eight: one saves 7 of 8 filters of 3 inputs, and two's reading of them; two its filters
    # of 8 inputs, and gate's reading. Per pixel (3 + 8) * 7 and (8 + 1) * 7.
    assert found[0].shares == pytest.approx((11 / 20, 9 / 20))
    assert found[0].saving(0, 2) == pytest.approx(0.75 * 11 / 20)
    # A layer of one channel has none to give.
    assert all(one.timed == () and one.below(1, 0) is None for one in found[1:])


def test_the_table_of_counts_says_where_the_search_may_stop() -> None:
    ladders = [
        Ladder(16, (0, 1), (0.5, 0.5), (rung(12, 0.0), rung(8, 0.4))),
        Ladder(8, (2,), (1.0,), (rung(4, 0.1),)),
    ]
    groups = [group(name, (name,), 16) for name in ("a", "b", "c")]
    assert [(row[0], row[1], row[-1]) for row in ladder.table(groups, ladders).rows] == [
        ("2 of 16 channels (a, ...)", 12, "passed over: no faster than more channels"),
        ("2 of 16 channels (a, ...)", 8, "taken"),
        ("c, 8 channels", 4, "taken"),
    ]


# ---------------------------------------------------------------- tables, budgets, images


def at(ratio: float, half: float = 0.01) -> Latency:
    return make_latency(10 * ratio, ratio, (ratio - half, ratio + half))


@pytest.mark.parametrize(
    ("macs", "before", "after", "first", "expected"),
    [
        (0.1, None, at(0.9), True, "saves time"),
        (0.1, at(0.9), at(0.8), False, "saves time"),
        # Two intervals that touch: perhaps 0.02, perhaps nothing; the MACs promised 0.02.
        (0.02, at(0.9), at(0.89), False, "within the noise"),
        # At the most 0.02 was saved, less than a quarter of what the MACs promised.
        (0.1, at(0.9), at(0.9), False, "buys no time: removes MACs alone"),
        (0.07, at(0.9), at(0.9), False, "within the noise"),
        (0.4, None, at(1.0), True, "buys no time: removes MACs alone"),
        # Slower than before.
        (0.1, at(0.8), at(0.9), False, "buys no time: removes MACs alone"),
        # Not timed, here or before.
        (0.1, at(0.9), None, False, None),
        (0.1, None, at(0.9), False, None),
        (0.1, None, None, True, None),
    ],
)
def test_the_verdict_on_a_step_holds_what_was_measured_against_what_the_macs_promised(
    macs: float, before: Latency | None, after: Latency | None, first: bool, expected: str | None
) -> None:
    assert tables.verdict(macs, before, after, first=first) == expected


def test_every_group_has_its_row_of_widths() -> None:
    every = [group("a", ("a",), 4), group("b", ("b", "c"), 4), group("d", ("d",), 3)]
    fixed = ChannelGroup("e", ("e",), (2, 1), 2, 1, 1, prunable=False, why_not="its channels are the classes")
    widths = graph.WidthMap(tuple(every), ((),) * 3, (1,) * 3, (1,) * 3, (fixed,))
    table = tables.width_table([*every, fixed], widths, ((0, 1, 2, 3), (1,), (0, 2)))
    assert table.rows == (
        ("a", 1, 4, 4, "whole"),
        ("b", 2, 4, 1, "narrowed"),
        ("d", 1, 3, 2, "narrowed"),
        ("e", 1, 2, 2, "its channels are the classes"),
    )


def scene(budget: Budget) -> Scene:
    shown = ModelGraph((), (), 100, 1000, SHAPE, CLASSES)
    return Scene(NETWORK, shown, PICTURES, make_latency(10.0), budget, Tune(steps=1), 0)


def test_a_size_meets_its_budget_from_the_fraction_itself_on() -> None:
    macs, parameters = Budget(macs_reduction=0.5), Budget(parameters_reduction=0.25)
    assert [budgets.sizes_meet(macs, left, 1.0) for left in (0.51, 0.5, 0.49)] == [False, True, True]
    assert [budgets.sizes_meet(parameters, 0.1, left) for left in (0.76, 0.75)] == [False, True]


def test_a_size_that_is_met_exactly_is_met_whatever_the_rounding() -> None:
    # 1 - 0.9 is a little less than 0.1 in floating point.
    assert 1 - 0.9 < 0.1
    assert Budget(macs_reduction=0.9).met_in_size(0.1, 1.0) is True
    assert Budget(parameters_reduction=0.9).met_in_size(1.0, 0.1) is True
    # One filter too many in ten million is more than rounding.
    assert Budget(macs_reduction=0.9).met_in_size(0.1 + 1e-7, 0.0) is False
    assert Budget(parameters_reduction=0.9).met_in_size(0.0, 0.1 + 1e-7) is False
    for budget in (Budget(latency_reduction=0.1), Budget(latency_ms=1.0), Budget(drop_blocks=1)):
        assert budget.met_in_size(0.0, 0.0) is None


def test_a_latency_meets_its_budget_with_its_whole_interval() -> None:
    relative, absolute = scene(Budget(latency_reduction=0.25)), scene(Budget(latency_ms=7.5))
    for one in (relative, absolute):
        assert [budgets.latency_meets(one, at(ratio)) for ratio in (0.75, 0.73)] == [False, True]
        assert budgets.asked(one) == pytest.approx(0.25)
    assert budgets.saved(at(0.7)) == pytest.approx(0.3)


def test_images_to_score_and_to_tune_are_disjoint_and_equally_many_of_each_class() -> None:
    many = pictures(80)
    assert many.labels is not None
    validation, subset = images.draw(many, Config(score_images=3, tuning_images=10), CLASSES, seed=1)
    assert not set(validation) & set(subset)
    assert (len(set(validation)), len(set(subset))) == (3 * CLASSES, 10 * CLASSES)
    assert torch.bincount(many.labels[list(validation)]).tolist() == [3] * CLASSES
    assert torch.bincount(many.labels[list(subset)]).tolist() == [10] * CLASSES
    assert images.draw(many, Config(score_images=3, tuning_images=10), CLASSES, seed=1) == (
        validation,
        subset,
    )
    assert images.draw(many, Config(score_images=3, tuning_images=10), CLASSES, seed=2)[0] != validation
    # Of few images at most half score.
    few = images.draw(pictures(20), Config(), CLASSES, seed=1)
    assert (len(few[0]), len(few[1])) == (2 * CLASSES, 3 * CLASSES)
