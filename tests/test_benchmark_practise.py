"""The benchmark of PRACTISE: which runs it makes, what it reads of them, and what its tables say."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import practise, practise_sources_tables, practise_tables, runs  # noqa: E402
from benchmarks import practise_paper as paper  # noqa: E402
from benchmarks.practise_rows import Figures, Job, Record, Row, Settings, Variant  # noqa: E402
from benchmarks.runs import Facts  # noqa: E402
from optpipe import recipe as recipes  # noqa: E402
from optpipe import store  # noqa: E402
from optpipe.errors import RunError, UsageError  # noqa: E402

FACTS = Facts("a processor, 2 threads", "Linux", {"torch": "2.15"}, 500, 423)
METHODS = ["practise", "blocks-kd", "blocks-bp", "filters", "filters-kd", "filters-bp"]


def call(tmp_path: Path, *words: str) -> list[str]:
    return [*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]


def jobs(tmp_path: Path, *words: str) -> list[Job]:
    arguments = practise.parse(call(tmp_path, *words))
    return list(practise.jobs_of(arguments, *practise.recipes_of(arguments)))


def loaded(job: Job) -> recipes.Recipe:
    """A job's recipe, as its command gives it."""
    path = next(Path(word) for word in job.command if word.endswith(".toml"))
    given = [word for before, word in zip(job.command, job.command[1:], strict=False) if before == "--set"]
    return recipes.load(path, given)


def settings(table: str, synthesis: str = "") -> Settings:
    return Settings(table, "resnet20", "practise_resnet56.toml", 1200, (), "here", synthesis=synthesis)


def figures(top1: float, saving: float = 23.0, dropped: tuple[str, ...] = ("a", "b")) -> Figures:
    measured = runs.Figures(
        saving=saving,
        saving_low=saving - 0.5,
        saving_high=saving + 0.5,
        macs_saving=25.0,
        parameters_saving=20.0,
        original_top1=91.0,
        before_recovery=70.0,
        top1=top1,
        agreement=95.0,
        met=True,
        stages={"analyze": 5.0, "recover": 60.0},
    )
    return Figures(measured, dropped, 1200)


def row(
    method: str, seed: int, top1: float, count: int = 50, asked: float = 0.22, saving: float = 23.0
) -> Row:
    variant = Variant(f"{method}-{count}-{asked:g}", method, count, asked, ())
    return runs.Row(variant, seed, figures(top1, saving))


def record(table: str, *rows: Row, synthesis: str = "") -> Record:
    return runs.Record(settings(table, synthesis), "2026-11-22", FACTS, rows)


# ---------------------------------------------------------------- the runs


def test_both_methods_run_in_every_cell_the_first_seed_first(tmp_path: Path) -> None:
    found = jobs(tmp_path, "images")
    assert [job.seed for job in found] == [0] * 8 + [1] * 8 + [2] * 8
    assert [job.variant.name for job in found[:8]] == [
        f"{name}-{count}-{asked}"
        for asked in (22, 35)
        for count in (50, 500)
        for name in ("practise", "filters")
    ]
    assert len({job.folder for job in found}) == 24


def test_a_row_is_what_its_cell_says(tmp_path: Path) -> None:
    for job in jobs(tmp_path, "images", "--full", "--seeds", "4", "--scale", "0.5"):
        recipe = loaded(job)
        blocks = job.variant.method in {"practise", "blocks-kd", "blocks-bp"}
        assert recipe.method_name == ("practise" if blocks else "filters")
        assert recipe.budget.latency_reduction == job.variant.asked
        assert recipe.recover["steps"] == 600
        assert recipe.model.name == "zoo:resnet20_cifar"
        calibration = recipe.data.calibration
        assert (calibration.count, calibration.seed, recipe.run.seed) == (job.variant.count, 4, 4)
        assert calibration.labels == job.variant.method.endswith("bp")
        loss = {"kd": "kd", "bp": "labels"}.get(job.variant.method.partition("-")[2])
        assert recipe.recover.get("loss") == loss


