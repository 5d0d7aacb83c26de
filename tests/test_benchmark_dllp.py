"""The benchmark of DLLP: which runs it makes, what it reads of them, and what its tables say."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from whole_runs import take

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import dllp, dllp_left, dllp_rows, dllp_tables, runs  # noqa: E402
from benchmarks import dllp_uncertainty as seen  # noqa: E402
from benchmarks.dllp_rows import Figures, Joined, Observed, Reading, Settings, Spike, Variant  # noqa: E402
from benchmarks.runs import Facts, Record, Row  # noqa: E402
from optpipe import data, preparation, store  # noqa: E402
from optpipe import recipe as recipes  # noqa: E402
from optpipe.errors import RunError, UsageError  # noqa: E402
from optpipe.methods.dllp.config import Config  # noqa: E402
from optpipe.report import build, schema  # noqa: E402
from optpipe.types import Calibration, Quality, Reliability, Selective, Table  # noqa: E402

FACTS = Facts("a processor, 2 threads", "Linux", {"torch": "2.15"}, 4660, 423)
SPIKE = Table(
    "Cutting the spike out (1000 calibration images; logits up to 26.5)",
    ("network", "accuracy", "largest difference of a logit"),
    (
        ("masks sampled, mean of 4", 0.5, None),
        ("masks by the threshold, before settling", 0.6, None),
        ("masks by the threshold, at the end", 0.88, None),
        ("cut, nothing trained since", 0.881, 5e-6),
    ),
)


def call(tmp_path: Path, *words: str) -> list[str]:
    return [*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]


def jobs(tmp_path: Path, *words: str) -> list[dllp_rows.Job]:
    arguments = dllp.parse(call(tmp_path, *words))
    return list(dllp.jobs_of(arguments, runs.base_recipe(arguments.recipe, tmp_path / "base.toml")))


def loaded(job: dllp_rows.Job) -> tuple[recipes.Recipe, Config]:
    """A job's recipe and its method's settings, as its command gives them."""
    path = next(Path(word) for word in job.command if word.endswith(".toml"))
    given = [word for before, word in zip(job.command, job.command[1:], strict=False) if before == "--set"]
    found = recipes.load(path, given)
    return found, recipes.bind(Config, found.method, path, "method")


# ---------------------------------------------------------------- the runs


def test_the_first_seed_of_both_comes_before_the_second(tmp_path: Path) -> None:
    found = jobs(tmp_path, "macs")
    assert [job.folder.name for job in found] == [
        f"macs-{name}-seed{seed}" for seed in (0, 1, 2) for name in ("dllp", "magnitude")
    ]


@pytest.mark.parametrize("table", ["macs", "latency"])
def test_both_train_for_the_same_steps_at_the_same_budget(tmp_path: Path, table: str) -> None:
    for job in jobs(tmp_path, table, "--seeds", "1", "--scale", "3"):
        recipe, config = loaded(job)
        assert recipe.run.seed == recipe.data.calibration.seed == 1
        assert recipe.model.name == "zoo:resnet56_cifar" and recipe.method_name == "dllp"
        assert (recipe.budget.macs_reduction, recipe.budget.latency_reduction) == (
            (0.55, None) if table == "macs" else (None, 0.3)
        )
        posterior = job.variant.name == "dllp"
        assert config.score == ("posterior" if posterior else "magnitude")
        assert recipe.export.uncertainty == posterior and recipe.export.precisions == ()
        assert (config.start, config.epochs, config.batch) == ("pretrained", 3.0, 64)
        assert dllp_left.steps_of(config, 4660) == 219  # ceil(3 * 4660 / 64)
        assert recipe.recover == {}


def test_the_papers_scale_is_60_epochs_of_512_at_a_tenth(tmp_path: Path) -> None:
    for table in ("macs", "uncertainty"):
        _, config = loaded(jobs(tmp_path, table, "--paper", "--seeds", "0")[-1])
        assert (config.batch, config.lr) == (512, 0.1)
        assert dllp_left.steps_of(config, 4660) == 547  # ceil(60 * 4660 / 512)


def test_further_rows_are_made_where_they_are_named(tmp_path: Path) -> None:
    words = (
        "macs",
        "--seeds",
        "0",
        "--scale",
        "3",
        "--only",
        "dllp-beta0",
        "dllp-settle0",
        "magnitude-double",
    )
    bare, unsettled, double = (loaded(job)[1] for job in jobs(tmp_path, *words))
    assert (bare.score, bare.beta, bare.settle) == ("posterior", 0.0, 0.6)  # as the recipe settles
    assert (unsettled.beta, unsettled.settle, unsettled.epochs) == (Config().beta, 0.0, 3.0)
    assert (double.score, double.epochs) == ("magnitude", 6.0)


def test_all_shares_of_the_images_are_trained_for_the_same_steps(tmp_path: Path) -> None:
    found = [loaded(job) for job in jobs(tmp_path, "uncertainty", "--seeds", "2")]
    assert [recipe.data.calibration.count for recipe, _ in found] == [932, 1864, 2796, 3728, 4660]
    for recipe, config in found:
        assert recipe.data.calibration.seed == 2 and recipe.model.name == "zoo:resnet20_cifar"
        assert (config.start, config.batch, config.lr) == ("scratch", 128, 0.1)
        assert not recipe.export.uncertainty
        count = recipe.data.calibration.count
        assert count is not None
        assert dllp_left.steps_of(config, count) == 219  # ceil(6 * 4660 / 128)


def test_fewer_images_than_a_batch_have_the_same_steps_too(tmp_path: Path) -> None:
    for job in jobs(tmp_path, "uncertainty", "--seeds", "0", "--images", "200", "--scale", "4"):
        recipe, config = loaded(job)
        count = recipe.data.calibration.count
        assert count is not None and dllp_left.steps_of(config, count) == 7  # ceil(4 * 200 / 128)


def test_equal_epochs_and_a_pretrained_start_are_other_results(tmp_path: Path) -> None:
    words = ("uncertainty", "--seeds", "0", "--equal", "epochs", "--pretrained")
    for job in jobs(tmp_path, *words):
        _, config = loaded(job)
        assert (config.start, config.epochs) == ("pretrained", 6.0)
    assert (
        dllp.named(dllp.parse([*words, "--images", "500"])) == "-resnet20-pretrained-equal-epochs-500images"
    )
    assert dllp.named(dllp.parse(["uncertainty"])) == "-resnet20"
    assert dllp.named(dllp.parse(["macs", "--network", "resnet20", "--scale", "2"])) == "-resnet20-2epochs"


@pytest.mark.parametrize(
    "words",
    [
        ("macs", "--set", "method.epochs=1"),
        ("macs", "--set", 'method.score = "magnitude"'),
        ("macs", "--only", "dllp-beta0", "--set", "method.beta=0.5"),
        ("uncertainty", "--set", "data.calibration.count=10"),
        ("uncertainty", "--set", "method.batch=64"),
    ],
)
def test_what_rows_differ_in_is_not_for_the_caller_to_set(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="give --scale or --only"):
        dllp.parse(words)
    dllp.parse(["macs", "--set", "method.beta=0.5"])  # of all rows alike


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dllp.main([*call(tmp_path, "uncertainty"), "--dry-run", "--only", "share-20"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "data.calibration.count=932" in printed[0]
    assert not list(tmp_path.glob("*.json"))


# ---------------------------------------------------------------- what a run left


def reliability(error: float) -> Reliability:
    return Reliability(Calibration(error, ()), (Selective(0.0, 423, 0.9),))


def finished(report: schema.Report) -> schema.Report:
    """A report with calibration errors of 1 and 4 percent, an ensemble, and the table of the cut."""
    joined = schema.EnsembleReport(
        2,
        10,
        1.0,
        report.result.latency,
        Quality("top1", 0.92, (0.9, 0.94), 423, "evaluation"),
        None,
        reliability(0.03),
        0.01,
        0.2,
        0.05,
        (),
        None,
    )
    return dataclasses.replace(
        report,
        original=dataclasses.replace(report.original, reliability=reliability(0.01)),
        result=dataclasses.replace(report.result, reliability=reliability(0.04), sparsity=0.25),
        data=dataclasses.replace(report.data, calibration_count=4660),
        tables=(*report.tables, SPIKE),
        ensemble=joined,
    )


def leave(folder: Path, report: schema.Report, score: str = "posterior") -> None:
    """A run's folder as far as a row of accuracies reads it; its settling was asked for twice."""
    folder.mkdir(parents=True)
    build.write(folder, report)
    text = f'[method]\nname = "dllp"\nscore = "{score}"\nepochs = 2.0\nbatch = 128\n'
    (folder / "recipe.toml").write_text(text, encoding="utf-8")
    events = [
        ("stage", "analyze", "", "", 1.0),
        ("trial", "gates", "computed", "a", 60.0),
        ("trial", "9 groups narrowed", "computed", "b", 5.0),
        ("trial", "settling", "computed", "c", 40.0),
        ("trial", "gates", "reused", "a", 0.1),
        ("trial", "settling", "reused", "c", 0.2),
    ]
    lines = [
        json.dumps({"kind": kind, "name": name, "detail": detail, "fields": {"key": key}, "seconds": seconds})
        for kind, name, detail, key, seconds in events
    ]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_row_has_what_the_report_and_the_folder_hold(tmp_path: Path, report: schema.Report) -> None:
    leave(tmp_path / "run", finished(report))
    found = dllp.figures_of(build.read(tmp_path / "run"), tmp_path / "run")
    assert (found.original_calibration, found.calibration) == pytest.approx((1.0, 4.0))
    assert (found.particles, found.steps, found.trained_s, found.sparsity) == (2, 73, 100.0, 25.0)
    assert found.spike is not None and found.joined is not None
    assert (found.spike.sampled, found.spike.unsettled) == pytest.approx((50.0, 60.0))
    assert (found.spike.masked, found.spike.cut, found.spike.apart) == pytest.approx((88.0, 88.1, 5e-6))
    assert (found.joined.members, found.joined.top1, found.joined.ratio) == (2, 92.0, 0.75)
    assert found.joined.calibration == pytest.approx(3.0)
    assert found.top1 == pytest.approx(90.5)


