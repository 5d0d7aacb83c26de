"""The criteria that blocks are chosen by, and joint selection, driven as in test_practise.py."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import pytest
from test_practise import ERROR, Errors, FakeLab, drive, drops, make_scene, rows, search
from test_removal import Line, Pair

from optpipe import graph
from optpipe import recipe as recipes
from optpipe.errors import UsageError
from optpipe.methods import practise
from optpipe.methods.practise.config import Criterion
from optpipe.types import Budget, Choice, Scene


@pytest.mark.parametrize(
    ("criterion", "effect", "column"),
    [
        ("l2", "features", "L2"),
        ("curl", "answers", "KL"),
        ("epsilon_resnet", "response", "largest response"),
    ],
)
def test_the_rivals_order_blocks_by_their_value_alone_and_score_all_images_in_one_step(
    criterion: Criterion, effect: str, column: str
) -> None:
    lab = FakeLab()
    choice = search(lab, Budget(drop_blocks=3), practise.Config(criterion=criterion))
    assert drops(choice) == "bdc"
    (step,) = lab.steps
    work = cast("functools.partial[tuple[float, ...]]", step.function)
    assert work.func is graph.removal_effects
    assert work.args[-1] == effect
    assert step.depends.startswith(f"{criterion} 1, all images, ")
    found = rows(choice.tables[0])
    assert {name: row[column] for name, row in found.items()} == ERROR
    assert choice.tables[0].columns[-2:] == ("MACs", "verdict")
    assert not any("/" in heading for heading in choice.tables[0].columns)
    assert found["e"]["verdict"] == "kept: saves no measurable time"
    assert f'in order of "{criterion}": b, d, c.' in choice.reason


def test_of_equal_scores_the_earlier_block_goes_first() -> None:
    lab = FakeLab(lambda _dropped, _name: 0.25)
    assert drops(search(lab, Budget(drop_blocks=3), practise.Config(criterion="l2"))) == "abc"


def test_first_drops_in_the_order_of_execution_and_computes_nothing() -> None:
    lab = FakeLab()
    assert drops(search(lab, Budget(drop_blocks=3), practise.Config(criterion="first"))) == "abc"
    assert lab.steps == []


def test_a_random_order_is_the_seeds() -> None:
    config = practise.Config(criterion="random")
    scene = make_scene(Budget(drop_blocks=4))
    lab = FakeLab()
    orders = [drops(drive(lab, replace(scene, seed=seed), config)) for seed in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert orders[:4] == orders[4:]
    assert len(set(orders)) > 1
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert lab.steps == []


def on_a_line() -> tuple[FakeLab, Scene]:
    """The network of test_removal.py, all of whose blocks are to go and save the same."""
    names = ("small", "none", "large")
    scene = replace(make_scene(Budget(drop_blocks=3), names), model=Line(), calibration=Pair())
    shown = replace(scene.graph, input_shape=(1, 2, 2))
    return FakeLab(None, dict.fromkeys(names, 0.1)), replace(scene, graph=shown)


@pytest.mark.parametrize(
    ("criterion", "order", "column", "values"),
    [
        # Worked out in test_removal.py.
        ("epsilon_resnet", ["none", "small", "large"], "largest response", (2.0, 0.0, 6.0)),
        ("l2", ["none", "small", "large"], "L2", (3.75, 0.0, 8.4375)),
        ("first", ["small", "none", "large"], "place", (1.0, 2.0, 3.0)),
    ],
)
def test_a_real_network_is_searched_by_the_values_of_its_blocks(
    criterion: Criterion, order: list[str], column: str, values: tuple[float, ...]
) -> None:
    choice = drive(*on_a_line(), practise.Config(criterion=criterion))
    assert [row[1] for row in choice.tables[1].rows] == order
    assert tuple(row[column] for row in rows(choice.tables[0]).values()) == pytest.approx(values)


def test_joint_sees_what_a_drop_leaves_of_the_others() -> None:
    config = practise.Config(criterion="epsilon_resnet", select="joint")
    choice = drive(*on_a_line(), config)
    # Without small, large adds 4 instead of 6 at the brightest place.
    assert [(row[1], row[2], row[5]) for row in choice.tables[2].rows] == [
        ("none", 0.0, 0.0),
        ("small", 2.0, 2.0),
        ("large", 4.0, 6.0),
    ]


def test_an_unknown_criterion_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r'\[method\] criterion = "l3": should be .*epsilon_resnet'):
        recipes.bind(practise.Config, {"criterion": "l3"}, Path("recipe.toml"), "method")


def of_sets(together: float) -> Errors:
    """The values of sets: the sum over their blocks, and ``together`` where both a and b are gone."""

    def errors(dropped: tuple[str, ...], name: str) -> float:
        names = {*dropped, name}
        return sum(ERROR[one] for one in names) + (together if {"a", "b"} <= names else 0.0)

    return errors


JOINT = practise.Config(select="joint")


def ends(choice: Choice) -> dict[str, dict[str, object]]:
    table = choice.tables[3]
    return {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_joint_ends_where_greedy_does_if_blocks_do_not_interact() -> None:
    budget = Budget(latency_reduction=0.35)
    greedy = search(FakeLab(of_sets(0.0)), budget)
    joint = search(FakeLab(of_sets(0.0)), budget, JOINT)
    assert (drops(joint), joint.plan) == (drops(greedy), greedy.plan) == ("bac", greedy.plan)
    assert len(greedy.tables) == 2
    gained = ends(joint)["gained by joint"]
    assert (gained["R of the set"], gained["latency (ms)"], gained["measured saving"]) == (0.0, 0.0, 0.0)


def test_joint_avoids_blocks_that_cost_more_together_and_says_what_that_gained() -> None:
    lab = FakeLab(of_sets(0.5))
    choice = search(lab, Budget(drop_blocks=2), JOINT)
    # Beside b, R/tau is (1.0 - 0.1) / 0.2 = 4.5 for a, (0.4 - 0.1) / 0.1 = 3 for c, 4 for d.
    assert drops(choice) == "bc"
    assert drops(search(FakeLab(of_sets(0.5)), Budget(drop_blocks=2))) == "ba"
    assert lab.timed[-4:] == ["b", "bc", "b", "ab"]
    rounds = choice.tables[2]
    assert rounds.title == "Rounds of the joint selection"
    assert [row[:2] for row in rounds.rows] == [(1, "b"), (2, "c")]
    assert dict(zip(rounds.columns[2:], rounds.rows[1][2:], strict=True)) == {
        "score": pytest.approx(3.0),
        "next best": "d",
        "its score": pytest.approx(4.0),
        "score in round 1": pytest.approx(3.0),
        "place in round 1": 3,
    }
    assert choice.tables[3].title == "Sets that joint and greedy end with: predicted R and measured latency"
    found = ends(choice)
    assert (found["joint"]["blocks"], found["greedy"]["blocks"]) == ("b, c", "b, a")
    assert found["joint"]["R of the set"] == pytest.approx(0.4)
    assert found["greedy"]["R of the set"] == pytest.approx(1.0)
    assert found["gained by joint"]["R of the set"] == pytest.approx(0.6)
    assert (found["joint"]["latency (ms)"], found["greedy"]["latency (ms)"]) == pytest.approx((8.0, 7.0))
    assert found["gained by joint"]["latency (ms)"] == pytest.approx(-1.0)
    assert found["gained by joint"]["measured saving"] == pytest.approx(-0.1)
    assert "in order of R/tau, scored anew after each drop: b, c." in choice.reason


def test_joint_scores_by_what_a_block_adds_only_where_values_are_those_of_sets() -> None:
    config = practise.Config(criterion="l2", select="joint")
    added = search(FakeLab(of_sets(0.5)), Budget(drop_blocks=2), config)
    assert rows(added.tables[1])["d"]["score when chosen"] == pytest.approx(ERROR["d"])
    config = practise.Config(criterion="epsilon_resnet", select="joint")
    own = search(FakeLab(), Budget(drop_blocks=2), config)
    assert rows(own.tables[1])["d"]["score when chosen"] == ERROR["d"]
    assert [row[2] for row in own.tables[3].rows] == [None, None, None]
    assert own.tables[3].title == "Sets that joint and greedy end with: measured latency"


@pytest.mark.parametrize("criterion", ["random", "first"])
def test_scoring_anew_what_looks_at_nothing_is_refused_unasked(criterion: Literal["random", "first"]) -> None:
    config = practise.Config(criterion=criterion, select="joint")
    lab = FakeLab()
    with pytest.raises(UsageError) as refused:
        search(lab, Budget(drop_blocks=1), config)
    assert str(refused.value) == (
        f'[method] select = "joint": criterion = "{criterion}" looks at no network, so that nothing changes '
        'when blocks are scored anew; use select = "greedy", or another criterion'
    )
    assert lab.requests == []