def test_the_full_grid_is_four_counts_three_budgets_six_methods(tmp_path: Path) -> None:
    found = jobs(tmp_path, "images", "--full", "--seeds", "0")
    assert len(found) == 4 * 3 * 6
    assert sorted({job.variant.method for job in found}) == sorted(METHODS)
    assert {job.variant.cell for job in found} == {
        (count, asked) for count in (50, 100, 500, 1000) for asked in (0.22, 0.35, 0.5)
    }


def test_the_papers_scale_is_resnet56_for_2000_steps_and_five_draws(tmp_path: Path) -> None:
    arguments = practise.parse(call(tmp_path, "images", "--paper"))
    assert (arguments.network, arguments.full, arguments.seeds) == ("resnet56", True, [0, 1, 2, 3, 4])
    assert practise.steps_of(arguments) == 2000
    assert practise.named(arguments) == "-resnet56-2000steps"
    other = practise.parse(["images", "--paper", "--label", "epyc"])
    assert practise.named(other) == "-resnet56-2000steps-epyc"
    assert loaded(jobs(tmp_path, "images", "--paper")[0]).model.name == "zoo:resnet56_cifar"
    smaller = practise.parse(call(tmp_path, "images", "--paper", "--network", "resnet20", "--seeds", "7"))
    assert (smaller.network, smaller.seeds) == ("resnet20", [7])


def test_a_recipe_of_its_own_lends_its_scorer_and_its_recovery(tmp_path: Path) -> None:
    path = ROOT / "recipes/cifar10/practise_resnet56_paper.toml"
    mine, rival = jobs(tmp_path, "images", "--recipe", str(path), "--counts", "50", "--budgets", "0.22")[:2]
    assert loaded(mine).method["scorer"] == "exact" and "scorer" not in loaded(rival).method
    assert loaded(mine).recover["lr"] == loaded(rival).recover["lr"] == 0.02
    assert mine.folder.name == "images-practise-50-22-resnet20-1200steps-practise_resnet56_paper-seed0"


def test_real_rows_are_the_same_runs_in_all_tables(tmp_path: Path) -> None:
    of_images = jobs(tmp_path, "images", "--only", "practise", "--counts", "500", "--budgets", "0.22")
    for table in ("data-free", "out-of-domain"):
        found = jobs(tmp_path, table, "--only", "practise", "--counts", "500")
        assert [(job.folder, job.command) for job in found] == [
            (job.folder, job.command) for job in of_images
        ]


def test_images_of_other_things_are_drawn_by_the_seed(tmp_path: Path) -> None:
    found = jobs(tmp_path, "out-of-domain", "--only", "imagenet", "--seeds", "2")
    assert [loaded(job).data.calibration.count for job in found] == [50, 500, 1000]
    for job in found:
        calibration = loaded(job).data.calibration
        assert calibration.source.endswith("data/out_of_domain/imagenet_1000_32px.npz")
        assert (calibration.seed, calibration.labels) == (2, False)


def test_one_set_of_made_images_serves_all_rows(tmp_path: Path) -> None:
    words = ("data-free", "--only", "synthesized", "--budgets", "0.22", "0.35", "--synthesis-steps", "30")
    arguments = practise.parse(call(tmp_path, *words))
    (made,) = practise.synthesis_jobs(arguments, practise.recipes_of(arguments)[0])
    recipe = loaded(made)
    assert recipe.data.synthesize is not None and recipe.data.synthesize.steps == 30
    assert (recipe.data.calibration.source, recipe.data.calibration.count) == ("synthesize", 500)
    assert str(made.folder) in made.command
    found = jobs(tmp_path, *words)
    wanted = str((made.folder / "synthesized.npz").resolve())
    assert len(found) == 6 and {loaded(job).data.calibration.source for job in found} == {wanted}


def test_each_seed_has_a_set_of_its_own_where_asked(tmp_path: Path) -> None:
    words = ("data-free", "--only", "synthesized", "--own-sets")
    arguments = practise.parse(call(tmp_path, *words))
    made = list(practise.synthesis_jobs(arguments, practise.recipes_of(arguments)[0]))
    wanted = [str((job.folder / "synthesized.npz").resolve()) for job in made]
    assert [loaded(job).data.calibration.source for job in jobs(tmp_path, *words)] == wanted
    assert len(set(wanted)) == 3


