"""The search of three dimensions, driven by a laboratory whose accuracies and latencies are made up."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import torch
from conftest import make_latency
from torch import fx

from optpipe import graph
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.lab import nesting
from optpipe.methods import three_d
from optpipe.methods.three_d import importance
from optpipe.methods.three_d.collect import tuning
from optpipe.methods.three_d.images import Split, parts_of, split
from optpipe.types import (
    Answer,
    Ask,
    Budget,
    Choice,
    ModelGraph,
    Plan,
    Quality,
    Request,
    Scene,
    Search,
    Step,
    StepResult,
    Table,
    Train,
    Trained,
    Trial,
    Tune,
)
from optpipe.zoo import build

SHAPE = (3, 16, 16)
CLASSES = 4
BLOCKS = 9
HALF_WIDTH = 0.002
Share = tuple[float, float, float]


@functools.cache
def network() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("resnet20_cifar", classes=CLASSES)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
        return graph.trace(model.eval(), SHAPE)


@functools.cache
def shown() -> ModelGraph:
    return graph.inspect(network(), SHAPE)


def share_of(plan: Plan) -> Share:
    """(d, w, r) of a plan, the width as that of the widest layer that it narrows."""
    kept = dict(plan.keep_channels)
    ratio = len(kept["layer3.1.conv1"]) / 64 if "layer3.1.conv1" in kept else 1.0
    height = SHAPE[1] if plan.input_hw is None else plan.input_hw[0]
    return 1 - len(plan.drop_blocks) / BLOCKS, ratio, height / SHAPE[1]


def accuracy(d: float, w: float, r: float) -> float:
    """Each dimension costs the more the further it goes; the resolution costs most, the width least."""
    return 0.95 * (1 - 0.25 * (1 - d) ** 2) * (1 - 0.1 * (1 - w) ** 2) * (1 - 0.4 * (1 - r) ** 2)


def smooth(d: float, w: float, r: float) -> float:
    """A twentieth is fixed; most goes with what convolutions compute."""
    return 0.05 + 0.15 * d + 0.8 * d * w * r**2


def in_quarters(d: float, w: float, r: float) -> float:
    """An engine that works in blocks of a quarter of a layer's channels."""
    return smooth(d, -(-w * 4 // 1) / 4, r)


@dataclass
class FakeLab:
    """Makes accuracies and costs up; runs the search's own steps, or answers them from ``known``."""

    cost: Callable[[float, float, float], float] = smooth
    known: dict[tuple[str, str], StepResult] = field(default_factory=dict)
    batches: list[list[Request]] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)

    def answer(self, request: Request) -> Answer:
        if isinstance(request, Train):
            return self.train(request)
        if isinstance(request, Ask):
            ratio = self.cost(*share_of(request.plan))
            interval = (ratio - HALF_WIDTH, ratio + HALF_WIDTH)
            latency = make_latency(10 * ratio, ratio, interval) if "latency" in request.wants else None
            whole = shown()
            return Trial("t", request, round(whole.parameters * ratio), round(whole.macs * ratio), latency)
        assert isinstance(request, Step)
        asked = (request.name, request.depends)
        if asked not in self.known:
            self.known[asked] = StepResult("s", request.name, request.function())
        return self.known[asked]

    def train(self, request: Train) -> Trained:
        key = f"trained {len(self.plans)}"
        start = request.start
        if start is not None:
            assert self.plans[start.key] == start.plan
            nesting.further(start.plan, request.plan)
        self.plans[key] = request.plan
        value = accuracy(*share_of(request.plan))
        assert request.score is not None
        split = request.score if request.score == "validation" else "calibration"
        quality = Quality("top1", value, (value - 0.01, value + 0.01), 9, split)
        return Trained(key, graph.apply(network(), request.plan, SHAPE), f"digest {key}", quality)

    def drive(self, running: Search) -> Choice:
        try:
            requests = next(running)
            while True:
                self.batches.append(list(requests))
                requests = running.send([self.answer(request) for request in requests])
        except StopIteration as stop:
            return cast(Choice, stop.value)

    @property
    def trainings(self) -> list[Train]:
        return [one for batch in self.batches for one in batch if isinstance(one, Train)]

    @property
    def costed(self) -> list[Plan]:
        return [one.plan for batch in self.batches for one in batch if isinstance(one, Ask)]


@functools.cache
def pictures(count: int = 40) -> ImageSet:
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(2)).byte()
    names = tuple(map(str, range(count)))
    return ImageSet(pixels, torch.arange(count) % CLASSES, names, (0.5,) * 3, (0.25,) * 3, digest="d")


