"""What a run says of more images, and the curves between its networks; a small real network, real engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_pipeline import write_recipe
from whole_runs import Ran, forget, interrupt, take

from optpipe import preparation, store, tune
from optpipe import recipe as recipes
from optpipe.errors import UsageError
from optpipe.report import build
from optpipe.types import Figure


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    write_recipe(folder)
    return folder


def prepared(home: Path, *overrides: str) -> preparation.Setup:
    return preparation.prepare(recipes.load(home / "small.toml", overrides))


@pytest.fixture(scope="module")
def plain(home: Path) -> Ran:
    """A run that was not asked for curves."""
    return take(prepared(home), home / "run")


@pytest.fixture(scope="module")
def drawn(home: Path, plain: Ran) -> Ran:
    """The same run, asked for them once it was finished."""
    return take(prepared(home, "report.curves=true"), plain.folder)


def test_a_run_that_mimics_says_whether_more_images_would_help(plain: Ran) -> None:
    found = plain.report.leakage
    assert found is not None and found.halves is None
    assert (found.seen_images, found.unseen_images) == (20, 24)
    assert found.ratio.value == pytest.approx(found.unseen / found.seen)
    assert found.ratio.ci95[0] < found.ratio.value < found.ratio.ci95[1]
    assert found.advice
    said = (plain.folder / "report.md").read_text()
    assert f"**Would more images help?** {found.advice}" in said
    assert "Loss leakage" not in said
    assert build.read(plain.folder) == plain.report


def test_the_seen_error_is_the_features_distance_on_the_calibration_images(plain: Ran) -> None:
    setup = plain.setup
    assert plain.report.leakage is not None
    from optpipe.pipeline import leakage

    network = leakage.load(setup, store.Run(plain.folder, None), plain.choice, "recover")
    whole = tune.distance(network, setup.original, setup.calibration)
    assert plain.report.leakage.seen == pytest.approx(whole, rel=1e-5)


def test_a_run_that_does_not_recover_says_nothing_of_images(home: Path) -> None:
    ran = take(prepared(home, "recover.steps=0"), home / "bare")
    assert ran.report.leakage is None
    assert "more images" not in (ran.folder / "report.md").read_text()


def test_a_finished_run_can_be_asked_for_curves_and_keeps_the_rest(plain: Ran, drawn: Ran) -> None:
    assert drawn.report.result == plain.report.result
    assert [name for name, detail in drawn.details("stage") if detail == "started"] == []
    assert drawn.notes("curves") == [
        "recovering half-a, 10 images",
        "recovering half-b, 10 images",
        "recovering adaptors, 20 images",
    ]
    found = drawn.report.leakage
    assert found is not None and found.halves is not None
    assert found.halves.images == 10
    assert found.halves.leakage.ci95[0] <= found.halves.leakage.value <= found.halves.leakage.ci95[1]
    assert "**Loss leakage (Eq. 11).**" in (drawn.folder / "report.md").read_text()


def curves(figures: tuple[Figure, ...], title: str) -> dict[str, dict[float, float]]:
    (figure,) = [figure for figure in figures if figure.title.startswith(title)]
    return {curve.name: dict(zip(curve.x, curve.y, strict=True)) for curve in figure.curves}


def test_the_curves_join_the_networks_of_the_run(drawn: Ran) -> None:
    assert len(drawn.report.figures) == 6
    away = curves(drawn.report.figures, "Feature error from the original")
    back = curves(drawn.report.figures, "Feature error from the pruned")
    halves = curves(drawn.report.figures, "Feature error between")
    leaked = drawn.report.leakage
    assert leaked is not None and leaked.halves is not None
    assert away["original to pruned"][0] == 0
    assert away["original to pruned"][1] == pytest.approx(back["pruned to recovered"][0], rel=1e-4)
    assert away["original to recovered"][1] == pytest.approx(leaked.unseen, rel=1e-4)
    assert back["pruned to recovered"][1] == pytest.approx(leaked.unseen, rel=1e-4)
    assert back["adaptors alone to recovered"][0] == pytest.approx(back["pruned to adaptors alone"][1])
    assert back["pruned to adaptors alone"][1] < back["pruned to adaptors alone"][0]
    line = halves["recovered on 10 images to 10 others"]
    assert (line[0] + line[1]) / 2 == pytest.approx(leaked.halves.half)
    assert leaked.halves.whole == pytest.approx(leaked.unseen)
    assert halves["chord, recovered on 10 images to 10 others"] == {0: line[0], 1: line[1]}
    assert all((drawn.folder / path).exists() for path in _figure_paths(drawn))


def _figure_paths(ran: Ran) -> list[str]:
    text = (ran.folder / "report.md").read_text()
    return [part.split(")")[0] for part in text.split("](")[1:]]


def test_the_table_of_convexity_has_each_line_in_each_loss(drawn: Ran) -> None:
    (table,) = [table for table in drawn.report.tables if table.title.startswith("Convexity")]
    assert len(table.rows) == 6 * 3
    original = curves(drawn.report.figures, "Cross-entropy from the original")["original to pruned"]
    row = next(row for row in table.rows if row[:2] == ("original to pruned", "cross-entropy"))
    assert row[2:4] == (original[0], original[1])


def test_curves_that_were_drawn_stay_in_the_report(home: Path, drawn: Ran) -> None:
    again = take(prepared(home), drawn.folder)
    assert again.report == drawn.report
    assert again.notes("curves") == []


def test_a_run_killed_while_recovering_halves_goes_on(
    home: Path, drawn: Ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uncached = prepared(home, "report.curves=true", "run.cache=false")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, tune, "train", 2)  # the recovery itself, and half A
        take(uncached, tmp_path / "killed")
    resumed = take(uncached, tmp_path / "killed")
    assert resumed.notes("curves") == ["recovering half-b, 10 images", "recovering adaptors, 20 images"]
    assert resumed.report.leakage == drawn.report.leakage


def test_evaluation_images_without_labels_give_feature_errors_alone(home: Path) -> None:
    bare = prepared(home, "data.evaluation.labels=false", "report.curves=true")
    report = take(bare, home / "unlabelled").report
    assert [figure.title.split(" ")[0] for figure in report.figures] == ["Feature"] * 3
    (table,) = [table for table in report.tables if table.title.startswith("Convexity")]
    assert {row[1] for row in table.rows} == {"feature error"}


def test_curves_of_another_recovery_are_refused_before_anything_runs(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[report\] curves = true: follows losses"):
        take(prepared(home, "report.curves=true", "recover.steps=0"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_unknown_key_of_the_report_is_refused(home: Path) -> None:
    with pytest.raises(UsageError, match=r"\[report\] curve = true: unknown key; did you mean curves"):
        recipes.load(home / "small.toml", ["report.curve=true"])


def test_a_stage_done_afresh_is_measured_afresh(plain: Ran, drawn: Ran, tmp_path: Path) -> None:
    """What is kept belongs to the recovered weights, not to the folder."""
    assert plain.report.leakage is not None and drawn.report.leakage is not None
    assert replace(drawn.report.leakage, halves=None, advice="") == replace(plain.report.leakage, advice="")
    forget(drawn.folder, "benchmark")
    again = take(drawn.setup, drawn.folder)
    assert again.report.leakage == drawn.report.leakage


@pytest.mark.slow
def test_the_shipped_recipe_measures_loss_leakage_between_convex_ends(tmp_path: Path) -> None:
    """Figs 3 and 4 on the digits: no barrier to speak of, and zeros for blocks are their absence."""
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "practise.toml"
    overrides = ["report.curves=true", "recover.steps=30", "run.cache=false", "target.threads=1"]
    setup = preparation.prepare(recipes.load(recipe, overrides))
    report = take(setup, tmp_path / "run").report
    assert report.notes == ()
    found = report.leakage
    assert found is not None and found.halves is not None
    assert (found.seen_images, found.halves.images) == (200, 100)
    assert 0 <= found.halves.relative.value < 1
    (table,) = [table for table in report.tables if table.title.startswith("Convexity")]
    lines = {row[0]: row for row in table.rows if row[1] == "feature error"}
    assert len(lines) == 6
    for name in ("pruned to recovered", "pruned to adaptors alone", "recovered on 100 images to 100 others"):
        start, end, excess = (float(value or 0) for value in (lines[name][2], lines[name][3], lines[name][5]))
        assert excess < 0.1 * max(start, end), name
