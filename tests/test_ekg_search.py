"""EKG's search, driven by a laboratory whose latencies are made up: an engine that works in eights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from conftest import make_latency
from torch import nn

from optpipe import graph, tune
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.methods import ekg
from optpipe.methods.ekg.reward import Candidate, Facts, Guide
from optpipe.methods.ekg.scores import Score
from optpipe.types import (
    Answer,
    Ask,
    Budget,
    Choice,
    Plan,
    Request,
    Scene,
    Search,
    Start,
    Step,
    StepResult,
    Train,
    Trained,
    Trial,
    Tune,
)

SHAPE = (3, 8, 8)
CLASSES = 4
HALF_WIDTH = 0.005
FEW = ekg.Config(score_images=3, tuning_images=4)


class Net(nn.Module):
    """Three groups: the stem and the block's end, tied (16), the block's inside (16), a wider layer (24)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.wide_norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        logits: torch.Tensor = self.head(F.relu(self.wide_norm(self.wide(x))).mean((2, 3)))
        return logits


def made(make: Callable[[], nn.Module] = Net) -> torch.fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return graph.trace(make().eval(), SHAPE)


NETWORK = made()
COSTS = graph.Costs(NETWORK, SHAPE)
WIDTHS = {"stem": 16, "conv1": 16, "wide": 24}
SHARES = {"stem": 0.3, "conv1": 0.3, "wide": 0.4}


def counts(plan: Plan) -> dict[str, int]:
    """How many channels each group keeps."""
    return WIDTHS | {name: len(kept) for name, kept in plan.keep_channels}


