"""DLLP's search, driven by a laboratory that trains a tiny network and makes latencies up."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from conftest import make_latency
from torch import fx, nn

from optpipe import graph, store, tune
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.methods import dllp
from optpipe.methods._ladder import WELL_BELOW, Ladder, Rung
from optpipe.methods._meter import Meter
from optpipe.methods.dllp.family import Nested, Tried, family, largest
from optpipe.methods.dllp.pressure import Kept
from optpipe.methods.dllp.training import particles_of
from optpipe.types import (
    Answer,
    Ask,
    Budget,
    Choice,
    Fit,
    Fitted,
    Plan,
    Request,
    Scene,
    Search,
    Start,
    Step,
    StepResult,
    Table,
    Trial,
    Tune,
)

SHAPE = (3, 8, 8)
CLASSES = 4
HALF_WIDTH = 0.004


class Net(nn.Module):
    """Groups of 16 and 24 filters and, of a hidden layer, 12."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 24, 3, 2, padding=1, bias=False), nn.BatchNorm2d(24)
        self.hidden, self.head = nn.Linear(24, 12), nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x))).mean((2, 3))
        logits: torch.Tensor = self.head(F.relu(self.hidden(x)))
        return logits


WIDTHS = {"first": 16, "second": 24, "hidden": 12}
SHARES = {"first": 0.4, "second": 0.55, "hidden": 0.05}


@functools.cache
def network() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return graph.trace(Net().eval(), SHAPE)


@functools.cache
def masks_of(granularity: graph.Granularity = "filter") -> graph.Masks:
    return graph.Masks(network(), graph.width_map(network(), SHAPE), granularity)


@functools.cache
def costs() -> graph.Costs:
    return graph.Costs(network(), SHAPE)


@functools.cache
def pictures(count: int = 24) -> ImageSet:
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(2)).byte()
    names = tuple(map(str, range(count)))
    return ImageSet(pixels, torch.arange(count) % CLASSES, names, (0.5,) * 3, (0.25,) * 3, digest="d")


def counts(plan: Plan) -> dict[str, int]:
    return WIDTHS | {name: len(kept) for name, kept in plan.keep_channels}


