"""The benchmark of three dimensions: which runs it makes, how long they train, and what its tables say."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import runs, three_d, three_d_rows, three_d_tables  # noqa: E402
from benchmarks.runs import Facts, Record, Row  # noqa: E402
from benchmarks.runs_tables import of  # noqa: E402
from benchmarks.three_d_rows import OPTIMUM, POINTS, PREDICTORS, SURFACE, Figures, Settings  # noqa: E402
from optpipe import graph, plugins, store, tune  # noqa: E402
from optpipe import recipe as recipes  # noqa: E402
from optpipe.errors import RunError, UsageError  # noqa: E402
from optpipe.methods._meter import Meter, Reading  # noqa: E402
from optpipe.methods.three_d import tables  # noqa: E402
from optpipe.methods.three_d.collect import Made, Point  # noqa: E402
from optpipe.methods.three_d.comparison import comparison  # noqa: E402
from optpipe.methods.three_d.config import DIMENSIONS, Config  # noqa: E402
from optpipe.methods.three_d.cost import fit_cost  # noqa: E402
from optpipe.methods.three_d.ends import Costed  # noqa: E402
from optpipe.methods.three_d.optimum import Candidate, Optimum  # noqa: E402
from optpipe.methods.three_d.settle import Attempt, Settled  # noqa: E402
from optpipe.methods.three_d.space import Level, Space  # noqa: E402
from optpipe.report import build, schema  # noqa: E402
from optpipe.types import Plan, Quality, Table, Tune  # noqa: E402

FACTS = Facts("a processor, 2 threads", "Linux", {"torch": "2.15"}, 4660, 282, 141)
VARIANTS = {variant.name: variant for variant in three_d.VARIANTS}
REASON = "d = 0.778, w = 0.875, r = 0.938: 6 of 27 blocks dropped, images of 30x30; this saves 25.0%"


def call(tmp_path: Path, *words: str) -> list[str]:
    return [*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]


def jobs(tmp_path: Path, *words: str) -> list[three_d_rows.Job]:
    arguments = three_d.parse(call(tmp_path, *words))
    return list(three_d.jobs_of(arguments, runs.base_recipe(arguments.recipe, tmp_path / "base.toml")))


def overrides(job: three_d_rows.Job) -> dict[str, str]:
    given = [word for before, word in zip(job.command, job.command[1:], strict=False) if before == "--set"]
    return dict(word.split("=", 1) for word in given)


def levels() -> list[Level]:
    """(1, 1, 1) and four along each dimension."""
    whole = Level(0, 1.0, (32, 32))
    found = [whole]
    found += [dataclasses.replace(whole, dropped=count) for count in (3, 6, 9, 12)]
    found += [dataclasses.replace(whole, ratio=ratio) for ratio in (0.9375, 0.875, 0.8125, 0.75)]
    found += [dataclasses.replace(whole, size=(size, size)) for size in (30, 28, 26, 24)]
    return found


@pytest.fixture(scope="module")
def method_tables() -> tuple[Table, ...]:
    """The tables as the method itself makes them: one network was built, 2% dearer than predicted."""
    space = Space((3, 32, 32), 27, (), (), graph.WidthMap((), (), (), (), ()), (), ())
    points, costed = [], []
    for number, level in enumerate(levels()):
        d, w, r = share = space.share(level)
        accuracy = 0.93 * (1 - 0.1 * (1 - d)) * (1 - 0.2 * (1 - w) ** 2) * (1 - 0.3 * (1 - r) ** 3)
        along = () if number == 0 else (DIMENSIONS[(number - 1) // 4],)
        quality = Quality("top1", accuracy, (0.9, 0.95), 930, "held out")
        points.append(Point(along, (number - 1) % 4 + 1, level, share, Plan(), quality))
        ratio = 0.1 + 0.9 * d * w * r**2
        costed.append(Costed(level, Reading(ratio, ratio - 0.01, ratio + 0.01)))
    meter = Meter("latency", 0.65, 1, 1)
    best = Candidate((0.778, 0.875, 0.938), 0.92, 0.6)
    built = Level(6, 0.875, (30, 30))
    attempt = Attempt(built, Made(Plan(), None), best, Reading(0.612, 0.6, 0.63), True)
    costed.append(Costed(built, attempt.reading))
    surface = fit_cost([space.share(one.level) for one in costed], [one.reading.ratio for one in costed])
    optimum = Optimum(best, best, (0.01, 0.01, 0.01), True)
    settled = Settled((attempt,), attempt, surface, optimum, (0.5, 0.5, 0.5), tuple(costed))
    return (
        tables.optima(settled, meter),
        tables.points(points, costed, meter),
        tables.predictors(points, Config(degree=1)),  # quick
        tables.surface(space, settled, meter),
    )


def finished(report: schema.Report, made: tuple[Table, ...] = ()) -> schema.Report:
    """A report of the benchmark's size; its result takes 0.75 of the original's time."""
    return dataclasses.replace(
        report,
        reason=REASON,
        plan=Plan(drop_blocks=("layer1.1", "layer2.2"), input_hw=(30, 30)),
        recover=Tune(steps=146, epochs=4, batch=128),
        data=dataclasses.replace(report.data, calibration_count=4660, validation_count=141),
        tables=(*report.tables, *made),
    )


def figures(top1: float, made: tuple[Table, ...] = (), steps: int = 903) -> Figures:
    stages = {"ingest": 1.0, "analyze": 100.0, "recover": 20.0}
    measured = runs.Figures(
        40.0, 39.0, 41.0, 50.0, 30.0, 93.85, 50.0, top1, 96.0, met=True, stages=stages, tables=made
    )
    return Figures(measured, 0.778, 0.875, 0.938, 6, "30x30", 0, 0, steps)


def rows(top1s: dict[str, list[float]], made: tuple[Table, ...] = ()) -> list[three_d_rows.Row]:
    return [
        Row(VARIANTS[name], seed, figures(top1, made if name == "together" else ()))
        for name, values in top1s.items()
        for seed, top1 in enumerate(values)
    ]


def record(made: list[three_d_rows.Row], table: str = "latency") -> three_d_rows.Record:
    shared = (*three_d.SPLIT, *three_d.TEACHERS)
    settings = Settings(table, "resnet56", three_d.BUDGETS[table], 4.0, (), "Linux", shared=shared)
    return Record(settings, "2026-11-21", FACTS, tuple(made))


def test_the_first_seed_of_every_configuration_comes_before_the_second(tmp_path: Path) -> None:
    found = jobs(tmp_path, "macs")
    assert [job.variant.name for job in found[:4]] == ["together", "depth", "width", "resolution"]
    assert [job.seed for job in found] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({job.folder for job in found}) == 12
    assert found[4].folder.name == "macs-together-validated-seed1"


@pytest.mark.parametrize("table", ["macs", "latency"])
def test_every_command_binds_to_the_recipe_and_the_method(tmp_path: Path, table: str) -> None:
    for job in jobs(tmp_path, table, "--network", "resnet20", "--seeds", "1"):
        path = next(Path(word) for word in job.command if word.endswith(".toml"))
        loaded = recipes.load(path, [f"{key}={value}" for key, value in overrides(job).items()])
        assert loaded.run.seed == loaded.data.calibration.seed == 1
        assert loaded.model.name == "zoo:resnet20_cifar" and loaded.method_name == "three_d"
        budget = loaded.budget
        assert (budget.macs_reduction, budget.latency_reduction) == (
            (0.5, None) if table == "macs" else (None, 0.35)
        )
        config = recipes.bind(Config, loaded.method, path, "method")
        assert (config.dimensions, config.rounds, config.epochs) == (job.variant.dimensions, 4, 0.4)
        held, rest = loaded.data.validation, loaded.data.evaluation
        assert held is not None and (held.source, held.seed) == (rest.source, rest.seed)
        assert (held.skip, held.count, rest.skip, rest.count) == (0, 141, 141, None)
        recover = recipes.recovery(plugins.method("three_d").RECOVER, loaded.recover, path)
        assert recover.teachers == "single"


def test_all_configurations_train_for_the_same_number_of_steps(tmp_path: Path) -> None:
    """All 4660 images in each: 17 times 15 steps and 146 against 394 in one recovery."""
    steps: dict[str, int] = {}
    for job in jobs(tmp_path, "latency", "--seeds", "0"):
        path = next(Path(word) for word in job.command if word.endswith(".toml"))
        loaded = recipes.load(path, [f"{key}={value}" for key, value in overrides(job).items()])
        recover = recipes.recovery(plugins.method("three_d").RECOVER, loaded.recover, path)
        steps[job.variant.name] = tune.with_steps(recover, 4660).steps
    assert steps == {"together": 146, "depth": 394, "width": 394, "resolution": 394}
    assert 17 * 15 + 146 - 394 < 17  # each training rounds up


def test_the_papers_scale_is_40_and_80_epochs(tmp_path: Path) -> None:
    together, depth = (overrides(job) for job in jobs(tmp_path, "macs", "--paper", "--seeds", "0")[:2])
    assert (together["method.epochs"], together["recover.epochs"]) == ("40", "80")
    assert depth["recover.epochs"] == "760"


@pytest.mark.parametrize("word", ["method.epochs=1", "recover.epochs=9", "method.rounds = 2"])
def test_what_would_make_the_steps_unequal_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(UsageError, match=r"the equal total of training steps follows from it; give --scale"):
        three_d.parse(call(tmp_path, "macs", "--set", word))


def test_runs_beside_each_other_share_the_cores_where_time_counts(tmp_path: Path) -> None:
    workers = str(os.cpu_count() or 1)
    for job in jobs(tmp_path, "latency", "--seeds", "0", "--workers", workers):
        assert overrides(job).get("target.threads", "1") == "1"
        assert ("target.threads" in overrides(job)) == (workers != "1")


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert three_d.main([*call(tmp_path, "latency"), "--dry-run", "--only", "width"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and 'method.dimensions=["width"]' in printed[0]
    assert not list(tmp_path.glob("*.json"))


def test_a_row_has_what_the_report_holds(report: schema.Report, method_tables: tuple[Table, ...]) -> None:
    found = three_d.figures_of(finished(report, method_tables), 2.0)
    assert (found.d, found.w, found.r) == (0.778, 0.875, 0.938)
    assert (found.dropped, found.size) == (2, "30x30")
    # 13 rounds of ceil(2 * 4660 / 128)
    assert (found.trainings, found.search_steps, found.recover_steps, found.steps) == (13, 949, 146, 1095)
    assert found.measured.saving == pytest.approx(25.0)
    assert [table.title for table in found.measured.tables] == [
        OPTIMUM,
        POINTS,
        PREDICTORS,
        SURFACE + "latency",
    ]


def test_a_single_dimension_trains_in_its_recovery_alone(report: schema.Report) -> None:
    found = three_d.figures_of(finished(report), 2.0)
    assert (found.trainings, found.search_steps, found.steps) == (0, 0, 146)
    assert found.measured.tables == ()


def test_a_report_of_another_method_is_refused(report: schema.Report) -> None:
    with pytest.raises(RunError, match="its reason does not begin with d, w and r"):
        three_d.figures_of(report, 2.0)


def test_a_run_without_validation_images_is_no_row(
    report: schema.Report, method_tables: tuple[Table, ...]
) -> None:
    made = finished(report, method_tables)
    without = dataclasses.replace(made, data=dataclasses.replace(made.data, validation_count=0))
    with pytest.raises(RunError, match="had no validation images"):
        three_d.figures_of(without, 2.0)


def test_results_of_before_there_were_validation_images_are_left_alone(tmp_path: Path) -> None:
    old = runs.RESULTS / "three_d_macs-resnet20-8epochs.json"
    words = ("macs", "--network", "resnet20", "--scale", "8")
    arguments = three_d.parse(call(tmp_path, *words))
    assert three_d.named(arguments) == "-resnet20-8epochs-validated"
    kept = store.from_json(three_d_rows.Record, old.read_bytes())
    assert (len(kept.rows), kept.settings.shared) == (12, ())
    assert kept.settings != dataclasses.replace(
        three_d.settings_of(arguments), overrides=kept.settings.overrides
    )
    assert "validate" not in "".join(three_d_tables.introduction(kept))


def test_rows_that_are_there_are_not_made_again(
    tmp_path: Path, report: schema.Report, method_tables: tuple[Table, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([False, True, True])
    ran: list[str] = []

    def run(job: three_d_rows.Job, workers: int = 1) -> tuple[three_d_rows.Row, Facts | None]:
        ran.append(f"{job.variant.name} {job.seed}")
        if not next(outcomes):
            return Row(job.variant, job.seed, None, "no budget"), None
        build.write(job.folder, finished(report, method_tables))
        made, facts = three_d.outcome(job)
        return Row(job.variant, job.seed, made), facts

    monkeypatch.setattr(three_d, "run", run)
    asked = [*call(tmp_path, "latency"), "--only", "together", "depth", "--seeds", "0"]
    three_d.main(asked)
    assert ran == ["together 0", "depth 0"]
    assert "- together, seed 0: no budget" in (tmp_path / "three_d_latency-validated.md").read_text(
        encoding="utf-8"
    )
    three_d.main(asked)  # the one that failed is tried again
    assert ran == ["together 0", "depth 0", "together 0"]
    kept = store.from_json(three_d_rows.Record, (tmp_path / "three_d_latency-validated.json").read_bytes())
    assert [row.variant.name for row in kept.rows] == ["depth", "together"]
    assert "no budget" not in (tmp_path / "three_d_latency-validated.md").read_text(encoding="utf-8")
    three_d.main([*asked, "--scale", "2", "--dry-run"])
    assert not (tmp_path / "three_d_latency-2epochs-validated.json").exists()


def test_together_is_first_only_where_its_mean_is_the_highest() -> None:
    said = three_d_tables.first(
        rows({"together": [93.0, 93.4], "depth": [92.0, 92.4], "width": [91.0, 91.0]})
    )
    assert said.startswith(
        "Three dimensions together first of 3: true. `together` 93.20 ± 0.28 is first, 1.00 "
    )
    said = three_d_tables.first(rows({"together": [92.0], "depth": [92.5], "width": [93.0]}))
    assert said.startswith(
        "Three dimensions together first of 3: false. They are not: better are `width` by 1.00, `depth` by "
        "0.50 points. `width` 93.00 is first"
    )
    level = three_d_tables.first(rows({"together": [92.0], "depth": [92.0]}))
    assert level.startswith(
        "Three dimensions together first of 2: false. `together` 92.00 and `depth` 92.00 are"
    )
    assert "not decided" in three_d_tables.first(rows({"width": [92.0], "depth": [92.0]}))


def test_the_steps_that_were_trained_stand_beside_each_other() -> None:
    made = [Row(VARIANTS["together"], 0, figures(93.0, steps=913)), *rows({"depth": [92.0]})]
    said = three_d_tables.equal_steps(made)
    assert said.endswith("`together` 913, `depth` 903; at most 1.1% apart.")


def predictors_table(rank: float, cubic: float, ridge: float) -> Table:
    columns = ("predictor", "degree", "ridge", "error on the points", "error on points left out")
    errors = (
        ("rank 1", 3, 0.0, rank),
        ("full", 2, 0.0, 0.0),
        ("full", 3, 0.0, cubic),
        ("full", 3, 0.001, ridge),
    )
    return Table(
        PREDICTORS, columns, tuple((kind, degree, own, 0.001, error) for kind, degree, own, error in errors)
    )


def test_rank_one_is_held_against_the_full_cubic_with_and_without_ridge() -> None:
    made = [
        Row(VARIANTS["together"], 0, figures(93.0, (predictors_table(0.01, 0.05, 0.008),))),
        Row(VARIANTS["together"], 1, figures(93.0, (predictors_table(0.03, 0.02, 0.012),))),
    ]
    assert three_d_tables.rank_against_cubic(made) == (
        "The rank-1 predictor below the full cubic on points left out, on average: without ridge true (2.00% "
        "against 3.50%; seed 0 true, seed 1 false); with ridge 0.001 false (2.00% against 1.00%; seed 0 "
        "false, seed 1 false)."
    )
    assert "| full | 3 | 0 | 5.00 | 2.00 | 3.50 |" in three_d_tables.predictors_section(made)
    assert "not decided" in three_d_tables.rank_against_cubic(rows({"together": [93.0]}))


def test_errors_that_differ_by_rounding_are_level_and_the_reason_is_given() -> None:
    made = rows({"together": [93.0]}, (predictors_table(0.05341, 0.05342, 0.06),))
    said = three_d_tables.rank_against_cubic(made)
    assert "without ridge level (5.34% against 5.34%; seed 0 level); with ridge 0.001 true" in said
    assert said.endswith("only points between the axes could tell the two apart.")


def test_on_the_axes_a_product_of_cubics_is_the_full_cubic() -> None:
    """What the sentence says: fitted without ridge, both leave the same error at points left out."""
    shares = np.ones((13, 3))
    for axis in range(3):
        shares[1 + 4 * axis : 5 + 4 * axis, axis] = [0.9, 0.8, 0.7, 0.6]
    noise = np.random.default_rng(0).normal(0, 0.01, 13)
    values = 0.93 * np.prod(1 - 0.3 * (1 - shares) ** 2, axis=1) + noise
    errors = {(row.kind, row.degree, row.ridge): row.left_out_error for row in comparison(shares, values)}
    assert errors["rank 1", 3, 0.0] == pytest.approx(errors["full", 3, 0.0], rel=three_d_tables.LEVEL)


def test_the_chosen_networks_prediction_is_held_against_both_measurements(
    method_tables: tuple[Table, ...],
) -> None:
    """Predicted 0.6, built 0.612, finished 0.6 again: 2% off, then none."""
    made = rows({"together": [93.0]}, method_tables)
    said = three_d_tables.predicted_well(made, "latency")
    assert said == (
        "Predicted against measured latency of the chosen network within 3%: when it was built true (seed 0 "
        "+2.0%); when the finished network was measured anew true (seed 0 +0.0%)."
    )
    far = [dataclasses.replace(row, figures=_saving(of(row), 36.0)) for row in made]
    said = three_d_tables.predicted_well(far, "latency")
    assert said.endswith("when the finished network was measured anew false (seed 0 +6.7%).")
    assert "not decided" in three_d_tables.predicted_well(rows({"together": [93.0]}), "latency")


def _saving(one: Figures, saving: float) -> Figures:
    return dataclasses.replace(one, measured=dataclasses.replace(one.measured, saving=saving))


def test_a_correction_is_counted_and_the_first_network_is_not_forgotten() -> None:
    columns = ("network", "predicted MACs", "off by", "verdict")
    built = (("dense grid", 0.5, None, ""), ("built", 0.5, 0.05, "misses the budget"))
    table = Table(OPTIMUM, columns, (*built, ("built, correction 1", 0.49, -0.01, "chosen")))
    (found,) = three_d_tables.predictions(rows({"together": [93.0]}, (table,)), "MACs")
    assert (found.corrections, found.first_off, found.off, found.predicted) == (1, 0.05, -0.01, 0.49)
    assert found.final == pytest.approx(0.5)


def test_the_surfaces_errors_are_means_of_magnitudes(method_tables: tuple[Table, ...]) -> None:
    surface = method_tables[3]
    columns = list(surface.columns)
    left = [abs(float(str(row[columns.index("left out, off by")]))) for row in surface.rows]
    lines = three_d_tables.costs_section(rows({"together": [93.0]}, method_tables), "latency")
    assert lines[-1].endswith(f"| {sum(left) / len(left):.1%} | {max(left):.1%} |")
    assert lines[-1].startswith("| 0 | 14 |")


def test_the_whole_has_the_paper_beside_it_and_says_what_failed(method_tables: tuple[Table, ...]) -> None:
    made = rows({"together": [93.0, 93.2], "depth": [92.0, 92.4]}, method_tables)
    failed: three_d_rows.Row = Row(VARIANTS["width"], 0, None, "no ratio of channels is clearly faster")
    text = three_d_tables.markdown(record([*made, failed]))
    assert text.startswith("# Three dimensions at equal measured latency, resnet56\n")
    assert "| three dimensions (ours there) | 93.76 | +0.07 | -50% |" in text
    assert (
        "| width only | 92.97 | -0.72 | -50% |" in text
        and "| resolution only | 92.00 | -1.69 | -51% |" in text
    )
    assert "| depth only (DBP) | 93.27 | -0.42 | -52% |" in text
    assert "| together | 2 | 93.10 ± 0.14 | -0.75 ± 0.14 | 50.0 ± 0.0 | 40.0 ± 0.0% |" in text
    assert "- width, seed 0: no ratio of channels is clearly faster" in text
    assert "for 0.4 epochs at a time, and its result for 4 (the paper: 40 and 80" in text
    assert "4660 training, 141 validation and 282 test images" in text
    assert "141 of the 423 lossless test images validate, the other 282 test." in text
    assert "All rows alike: `data.validation.source=" in text and "`recover.teachers=single`" in text