def in_eights(plan: Plan) -> float:
    """A fifth of the time is fixed, the rest is for blocks of eight channels."""
    blocks = {name: -(-count // 8) * 8 for name, count in counts(plan).items()}
    return 0.2 + 0.8 * sum(SHARES[name] * blocks[name] / WIDTHS[name] for name in WIDTHS)


def sizes(plan: Plan) -> tuple[float, float]:
    """(MACs, parameters) as fractions of the original's."""
    whole = COSTS.of(list(WIDTHS.values()))
    parameters, macs = COSTS.of(list(counts(plan).values()))
    return macs / whole[1], parameters / whole[0]


Work = Callable[[functools.partial[tuple[float, ...]]], tuple[float, ...]]


@dataclass
class FakeLab:
    """Makes latencies up, computes the rest or lets ``work`` answer; keeps what it was asked."""

    ratio: Callable[[Plan], float] = in_eights
    known: dict[tuple[str, str], StepResult] = field(default_factory=dict)
    work: Work = lambda work: work()
    digest: str = "d" * 64
    requests: list[Request] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    results: dict[tuple[str, str], StepResult] = field(default_factory=dict)

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        if isinstance(request, Train):
            return Trained("tuned", made(), self.digest)
        if isinstance(request, Ask):
            ratio = self.ratio(request.plan)
            return Trial(
                "t", request, 1, 1, make_latency(10 * ratio, ratio, (ratio - HALF_WIDTH, ratio + HALF_WIDTH))
            )
        assert isinstance(request, Step), "no search for narrower layers trains what it makes itself"
        asked = (request.name, request.depends)
        if asked not in self.known:
            self.computed.append(request.name)
            work = cast("functools.partial[tuple[float, ...]]", request.function)
            self.results[asked] = StepResult(f"key {len(self.requests)}", request.name, self.work(work))
        else:
            self.results[asked] = self.known[asked]
        return self.results[asked]

    @property
    def timed(self) -> list[Plan]:
        """The plans that were timed, in order."""
        return [request.plan for request in self.requests if isinstance(request, Ask)]

    @property
    def steps(self) -> list[Step]:
        return [request for request in self.requests if isinstance(request, Step)]


def pictures(count: int = 40) -> ImageSet:
    pixels = torch.randint(0, 256, (count, *SHAPE), generator=torch.Generator().manual_seed(2)).byte()
    names = tuple(map(str, range(count)))
    return ImageSet(pixels, torch.arange(count) % CLASSES, names, (0.5,) * 3, (0.25,) * 3, digest="d")


def make_scene(budget: Budget, network: nn.Module = NETWORK, images: ImageSet | None = None) -> Scene:
    return Scene(
        model=network,
        graph=graph.inspect(network, SHAPE),
        calibration=images or pictures(),
        baseline=make_latency(10.0),
        budget=budget,
        recover=Tune(steps=7, loss="labels"),
        seed=0,
    )


def drive(running: Search, lab: FakeLab) -> Choice:
    try:
        requests = next(running)
        while True:
            requests = running.send([lab.answer(request) for request in requests])
    except StopIteration as stop:
        return cast(Choice, stop.value)


def search(lab: FakeLab, budget: Budget, config: ekg.Config = FEW) -> Choice:
    return drive(ekg.search(make_scene(budget), config), lab)


def column(choice: Choice, name: str, table: int = 0) -> list[object]:
    shown = choice.tables[table]
    return [row[shown.columns.index(name)] for row in shown.rows]


def settings(**changes: object) -> ekg.Config:
    return ekg.Config(**({"score_images": 3, "tuning_images": 4} | changes))  # type: ignore[arg-type]


# ---------------------------------------------------------------- a latency to meet


@pytest.mark.parametrize("reduction", [0.1, 0.2, 0.3, 0.43])
def test_a_latency_is_met_in_steps_that_each_save_time(reduction: float) -> None:
    lab = FakeLab()
    choice = search(lab, Budget(latency_reduction=reduction))
    assert in_eights(choice.plan) + HALF_WIDTH <= 1 - reduction
    # The rungs that seven counts of each width show: 8 of 16; 15 and 6 of 24.
    ladder = choice.tables[2]
    assert [row[1] for row in ladder.rows if row[-1] == "taken"] == [8, 8, 15, 6]
    steps = list(zip(column(choice, "channels before"), column(choice, "after"), strict=True))
    assert set(steps[:-1]) <= {(16, 8), (24, 15), (15, 6)}
    assert set(column(choice, "this step")) == {"saves time"}
    # Every network on the way was built and timed, the chosen one too.
    assert choice.interim[0].plan == Plan()
    assert {one.plan for one in choice.interim[1:]} <= set(lab.timed)
    assert choice.interim[-1].plan == choice.plan
    # What the last step took is no more than what the time needs.
    last = str(column(choice, "group")[-1])
    more = counts(choice.plan)[last] + 1
    assert more > WIDTHS[last] or in_eights(kept(counts(choice.plan) | {last: more})) > 1 - reduction


def kept(widths: dict[str, int]) -> Plan:
    """A plan of these widths."""
    narrowed = {name: count for name, count in widths.items() if count < WIDTHS[name]}
    return Plan(keep_channels=tuple((name, tuple(range(count))) for name, count in narrowed.items()))


def test_an_absolute_latency_is_met_alike() -> None:
    relative = search(FakeLab(), Budget(latency_reduction=0.25))
    assert search(FakeLab(), Budget(latency_ms=7.5)) == relative


def test_steps_by_the_ratio_alone_are_seen_to_buy_no_time() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(latency_reduction=0.2), settings(widths="any"))
    assert in_eights(choice.plan) + HALF_WIDTH <= 0.8
    verdicts = column(choice, "this step")
    assert "buys no time: removes MACs alone" in verdicts
    assert "saves time" in verdicts
    assert len(verdicts) == len([plan for plan in lab.timed[1:] if plan in {i.plan for i in choice.interim}])
    assert len(choice.tables) == 2


def test_the_reason_says_how_much_went() -> None:
    choice = search(FakeLab(), Budget(latency_reduction=0.3))
    macs, parameters = sizes(choice.plan)
    assert choice.reason == (
        f"{len(choice.tables[0].rows)} steps narrowed {len(choice.plan.keep_channels)} of 3 prunable channel "
        f"groups: {1 - macs:.1%} fewer MACs, {1 - parameters:.1%} fewer parameters, "
        f"{1 - in_eights(choice.plan):.1%} of the measured latency saved"
    )
    assert column(choice, "MACs saved")[-1] == pytest.approx(1 - macs)
    assert column(choice, "measured saving")[-1] == pytest.approx(1 - in_eights(choice.plan))
    assert {str(row[0]): row[3] for row in choice.tables[1].rows} == counts(choice.plan) | {"head": CLASSES}


# ---------------------------------------------------------------- a size to meet


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6])
@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_a_size_is_met_as_closely_as_one_filter(measure: str, share: float) -> None:
    budget = Budget(macs_reduction=share) if measure == "macs" else Budget(parameters_reduction=share)
    choice = search(FakeLab(), budget)
    part = ("macs", "parameters").index(measure)
    assert sizes(choice.plan)[part] <= 1 - share
    last = str(column(choice, "group")[-1])
    one_more = counts(choice.plan) | {last: counts(choice.plan)[last] + 1}
    assert sizes(kept(one_more))[part] > 1 - share
    # The steps before it went by the ratio, a tied group's by half of it, and met nothing yet.
    for name, before, after in list(
        zip(*(column(choice, title) for title in ("group", "channels before", "after")), strict=True)
    )[:-1]:
        assert isinstance(before, int)
        assert after == before - max(1, round(before * (0.1 if name == "stem" else 0.2)))
    assert all(sizes(one.plan)[part] > 1 - share for one in choice.interim[:-1])