def in_fours(plan: Plan) -> float:
    """A fifth of the time is fixed, the rest is for blocks of four channels."""
    blocks = {name: -(-count // 4) * 4 for name, count in counts(plan).items()}
    return 0.2 + 0.8 * sum(SHARES[name] * blocks[name] / WIDTHS[name] for name in WIDTHS)


@dataclass
class FakeLab:
    """Makes latencies up, trains what it is asked to train, and keeps both; what it knows is not redone."""

    ratio: Callable[[Plan], float] = in_fours
    requests: list[Request] = field(default_factory=list)
    trained: dict[tuple[str, str, Tune], Fitted] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        if isinstance(request, Fit):
            return self.fit(request)
        if isinstance(request, Step):
            return StepResult("s", request.name, request.function())
        assert isinstance(request, Ask)
        ratio = self.ratio(request.plan)
        interval = (ratio - HALF_WIDTH, ratio + HALF_WIDTH)
        latency = make_latency(10 * ratio, ratio, interval) if "latency" in request.wants else None
        return Trial("t", request, *costs().of(list(counts(request.plan).values())), latency)

    def fit(self, request: Fit) -> Fitted:
        asked = (request.name, request.depends, request.tune)
        if asked not in self.trained:
            self.computed.append(request.name)
            module, objective = request.make()
            if request.tune.steps:
                tune.fit(module, objective, pictures(), request.tune, seed=0)
            module.eval().requires_grad_(False)
            digest = store.digest({name: one.tolist() for name, one in module.state_dict().items()})
            self.trained[asked] = Fitted(f"fit {len(self.trained)}", module, digest)
        return self.trained[asked]

    def drive(self, running: Search) -> Choice:
        try:
            requests = next(running)
            while True:
                requests = running.send([self.answer(request) for request in requests])
        except StopIteration as stop:
            return cast(Choice, stop.value)

    def module(self, start: Start) -> nn.Module:
        """The weights that a start names."""
        (found,) = [one.module for one in self.trained.values() if one.key == start.key]
        return found.get_submodule(start.part.removesuffix("."))

    @property
    def fits(self) -> list[Fit]:
        return [request for request in self.requests if isinstance(request, Fit)]

    @property
    def built(self) -> list[Plan]:
        """What was counted or timed after the gates were learnt."""
        first = next(index for index, one in enumerate(self.requests) if isinstance(one, Fit))
        return [one.plan for one in self.requests[first:] if isinstance(one, Ask)]


def make_scene(budget: Budget, **changes: object) -> Scene:
    scene = Scene(
        network(),
        graph.inspect(network(), SHAPE),
        pictures(),
        make_latency(10.0),
        budget,
        Tune(steps=0, loss="labels"),
        seed=0,
    )
    return replace(scene, **changes)  # type: ignore[arg-type]


def config(**changes: object) -> dllp.Config:
    few = {"epochs": 4, "settle": 0.5, "batch": 8, "lr": 0.02, "augment": "none", "autocast": "off"}
    # In so few steps gates are to go less far.
    return dllp.Config(**(few | {"travel": 3.0, "spike": 50.0} | changes))  # type: ignore[arg-type]


def search(lab: FakeLab, budget: Budget, **changes: object) -> Choice:
    return lab.drive(dllp.search(make_scene(budget), config(**changes)))


def table(choice: Choice, title: str) -> Table:
    return next(one for one in choice.tables if one.title.startswith(title))


def column(shown: Table, name: str) -> list[object]:
    return [row[shown.columns.index(name)] for row in shown.rows]


# ---------------------------------------------------------------- the family


def thetas(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for shape in masks_of().shapes]


TOTAL = sum(WIDTHS.values())


def test_the_family_is_nested_from_the_largest_to_one_channel_each() -> None:
    found = family(masks_of(), thetas(), Kept(TOTAL))
    assert len(found) == len({one.counts for one in found}) > 40
    assert [one.threshold for one in found] == sorted(one.threshold for one in found)
    for before, after in itertools.pairwise([(16, 24, 12), *(one.counts for one in found)]):
        assert sum(after) < sum(before)
        assert all(less <= more for less, more in zip(after, before, strict=True))
    assert found[-1].counts == (1, 1, 1)
    for one in found:
        assert one.predicted == pytest.approx(sum(one.counts) / TOTAL)
        kept = masks_of().highest(thetas(), one.counts)
        above = masks_of().above(thetas(), one.threshold)
        assert all(torch.equal(a, b) for a, b in zip(kept, above, strict=True))


def test_with_ladders_the_family_stops_where_the_target_is_fast() -> None:
    rungs = tuple(
        Rung(count, saving, saving - 0.01, saving + 0.01) for count, saving in ((12, 0.1), (6, 0.3))
    )
    found = family(masks_of(), thetas(), Kept(TOTAL), [Ladder(16, (0,), (1.0,), rungs)])
    below = {count for count in range(1, 6) if count <= WELL_BELOW * 6}
    assert 1 <= len(below) < 5
    assert {one.counts[0] for one in found} == {16, 12, 6} | below
    assert len({one.counts[1] for one in found}) > 20
    for before, after in itertools.pairwise(found):
        assert all(less <= more for less, more in zip(after.counts, before.counts, strict=True))
        assert before.counts != after.counts


def test_of_two_equally_near_rungs_the_larger_is_taken() -> None:
    rungs = tuple(
        Rung(count, saving, saving - 0.01, saving + 0.01) for count, saving in ((12, 0.1), (6, 0.3))
    )
    rising = [torch.arange(16) / 16, torch.ones(24), torch.ones(12)]
    found = family(masks_of(), rising, Kept(TOTAL), [Ladder(16, (0,), (1.0,), rungs)])
    # Above i / 16 there are 15 - i: 14 is as near to 16 as to 12, and 9 to 12 as to 6; well below any goes.
    least = int(WELL_BELOW * 6)
    assert [(one.threshold * 16, one.counts) for one in found] == [
        (2, (12, 24, 12)),
        (7, (6, 24, 12)),
        *((15 - count, (count, 24, 12)) for count in range(least, 0, -1)),
        (16, (1, 1, 1)),
    ]


def test_units_of_one_theta_leave_no_family() -> None:
    ones = [torch.ones(shape) for shape in masks_of().shapes]
    assert [one.counts for one in family(masks_of(), ones, Kept(TOTAL))] == [(1, 1, 1)]


def run(
    members: Sequence[Nested], ratio: Callable[[int], float], allowed: float, builds: int
) -> tuple[Tried, tuple[Tried, ...], list[int]]:
    """What :func:`largest` takes where a member that keeps so many filters has that ratio."""
    meter = Meter("latency", allowed, 1, 1)
    running = largest(masks_of(), thetas(), members, meter, builds)
    sizes: list[int] = []
    try:
        (request,) = next(running)
        while True:
            assert isinstance(request, Ask) and request.wants == ("latency",)
            sizes.append(sum(counts(request.plan).values()))
            cost = ratio(sizes[-1])
            latency = make_latency(1.0, cost, (cost - HALF_WIDTH, cost + HALF_WIDTH))
            (request,) = running.send([Trial("t", request, 1, 1, latency)])
    except StopIteration as stop:
        taken, tried = cast("tuple[Tried, tuple[Tried, ...]]", stop.value)
        return taken, tried, sizes


def members_of(predicted: Callable[[Nested], float]) -> list[Nested]:
    return [replace(one, predicted=predicted(one)) for one in family(masks_of(), thetas(), Kept(TOTAL))]


@pytest.mark.parametrize("allowed", [0.99, 0.7, 0.42, 0.1])
@pytest.mark.parametrize("wrong", [-0.9, -0.2, -0.02, 0.0, 0.02, 0.2, 0.9])
def test_the_largest_that_meets_the_budget_is_found_wherever_the_search_begins(
    allowed: float, wrong: float
) -> None:
    members = members_of(lambda one: sum(one.counts) / TOTAL + wrong)

    def ratio(size: int) -> float:
        return size / TOTAL

    best = next(one for one in members if ratio(sum(one.counts)) + HALF_WIDTH <= allowed)
    taken, tried, sizes = run(members, ratio, allowed, 12)
    assert taken.nested == best
    assert taken.meets and taken in tried
    assert len(sizes) == len(set(sizes)) == len(tried) <= 12
    order = [sum(one.nested.counts) for one in tried]
    assert order == sorted(order, reverse=True)
    assert taken.plan == masks_of().plan(masks_of().highest(thetas(), taken.nested.counts))


def test_a_search_that_began_well_builds_three_networks_at_most() -> None:
    members = members_of(lambda one: sum(one.counts) / TOTAL + HALF_WIDTH)
    _, _, sizes = run(members, lambda size: size / TOTAL, 0.5, 12)
    assert len(sizes) <= 3


@pytest.mark.parametrize("builds", [2, 4, 6])
def test_few_builds_end_with_one_that_meets_the_budget(builds: int) -> None:
    members = members_of(lambda one: 0.2)
    taken, tried, sizes = run(members, lambda size: size / TOTAL, 0.97, builds)
    assert taken.meets and len(tried) == len(sizes) <= builds
    meeting = [one for one in tried if one.meets]
    assert taken == meeting[0]


def test_where_none_meets_the_budget_the_least_that_was_reached_is_said() -> None:
    members = members_of(lambda one: 0.9)
    with pytest.raises(RunError) as error:
        run(members, lambda size: 0.5 + size / TOTAL / 2, 0.3, 20)
    assert str(error.value) == (
        "no network of the family meets the budget: the smallest leaves 52.9% (52.5% to "
        "53.3%) of the latency, 30.0% is allowed; lower the budget, raise [method] builds, or train for "
        "longer"
    )
    with pytest.raises(
        RunError, match=r"leaves 9\d\.\d% \(.*\) of the latency, 30\.0% is allowed; .* builds"
    ):
        run(members_of(lambda one: 0.2), lambda size: size / TOTAL, 0.3, 1)


def test_a_family_without_members_is_refused() -> None:
    with pytest.raises(RunError, match="leaves the whole network: no unit was trained away"):
        run([], lambda size: 1.0, 0.5, 5)


# ---------------------------------------------------------------- whole searches


@functools.cache
def searched() -> tuple[FakeLab, Choice]:
    lab = FakeLab()
    return lab, search(lab, Budget(latency_reduction=0.3))


def test_a_latency_is_met_by_a_network_that_was_built() -> None:
    lab, choice = searched()
    assert in_fours(choice.plan) + HALF_WIDTH <= 0.7
    assert choice.plan in lab.built
    shown = table(choice, "Networks of the family that were tried")
    assert len(shown.rows) == len(lab.built)
    verdicts = column(shown, "verdict")
    assert verdicts.count("taken: the largest that does") == 1
    at = verdicts.index("taken: the largest that does")
    assert set(verdicts[:at]) <= {"does not meet the budget"}
    assert column(shown, "latency left")[at] == pytest.approx(in_fours(choice.plan))
    # Groups stop at counts that are clearly faster.
    fast = {"first": {16, 12, 8, 4}, "second": {24, 18, 15, 12, 6, 3}, "hidden": {12, 7, 4}}
    assert all(count in fast[name] for name, count in counts(choice.plan).items())
    assert f"{in_fours(choice.plan):.1%} of the latency" in choice.reason
    assert "70.0% allowed" in choice.reason
    assert choice.recover == Tune(steps=0, loss="labels")


def test_gates_are_learnt_then_the_rest_is_settled() -> None:
    lab, choice = searched()
    assert [(one.name, one.tune.steps) for one in lab.fits] == [("gates", 6), ("settling", 6)]
    for one in lab.fits:
        assert (one.tune.batch, one.tune.lr, one.tune.loss, one.tune.schedule) == (
            8,
            0.02,
            "labels",
            "cosine",
        )
    gates, settled = lab.trained.values()
    assert choice.start == Start(settled.key, Plan(), "networks.0.")
    first, last = particles_of(gates), particles_of(settled)
    # Settling trains weights alone: the gates are those that the thresholds were made of.
    for gate, later in zip(first.gates_of(0), last.gates_of(0), strict=True):
        assert torch.equal(gate, later)
    assert not torch.equal(
        first.network(0).get_parameter("head.weight"), last.network(0).get_parameter("head.weight")
    )


def test_the_other_particles_are_networks_of_the_same_widths() -> None:
    lab, choice = searched()
    (member,) = choice.members
    assert member.start == Start(cast(Start, choice.start).key, Plan(), "networks.1.")
    assert counts(member.plan) == counts(choice.plan)
    learnt = particles_of(next(iter(lab.trained.values())))
    for index, plan in enumerate((choice.plan, member.plan)):
        kept = masks_of().highest(learnt.probabilities(index, "filter"), list(counts(plan).values()))
        assert masks_of().plan(kept) == plan


def test_cutting_the_spike_changes_nothing() -> None:
    _, choice = searched()
    looked = table(choice, "Cutting the spike out")
    assert [row[0] for row in looked.rows] == [
        "masks sampled, mean of 4",
        "masks by the threshold, before settling",
        "masks by the threshold, at the end",
        "cut, nothing trained since",
    ]
    accuracy = column(looked, "accuracy")
    assert accuracy[-1] == accuracy[-2]
    assert cast(float, column(looked, "largest difference of a logit")[-1]) < 1e-5


def test_theta_is_shown_for_every_layer() -> None:
    lab, choice = searched()
    shown = table(choice, "Theta of channels by layer")
    assert column(shown, "layer") == list(WIDTHS)
    assert column(shown, "kept") == list(counts(choice.plan).values())
    assert column(shown, "sparsity") == pytest.approx(
        [1 - counts(choice.plan)[name] / WIDTHS[name] for name in WIDTHS]
    )
    learnt = particles_of(next(iter(lab.trained.values()))).probabilities(0, "filter")
    assert column(shown, "mean theta") == pytest.approx([float(one.mean()) for one in learnt])
    for row in shown.rows:
        lowest, highest = row[-2], row[-1]
        assert highest is None or cast(float, lowest) >= cast(float, highest)
    titles = [figure.title for figure in choice.figures]
    assert titles == ["Theta of all units", *(f"Weights of {name}" for name in WIDTHS)]
    for figure in choice.figures[1:]:
        assert [one.name for one in figure.curves] == ["original", "pruned by dllp", "pruned by magnitude"]


def test_a_replayed_search_trains_nothing_twice() -> None:
    lab, choice = searched()
    again = FakeLab(trained=dict(lab.trained))
    assert search(again, Budget(latency_reduction=0.3)) == choice
    assert again.computed == []
    assert [type(one) for one in again.requests] == [type(one) for one in lab.requests]


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.7}, {"spike": 60.0}, {"particles": 3}, {"kernel": "each"}, {"keep": 0.9}, {"jitter": 0.1}],
)
def test_other_settings_are_other_trainings(changes: dict[str, object]) -> None:
    lab, _ = searched()
    again = FakeLab(trained=dict(lab.trained))
    running = dllp.search(make_scene(Budget(latency_reduction=0.3)), config(**changes))
    requests = next(running)
    requests = running.send([again.answer(one) for one in requests])
    (asked,) = requests
    assert isinstance(asked, Fit)
    assert (asked.name, asked.depends, asked.tune) not in lab.trained