def test_magnitude_is_one_network_without_learnt_masks(tmp_path: Path, report: schema.Report) -> None:
    without = dataclasses.replace(SPIKE, rows=SPIKE.rows[2:])
    made = dataclasses.replace(finished(report), tables=(without,), ensemble=None)
    leave(tmp_path / "run", made, "magnitude")
    found = dllp.figures_of(made, tmp_path / "run")
    assert (found.particles, found.joined) == (1, None)
    assert found.spike is not None and (found.spike.sampled, found.spike.unsettled) == (None, None)


def test_a_run_without_labels_is_no_row(tmp_path: Path, report: schema.Report) -> None:
    leave(tmp_path / "run", report)
    with pytest.raises(RunError, match="its calibration was not measured"):
        dllp.figures_of(report, tmp_path / "run")


def image_set(pixels: np.ndarray) -> data.ImageSet:
    return data.ImageSet(torch.from_numpy(pixels), None, ("",) * len(pixels), (0.0,) * 3, (1.0,) * 3, "d")


def test_images_are_sharpened_by_the_laplacian_and_blurred_by_a_gaussian() -> None:
    pixels = np.full((1, 3, 9, 9), 100, np.uint8)
    pixels[0, 0, 4, 4] = 116
    images = image_set(pixels)
    assert dllp_left.filtered(images, "clean") is images
    sharp = dllp_left.filtered(images, "sharpen").pixels
    # v + (8 v - its eight neighbours) / 8: 116 + 16 in the middle, 100 - 2 beside it.
    assert (int(sharp[0, 0, 4, 4]), int(sharp[0, 0, 4, 5]), int(sharp[0, 1, 4, 4])) == (132, 98, 100)
    noise = image_set(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    spreads = [float(dllp_left.filtered(noise, name).pixels.float().std()) for name in seen.FILTERS]
    assert spreads == sorted(spreads, reverse=True)
    assert dllp_left.filtered(noise, "blur 1").pixels.shape == noise.pixels.shape


@pytest.mark.slow
def test_the_members_of_a_finished_run_are_its_particles_and_its_networks(tmp_path: Path) -> None:
    given = (
        "data.calibration.count=64",
        "data.evaluation.count=40",
        "method.epochs=2",
        "method.batch=32",
        "budget.latency_reduction=0.9",
        "export.precisions=[]",
        "export.uncertainty=false",
        "timing.budget_s=0.1",
        "timing.final_budget_s=0.1",
        "target.threads=1",
    )
    recipe = recipes.load(ROOT / "recipes" / "dllp.toml", given)
    recipe = dataclasses.replace(
        recipe, budget=dataclasses.replace(recipe.budget, latency_reduction=None, macs_reduction=0.3)
    )
    ran = take(preparation.prepare(recipe), tmp_path / "run")
    left = dllp_left.opened(ran.folder)
    images = left.setup.evaluation
    networks = list(left.networks())
    settled = dllp_left.settled(networks, images)
    sampled = dllp_left.sampled(left, left.particles(), images, 3)
    assert settled.shape == (2, 40, 10) and sampled.shape == (6, 40, 10)
    assert images.labels is not None
    top1 = float((settled[0].argmax(1) == images.labels.numpy()).mean())
    assert top1 == pytest.approx(ran.report.result.quality.value, abs=1.01 / 40)
    assert [one.name for one in dllp_left.trainings(ran.folder)] == ["gates", "settling"]


# ---------------------------------------------------------------- accuracies


def figures(
    top1: float, calibration: float = 3.0, spike: Spike | None = None, joined: Joined | None = None
) -> Figures:
    stages = {"ingest": 1.0, "analyze": 100.0}
    measured = runs.Figures(30.0, 29.0, 31.0, 55.0, 50.0, 93.85, top1, top1, 96.0, met=True, stages=stages)
    return Figures(measured, 2.0, calibration, 2, 292, 90.0, 0.0, spike, joined)


def rows(
    top1s: dict[str, list[float]], calibrations: dict[str, list[float]] | None = None
) -> list[dllp_rows.Row]:
    errors = calibrations or {}
    return [
        Row(
            Variant(name, ()),
            seed,
            figures(top1, errors.get(name, [3.0] * 3)[seed], Spike(88.0, 88.1, 5e-6, 50.0, 60.0)),
        )
        for name, values in top1s.items()
        for seed, top1 in enumerate(values)
    ]


def test_differences_are_of_equal_seeds_with_students_interval() -> None:
    """1, 2 and 3: a mean of 2, and t = 4.3027 at two degrees of freedom over the root of 3."""
    made = rows({"dllp": [93.0, 94.0, 95.0], "magnitude": [92.0, 92.0, 92.0]})
    found = dllp_tables.paired(made, "dllp", "magnitude", lambda one: one.top1)
    assert found is not None and found.mean == pytest.approx(2.0)
    half = 4.302653 / 3**0.5
    assert found.interval == pytest.approx((2 - half, 2 + half), abs=1e-5)
    fewer = dllp_tables.paired(made[:1] + made[3:], "dllp", "magnitude", lambda one: one.top1)
    assert fewer is not None and (fewer.by_seed, fewer.interval) == ({0: 1.0}, None)
    assert dllp_tables.paired(made[:3], "dllp", "magnitude", lambda one: one.top1) is None


def test_dllp_is_above_only_where_its_mean_is() -> None:
    said = dllp_tables.higher(rows({"dllp": [93.0, 91.0], "magnitude": [92.0, 91.5]}))
    assert "number of steps: true, +0.25 points (95% interval " in said
    assert said.endswith("seed 0 +1.00, seed 1 -0.50); ahead at 1 of 2 seeds.")
    assert ": false, -1.00" in dllp_tables.higher(rows({"dllp": [91.0], "magnitude": [92.0]}))
    assert ": false, +0.00" in dllp_tables.higher(rows({"dllp": [92.0], "magnitude": [92.0]}))
    assert "not decided" in dllp_tables.higher(rows({"dllp": [91.0]}))


def test_a_lower_calibration_error_is_the_better_one() -> None:
    top1s = {"dllp": [92.0] * 3, "magnitude": [92.0] * 3}
    said = dllp_tables.calibrated(rows(top1s, {"dllp": [2.0, 2.0, 4.0], "magnitude": [3.0, 3.5, 3.0]}))
    assert "at the same budget: true, -0.50 points" in said and said.endswith("lower at 2 of 3 seeds.")
    assert ": false, " in dllp_tables.calibrated(rows(top1s))


def test_the_cut_loses_nothing_where_no_run_of_dllp_moved_by_half_a_point() -> None:
    made = rows({"dllp": [92.0, 92.0], "magnitude": [92.0]})
    assert dllp_tables.lossless(made).endswith(
        ": true in 2 runs of DLLP; at most 0.10 points and 5e-06 of a logit apart."
    )
    worse = Row(Variant("dllp", ()), 2, figures(92.0, spike=Spike(88.0, 87.4, 3.0)))
    assert ": false in 3 runs of DLLP; at most 0.60 points" in dllp_tables.lossless([*made, worse])
    assert "not decided" in dllp_tables.lossless(rows({"magnitude": [92.0]}))


def record(made: list[dllp_rows.Row], table: str = "macs") -> dllp_rows.Record:
    settings = Settings(table, "resnet56", dllp.BUDGETS[table], 8.0, (), (), "Linux")
    return Record(settings, "2026-11-21", FACTS, tuple(made))


def test_the_whole_has_the_paper_beside_it_and_says_what_failed() -> None:
    made = rows({"dllp": [92.0, 92.4], "magnitude": [91.0, 91.4]})
    made[0] = Row(Variant("dllp", ()), 0, figures(92.0, joined=Joined(2, 92.5, 1.5, 1.4)))
    failed: dllp_rows.Row = Row(Variant("dllp", ()), 2, None, "no network of the family meets the budget")
    text = dllp_tables.markdown(record([*made, failed]))
    assert text.startswith("# DLLP against magnitude pruning at equal MACs, resnet56\n")
    assert "| DLLP | 92.80 | -55% | -0.04 |" in text
    assert "`dllp` 292 steps of 2 particles in 90 ± 0 s" in text
    assert "| dllp | 2 | 92.20 ± 0.28 | -1.65 ± 0.28 | 0.700 ± 0.000 | -55.0 ± 0.0% |" in text
    assert "| dllp | 1 | 50.00 | 60.00 | 88.00 | 88.10 | +0.10 | 5e-06 |" in text
    assert "| dllp | 2 | 92.50 | 1.50% | 3.00% | 1.400 |" in text
    assert "- `dllp`, top-1: +1.00 points" in text
    assert "- dllp, seed 2: no network of the family meets the budget" in text


# ---------------------------------------------------------------- uncertainties


def test_a_reading_is_the_mean_over_images() -> None:
    """Sure of different classes: all uncertainty is the model's, log 2, and the mean is 0.5 off twice."""
    found = seen.reading("sampled masks", "clean", np.array([[[1.0, 0.0]], [[0.0, 1.0]]]), np.array([0]))
    assert (found.information, found.entropy) == pytest.approx((np.log(2), 0.0))
    assert (found.variance, found.disagreement) == pytest.approx((0.25, 0.5))
    assert (found.top1, found.calibration) == (100.0, 50.0)


def test_spearman_by_hand() -> None:
    assert seen.spearman([1, 2, 3, 4, 5]) == pytest.approx(1.0)
    assert seen.spearman([1, 3, 2, 4, 5]) == pytest.approx(0.9)  # 1 - 6 * 2 / (5 * 24)
    assert seen.spearman([2, 1, 3, 4, 5, 6]) == pytest.approx(1 - 12 / 210)
    assert seen.spearman([3, 2, 1]) == pytest.approx(-1.0)
    assert seen.spearman([1, 1, 1]) is None and seen.spearman([1, 2]) is None


def observed(readings: tuple[Reading, ...], count: int = 4660) -> Observed:
    return Observed(count, 219, 90.0, 20.0, 60.0, 50.0, (0.05, 0.06), readings)


def read(members: str, images: str, value: float) -> Reading:
    return Reading(members, images, value, 2 * value, 3 * value, 4 * value, 60.0, 5.0)


def shares(by_share: dict[int, float], seed: int, members: str = seen.SAMPLED) -> list[dllp_rows.Seen]:
    return [
        Row(Variant(seen.name_of(share), ()), seed, observed((read(members, "clean", value),), 46 * share))
        for share, value in by_share.items()
    ]


FALLING = {20: 5.0, 40: 4.0, 60: 3.0, 80: 2.0, 100: 1.0}
SWAPPED = {20: 5.0, 40: 3.2, 60: 3.7, 80: 2.0, 100: 1.0}  # with FALLING, on average: it falls


def test_epistemic_uncertainty_that_falls_with_images_has_a_spearman_of_one() -> None:
    made = [*shares(FALLING, 0), *shares(SWAPPED, 1), *shares({20: 1.0}, 2)]
    information, variance = seen.trends(made, seen.EPISTEMIC, seen.over_shares)
    assert information.by_seed == pytest.approx({0: 1.0, 1: 0.9})
    assert (information.measure, variance.measure) == ("mutual information", "variance over members")
    assert seen.verdict([information, variance], "It falls") == (
        "It falls, Spearman at least 0.9 averaged over seeds: by sampled masks true: mutual information 0.95 "
        "(seed 0 1.00, seed 1 0.90; of the mean over seeds 1.00), variance over members 0.95 (seed 0 1.00, "
        "seed 1 0.90; of the mean over seeds 1.00)."
    )


def test_uncertainty_that_rises_with_images_is_not_what_was_asked() -> None:
    rising = dict(zip(FALLING, reversed(FALLING.values()), strict=True))
    found = seen.trends(shares(rising, 0, seen.SETTLED), seen.EPISTEMIC, seen.over_shares)
    assert [trend.mean for trend in found] == pytest.approx([-1.0, -1.0])
    assert "by settled particles false" in seen.verdict(found, "It falls")
    assert "not decided" in seen.verdict([], "It falls")


def test_aleatoric_uncertainty_is_of_networks_that_saw_all_images() -> None:
    values = dict(zip(seen.FILTERS, (2.0, 1.0, 3.0, 4.0, 5.0, 6.0), strict=True))
    readings = tuple(read(seen.SAMPLED, name, value) for name, value in values.items())
    whole: dllp_rows.Seen = Row(Variant(seen.name_of(100), ()), 0, observed(readings))
    part: dllp_rows.Seen = Row(Variant(seen.name_of(20), ()), 1, observed(readings))
    found = seen.trends([whole, part], seen.ALEATORIC, seen.over_filters)
    assert [(trend.measure, set(trend.by_seed)) for trend in found] == [
        ("1/d²", {0}),
        ("expected entropy", {0}),
    ]
    assert found[0].mean == pytest.approx(1 - 12 / 210)


def seen_record(made: list[dllp_rows.Seen]) -> dllp_rows.SeenRecord:
    settings = Settings(
        "uncertainty", "resnet20", "budget.macs_reduction=0.5", 6.0, (), (), "Linux", 1, 4, "steps", 4660
    )
    return Record(settings, "2026-11-21", FACTS, tuple(made))


def test_the_whole_shows_both_measures_and_figures_are_over_their_base() -> None:
    made = [*shares(FALLING, 0), *shares(SWAPPED, 1)]
    text = seen.markdown(seen_record(made))
    assert "- Aleatoric uncertainty rises from sharpened to blurred: not decided" in text
    assert "| sampled masks | 1840 (40%) | 10.8000 ± 1.6971 | 14.4000 ± 2.2627 |" in text
    assert "All shares are trained for the same number of steps" in text
    drawn = seen.figures(seen_record(made))
    assert list(drawn) == ["epistemic"] and "<svg" in drawn["epistemic"]


# ---------------------------------------------------------------- resuming


def test_rows_that_are_there_are_not_made_again(
    tmp_path: Path, report: schema.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([False, True, True])
    ran: list[str] = []

    def run(job: dllp_rows.Job, workers: int = 1) -> tuple[dllp_rows.Row, Facts | None]:
        ran.append(job.variant.name)
        if not next(outcomes):
            return Row(job.variant, job.seed, None, "no budget"), None
        leave(job.folder, finished(report))
        made, facts = dllp.outcome(job)
        return Row(job.variant, job.seed, made), facts

    monkeypatch.setattr(dllp, "run", run)
    asked = [*call(tmp_path, "latency"), "--seeds", "0"]
    dllp.main(asked)
    dllp.main(asked)  # the one that failed is tried again
    assert ran == ["dllp", "magnitude", "dllp"]
    kept = store.from_json(dllp_rows.Record, (tmp_path / "dllp_latency.json").read_bytes())
    assert [row.variant.name for row in kept.rows] == ["magnitude", "dllp"]
    assert "no budget" not in (tmp_path / "dllp_latency.md").read_text(encoding="utf-8")


def test_uncertainties_are_kept_with_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def look(job: dllp_rows.Job, draws: int, workers: int = 1) -> tuple[dllp_rows.Seen, Facts | None]:
        ran.append(job.variant.name)
        share = int(job.variant.name.partition("-")[2])
        return shares({share: FALLING[share]}, job.seed)[0], FACTS

    def row(job: dllp_rows.Job, draws: int, workers: int = 1) -> tuple[dllp_rows.Seen, Facts | None]:
        made, facts = look(job, draws, workers)
        return dataclasses.replace(made, variant=job.variant), facts

    monkeypatch.setattr(dllp, "look", row)
    asked = [*call(tmp_path, "uncertainty"), "--seeds", "0"]
    dllp.main(asked)
    dllp.main(asked)
    assert ran == [seen.name_of(share) for share in seen.SHARES]
    path = tmp_path / "dllp_uncertainty-resnet20.json"
    kept = store.from_json(dllp_rows.SeenRecord, path.read_bytes())
    assert len(kept.rows) == 5
    assert (tmp_path / "dllp_uncertainty-resnet20-epistemic.svg").is_file()
    assert not (tmp_path / "dllp_uncertainty-resnet20-aleatoric.svg").exists()