def test_a_size_is_timed_at_every_step_or_at_the_last_alone() -> None:
    every, last = FakeLab(), FakeLab()
    budget = Budget(macs_reduction=0.3)
    one, other = search(every, budget), search(last, budget, settings(timed="last"))
    assert one.plan == other.plan
    assert every.timed == [interim.plan for interim in one.interim[1:]]
    assert last.timed == [other.plan]
    assert column(other, "measured saving")[:-1] == [None] * (len(other.interim) - 2)
    assert column(other, "measured saving")[-1] == pytest.approx(1 - in_eights(other.plan))


def test_a_size_can_be_met_in_measured_widths() -> None:
    choice = search(FakeLab(), Budget(macs_reduction=0.5), settings(widths="measured"))
    assert sizes(choice.plan)[0] <= 0.5
    steps = set(zip(column(choice, "channels before"), column(choice, "after"), strict=True))
    assert len(steps & {(16, 8), (24, 15), (15, 6)}) >= len(choice.interim) - 2


# ---------------------------------------------------------------- the networks on the way


def test_the_networks_on_the_way_lead_from_the_original_to_the_chosen_one() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(macs_reduction=0.4))
    assert (choice.interim[0].plan, choice.interim[-1].plan) == (Plan(), choice.plan)
    assert len(choice.interim) == len(choice.tables[0].rows) + 1 == len(lab.steps)
    macs = [sizes(one.plan)[0] for one in choice.interim]
    assert macs == sorted(macs, reverse=True)
    losses = [Facts.decode(result.values).loss for result in lab.results.values()]
    assert [one.loss for one in choice.interim] == losses
    assert len(set(losses)) == len(losses)


def test_of_a_long_way_at_most_32_networks_are_handed_on() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(macs_reduction=0.85), settings(ratio=0.01, tries=1, timed="last"))
    assert len(choice.tables[0].rows) > 32
    plans = [one.plan for one in choice.interim]
    assert 3 <= len(plans) == len(set(plans)) <= 32
    assert (plans[0], plans[-1]) == (Plan(), choice.plan)
    # In the order of the way.
    macs = [sizes(plan)[0] for plan in plans]
    assert macs == sorted(macs, reverse=True)


def test_the_networks_that_are_handed_on_spread_their_losses_evenly() -> None:
    def slowly(work: functools.partial[tuple[float, ...]]) -> tuple[float, ...]:
        """The loss is the square of the step's number: most networks are close to the original."""
        values = made_up(work)
        return (values[0], float(len(work.args[1]) - 1) ** 2, *values[2:])

    choice = search(FakeLab(work=slowly), Budget(macs_reduction=0.85), settings(ratio=0.01, timed="last"))
    losses = [one.loss for one in choice.interim]
    # Of as many as there were, for each of 30 losses that divide the whole range the network nearest to it.
    steps = len(choice.tables[0].rows)
    assert steps > 32
    wanted = (steps**2 * part / 29 for part in range(30))
    assert losses == sorted({min(range(steps + 1), key=lambda n: abs(n**2 - loss)) ** 2 for loss in wanted})