@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_a_size_is_met_and_nothing_is_timed(measure: str) -> None:
    lab = FakeLab()
    budget = Budget(macs_reduction=0.4) if measure == "macs" else Budget(parameters_reduction=0.4)
    choice = search(lab, budget)
    whole, left = costs().of(list(WIDTHS.values())), costs().of(list(counts(choice.plan).values()))
    part = ("parameters", "macs").index(measure)
    assert 0.4 < left[part] / whole[part] <= 0.6 + 1e-9
    assert not any("latency" in one.wants for one in lab.requests if isinstance(one, Ask))
    assert lab.built == [one.plan for one in lab.requests if isinstance(one, Ask)]


def test_an_absolute_latency_is_met_alike() -> None:
    lab, choice = searched()
    assert search(FakeLab(trained=dict(lab.trained)), Budget(latency_ms=7.0)).plan == choice.plan


def test_where_the_fast_counts_do_not_reach_the_budget_any_count_may_serve() -> None:
    def stiff(plan: Plan) -> float:
        """Only a whole network with all of its layers narrow is faster than what is fixed."""
        small = all(count <= 0.6 * WIDTHS[name] for name, count in counts(plan).items())
        return 0.6 if small else 0.97

    lab = FakeLab(stiff)
    choice = search(lab, Budget(latency_reduction=0.3), builds=20)
    assert stiff(choice.plan) == 0.6
    assert choice.tables[0].title == "Channel counts on this target"


