"""The search of PRACTISE, driven by a laboratory of made-up latencies and errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from conftest import make_latency
from torch import nn

from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.methods import practise
from optpipe.types import (
    Answer,
    Ask,
    Block,
    Budget,
    Choice,
    ModelGraph,
    Plan,
    Request,
    Scene,
    Step,
    StepResult,
    Table,
    Trial,
    Tune,
)

# R/tau is 2, 1, 3 and 4: the order is b, a, c, d. The interval of e includes 0, f makes things slower.
TAU = {"a": 0.2, "b": 0.1, "c": 0.1, "d": 0.05, "e": 0.005, "f": -0.02}
ERROR = {"a": 0.4, "b": 0.1, "c": 0.3, "d": 0.2, "e": 1e-6, "f": 1e-6}
HALF_WIDTH = 0.01
ONCE = practise.Config()
MACS = 100
PARAMETERS = 100

Errors = Callable[[tuple[str, ...], str], float]


def alone(_dropped: tuple[str, ...], name: str) -> float:
    return ERROR[name]


@dataclass
class FakeLab:
    """Answers from the tables above; savings add up. Without ``errors`` it carries steps out.

    Remembers what it was asked.
    """

    errors: Errors | None = alone
    savings: dict[str, float] = field(default_factory=lambda: TAU)
    requests: list[Request] = field(default_factory=list)

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        if isinstance(request, Step) and self.errors is None:
            return StepResult("step", request.name, request.function())
        if isinstance(request, Step):
            assert self.errors is not None
            # (model, base, remaining, images, input shape, how many images)
            work = cast("functools.partial[tuple[float, ...]]", request.function)
            base, remaining = work.args[1], work.args[2]
            values = tuple(self.errors(base.drop_blocks, name) for name in remaining)
            return StepResult("step", request.name, values)
        assert isinstance(request, Ask)
        names = request.plan.drop_blocks
        ratio = 1 - sum(self.savings[name] for name in names)
        latency = make_latency(10 * ratio, ratio, (ratio - HALF_WIDTH, ratio + HALF_WIDTH))
        distance = None
        if "distance" in request.wants:
            assert self.errors is not None
            distance = self.errors(names[:-1], names[-1])
        macs = MACS - 10 * len(names)
        wanted = latency if "latency" in request.wants else None
        return Trial("trial", request, PARAMETERS - 20 * len(names), macs, wanted, None, distance)

    @property
    def timed(self) -> list[str]:
        """The plans that were timed, in order."""
        return ["".join(r.plan.drop_blocks) for r in self.requests if isinstance(r, Ask) and r.tune is None]

    @property
    def steps(self) -> list[Step]:
        return [request for request in self.requests if isinstance(request, Step)]


def make_scene(budget: Budget, names: Sequence[str] = tuple(TAU)) -> Scene:
    def block(name: str, droppable: bool) -> Block:
        return Block(name, (4, 8, 8), (4, 8, 8), 10, 10, droppable, "" if droppable else "a projection")

    blocks = (*(block(name, True) for name in names), block("projecting", False))
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    return Scene(
        model=nn.Identity(),
        graph=ModelGraph(blocks, (), PARAMETERS, MACS, (3, 8, 8), 10),
        calibration=ImageSet(pixels, None, ("0", "1"), (0.5,) * 3, (0.5,) * 3, digest="d"),
        baseline=make_latency(10.0),
        budget=budget,
        recover=Tune(steps=7),
        seed=0,
    )


def search(
    lab: FakeLab,
    budget: Budget,
    config: practise.Config = ONCE,
    names: Sequence[str] = tuple(TAU),
) -> Choice:
    return drive(lab, make_scene(budget, names), config)


def drive(lab: FakeLab, scene: Scene, config: practise.Config) -> Choice:
    running = practise.search(scene, config)
    try:
        requests = next(running)
        while True:
            requests = running.send([lab.answer(request) for request in requests])
    except StopIteration as stop:
        return cast(Choice, stop.value)


def drops(choice: Choice) -> str:
    """The dropped blocks in the order in which they were chosen."""
    return "".join(str(row[1]) for row in choice.tables[1].rows)


def rows(table: Table) -> dict[str, dict[str, object]]:
    """The rows of a table by their block."""
    return {
        str(row[table.columns.index("block")]): dict(zip(table.columns, row, strict=True))
        for row in table.rows
    }


def test_blocks_go_in_the_order_of_error_over_saving_and_every_prefix_is_timed() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(drop_blocks=4))
    assert drops(choice) == "bacd"
    assert lab.timed == ["a", "b", "c", "d", "e", "f", "b", "ab", "abc", "abcd"]
    assert choice.plan == Plan(drop_blocks=("a", "b", "c", "d"))
    assert choice.recover == Tune(steps=7)


def test_a_block_whose_saving_may_be_none_is_never_dropped() -> None:
    with pytest.raises(
        UsageError,
        match=r"\[budget\] drop_blocks = 5: only 4 of the 6 droppable blocks save measurable time",
    ):
        search(FakeLab(), Budget(drop_blocks=5))
    every = search(FakeLab(), Budget(latency_reduction=0.44))
    assert every.plan == Plan(drop_blocks=("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("budget", "dropped"),
    [
        (Budget(drop_blocks=1), "b"),
        (Budget(drop_blocks=2), "ba"),
        # Two drops save 30%, but perhaps only 29%.
        (Budget(latency_reduction=0.29 - 1e-9), "ba"),
        (Budget(latency_reduction=0.295), "bac"),
        # Of 10 ms: two drops leave 7 ms, perhaps 7.1 ms.
        (Budget(latency_ms=7.1 + 1e-9), "ba"),
        (Budget(latency_ms=7.05), "bac"),
        # Each drop saves 10 of 100 MACs and 20 of 100 parameters.
        (Budget(macs_reduction=0.1), "b"),
        (Budget(macs_reduction=0.3), "bac"),
        (Budget(macs_reduction=0.31), "bacd"),
        (Budget(parameters_reduction=0.4), "ba"),
        (Budget(parameters_reduction=0.41), "bac"),
    ],
)
def test_the_search_ends_when_the_whole_interval_or_the_size_meets_the_budget(
    budget: Budget, dropped: str
) -> None:
    lab = FakeLab()
    choice = search(lab, budget)
    assert drops(choice) == dropped
    assert lab.timed[-1] == "".join(sorted(dropped))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (
            Budget(latency_reduction=0.6),
            "dropping all 4 blocks that save time reduces the latency by 45.0% (at least 44.0%), 60.0% is "
            "asked: it misses by 16.0%",
        ),
        (
            Budget(latency_ms=5.0),
            "dropping all 4 blocks that save time reduces the latency by 45.0% (at least 44.0%), 50.0% is "
            "asked: it misses by 6.0%",
        ),
        (
            Budget(macs_reduction=0.5),
            "dropping all 4 blocks that save time reduces the MACs by 40.0%, 50.0% is asked: it misses by "
            "10.0%",
        ),
        (
            Budget(parameters_reduction=0.9),
            "dropping all 4 blocks that save time reduces the parameters by 80.0%, 90.0% is asked: it misses "
            "by 10.0%",
        ),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_miss_before_any_scoring(budget: Budget, text: str) -> None:
    lab = FakeLab()
    with pytest.raises(RunError) as refused:
        search(lab, budget)
    assert text in str(refused.value)
    assert lab.timed == ["a", "b", "c", "d", "e", "f", "abcd"]
    assert lab.steps == []


def test_where_no_block_saves_time_there_is_nothing_to_drop() -> None:
    with pytest.raises(RunError, match="no block saves measurable time on this target"):
        search(FakeLab(), Budget(latency_reduction=0.1), names=("e", "f"))


def test_a_network_without_droppable_blocks_is_refused_unasked() -> None:
    lab = FakeLab()
    with pytest.raises(UsageError, match="the network has no droppable block"):
        search(lab, Budget(drop_blocks=1), names=())
    assert lab.requests == []
    scene = make_scene(Budget(drop_blocks=1), ())
    with pytest.raises(UsageError, match="`optpipe inspect` says why not for each"):
        practise.check(scene.graph, scene.calibration, scene.budget, ONCE, scene.recover)
    practise.check(
        make_scene(Budget(drop_blocks=1)).graph, scene.calibration, scene.budget, ONCE, scene.recover
    )


def test_all_blocks_are_scored_once_in_one_step() -> None:
    lab = FakeLab()
    search(lab, Budget(drop_blocks=3), practise.Config(fast_images=17))
    (step,) = lab.steps
    work = cast("functools.partial[tuple[float, ...]]", step.function)
    assert work.args[1:3] == (Plan(), list(TAU))
    assert work.args[-1] == 17
    assert step.name == "scores after 0 drops"
    # What stored scores of earlier runs are found by.
    assert step.depends == (
        "refit 3, 17 images, Plan(drop_blocks=(), keep_channels=(), input_hw=None), "
        "['a', 'b', 'c', 'd', 'e', 'f']"
    )


def test_joint_selection_asks_again_after_each_drop_and_counts_what_each_block_adds() -> None:
    def errors(dropped: tuple[str, ...], name: str) -> float:
        # Beside b, a adds 0.6 and c only 0.1: (0.7 - 0.1) / 0.2 = 3 for a, (0.2 - 0.1) / 0.1 = 1 for c.
        beside_b = {"a": 0.7, "c": 0.2, "d": 0.5, "e": 0.1, "f": 0.1}
        return beside_b[name] if dropped else ERROR[name]

    lab = FakeLab(errors)
    choice = search(lab, Budget(drop_blocks=2), practise.Config(select="joint"))
    assert drops(choice) == "bc"
    scored = [cast("functools.partial[tuple[float, ...]]", step.function).args[1:3] for step in lab.steps]
    after_b = Plan(drop_blocks=("b",))
    # The last is greedy's set, "ba", to be compared.
    assert scored == [(Plan(), list(TAU)), (after_b, ["a", "c", "d", "e", "f"]), (after_b, ["a"])]
    assert len({(step.name, step.depends) for step in lab.steps}) == 3
    assert rows(choice.tables[1])["c"]["score when chosen"] == pytest.approx(1.0)
    assert rows(choice.tables[1])["c"]["R of the set"] == pytest.approx(0.2)


def test_the_exact_scorer_trains_adaptors_around_each_block() -> None:
    lab = FakeLab()
    choice = search(lab, Budget(drop_blocks=2), practise.Config(scorer="exact", exact_steps=5))
    assert drops(choice) == "ba"
    assert lab.steps == []
    trained = [request for request in lab.requests if isinstance(request, Ask) and request.tune is not None]
    assert [request.plan.drop_blocks for request in trained] == [(name,) for name in TAU]
    for request in trained:
        assert request.wants == ("distance",)
        assert request.tune == Tune(steps=5, trainable="adaptors", batch_norm="eval")


def test_the_table_of_blocks_says_for_each_what_became_of_it_and_why() -> None:
    table = search(FakeLab(), Budget(drop_blocks=2)).tables[0]
    assert table.title == "Blocks"
    found = rows(table)
    assert list(found) == list(TAU)
    assert {name: row["verdict"] for name, row in found.items()} == {
        "a": "dropped as number 2",
        "b": "dropped as number 1",
        "c": "kept: not needed for the budget",
        "d": "kept: not needed for the budget",
        "e": "kept: saves no measurable time",
        "f": "kept: saves no measurable time",
    }
    assert {name: row["R"] for name, row in found.items()} == ERROR
    for name, row in found.items():
        assert row["tau"] == pytest.approx(TAU[name])
        assert (row["tau low"], row["tau high"]) == pytest.approx((TAU[name] - 0.01, TAU[name] + 0.01))
        assert row["MACs"] == 10
    scores = {name: row["R/tau"] for name, row in found.items()}
    assert (scores.pop("e"), scores.pop("f")) == (None, None)
    assert scores == pytest.approx({"a": 2, "b": 1, "c": 3, "d": 4})


def test_the_table_of_drops_sets_the_measured_saving_beside_the_predicted_one() -> None:
    table = search(FakeLab(), Budget(drop_blocks=3)).tables[1]
    found = [row[:2] + row[4:] for row in table.rows]
    assert table.columns[:2] + table.columns[4:] == (
        *("dropped", "block", "MACs saved", "sum of tau"),
        *("measured saving", "low", "high"),
    )
    expected = [
        (1, "b", 0.1, 0.1, 0.1, 0.09, 0.11),
        (2, "a", 0.2, 0.3, 0.3, 0.29, 0.31),
        (3, "c", 0.3, 0.4, 0.4, 0.39, 0.41),
    ]
    for row, wanted in zip(found, expected, strict=True):
        assert row[:2] == wanted[:2]
        assert row[2:] == pytest.approx(wanted[2:])


def test_the_reason_names_the_blocks_in_order_and_what_they_save_together() -> None:
    assert search(FakeLab(), Budget(drop_blocks=2)).reason == (
        "2 of 6 droppable blocks, in order of R/tau: b, a. Together they save 30.0% (29.0% to 31.0%) of the "
        "measured latency"
    )
