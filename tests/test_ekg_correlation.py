"""The benchmark of Fig. 2 of EKG: random sub-networks, coefficients and what is said of them."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import ekg_correlation as benchmark  # noqa: E402
from benchmarks import ekg_correlation_tables as tables  # noqa: E402
from benchmarks.ekg_correlation_tables import Record, Row, Settings  # noqa: E402
from optpipe import graph, store, tune  # noqa: E402
from optpipe.data import ImageSet  # noqa: E402
from optpipe.graph.trace import total  # noqa: E402
from optpipe.types import Plan  # noqa: E402
from optpipe.zoo.cifar_resnet import resnet20  # noqa: E402

SHARED = Path(os.environ.get("OPTPIPE_DATA", ROOT.parent / "shared"))
SHAPE = (3, 32, 32)


def row(index: int, validation: float, condition: float, potential: float, macs: float = 0.3) -> Row:
    return Row(
        index=index,
        score="l1" if index % 3 == 0 else "random",
        macs_reduction=macs,
        parameters_reduction=0.2,
        validation_loss=validation,
        condition=condition,
        line=(condition / 2, condition, condition * 1.5),
        residual=0.001,
        training_loss=0.1,
        potential_loss=potential,
        test_error=0.1,
        condition_s=1.0,
        tune_s=2.0,
    )


def record(rows: list[Row]) -> Record:
    return tables.correlated(Record(Settings(), "2026-01-01", "a machine", (("torch", "2"),), tuple(rows)))


def subject() -> benchmark.Subject:
    torch.manual_seed(0)
    original = graph.trace(resnet20().eval(), SHAPE)
    groups = tuple(group for group in graph.inspect(original, SHAPE).groups if group.prunable)
    pixels = torch.zeros(0, *SHAPE, dtype=torch.uint8)
    nothing = ImageSet(pixels, torch.zeros(0, dtype=torch.int64), (), (0.5,) * 3, (0.5,) * 3, "")
    return benchmark.Subject(original, groups, nothing, nothing, nothing)


# ---------------------------------------------------------------- images and sub-networks


def test_the_validation_set_has_as_many_of_each_class_and_none_of_the_training_set() -> None:
    labels = torch.tensor([0, 1, 0, 0, 1, 2, 2, 1, 0, 2])
    validation, training = benchmark.split(labels, 2)
    assert validation == [0, 1, 2, 4, 5, 6]
    assert training == [3, 7, 8, 9]


@pytest.mark.parametrize("score", ["random", "l1"])
def test_a_sub_network_loses_a_share_of_the_macs_within_the_range(score: tables.Score) -> None:
    whole = subject()
    before = total(whole.original)[1]
    reached = []
    for seed in range(3):
        network = benchmark.cut(whole, score, np.random.default_rng(seed))
        wanted = np.random.default_rng(seed).uniform(0.2, 0.6)
        reached.append(1 - total(network)[1] / before)
        # One step takes a fifth of one of nine layers.
        assert wanted <= reached[-1] < wanted + 0.04
    assert len(set(reached)) == 3
    assert total(whole.original)[1] == before


def test_the_same_draws_give_the_same_sub_network() -> None:
    whole = subject()
    shapes = [
        [
            tuple(p.shape)
            for p in benchmark.cut(whole, "random", np.random.default_rng([0, seed])).parameters()
        ]
        for seed in (1, 1, 2)
    ]
    assert shapes[0] == shapes[1] != shapes[2]


def test_by_the_l1_norm_the_weakest_filters_go_first() -> None:
    whole = subject()
    group = whole.groups[0]
    weight = whole.original.get_submodule(group.name).weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        weight[3] *= 0.01
        weight[7] *= 0.001
    order = benchmark.order_of(whole.original, group, "l1", np.random.default_rng(0))
    assert list(order[:2]) == [7, 3]
    assert sorted(order) == list(range(group.channels))
    network = benchmark.narrowed(whole, [order] * len(whole.groups), [2] + [0] * (len(whole.groups) - 1))
    kept = tuple(channel for channel in range(group.channels) if channel not in (3, 7))
    wanted = graph.apply(whole.original, Plan(keep_channels=((group.name, kept),)), SHAPE)
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(images), wanted(images))


def test_removal_takes_a_fifth_of_one_layer_a_step_and_leaves_a_filter_in_each() -> None:
    steps = list(benchmark.removal([10, 4], np.random.default_rng(0)))
    assert steps[-1] == (9, 3)
    before: tuple[int, ...] = (0, 0)
    for after in steps:
        taken = [b - a for a, b in zip(before, after, strict=True)]
        chosen = int(np.argmax(taken))
        left = (10, 4)[chosen] - before[chosen]
        assert sorted(taken) == [0, max(1, round(0.2 * left))]
        before = after


def test_fine_tuning_is_plain_and_as_long_as_the_scale_says() -> None:
    recovery = benchmark.fine_tuning(Settings(epochs=2.0, lr=0.05), 1280, "cpu")
    assert (recovery.steps, recovery.lr, recovery.batch) == (20, 0.05, 128)
    assert (recovery.loss, recovery.teachers, recovery.trainable) == ("labels", "none", "all")
    # The paper's 60, 120 and 160 of 200 epochs, each time to a fifth.
    assert [tune.rate(step, recovery) for step in (0, 6, 12, 16)] == pytest.approx([1, 0.2, 0.04, 0.008])


# ---------------------------------------------------------------- coefficients


def test_coefficients_are_those_computed_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 6.0]), np.array([2.0, 1.0, 4.0, 5.0])
    # Deviations (-2, -1, 0, 3) and (-1, -2, 1, 2): 10 / (sqrt 14 * sqrt 10).
    assert tables.pearson(x, y) == pytest.approx(10 / 140**0.5)
    # Ranks (1, 2, 3, 4) and (2, 1, 3, 4): 1 - 6 * 2 / (4 * 15).
    assert tables.spearman(x, y) == pytest.approx(0.8)
    assert tables.spearman(np.exp(x), -x) == pytest.approx(-1.0)
    assert tables.pearson(np.ones(3), np.arange(3.0)) == 0.0


def test_the_predictor_that_foretells_more_is_named_only_when_it_is_decided() -> None:
    rng = np.random.default_rng(0)
    potential = np.linspace(0.3, 0.9, 30)
    noise = rng.permutation(potential)
    sharp = record([row(i, float(noise[i]), 2 * float(p), float(p)) for i, p in enumerate(potential)])
    found = {each.predictor: each for each in sharp.correlations}
    assert found["condition number"].pearson == pytest.approx((1.0, 1.0, 1.0))
    low, high = found["validation loss"].pearson[1:]
    assert low < found["validation loss"].pearson[0] < high < 1.0
    assert sharp.difference is not None and sharp.difference[1] > 0
    assert "the condition number foretells more" in tables.markdown(sharp)
    equal = record([row(i, float(p), 2 * float(p), float(p)) for i, p in enumerate(potential)])
    assert "is not decided" in tables.markdown(equal)
    turned = record([row(i, float(p), float(noise[i]), float(p)) for i, p in enumerate(potential)])
    assert "the validation loss foretells more" in tables.markdown(turned)


def test_the_macs_left_are_a_predictor_that_costs_nothing() -> None:
    rows = [row(i, 0.5, 0.1, 0.3 + 0.1 * i, macs=0.2 + 0.05 * i) for i in range(6)]
    found = {each.predictor: each.pearson[0] for each in record(rows).correlations}
    assert found["MACs left"] == pytest.approx(-1.0)
    assert found["validation loss"] == 0.0


def test_the_condition_number_at_the_weights_is_the_middle_of_the_line() -> None:
    values = tables.predictor_values([row(0, 0.5, 0.2, 0.3)], "condition number at the weights")
    assert list(values) == [0.2]


# ---------------------------------------------------------------- results


def test_few_networks_give_rows_and_no_coefficient() -> None:
    few = record([row(i, 0.5, 0.1, 0.3) for i in range(2)])
    assert few.correlations == ()
    text = tables.markdown(few)
    assert "no correlation yet" in text
    assert text.count("| random |") + text.count("| l1 |") == 2


def test_a_network_that_failed_is_named() -> None:
    text = tables.markdown(dataclasses.replace(record([]), failed=((4, "training diverged"),)))
    assert "Network 4 has no row: training diverged" in text


def test_results_of_other_settings_have_other_names() -> None:
    assert benchmark.name_of(Settings()) == "ekg_correlation"
    assert benchmark.name_of(tables.PAPER) == "ekg_correlation-paper"
    assert benchmark.name_of(Settings(network="resnet20")) == "ekg_correlation-resnet20"
    assert benchmark.name_of(Settings(epochs=0.5)) == "ekg_correlation-0.5epochs"
    assert benchmark.name_of(dataclasses.replace(tables.PAPER, seed=1)) == "ekg_correlation-paper-1seed"


def test_the_command_line_departs_from_the_scale_it_names() -> None:
    _, settings = benchmark.parse(["--paper", "--scale", "3", "--network", "resnet20"])
    assert settings == dataclasses.replace(tables.PAPER, epochs=3.0, network="resnet20")
    with pytest.raises(SystemExit):
        benchmark.parse(["--images", "33"])


def test_rows_are_taken_up_only_with_the_same_settings_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "ekg_correlation.json"
    fresh = benchmark.resume(path, Settings(), "a machine")
    assert fresh.rows == ()
    done = dataclasses.replace(fresh, rows=(row(0, 0.5, 0.1, 0.3),), failed=((1, "diverged"),))
    benchmark.publish(path, done)
    again = benchmark.resume(path, Settings(), "a machine")
    assert again.rows == done.rows
    assert again.failed == ()
    assert benchmark.resume(path, Settings(seed=1), "a machine").rows == ()
    assert benchmark.resume(path, Settings(), "another machine").rows == ()


def test_results_are_json_markdown_and_two_figures(tmp_path: Path) -> None:
    rows = [row(i, 0.5 + 0.01 * i, 0.1 + 0.02 * (i % 4), 0.3 + 0.02 * i) for i in range(6)]
    whole = record(rows)
    benchmark.publish(tmp_path / "fig2.json", whole)
    assert store.from_json(Record, (tmp_path / "fig2.json").read_bytes()) == whole
    assert "| condition number | 6 |" in (tmp_path / "fig2.md").read_text()
    for name, label in (("validation", "validation loss"), ("condition", "condition number")):
        svg = (tmp_path / f"fig2-{name}.svg").read_text()
        found = next(each for each in whole.correlations if each.predictor == label)
        assert f"Pearson {tables.shown(found.pearson)}" in svg
        assert label in svg


@pytest.mark.shared
@pytest.mark.slow
def test_a_network_of_the_benchmark_is_measured_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not SHARED.exists():
        pytest.skip(f"no shared data folder at {SHARED}")
    few = "--network resnet20 --networks 1 --scale 0.05 --points 1 --iterations 2 --images 1"
    benchmark.main([*few.split(), "--out", str(tmp_path)])
    assert "1 of 1: MACs -" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    made = store.from_json(Record, path.read_bytes())
    (only,) = made.rows
    assert 0.2 <= only.macs_reduction < 0.65
    assert only.score == "l1"
    assert only.validation_loss > 0
    assert only.condition == only.line[0] >= 0
    assert 0 < only.test_error < 0.95
    benchmark.main([*few.split(), "--out", str(tmp_path)])
    assert "1 of 1: MACs -" not in capsys.readouterr().out
    assert store.from_json(Record, path.read_bytes()) == made