def test_the_original_is_trained_first_on_images_that_do_not_score() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(macs_reduction=0.1))
    first, *others = lab.requests
    assert isinstance(first, Train)
    assert not any(isinstance(other, Train) for other in others)
    assert first.plan == Plan()
    assert (first.tune.epochs, first.tune.lr, first.tune.loss) == (1, 1e-3, "labels")
    assert (first.tune.trainable, first.tune.augment) == ("all", "none")
    assert first.images is not None
    labels = pictures().labels
    assert labels is not None
    assert torch.bincount(labels[list(first.images)]).tolist() == [4] * CLASSES
    assert choice.start == Start("tuned", Plan())
    assert choice.recover == Tune(steps=7, loss="labels")


# ---------------------------------------------------------------- scorers, guides, ways to choose


@pytest.mark.parametrize("score", ["taylor", "gbn", "l1", "fpgm", "random"])
@pytest.mark.parametrize("guide", ["none", "single", "ensemble"])
def test_every_scorer_and_guide_meets_the_budget(score: Score, guide: Guide) -> None:
    lab = FakeLab()
    config = settings(score=score, guide=guide, ratio=0.4, timed="last")
    choice = search(lab, Budget(macs_reduction=0.4), config)
    assert sizes(choice.plan)[0] <= 0.6
    assert search(FakeLab(), Budget(macs_reduction=0.4), config) == choice


def test_scorers_choose_different_filters() -> None:
    plans = {
        search(FakeLab(), Budget(macs_reduction=0.3), settings(score=score, timed="last")).plan
        for score in ("taylor", "l1", "fpgm", "random")
    }
    assert len(plans) == 4


LOST = (0.30, 0.20, 0.10)


def made_up(work: functools.partial[tuple[float, ...]], base: float = -1.0) -> tuple[float, ...]:
    """Each group's candidate loses so much reward, and its channels from the last on."""
    _, history, after, _ = work.args
    if after is None:
        return Facts(base, 1.0, ()).encode()
    candidates = []
    for group, (channels, count) in enumerate(zip(history[-1], after, strict=True)):
        if count is not None:
            removed = tuple(reversed(channels[count:]))
            candidates.append(Candidate(group, removed, -1.0 - LOST[group], 1.0))
    return Facts(base, 1.0, tuple(candidates)).encode()


def first_step(budget: Budget, config: ekg.Config, work: Work = made_up) -> tuple[str, tuple[float, ...]]:
    """The group that the first step narrows, and what each candidate was expected to save."""
    lab = FakeLab(work=work)
    choice = search(lab, budget, config)
    gains = cast("functools.partial[tuple[float, ...]]", lab.steps[0].function).args[3]
    return str(column(choice, "group")[0]), gains


def test_a_candidate_is_chosen_by_its_reward_or_by_what_that_costs_for_the_saving() -> None:
    size, names = Budget(macs_reduction=0.3), list(WIDTHS)
    assert first_step(size, settings(select="reward")) == ("wide", (1.0, 1.0, 1.0))
    chosen, gains = first_step(size, settings(select="reward_per_saving"))
    # Steps of the ratio: 14 of the tied 16, 13 of 16, 19 of 24.
    whole = COSTS.of([16, 16, 24])[1]
    assert gains == pytest.approx(
        [1 - COSTS.of(few)[1] / whole for few in ([14, 16, 24], [16, 13, 24], [16, 16, 19])]
    )
    costs = [lost / gain for lost, gain in zip(LOST, gains, strict=True)]
    assert chosen == names[costs.index(min(costs))]
    # By time the saving of the rung: 8 of 16 saves 0.12 and 15 of 24 saves 0.107.
    chosen, gains = first_step(Budget(latency_reduction=0.1), FEW)
    assert gains == pytest.approx([0.12, 0.12, 0.8 * 0.4 / 3])
    assert chosen == "wide"
    assert first_step(Budget(latency_reduction=0.1), settings(select="reward"))[1] == (1.0,) * 3


def test_the_dearer_candidate_is_taken_where_it_saves_more_than_it_costs() -> None:
    def steep(plan: Plan) -> float:
        """The stem's eight channels save 0.4, all else 0.02."""
        found = counts(plan)
        return 1 - 0.4 * (found["stem"] <= 8) - 0.02 * (found["conv1"] <= 8) - 0.02 * (found["wide"] <= 15)

    for config, expected in ((FEW, "stem"), (settings(select="reward"), "wide")):
        lab = FakeLab(ratio=steep, work=made_up)
        assert column(search(lab, Budget(latency_reduction=0.3), config), "group")[0] == expected


