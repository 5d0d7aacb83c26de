"""Plain filter pruning: what is narrowed, by which scores, and the one ratio that meets the budget."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from conftest import make_latency
from torch import fx, nn
from whole_runs import take

import optpipe
from optpipe import graph, plugins, preparation
from optpipe import recipe as recipes
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.methods import filters
from optpipe.methods._ladder import Ladder, Rung
from optpipe.methods._meter import Meter
from optpipe.methods._norms import of_weights
from optpipe.methods.filters.family import family
from optpipe.methods.filters.selection import scores_of
from optpipe.types import (
    Answer,
    Ask,
    Budget,
    ChannelGroup,
    Choice,
    Plan,
    Request,
    Scene,
    Search,
    Table,
    Trial,
    Tune,
)
from optpipe.zoo.cifar_resnet import resnet20

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (3, 8, 8)
HALF_WIDTH = 0.005


class Net(nn.Module):
    """Two streams, of 16 channels (stem, conv2) and of 24 (down, conv4); conv1 and conv3 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.down_norm = nn.Conv2d(16, 24, 3, 2, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv3, self.norm3 = nn.Conv2d(24, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv4, self.norm4 = nn.Conv2d(12, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        x = F.relu(self.down_norm(self.down(x)))
        x = F.relu(x + self.norm4(self.conv4(F.relu(self.norm3(self.conv3(x))))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Gated(nn.Module):
    """A branch of 8 channels whose channels are weighed by a second branch: a product, no sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.narrow, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        inside = F.relu(self.wide(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(inside, 1)))))
        x = x + self.narrow(inside * gate)
        logits: torch.Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


@functools.cache
def made(make: Callable[[], nn.Module] = Net, shape: tuple[int, int, int] = SHAPE) -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = make().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.1, 1.0, generator=torch.Generator().manual_seed(5))
    return graph.trace(network, shape)


WIDTHS = {"stem": 16, "conv1": 16, "down": 24, "conv3": 12}
SHARES = {"stem": 0.3, "conv1": 0.3, "down": 0.2, "conv3": 0.2}
ALL = graph.Costs(made(), SHAPE)


def counts(plan: Plan) -> dict[str, int]:
    """How many channels each group keeps."""
    return WIDTHS | {name: len(kept) for name, kept in plan.keep_channels}


def in_fours(plan: Plan) -> float:
    """A fifth of the time is fixed, the rest is for blocks of four channels."""
    blocks = {name: -(-count // 4) * 4 for name, count in counts(plan).items()}
    return 0.2 + 0.8 * sum(SHARES[name] * blocks[name] / WIDTHS[name] for name in WIDTHS)


@dataclass
class FakeLab:
    """Makes latencies up and counts the rest; keeps what it was asked."""

    ratio: Callable[[Plan], float] = in_fours
    asked: list[Ask] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        assert isinstance(request, Ask), "plain filter pruning computes nothing and trains nothing"
        self.asked.append(request)
        size = ALL.of(list(counts(request.plan).values()))
        if "latency" not in request.wants:
            return Trial("t", request, *size)
        ratio = self.ratio(request.plan)
        interval = (ratio - HALF_WIDTH, ratio + HALF_WIDTH)
        return Trial("t", request, *size, make_latency(10 * ratio, ratio, interval))

    def drive(self, running: Search) -> Choice:
        try:
            requests = next(running)
            while True:
                requests = running.send([self.answer(request) for request in requests])
        except StopIteration as stop:
            return cast(Choice, stop.value)


def make_scene(budget: Budget, network: nn.Module | None = None, **changes: object) -> Scene:
    network = made() if network is None else network
    images = ImageSet(
        torch.zeros(4, *SHAPE, dtype=torch.uint8), None, tuple("abcd"), (0.5,) * 3, (0.5,) * 3, digest="d"
    )
    shown = graph.inspect(network, SHAPE)
    scene = Scene(network, shown, images, make_latency(10.0), budget, filters.RECOVER, seed=0)
    return replace(scene, **changes)  # type: ignore[arg-type]


LABELS = Tune(steps=7, loss="labels")


def search(lab: FakeLab, budget: Budget, scene: Scene | None = None, **changes: object) -> Choice:
    config = filters.Config(**changes)  # type: ignore[arg-type]
    return lab.drive(filters.search(scene or make_scene(budget, recover=LABELS), config))


def table(choice: Choice, title: str) -> Table:
    return next(one for one in choice.tables if one.title == title)


def column(shown: Table, name: str) -> list[object]:
    return [row[shown.columns.index(name)] for row in shown.rows]


# ---------------------------------------------------------------- scores


def group(name: str, of: tuple[str, ...], channels: int = 3) -> ChannelGroup:
    return ChannelGroup(name, of, (channels, 1, 1, 1), channels, 1, 1, prunable=True)


def test_l2_is_the_filters_length_in_units_of_the_groups_mean() -> None:
    network = nn.ModuleDict({"a": nn.Conv2d(2, 3, 1, bias=False), "b": nn.Conv2d(1, 3, 1, bias=False)})
    cast(nn.Conv2d, network["a"]).weight.data = torch.tensor([3.0, 4, 0, 0, 6, 8]).view(3, 2, 1, 1)
    cast(nn.Conv2d, network["b"]).weight.data = torch.tensor([-1.0, 2, 0]).view(3, 1, 1, 1)
    (found,) = of_weights("l2", network, [group("a", ("a",))], [(0, 1, 2)], 0)
    # 5, 0, 10, of mean 5.
    assert found.tolist() == pytest.approx([1.0, 0.0, 2.0])
    (found,) = of_weights("l2", network, [group("a", ("a", "b"))], [(0, 1, 2)], 0)
    # 6, 2, 10, of mean 6.
    assert found.tolist() == pytest.approx([1.0, 1 / 3, 5 / 3])


def test_batch_norm_scores_are_the_absolute_scales() -> None:
    widths = graph.width_map(made(), SHAPE)
    scores = scores_of("batch_norm", make_scene(Budget(macs_reduction=0.1)), widths)
    at = [one.name for one in widths.groups].index("conv1")
    scale = cast(nn.BatchNorm2d, made().get_submodule("norm1")).weight
    assert list(scores[at]) == pytest.approx(scale.abs().tolist())


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm", "batch_norm", "random"])
def test_of_every_criterion_the_highest_scores_stay(criterion: str) -> None:
    scene = make_scene(Budget(macs_reduction=0.4), recover=LABELS)
    choice = search(FakeLab(), scene.budget, scene, criterion=criterion, style="residual")
    widths = graph.width_map(made(), SHAPE)
    scores = dict(zip(WIDTHS, scores_of(criterion, scene, widths), strict=True))  # type: ignore[arg-type]
    assert choice.plan.keep_channels
    for name, kept in choice.plan.keep_channels:
        gone = set(range(WIDTHS[name])) - set(kept)
        assert min(scores[name][i] for i in kept) >= max(scores[name][i] for i in gone)
    assert f"lowest {criterion} kept" in table(choice, "Filters").columns


def test_criteria_choose_different_filters_and_random_ones_hang_on_the_seed() -> None:
    def chosen(criterion: str, seed: int = 0) -> Plan:
        scene = make_scene(Budget(macs_reduction=0.4), recover=LABELS, seed=seed)
        return search(FakeLab(), scene.budget, scene, criterion=criterion).plan

    plans = [chosen(one) for one in ("l1", "fpgm", "batch_norm", "random")]
    assert len(set(plans)) == 4
    assert chosen("random") == plans[-1] != chosen("random", seed=1)


# ---------------------------------------------------------------- what is narrowed


def test_layers_that_write_into_a_sum_are_those_of_the_streams() -> None:
    assert graph.stream_layers(made(), SHAPE) == {"stem", "conv2", "down", "conv4"}
    # A gate that multiplies is no sum, though it ties the channels of two layers.
    assert graph.stream_layers(made(Gated), SHAPE) == {"stem", "narrow"}


def test_normal_narrows_inside_blocks_and_residual_the_streams_too() -> None:
    budget = Budget(macs_reduction=0.2)
    normal = search(FakeLab(), budget)
    assert {name for name, _ in normal.plan.keep_channels} == {"conv1", "conv3"}
    verdicts = {row[0]: row[-1] for row in table(normal, "Filters").rows}
    assert verdicts["stem"] == 'a sum ties it to a residual stream, which style = "normal" leaves whole'
    assert verdicts["head"] == "its channels are the classes"
    residual = search(FakeLab(), budget, style="residual")
    assert {name for name, _ in residual.plan.keep_channels} == set(WIDTHS)
    assert "residual streams" not in residual.reason


def test_a_gate_that_multiplies_lies_inside_the_block() -> None:
    network = made(Gated)
    running = filters.search(
        make_scene(Budget(macs_reduction=0.2), network, recover=LABELS), filters.Config()
    )
    (ask,) = next(running)
    assert isinstance(ask, Ask)
    assert {name for name, _ in ask.plan.keep_channels} == {"wide", "squeeze"}


def test_streams_that_the_recovery_compares_stay_whole_and_the_reason_says_so() -> None:
    scene = make_scene(Budget(macs_reduction=0.2), recover=replace(filters.RECOVER, stage_weight=0.0))
    choice = search(FakeLab(), scene.budget, scene, style="residual")
    assert {name for name, _ in choice.plan.keep_channels} == {"stem", "conv1", "conv3"}
    assert choice.reason.endswith(
        "; of the residual streams 1 stay whole (down: the recovery compares its channels with the "
        "original's)"
    )


def test_residual_without_a_stream_to_narrow_is_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError) as error:
        search(FakeLab(), Budget(), make_scene(Budget(macs_reduction=0.2)), style="residual")
    assert str(error.value) == (
        '[method] style = "residual": no residual stream can be narrowed (stem: the recovery compares its '
        'channels with the original\'s); set style = "normal", or a recovery that compares fewer features: '
        "[recover] stage_weight = 0 leaves the streams of all but the last stage free, "
        'loss = "kd" or "labels" that one too'
    )


def test_shortcuts_that_pad_channels_are_refused_before_anything_is_measured() -> None:
    shown = graph.inspect(resnet20(), (3, 32, 32))
    scene = make_scene(Budget(macs_reduction=0.2))
    with pytest.raises(
        UsageError, match=r'no residual stream can be narrowed \(conv1: .*a shortcut pads them.*"normal"$'
    ):
        filters.check(shown, scene.calibration, scene.budget, filters.Config(style="residual"), scene.recover)
    filters.check(shown, scene.calibration, scene.budget, filters.Config(), scene.recover)


# ---------------------------------------------------------------- one ratio


def test_every_group_keeps_the_same_share_and_each_member_is_narrower() -> None:
    widths = graph.width_map(made(), SHAPE)
    members = family(widths, ALL, Meter("MACs", 0.5, 1, 1))
    # The first ratio that narrows a group: 1/48 of 24 channels and more leaves 23.
    assert (members[0].ratio, members[0].counts) == (0.0225, (16, 16, 23, 12))
    assert max((one for one in members if one.ratio <= 0.25), key=lambda one: one.ratio).counts == (
        12,
        12,
        18,
        9,
    )
    assert members[-1].counts == (1, 1, 1, 1)
    for wide, narrow in itertools.pairwise(members):
        assert wide.ratio < narrow.ratio and wide.macs > narrow.macs
        assert all(a >= b for a, b in zip(wide.counts, narrow.counts, strict=True))
    half = next(one for one in members if one.counts == (8, 8, 12, 6))
    assert half.macs == half.predicted == ALL.of([8, 8, 12, 6])[1] / ALL.of(list(WIDTHS.values()))[1]


def test_a_group_is_not_rounded_far_from_the_ratio() -> None:
    """Of a class timed through noise one low count may be all that is clearly faster."""
    widths = graph.width_map(made(), SHAPE)
    noisy = Ladder(24, (2,), (1.0,), (Rung(3, 0.4, 0.1, 0.7),))
    members = family(widths, ALL, Meter("latency", 0.9, 1, 1), [noisy])
    seen = dict.fromkeys(one.counts[2] for one in members)
    # Up to 6 channels, a quarter of 24, are given or taken: to 24 and to 3.
    assert list(seen) == [24, *range(17, 9, -1), 3, 2, 1]
    # The others follow the ratio.
    assert max((one for one in members if one.ratio <= 0.5), key=lambda one: one.ratio).counts[:2] == (8, 8)


@pytest.mark.parametrize(
    ("reduction", "style"),
    [
        (0.1, "normal"),
        (0.25, "normal"),
        (0.4, "normal"),
        (0.1, "residual"),
        (0.4, "residual"),
        (0.8, "residual"),
    ],
)
def test_the_widest_network_that_meets_a_size_is_taken_and_nothing_is_timed(
    reduction: float, style: str
) -> None:
    lab, budget = FakeLab(), Budget(macs_reduction=reduction)
    choice = search(lab, budget, style=style)
    names = ["conv1", "conv3"] if style == "normal" else list(WIDTHS)
    whole = ALL.of(list(WIDTHS.values()))[1]

    def macs(part: int) -> float:
        kept = {name: max(1, round((1 - part / 400) * WIDTHS[name])) for name in names}
        return ALL.of(list((WIDTHS | kept).values()))[1] / whole

    best = next(part for part in range(1, 401) if macs(part) <= 1 - reduction)
    assert ALL.of(list(counts(choice.plan).values()))[1] / whole == macs(best)
    assert {ask.wants for ask in lab.asked} == {()}


@pytest.mark.parametrize("reduction", [0.15, 0.3, 0.5])
def test_a_latency_is_met_at_counts_that_the_engine_likes(reduction: float) -> None:
    lab = FakeLab()
    choice = search(lab, Budget(latency_reduction=reduction), style="residual")
    assert in_fours(choice.plan) + HALF_WIDTH <= 1 - reduction
    # Seven counts of each width were timed; of them these begin a block of four.
    good = {16: {16, 12, 8, 4}, 24: {24, 18, 15, 12, 6, 3}, 12: {12, 7, 4}}
    for name, count in counts(choice.plan).items():
        assert count in good[WIDTHS[name]] or count < min(good[WIDTHS[name]])
    tried = table(choice, "Ratios that were tried")
    verdicts = column(tried, "verdict")
    at = verdicts.index("taken: the widest that does")
    assert set(verdicts[:at]) <= {"does not meet the budget"}
    assert all(left is not None for left in column(tried, "latency (ms)"))
    assert [one.title for one in choice.tables[1:]] == ["Filters", "Channel counts on this target"]
    rounded = len(lab.asked)
    lab = FakeLab()
    loose = search(lab, Budget(latency_reduction=reduction), style="residual", rounding="none")
    assert in_fours(loose.plan) + HALF_WIDTH <= 1 - reduction
    assert len(lab.asked) < rounded
    assert len(loose.tables) == 2


def test_rounding_keeps_channels_that_cost_no_time() -> None:
    """At one latency counts on the edge of a block hold at least as many channels as any others."""
    budget = Budget(latency_reduction=0.3)
    kept = [
        sum(counts(search(FakeLab(), budget, style="residual", rounding=how).plan).values())
        for how in ("engine", "none")
    ]
    assert kept[0] >= kept[1]


def test_a_latency_that_was_predicted_wrongly_is_found_by_building() -> None:
    """MACs promise much of what this engine does not give."""

    def sluggish(plan: Plan) -> float:
        return 0.8 + 0.2 * in_fours(plan)

    lab = FakeLab(sluggish)
    choice = search(lab, Budget(latency_reduction=0.1), style="residual", rounding="none")
    tried = table(choice, "Ratios that were tried")
    assert sluggish(choice.plan) + HALF_WIDTH <= 0.9
    meeting = [row for row in tried.rows if "do" in str(row[-1]) or "meets" in str(row[-1])]
    assert len(meeting) == len(tried.rows) == len(lab.asked) <= 12
    assert cast(float, column(tried, "predicted latency left")[-1]) < 0.6


def test_a_budget_that_even_the_narrowest_misses_ends_with_what_it_leaves() -> None:
    with pytest.raises(RunError) as error:
        search(FakeLab(lambda plan: 0.95), Budget(latency_reduction=0.3), rounding="none")
    assert str(error.value) == (
        "no network of the family meets the budget: the smallest leaves 95.0% (94.5% to 95.5%) of the "
        "latency, 70.0% is allowed; lower the budget, or raise [method] builds, or narrow the residual "
        'streams too ([method] style = "residual")'
    )
    with pytest.raises(RunError, match=r"the smallest that was tried leaves .*raise \[method\] builds$"):
        search(
            FakeLab(lambda plan: 0.95),
            Budget(latency_reduction=0.3),
            rounding="none",
            style="residual",
            builds=1,
        )


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("budget", "changes", "message"),
    [
        (Budget(sparsity=0.5), {}, "filters takes whole parts out of a network and leaves no zeros"),
        (Budget(drop_blocks=2), {}, "filters narrows layers and drops no block"),
        (Budget(macs_reduction=0.2), {"builds": 0}, r"\[method\] builds = 0: must be at least 1"),
        (Budget(latency_ms=11.0), {}, "the original takes 10.000 ms already; lower it"),
    ],
)
def test_what_cannot_be_asked_is_refused(budget: Budget, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search(FakeLab(), budget, **changes)  # type: ignore[arg-type]


def test_the_method_is_found_by_its_name_and_needs_no_labels() -> None:
    found = plugins.method("filters")
    assert found.Config is filters.Config and not found.NEEDS_LABELS
    assert found.RECOVER.loss == "mimic"


def test_the_recipe_for_cifar10_is_read() -> None:
    path = ROOT / "recipes" / "cifar10" / "filters_resnet56.toml"
    loaded = recipes.load(path)
    assert recipes.bind(filters.Config, loaded.method, path, "method") == filters.Config()


# ---------------------------------------------------------------- a whole run


@pytest.mark.slow
def test_digits_are_read_by_narrower_layers_after_a_short_recovery(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "practise.toml").read_text()
    text = text.replace("../calibration_data", str(ROOT / "calibration_data"))
    text = text.replace("weights/resnet20", str(ROOT / "recipes" / "weights" / "resnet20"))
    text = text.replace('name = "practise"\nscorer = "fast"', 'name = "filters"').replace(
        "steps = 300", "steps = 8\nbatch = 16"
    )
    text = text.replace("latency_reduction = 0.25", "latency_reduction = 0.1")
    text = text.replace(
        "budget_s = 2.0", "tolerance = 0.5\nbudget_s = 0.05\nfinal_budget_s = 0.05\ndrift = 1000"
    )
    text = text.replace("batch = 16\nthreads = 2", "batch = 2\nthreads = 1")
    (tmp_path / "filters.toml").write_text(text)
    setup = preparation.prepare(recipes.load(tmp_path / "filters.toml"))
    ran = take(setup, tmp_path / "run")
    report = ran.report
    assert (report.method, report.recover.loss, report.recover.steps) == ("filters", "mimic", 8)
    names = {name for name, _ in report.plan.keep_channels}
    assert names and all(name.endswith(".conv1") for name in names)
    assert report.result.macs < report.original.macs
    titles = [one.title for one in report.tables]
    assert titles[:3] == ["Ratios that were tried", "Filters", "Channel counts on this target"]
    loaded = optpipe.load(ran.folder)
    shape = setup.target.input_shape
    assert graph.count(graph.trace(loaded, shape), shape) == (report.result.parameters, report.result.macs)