def make_scene(budget: Budget, **changes: object) -> Scene:
    recover = Tune(steps=7, batch=8, loss="labels", epochs=3, **changes)  # type: ignore[arg-type]
    return Scene(network(), shown(), pictures(), make_latency(10.0), budget, recover, seed=0)


def search(lab: FakeLab, budget: Budget, **settings: object) -> Choice:
    config = three_d.Config(**({"epochs": 1.0} | settings))  # type: ignore[arg-type]
    return lab.drive(three_d.search(make_scene(budget), config))


def table(choice: Choice, title: str) -> Table:
    return next(one for one in choice.tables if one.title == title)


def column(shown: Table, name: str) -> list[object]:
    return [row[shown.columns.index(name)] for row in shown.rows]


THIRD = Budget(latency_reduction=0.35)


@functools.cache
def searched() -> tuple[FakeLab, Choice]:
    lab = FakeLab()
    return lab, search(lab, THIRD)


def best_of_all(cost: Callable[[float, float, float], float], allowed: float) -> float:
    """The highest accuracy of any network that can be built within the budget."""
    depths = [1 - count / BLOCKS for count in range(8)]
    widths = [part / 16 for part in range(1, 17)]
    sizes = [height / 16 for height in range(1, 17)]
    points = itertools.product(depths, widths, sizes)
    return max(accuracy(*point) for point in points if cost(*point) + HALF_WIDTH <= allowed)


def test_the_chosen_network_meets_the_budget_and_is_next_to_the_best_there_is() -> None:
    _, choice = searched()
    share = share_of(choice.plan)
    assert smooth(*share) + HALF_WIDTH <= 0.65
    assert accuracy(*share) >= best_of_all(smooth, 0.65) - 0.003
    assert all(part < 1 for part in share)


def test_a_round_trains_every_dimension_in_one_batch_and_goes_on_from_the_last() -> None:
    lab, _ = searched()
    rounds = [batch for batch in lab.batches if isinstance(batch[0], Train)]
    assert [len(batch) for batch in rounds] == [4, 3, 3, 3, 3, 1]
    for before, after in itertools.pairwise([cast("list[Train]", batch)[-3:] for batch in rounds[:4]]):
        assert [one.start.plan for one in after if one.start] == [one.plan for one in before]
    assert all(one.start is None for one in cast("list[Train]", rounds[0]))
    depth, width, size = ([one.plan for one in lab.trainings[first:13:3]] for first in (1, 2, 3))
    for plans in (depth, width, size):
        assert len(set(plans)) == 4
    for less, more in itertools.pairwise(depth):
        assert set(less.drop_blocks) < set(more.drop_blocks)
    for less, more in itertools.pairwise(width):
        kept = dict(less.keep_channels)
        for name, channels in more.keep_channels:
            assert set(channels) <= set(kept.get(name, channels))
    sizes = [plan.input_hw or SHAPE[1:] for plan in size]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_trainings_never_see_the_images_that_they_are_scored_on() -> None:
    lab, _ = searched()
    labels = pictures().labels
    assert labels is not None
    for one in lab.trainings:
        assert one.images is not None and isinstance(one.score, tuple)
        assert not set(one.images) & set(one.score)
        assert len(one.images) + len(one.score) == len(pictures())
        assert torch.bincount(labels[list(one.score)]).tolist() == [2, 2, 2, 2]