def test_a_set_that_could_not_be_made_stops_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        practise, "run", lambda job, workers: (runs.Row(job.variant, 0, None, "no norms"), None)
    )
    with pytest.raises(RunError, match="no images were made from the network: no norms"):
        practise.main(call(tmp_path, "data-free", "--only", "synthesized"))


def test_criteria_drop_as_many_blocks_as_the_network_has(tmp_path: Path) -> None:
    found = jobs(tmp_path, "criteria", "--seeds", "0")
    assert [job.variant.asked for job in found] == [drop for drop in (1, 2, 3, 5) for _ in range(6)]
    assert [loaded(job).method["criterion"] for job in found[:6]] == list(practise.CRITERIA)
    assert {loaded(job).recover["steps"] for job in found} == {300}
    assert [loaded(job).budget.drop_blocks for job in found[::6]] == [1, 2, 3, 5]
    longer = jobs(tmp_path, "criteria", "--seeds", "0", "--network", "resnet56", "--only", "l2")
    assert [job.variant.asked for job in longer] == [1, 2, 3, 5, 8, 11]


@pytest.mark.parametrize(
    "words",
    [
        ("images", "--set", "recover.steps=9"),
        ("images", "--set", "budget.latency_reduction=0.1"),
        ("images", "--set", 'method.name = "filters"'),
        ("images", "--only", "synthesized"),
        ("criteria", "--only", "practise"),
        ("images", "--scale", "0"),
    ],
)
def test_what_rows_differ_in_cannot_be_set_for_all(tmp_path: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"--set|--only|--scale"):
        practise.parse(call(tmp_path, *words))


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for table in ("images", "data-free", "out-of-domain", "criteria", "correlation"):
        assert practise.main([*call(tmp_path, table), "--dry-run"]) == 0
        assert capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))


def test_rows_of_another_grid_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(job: Job, workers: int = 1) -> tuple[Row, Facts | None]:
        ran.append(job.variant.name)
        return runs.Row(job.variant, job.seed, figures(88.0)), FACTS

    monkeypatch.setattr(practise, "run", run)
    asked = [*call(tmp_path, "images"), "--seeds", "0", "--budgets", "0.22"]
    practise.main([*asked, "--counts", "50"])
    practise.main([*asked, "--counts", "50", "500", "--only", "practise"])
    assert ran == ["practise-50-22", "filters-50-22", "practise-500-22"]
    kept = store.from_json(Record, (tmp_path / "practise_images-resnet20-1200steps.json").read_bytes())
    assert len(kept.rows) == 3


# ---------------------------------------------------------------- what the tables say


def test_margins_are_paired_by_seed_and_held_against_the_first_trial() -> None:
    rows = [row("practise", seed, top1) for seed, top1 in enumerate((88.0, 89.0, 90.0))]
    rows += [row("filters", seed, top1) for seed, top1 in enumerate((84.0, 85.0, 87.0))]
    rows += [row("practise", 0, 89.0, count=500), row("filters", 0, 87.1, count=500)]
    text = practise_tables.markdown(record("images", *rows))
    # Differences 4, 4, 3: mean 3.67, and 4.303 * 0.577 / sqrt(3) = 1.43 to either side.
    assert (
        "| 50 | 22% | +3.67 points (95% interval +2.23 to +5.10; seed 0 +4.00, seed 1 +4.00, seed 2 +3.00)"
        in text
    )
    assert "| +3.2 | +3.7 | no | +8.1 |" in text
    assert "| 500 | 22% | +1.90 points (a single seed has no interval) |" in text
    assert "| +1.5 | +2.0 | no | +6.4 |" in text
    assert "0 of 2 margins beat the first trial's by 0.5 points or more." in text


def test_half_a_point_more_than_the_first_trial_passes() -> None:
    rows = [row("practise", 0, 90.2, count=500, asked=0.35), row("filters", 0, 87.0, count=500, asked=0.35)]
    text = practise_tables.markdown(record("images", *rows))
    assert "| +2.7 | +3.2 | yes |  |" in text
    assert "1 of 1 margins beat the first trial's" in text


def test_a_cell_shows_spread_saving_and_budget() -> None:
    rows = [row("practise", 0, 88.0, saving=23.0), row("practise", 1, 89.0, saving=25.0)]
    text = practise_tables.markdown(record("images", *rows))
    assert "| 2 | 88.50 ± 0.71 | -2.50 ± 0.71 | 24.0% (22.5 to 25.5) | -25.0% | 2 of 2 |" in text
    assert "No margin can be compared with the first trial's yet." in text