def test_pressed_by_macs_no_channel_count_is_timed() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(latency_reduction=0.3), cost="macs")
    assert in_fours(choice.plan) + HALF_WIDTH <= 0.7
    assert isinstance(lab.requests[0], Fit)
    assert not any(one.title == "Channel counts on this target" for one in choice.tables)


def test_without_settling_the_gates_training_is_what_is_cut() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(macs_reduction=0.4), settle=0.0)
    assert [(one.name, one.tune.steps) for one in lab.fits] == [("gates", 12)]
    assert choice.start == Start(next(iter(lab.trained.values())).key, Plan(), "networks.0.")


def test_by_magnitude_one_network_is_trained_for_as_long() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(macs_reduction=0.4), score="magnitude")
    assert [(one.name, one.tune.steps) for one in lab.fits] == [("settling", 12)]
    assert choice.members == ()
    largest_ones = masks_of().highest(masks_of().magnitudes(network()), list(counts(choice.plan).values()))
    assert masks_of().plan(largest_ones) == choice.plan
    assert "a threshold on magnitude" in choice.reason
    looked = table(choice, "Cutting the spike out")
    assert [row[0] for row in looked.rows] == [
        "masks by the threshold, at the end",
        "cut, nothing trained since",
    ]


def test_from_scratch_particles_have_weights_of_their_own() -> None:
    lab = FakeLab()
    search(lab, Budget(macs_reduction=0.4), start="scratch", epochs=1)
    begun = lab.fits[0].make()[0]
    first, second, own = (
        one.get_parameter("first.weight").detach()
        for one in (begun.get_submodule("networks.0"), begun.get_submodule("networks.1"), network())
    )
    assert float((first - second).abs().mean()) > 0.05 and float((first - own).abs().mean()) > 0.05
    assert float(first.abs().max()) <= 27**-0.5