def test_a_round_takes_its_epochs_in_steps_of_the_recoverys_batch_and_at_most_one_teacher() -> None:
    lab = FakeLab()
    config = three_d.Config(epochs=1.5)
    lab.drive(three_d.search(make_scene(THIRD, teachers="ensemble"), config))
    assert {one.tune.steps for one in lab.trainings} == {6}  # 1.5 epochs of 32 images in batches of 8
    assert {one.tune.teachers for one in lab.trainings} == {"single"}
    assert tuning(Tune(steps=1), 1, 9).teachers == "none"


@pytest.mark.parametrize("dimension", ["depth", "width", "resolution"])
def test_one_dimension_alone_trains_nothing_and_goes_no_further_than_it_must(dimension: str) -> None:
    lab = FakeLab()
    choice = search(lab, THIRD, dimensions=(dimension,))
    assert not lab.trainings
    share = list(share_of(choice.plan))
    assert smooth(*share) + HALF_WIDTH <= 0.65
    along = ("depth", "width", "resolution").index(dimension)
    milder = list(share)
    milder[along] += 1 / BLOCKS if dimension == "depth" else 1 / 16
    assert smooth(*milder) + HALF_WIDTH > 0.65
    assert [part for place, part in enumerate(share) if place != along] == [1.0, 1.0]


def test_only_widths_that_pay_are_chosen() -> None:
    choice = search(FakeLab(in_quarters), THIRD)
    _, width, _ = share_of(choice.plan)
    assert width in {0.25, 0.5, 0.75, 1.0}
    ratios = table(choice, "Ratios of channels on this target")
    taken = [
        ratio
        for ratio, verdict in zip(column(ratios, "ratio"), column(ratios, "verdict"), strict=True)
        if verdict == "may be taken"
    ]
    assert taken and set(taken) <= {0.25, 0.5, 0.75}


def test_where_no_width_pays_the_other_two_dimensions_are_left() -> None:
    choice = search(FakeLab(lambda d, w, r: smooth(d, 1.0, r)), THIRD)
    assert not choice.plan.keep_channels
    assert choice.plan.drop_blocks and choice.plan.input_hw
    assert "the width is whole" in choice.reason


def test_a_budget_in_macs_times_nothing() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(macs_reduction=0.5))
    assert not any("latency" in one.wants for batch in lab.batches for one in batch if isinstance(one, Ask))
    share = share_of(choice.plan)
    assert smooth(*share) <= 0.5 + 1e-6
    assert accuracy(*share) >= best_of_all(smooth, 0.5 + HALF_WIDTH) - 0.003


def test_the_papers_formula_asks_what_nothing_costs_before_the_end() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(macs_reduction=0.5), cost="formula")
    d, w, r = share_of(choice.plan)
    assert d * w**2 * r**2 <= 0.5 + 1e-6
    assert len(lab.costed) == 1


def test_a_surface_that_is_wrong_is_corrected_until_the_budget_is_met() -> None:
    def kinked(d: float, w: float, r: float) -> float:
        """Dearer by a tenth where all three are pruned, which nothing on the way to there shows."""
        away = d < 0.97 and w < 0.97 and r < 0.97
        return smooth(d, w, r) * (1.1 if away and smooth(d, w, r) > 0.55 else 1.0)

    choice = search(FakeLab(kinked), THIRD)
    built = table(choice, "The optimum, predicted and built")
    attempts = [one for one in column(built, "network") if str(one).startswith("built")]
    assert 2 <= len(attempts) <= 4
    assert kinked(*share_of(choice.plan)) + HALF_WIDTH <= 0.65
    assert column(built, "verdict").count("chosen") == 1


def test_the_cost_of_the_chosen_network_was_predicted_closely() -> None:
    _, choice = searched()
    built = table(choice, "The optimum, predicted and built")
    chosen = next(row for row in built.rows if row[-1] == "chosen")
    off = chosen[built.columns.index("off by")]
    assert isinstance(off, float) and abs(off) <= 0.03


def test_the_solver_and_the_grid_are_shown_side_by_side_and_agree() -> None:
    _, choice = searched()
    built = table(choice, "The optimum, predicted and built")
    assert built.rows[0][0] == "solver" and built.rows[0][-1] == "agrees with the grid"
    assert built.rows[1][0] == "dense grid"