def test_a_candidate_that_loses_nothing_comes_before_all_that_do() -> None:
    # conv1's and wide's rewards are above the network's own of -1.25; the stem's would cost least per saving.
    work = functools.partial(made_up, base=-1.25)
    assert first_step(Budget(latency_reduction=0.1), FEW, work)[0] == "wide"


# ---------------------------------------------------------------- resumed


@pytest.mark.parametrize("budget", [Budget(macs_reduction=0.45), Budget(latency_reduction=0.4)])
def test_a_search_goes_on_from_its_stored_steps_and_ends_as_one_that_was_not_interrupted(
    budget: Budget,
) -> None:
    whole = FakeLab()
    choice = search(whole, budget)
    names = [step.name for step in whole.steps]
    assert len(names) >= 4
    assert names == [*(f"step {number}" for number in range(1, len(names))), "chosen"]
    stored = list(whole.results.items())
    for done in (1, len(stored) // 2, len(stored) - 1, len(stored)):
        again = FakeLab(known=dict(stored[:done]))
        assert search(again, budget).plan == choice.plan
        # What was stored is not computed again, and all that comes after it is.
        assert again.computed == names[done:]
        assert again.timed == whole.timed


def test_a_resumed_search_is_guided_by_the_same_ensemble() -> None:
    budget, whole = Budget(macs_reduction=0.4), FakeLab()
    choice = search(whole, budget)
    stored = list(whole.results.items())
    again = FakeLab(known=dict(stored[:3]))
    resumed = search(again, budget)
    for one, other in zip(stored, again.results.items(), strict=True):
        assert one[1].values == pytest.approx(other[1].values, rel=1e-4)
    assert [one.plan for one in resumed.interim] == [one.plan for one in choice.interim]


def test_a_steps_key_holds_all_that_it_depends_on() -> None:
    budget = Budget(macs_reduction=0.3)
    lab = FakeLab()
    search(lab, budget)
    assert len({step.depends for step in lab.steps}) == len(lab.steps)
    changed = [
        settings(score="gbn"),
        settings(guide="single"),
        settings(ratio=0.3),
        settings(score_images=2),
        settings(tuning_images=3),
        settings(tries=2),
        settings(autocast="off"),
        settings(select="reward_per_saving"),
    ]
    keys = {lab.steps[0].depends}
    for config in changed:
        other = FakeLab()
        search(other, budget, config)
        keys.add(other.steps[0].depends)
    assert len(keys) == 1 + len(changed)
    # So does what was trained, which on another machine may come to other weights.
    elsewhere = FakeLab(digest="e" * 64)
    search(elsewhere, budget)
    assert elsewhere.steps[0].depends not in keys
    # The second step's key is that of the first, and what was taken.
    assert lab.results["step 1", lab.steps[0].depends].key in lab.steps[1].depends


# ---------------------------------------------------------------- refused


NARROWEST = kept(dict.fromkeys(WIDTHS, 1))
SAVED = "no widths meet the budget: the narrowest layers in all 3 groups that can be narrowed save"


@pytest.mark.parametrize(
    ("budget", "asks"),
    [
        (Budget(latency_reduction=0.5), "50.0% is asked"),
        (Budget(latency_ms=2.0), "80.0% is asked"),
    ],
)
def test_a_latency_out_of_reach_is_refused_with_what_can_be_reached(budget: Budget, asks: str) -> None:
    lab = FakeLab()
    with pytest.raises(RunError) as refused:
        search(lab, budget)
    assert str(refused.value) == f"{SAVED} 45.3% of the latency; {asks}; lower it"
    assert lab.requests == [Ask(NARROWEST)]


@pytest.mark.parametrize(
    ("budget", "measure"),
    [
        (Budget(macs_reduction=0.999), "macs_reduction"),
        (Budget(parameters_reduction=0.999), "parameters_reduction"),
    ],
)
def test_a_size_out_of_reach_is_refused_with_what_can_be_reached(budget: Budget, measure: str) -> None:
    lab = FakeLab()
    with pytest.raises(RunError) as refused:
        search(lab, budget)
    macs, parameters = sizes(NARROWEST)
    assert str(refused.value) == (
        f"{SAVED} {1 - macs:.1%} of the MACs and {1 - parameters:.1%} of the parameters; "
        f"{measure} = 0.999 is asked; lower it"
    )
    assert lab.requests == []


LOWEST = kept({"stem": 8, "conv1": 8, "wide": 6})
"""The rungs' own end."""


def test_where_the_rungs_end_before_the_budget_the_search_ends_before_it_trains() -> None:
    lab = FakeLab(ratio=lambda plan: 0.3 if plan == NARROWEST else in_eights(plan))
    with pytest.raises(RunError) as refused:
        search(lab, Budget(latency_reduction=0.6), settings(widths="measured"))
    assert str(refused.value) == (
        "no widths meet the budget: the smallest channel counts that the target executes faster than larger "
        "ones, in all groups, save 45.3% of the latency; 60.0% is asked; lower it, or let widths be any "
        '([method] widths = "any")'
    )
    assert (lab.timed[0], lab.timed[-1]) == (NARROWEST, LOWEST)
    assert asked(lab.requests) == ["Ask"] * (1 + 21 + 1)


def test_where_noise_hides_what_single_widths_save_any_width_will_do() -> None:
    lab = FakeLab()

    def ratio(plan: Plan) -> float:
        # The narrowest network, the 21 counts and the rungs' end, which is then the whole network.
        return 1.0 if 1 < len(lab.timed) <= 1 + 21 + 1 else sizes(plan)[0]

    lab.ratio = ratio
    choice = search(lab, Budget(latency_reduction=0.3))
    assert sizes(choice.plan)[0] + HALF_WIDTH <= 0.7
    assert {row[-1] for row in choice.tables[2].rows} == {"passed over: no faster than more channels"}
    assert {one.plan for one in choice.interim[1:]} <= set(lab.timed)


def test_what_is_slower_in_the_end_than_it_was_at_first_says_what_was_reached() -> None:
    lab = FakeLab(ratio=lambda plan: 0.3 if plan in {NARROWEST, LOWEST} else in_eights(plan))
    with pytest.raises(
        RunError,
        match=r"every group is at the smallest count that the target executes well, which saves 45\.3% of "
        r'the latency; lower the budget, or let widths be any \(\[method\] widths = "any"\)',
    ):
        search(lab, Budget(latency_reduction=0.6))


@pytest.mark.parametrize("timed", ["every", "last"])
def test_where_the_rungs_end_before_a_size_the_error_says_what_they_reach(timed: str) -> None:
    macs = sizes(kept({"stem": 8, "conv1": 8, "wide": 6}))[0]
    with pytest.raises(RunError, match=f"executes well, which saves {1 - macs:.1%} of the MACs; lower"):
        search(FakeLab(), Budget(macs_reduction=0.95), settings(widths="measured", timed=timed))


@pytest.mark.parametrize(
    ("budget", "config", "text"),
    [
        (Budget(drop_blocks=1), FEW, "[budget] drop_blocks: ekg narrows layers and drops no block"),
        (Budget(macs_reduction=0.1), settings(ratio=0.95), "ratio = 0.95: must be above 0 and at most 0.9"),
        (Budget(macs_reduction=0.1), settings(ratio=0.0), "[method] ratio = 0.0: must be above 0"),
        (Budget(macs_reduction=0.1), settings(ratio=float("nan")), "[method] ratio = nan: must be above 0"),
        (Budget(macs_reduction=0.1), settings(score_images=0), "[method] score_images = 0: must be above 0"),
        (
            Budget(macs_reduction=0.1),
            settings(tuning_images=-1),
            "[method] tuning_images = -1: must be above",
        ),
        (Budget(macs_reduction=0.1), settings(tries=-1), "[method] tries = -1: must be above 0"),
        (
            Budget(latency_reduction=0.1),
            settings(timed="last"),
            'timed = "last": a latency budget needs every',
        ),
    ],
)
def test_settings_that_make_no_search_are_refused_unasked(
    budget: Budget, config: ekg.Config, text: str
) -> None:
    lab = FakeLab()
    with pytest.raises(UsageError) as refused:
        search(lab, budget, config)
    assert text in str(refused.value)
    assert lab.requests == []


def test_a_class_of_one_image_is_refused() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    images = pictures(7)
    few = ImageSet(images.pixels, labels, images.names, images.mean, images.std, "d")
    running = ekg.search(make_scene(Budget(macs_reduction=0.1), images=few), FEW)
    with pytest.raises(
        UsageError, match=r"class 3 has 1 images; ekg needs at least two of each \(3 to score and 4 to tune"
    ):
        next(running)


def test_a_network_that_cannot_be_narrowed_is_refused() -> None:
    network = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES)))
    running = ekg.search(make_scene(Budget(macs_reduction=0.1), network), FEW)
    with pytest.raises(UsageError, match="the network has no channel group that can be narrowed"):
        next(running)