def test_one_particle_leaves_no_members() -> None:
    choice = search(FakeLab(), Budget(macs_reduction=0.4), particles=1, epochs=1)
    assert choice.members == ()


# ---------------------------------------------------------------- zeros


@pytest.mark.parametrize("score", ["posterior", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_single_weights_end_with_exactly_so_many_zeros(sparsity: float, score: str) -> None:
    lab = FakeLab()
    choice = search(lab, Budget(sparsity=sparsity), granularity="weight", score=score, epochs=2)
    assert choice.plan == Plan() and choice.start is not None
    total = graph.weight_count(network())
    for start in (choice.start, *(member.start for member in choice.members)):
        left = lab.module(start)
        assert round(graph.sparsity(left) * total) == -int(-sparsity * total // 1)
        assert bool(left.get_parameter("head.weight").all())
    assert len(choice.members) == (score == "posterior")
    assert lab.computed[-1] == "zeros"
    assert f"{sparsity:.1%} of the weights are zero (weight)" in choice.reason
    assert "only an engine with a sparse path" in choice.reason
    looked = table(choice, "Cutting the spike out")
    assert cast(float, column(looked, "largest difference of a logit")[-1]) < 1e-6


def test_two_of_each_four_along_the_inputs_are_zero() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(sparsity=0.3), granularity="2:4", epochs=2)
    assert choice.start is not None
    for start in (choice.start, *(member.start for member in choice.members)):
        for name in ("second", "hidden"):
            weight = lab.module(start).get_parameter(f"{name}.weight")
            assert set((graph.fours(weight) == 0).sum(-1).flatten().tolist()) == {2}
        for name in ("first", "head"):
            assert bool(lab.module(start).get_parameter(f"{name}.weight").all())
    # Half of the weights of the two layers whose inputs come in fours.
    total = graph.weight_count(network())
    assert graph.sparsity(lab.module(choice.start)) == pytest.approx((16 * 24 * 9 + 24 * 12) / 2 / total)
    assert "(2:4)" in choice.reason


def test_zeros_are_in_each_particles_own_weights_and_the_original_stays_whole() -> None:
    before = {name: value.clone() for name, value in network().state_dict().items()}
    lab = FakeLab()
    choice = search(lab, Budget(sparsity=0.5), granularity="weight", epochs=2)
    (settled,) = [one.module for asked, one in lab.trained.items() if asked[0] == "settling"]
    starts = [cast(Start, choice.start), *(member.start for member in choice.members)]
    for start in starts:
        learnt, left = settled.get_submodule(start.part.removesuffix(".")), lab.module(start)
        for name, value in left.state_dict().items():
            own = learnt.state_dict()[name]
            assert torch.equal(value, torch.where(value == 0, value, own)), name
    one, other = (lab.module(start).get_parameter("first.weight") for start in starts)
    assert not torch.equal(one == 0, other == 0)
    assert all(torch.equal(before[name], value) for name, value in network().state_dict().items())


def test_a_sparse_search_that_is_replayed_trains_nothing() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(sparsity=0.5), granularity="weight", epochs=2)
    assert lab.computed == ["gates", "settling", "zeros"]
    again = FakeLab(trained=dict(lab.trained))
    assert search(again, Budget(sparsity=0.5), granularity="weight", epochs=2) == choice
    assert again.computed == []


@pytest.mark.parametrize(("granularity", "most"), [("weight", 0.9886), ("2:4", 0.4432)])
def test_more_zeros_than_there_are_weights_to_take_are_refused(granularity: str, most: float) -> None:
    with pytest.raises(UsageError) as error:
        search(FakeLab(), Budget(sparsity=0.99), granularity=granularity)
    line = str(error.value)
    assert line.startswith(
        f'[budget] sparsity = 0.99: {most} is the most that granularity = "{granularity}" can do here'
    )
    assert line.endswith("lower it") and "\n" not in line


# ---------------------------------------------------------------- what no search can be made of


def refusal(budget: Budget, recover: Tune | None = None, **changes: object) -> str:
    """The one line that a search is refused with, before it asks anything."""
    scene = make_scene(budget) if recover is None else make_scene(budget, recover=recover)
    with pytest.raises(UsageError) as error:
        next(dllp.search(scene, config(**changes)))
    assert "\n" not in str(error.value)
    return str(error.value)


MACS = Budget(macs_reduction=0.3)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("epochs", 0, "must be above 0 and finite"),
        ("epochs", float("nan"), "must be above 0 and finite"),
        ("settle", 1.0, "must be a share of the epochs, at least 0 and below 1"),
        ("settle", -0.1, "must be a share of the epochs, at least 0 and below 1"),
        ("batch", 0, "must be at least 1"),
        ("lr", 0.0, "must be above 0 and finite"),
        ("lr", float("inf"), "must be above 0 and finite"),
        ("momentum", 1.0, "must be at least 0 and below 1"),
        ("particles", 0, "must be at least 1"),
        ("beta", -0.1, "must not be below 0"),
        ("spike", 1.0, "must be above 1, the slab's order, and at most 1e9"),
        ("spike", 1e10, "must be above 1, the slab's order, and at most 1e9"),
        ("temperature", (0.1, 1.0), "must fall, and be above 0"),
        ("temperature", (1.0, 0.0), "must fall, and be above 0"),
        ("keep", 1.0, "must be between 0 and 1"),
        ("travel", 0.0, "must be above 0 and finite"),
        ("jitter", -1.0, "must not be below 0"),
        ("builds", 0, "must be at least 1"),
        ("histograms", -1, "must be a number of layers, or 0 for all"),
    ],
)
def test_settings_that_make_no_sense_are_refused(key: str, value: object, why: str) -> None:
    shown = list(value) if isinstance(value, tuple) else value
    assert refusal(MACS, None, **{key: value}) == f"[method] {key} = {shown}: {why}"