def test_the_predictor_predicts_what_it_did_not_see_better_than_a_full_cubic() -> None:
    _, choice = searched()
    shown = table(choice, "Accuracy predictors")
    errors = dict(
        zip(
            zip(*(column(shown, name) for name in ("predictor", "degree", "ridge")), strict=True),
            column(shown, "error on points left out"),
            strict=True,
        )
    )
    assert cast(float, errors["rank 1", 3, 0.0]) < cast(float, errors["full", 3, 0.0])


def test_figures_show_the_curves_with_their_points_and_the_surface_with_the_optimum() -> None:
    _, choice = searched()
    curves, surface = choice.figures
    dots = [curve for curve in curves.curves if curve.style == "dots"]
    assert [len(curve.x) for curve in dots] == [5, 5, 5]
    assert surface.surface is not None
    finite = [value for row in surface.surface.values for value in row if value is not None]
    assert finite and max(finite) <= 1
    (optimum,) = [curve for curve in surface.curves if curve.name == "optimum"]
    assert surface.surface.x[0] <= optimum.x[0] <= 1 and surface.surface.y[0] <= optimum.y[0] <= 1


def test_of_two_dimensions_the_figure_is_a_curve() -> None:
    choice = search(FakeLab(), THIRD, dimensions=("depth", "resolution"))
    assert not choice.plan.keep_channels
    assert choice.figures[1].surface is None
    assert len(choice.figures[1].curves[0].x) > 5


def test_a_replay_with_the_same_answers_ends_in_the_same_choice() -> None:
    lab, choice = searched()
    again = FakeLab(known=lab.known)
    assert search(again, THIRD) == choice
    assert [[type(one) for one in batch] for batch in again.batches] == [
        [type(one) for one in batch] for batch in lab.batches
    ]


def test_a_budget_that_nothing_meets_is_refused_with_what_can_be_reached() -> None:
    with pytest.raises(RunError, match="no network within reach meets the budget"):
        search(FakeLab(lambda d, w, r: 0.9 + 0.1 * smooth(d, w, r)), THIRD)


def test_the_result_is_made_of_the_trained_network_that_is_nearest_on_the_way() -> None:
    lab, choice = searched()
    assert choice.start is not None
    assert lab.plans[choice.start.key] == choice.start.plan
    nesting.further(choice.start.plan, choice.plan)
    d, w, r = share_of(choice.plan)

    def away(plan: Plan) -> float:
        own = share_of(plan)
        within = all(a >= b for a, b in zip(own, (d, w, r), strict=True))
        return sum(own) - (d + w + r) if within else math.inf

    assert away(choice.start.plan) == min(map(away, lab.plans.values()))


def test_the_paper_makes_the_result_of_the_original() -> None:
    lab = FakeLab()
    choice = search(lab, THIRD, begin="original")
    assert choice.start is None


def test_one_dimension_that_cannot_meet_the_budget_says_how_far_it_goes() -> None:
    with pytest.raises(
        RunError, match=r"depth alone can do leaves \d+\.\d% of the latency, 10\.0% is allowed"
    ):
        search(FakeLab(), Budget(latency_reduction=0.9), dimensions=("depth",))


def test_a_latency_that_the_original_has_already_is_refused() -> None:
    with pytest.raises(UsageError, match=r"takes 10\.000 ms already"):
        search(FakeLab(), Budget(latency_ms=11.0))


def test_a_recovery_that_takes_no_labels_is_refused() -> None:
    scene = replace(make_scene(THIRD), recover=Tune(steps=1, loss="mimic"))
    with pytest.raises(UsageError, match="three_d trains on labels"):
        FakeLab().drive(three_d.search(scene, three_d.Config()))