def test_what_failed_says_why() -> None:
    variant = Variant("filters-50-50", "filters", 50, 0.5, ())
    failed: Row = runs.Row(variant, 1, None, "no plan meets the budget")
    text = practise_tables.markdown(record("images", failed))
    assert "- filters-50-50, seed 1: no plan meets the budget" in text


@pytest.mark.parametrize(("behind", "verdict"), [(2.0, "within"), (2.1, "not within")])
def test_made_images_may_be_two_points_behind(behind: float, verdict: str) -> None:
    rows = [row("practise", 0, 89.0, count=500), row("synthesized", 0, 89.0 - behind, count=500)]
    text = practise_sources_tables.markdown(record("data-free", *rows, synthesis="one set, of seed 0"))
    assert f"- 500 images, 22%: against real ones -{behind:.2f} points" in text
    assert f"; {verdict} the 2 points that are allowed." in text
    assert "Made images: one set, of seed 0." in text


def test_images_of_other_things_are_judged_at_a_thousand() -> None:
    rows = [
        row(kind, 0, top1, count=count)
        for kind, top1 in (("practise", 89.0), ("imagenet", 87.5))
        for count in (50, 1000)
    ]
    text = practise_sources_tables.markdown(record("out-of-domain", *rows))
    assert "- 50 images, 22%: against real ones -1.50 points (a single seed has no interval).\n" in text
    assert "; not within the 1 points that are allowed." in text


def test_recoverability_is_counted_where_it_is_first() -> None:
    tops = {"recoverability": {1: 90.0, 2: 88.0}, "l2": {1: 90.0, 2: 89.0}, "first": {1: 85.0, 2: 80.0}}
    rows = [
        row(name, 0, top1, count=500, asked=drop)
        for name, found in tops.items()
        for drop, top1 in found.items()
    ]
    text = practise_sources_tables.markdown(record("criteria", *rows))
    assert "| criterion | 1 | 2 |" in text and "| l2 | 90.00 (-23.0%) | 89.00 (-23.0%) |" in text
    assert "| l2 | 95.00 | 95.00 |" in text  # agreement
    assert "- 2 dropped: recoverability less `l2`, the best of the others: -1.00 points" in text
    assert "Recoverability is first, or level with the first, at 1 of 2 numbers." in text


def test_the_papers_rows_stand_beside_ours() -> None:
    texts = {
        table: practise_sources_tables.markdown(record(table))
        for table in ("data-free", "out-of-domain", "criteria")
    }
    texts["images"] = practise_tables.markdown(record("images"))
    assert (
        "| PRACTISE | 34.9 (-16.3%) | 70.3 ± 0.16 | 71.5 ± 0.74 | 72.5 ± 0.04 | 72.5 ± 0.05 |"
        in texts["images"]
    )
    assert "## Table 3 of the paper" in texts["images"] and "## Table 4 of the paper" in texts["images"]
    assert "| MobileNetV2 | PRACTISE | block | 30.4 (-19.1%) | 68.0 |" in texts["data-free"]
    assert "| Place365 | 72.80 | 74.10 | 74.18 | 75.05 | 75.21 |" in texts["out-of-domain"]
    assert "| PRACTISE | 73.02 | 72.52 | 71.92 | 70.86 | 69.35 |" in texts["criteria"]


def test_the_papers_margin_is_that_of_its_third_table() -> None:
    assert paper.of_margin(50, 0.22) == pytest.approx(8.1)
    assert paper.of_margin(1000, 0.22) == pytest.approx(5.3)
    assert paper.of_margin(50, 0.35) is None and paper.of_margin(70, 0.22) is None


def test_every_row_of_the_papers_tables_has_all_columns() -> None:
    for table in (paper.TABLE_2, paper.TABLE_3, paper.TABLE_4, paper.TABLE_6, paper.TABLE_7, paper.TABLE_8):
        assert {len(cells) for cells in table.rows} == {len(table.columns)}


def test_another_recipe_or_scale_is_another_table() -> None:
    one = settings("images")
    assert one != dataclasses.replace(one, steps=300)