def test_new_weights_have_no_magnitude_to_go_by() -> None:
    assert refusal(MACS, start="scratch", score="magnitude") == (
        '[method] start = "scratch": new weights have no magnitude to go by; set score = "posterior"'
    )


def test_budgets_of_other_kinds_are_refused() -> None:
    assert refusal(Budget(drop_blocks=2)).startswith("[budget] drop_blocks: dllp narrows layers")
    assert refusal(Budget(drop_blocks=2), granularity="weight").startswith("[budget] drop_blocks")
    line = refusal(Budget(sparsity=0.5))
    assert line.startswith('[budget] sparsity: granularity = "filter" takes whole parts out')
    for granularity in ("weight", "2:4"):
        assert refusal(MACS, granularity=granularity) == (
            f'[budget]: granularity = "{granularity}" leaves the structure as it is, most engines as slow: '
            "give sparsity, the share of the weights that becomes zero"
        )


@pytest.mark.parametrize("recover", [Tune(steps=3), Tune(steps=0, epochs=2)])
def test_a_recovery_that_would_fill_the_zeros_is_refused(recover: Tune) -> None:
    line = refusal(Budget(sparsity=0.5), recover, granularity="weight")
    assert "a recovery would fill the zeros" in line and "leave [recover] out" in line
    dllp.check(make_scene(MACS).graph, pictures(), MACS, config(), recover)  # filters take one


def test_a_network_without_filters_to_lose_is_refused() -> None:
    model = graph.trace(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES)).eval(), SHAPE)
    shown = graph.inspect(model, SHAPE)
    with pytest.raises(
        UsageError, match=r"no channel group that can be narrowed \(.*granularity = \"weight\""
    ):
        dllp.check(shown, pictures(), MACS, config(), Tune(steps=0))


def test_a_latency_that_the_original_meets_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        search(FakeLab(), Budget(latency_ms=11.0))
    assert str(error.value) == ("[budget] latency_ms = 11.0: the original takes 10.000 ms already; lower it")