@pytest.mark.parametrize(
    ("budget", "settings", "words"),
    [
        (Budget(drop_blocks=3), {}, "drop_blocks"),
        (Budget(parameters_reduction=0.3), {}, "smaller images leave every parameter"),
        (THIRD, {"cost": "formula"}, "stands for MACs"),
        (THIRD, {"dimensions": ()}, "name at least one"),
        (THIRD, {"dimensions": ("depth", "depth")}, "each once"),
        (THIRD, {"rounds": 0}, "rounds = 0"),
        (THIRD, {"degree": 0}, "degree = 0"),
        (THIRD, {"rank": 0}, "rank = 0"),
        (THIRD, {"corrections": -1}, "corrections = -1"),
        (THIRD, {"epochs": 0.0}, "epochs = 0"),
        (THIRD, {"validation": 1.0}, "validation = 1"),
        (THIRD, {"resolution_step": 0}, "resolution_step = 0"),
        (THIRD, {"resolution_step": 16}, "no multiple of it is below"),
    ],
)
def test_settings_that_make_no_search_are_refused_with_their_value(
    budget: Budget, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        search(FakeLab(), budget, **settings)


def test_a_network_of_one_size_says_so_and_what_is_left() -> None:
    tied = graph.inspect(network(), SHAPE)
    tied = replace(tied, fixed_size="its head is flat")
    with pytest.raises(
        UsageError, match=r'its head is flat; set \[method\] dimensions = \["depth", "width"\]'
    ):
        three_d.check(tied, pictures(), THIRD, three_d.Config(), Tune(steps=1, loss="labels"))


def test_with_validation_images_all_others_train_and_those_score() -> None:
    lab = FakeLab()
    scene = replace(make_scene(THIRD), validation=replace(pictures(9), digest="v"))
    lab.drive(three_d.search(scene, three_d.Config(epochs=1.5, rounds=1, inside=False)))
    assert {(one.images, one.score) for one in lab.trainings} == {(None, "validation")}
    assert {one.tune.steps for one in lab.trainings} == {8}  # 1.5 epochs of 40 images in batches of 8
    # Probes too are scored on them: of another set they would be other probes.
    assert all(", v, " in depends for name, depends in lab.known if name.startswith("probes of"))


def test_probes_are_scored_on_the_validation_images() -> None:
    scene = replace(make_scene(THIRD), validation=pictures(12))
    names = [block.name for block in shown().units]
    parts = parts_of(scene, 0.2)
    assert parts == Split(tuple(range(40)), "validation")
    (step,) = next(importance.probe(scene, network(), "", names, parts))
    assert isinstance(step, Step)
    found = graph.unit_discrimination(
        network(), pictures(), range(40), range(12), SHAPE, scored_on=scene.validation
    )
    assert step.function()[:2] == (found[0].before, found[0].after)
    # Twelve images are scored, of which every one moves the accuracy by a twelfth.
    assert all(abs(12 * one.after - round(12 * one.after)) < 1e-9 for one in found)
    inside = graph.unit_discrimination(network(), pictures(), range(12, 40), range(12), SHAPE)
    assert inside != found


def test_a_class_of_one_image_is_enough_where_there_are_validation_images() -> None:
    few = replace(pictures(), labels=torch.tensor([0] + [1] * 19 + [2] * 20))
    asked = (shown(), few, THIRD, three_d.Config(), Tune(steps=1, loss="labels"))
    with pytest.raises(
        UsageError, match=r"class 0 has 1 images.*give images of that class, or \[data\] valid"
    ):
        three_d.check(*asked)
    three_d.check(*asked, pictures(9))


def test_every_class_has_images_on_both_sides_of_the_split() -> None:
    parts = split(pictures(), 0.01, 0)
    assert parts.score != "validation"
    assert len(parts.score) == CLASSES
    labels = pictures().labels
    assert labels is not None
    assert (
        set(labels[list(parts.fit)].tolist())
        == set(labels[list(parts.score)].tolist())
        == set(range(CLASSES))
    )


def test_steps_are_asked_and_stored_by_the_weights_that_they_look_at() -> None:
    lab, _ = searched()
    steps = [one for batch in lab.batches for one in batch if isinstance(one, Step)]
    assert len({one.depends for one in steps}) == len(steps) >= 4