@pytest.mark.parametrize("budget", [Budget(latency_ms=12.5), Budget(latency_ms=10.0)])
def test_a_latency_that_the_original_meets_is_refused_unasked(budget: Budget) -> None:
    lab = FakeLab()
    with pytest.raises(UsageError) as refused:
        search(lab, budget)
    assert str(refused.value) == (
        f"[budget] latency_ms = {budget.latency_ms}: the original takes 10.000 ms already; lower it"
    )
    assert lab.requests == []


# ---------------------------------------------------------------- with a recovery that mimics


MIMIC = Tune(steps=12, batch=20, lr=0.01, batch_norm="eval", augment="none")
COMPARED = "the recovery compares its channels with the original's"


def mimicking(network: nn.Module, **changes: float) -> Choice:
    scene = make_scene(Budget(macs_reduction=0.2), network)
    return drive(ekg.search(replace(scene, recover=replace(MIMIC, **changes)), FEW), FakeLab())  # type: ignore[arg-type]


@pytest.mark.parametrize(("stage_weight", "whole"), [(0.0, {"wide"}), (0.5, {"wide", "stem"})])
def test_groups_that_mimicking_compares_stay_whole_and_say_why(stage_weight: float, whole: set[str]) -> None:
    choice = mimicking(NETWORK, stage_weight=stage_weight)
    narrowed = {name for name, _ in choice.plan.keep_channels}
    assert narrowed == WIDTHS.keys() - whole
    assert sizes(choice.plan)[0] <= 0.8
    verdicts = {str(row[0]): row[-1] for row in choice.tables[1].rows}
    assert verdicts == {
        **dict.fromkeys(narrowed, "narrowed"),
        **dict.fromkeys(whole, COMPARED),
        "head": "its channels are the classes",
    }
    # What is left has the original's features, so that a recovery can compare them.
    student = graph.apply(NETWORK, choice.plan, SHAPE)
    before = tune.distance(student, NETWORK, pictures())
    tune.train(student, NETWORK, pictures(), choice.recover, seed=0)
    assert 0 < tune.distance(student, NETWORK, pictures()) < before


def test_where_mimicking_compares_every_group_the_search_says_so() -> None:
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    with pytest.raises(UsageError, match=f"no channel group of the network can be narrowed: {COMPARED}"):
        mimicking(made(lambda: nn.Sequential(*layers)))


# ---------------------------------------------------------------- the order of its requests


def asked(requests: Sequence[Request]) -> list[str]:
    return [type(request).__name__ for request in requests]


def test_a_search_looks_at_both_ends_and_the_counts_then_trains_and_goes_step_by_step() -> None:
    lab = FakeLab()
    search(lab, Budget(latency_reduction=0.1))
    # Seven counts for each of three classes of widths, between the two ends.
    assert asked(lab.requests)[:26] == ["Ask"] * (1 + 21 + 1) + ["Train", "Step", "Ask"]
    assert (lab.timed[0], lab.timed[22]) == (NARROWEST, LOWEST)
    assert asked(lab.requests)[-1] == "Step"
    # Widths of any count have no ladder, and sizes need no measurement.
    lab = FakeLab()
    search(lab, Budget(latency_reduction=0.1), settings(widths="any"))
    assert asked(lab.requests)[:4] == ["Ask", "Train", "Step", "Ask"]
    lab = FakeLab()
    search(lab, Budget(macs_reduction=0.1))
    assert asked(lab.requests)[:3] == ["Train", "Step", "Ask"]
