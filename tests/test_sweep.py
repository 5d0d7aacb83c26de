"""``optpipe sweep`` without running anything: what is refused, and what is made of runs that are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Call, make_report
from test_pipeline import write_recipe
from whole_runs import write_images

from optpipe import comparison, store, sweep
from optpipe.report import schema
from optpipe.sweep.summary import Line
from optpipe.types import Budget

ROOT = Path(__file__).resolve().parents[1]

WIDE = """
from small_residual_network import Net, nn


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, padding=2)


def make():
    return Wide()
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with two recipes, small.toml and other.toml, of one small network."""
    small = write_recipe(tmp_path)
    (tmp_path / "other.toml").write_text(small.read_text())
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def both(home: Path) -> tuple[Path, Path]:
    return home / "small.toml", home / "other.toml"


def refused(call: Call, home: Path, *words: object, latency: str = "0.1") -> str:
    """What a sweep says that is refused before anything is written."""
    out = home / "out"
    code, told, err = call("sweep", *(words or both(home)), "--latency", latency, "--out", out)
    assert (code, told, out.exists()) == (2, "", False)
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return err.removeprefix("Error: ").removesuffix("\n")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("latency", "says"),
    [
        ("0.1,x", "'x' is no number; give the shares of the original's latency that are to be saved, for "
         "example 0.1,0.2,0.3"),
        ("0.1,", "'' is no number; give the shares of the original's latency that are to be saved, for "
         "example 0.1,0.2,0.3"),
        ("0.1,20", "20 must be between 0 and 1; 0.1 saves a tenth of the latency"),
        ("0", "0 must be between 0 and 1; 0.1 saves a tenth of the latency"),
        ("nan", "nan must be between 0 and 1; 0.1 saves a tenth of the latency"),
        ("0.1,0.10", "0.1 is there twice"),
    ],
)  # fmt: skip
def test_budgets_that_are_none_are_refused(optpipe: Call, home: Path, latency: str, says: str) -> None:
    assert refused(optpipe, home, latency=latency) == f"--latency {latency}: {says}"


def test_without_budgets_there_is_no_sweep(optpipe: Call, home: Path) -> None:
    code, _, err = optpipe("sweep", *both(home))
    assert (code, "Missing option '--latency'" in err) == (2, True)


def test_recipes_of_one_name_are_refused(optpipe: Call, home: Path) -> None:
    small, other = both(home)
    edit(other, "[run]", '[run]\nname = "small"')
    assert refused(optpipe, home) == (
        f'{other}: [run] name = "small": is that of {small} too; give each recipe of a sweep a name of '
        "its own"
    )


def test_another_budget_by_set_is_refused(optpipe: Call, home: Path) -> None:
    assert refused(optpipe, home, home / "small.toml", "--set", "budget.drop_blocks=1") == (
        "--set budget.drop_blocks=1: a sweep's budgets are those of --latency"
    )


def test_set_reaches_all_recipes_or_one(optpipe: Call, home: Path) -> None:
    words = (
        "--set",
        "run.seed=3",
        "--set",
        "other:recover.steps=7",
        "--set",
        "other:data.calibration.count=8",
    )
    given = [str(word) for word in words if word != "--set"]
    planned = sweep.plan(both(home), (0.1,), home / "out", given, fresh=False)
    setups = [entry.setup for entry in planned.entries]
    assert [setup.recipe.run.seed for setup in setups] == [3, 3]
    assert [setup.recover.steps for setup in setups] == [10, 7]
    assert [len(setup.calibration) for setup in setups] == [20, 8]
    assert refused(optpipe, home, *both(home), "--set", "smal:recover.steps=7") == (
        "--set smal:recover.steps=7: smal is none of the recipes; there are small, other"
    )
    assert "--set other:budget.drop_blocks=1: a sweep's budgets" in refused(
        optpipe, home, *both(home), "--set", "other:budget.drop_blocks=1"
    )


def test_recipes_that_read_the_same_images_hold_them_once(home: Path) -> None:
    planned = sweep.plan(
        both(home), (0.1, 0.2), home / "out", ["other:data.calibration.count=8"], fresh=False
    )
    first, second, third, _ = (entry.setup for entry in planned.entries)
    assert first.calibration is second.calibration
    assert (third.evaluation is first.evaluation, third.calibration is first.calibration) == (True, False)
    planned = sweep.plan(both(home), (0.1,), home / "out", [], fresh=False)
    first, second = (entry.setup for entry in planned.entries)
    assert first.calibration is second.calibration is second.bench.images


def test_another_network_is_refused(optpipe: Call, home: Path) -> None:
    small, other = both(home)
    (home / "wide_residual_network.py").write_text(WIDE)
    edit(other, "small_residual_network:make", "wide_residual_network:make")
    err = refused(optpipe, home)
    assert err.startswith(
        f'{other}: [model] name = "wide_residual_network:make": is not the network of {small} '
        '("small_residual_network:make", sha256 of the weights '
    )
    assert err.endswith("; a sweep is of one network: give both the same [model]")


def test_other_evaluation_images_are_refused(optpipe: Call, home: Path) -> None:
    small, other = both(home)
    write_images(home / "more.npz", 12, seed=3)
    edit(other, "evaluation.npz", "more.npz")
    err = refused(optpipe, home)
    assert err.startswith(f"{other}: [data] evaluation: more.npz gives other images than in {small} (sha256 ")
    assert err.endswith("give both the same [data] evaluation and preprocess")


def test_another_target_is_refused(optpipe: Call, home: Path) -> None:
    small, other = both(home)
    edit(other, "batch = 8\nthreads", "batch = 4\nthreads")
    assert refused(optpipe, home) == (
        f"{other}: [target] batch = 4: is 8 in {small}, and latencies on different targets do not compare; "
        "--set target.batch=... sets it for all"
    )
    edit(other, "batch = 4\nthreads = 1", "batch = 8")
    assert f"{other}: [target] threads = all cores: is 1 in {small}" in refused(optpipe, home)


def test_the_fastest_backend_is_refused(optpipe: Call, home: Path) -> None:
    err = refused(optpipe, home, home / "small.toml", "--set", "target.backend=fastest")
    assert err == (
        f'{home / "small.toml"}: [target] backend = "fastest": may come to another engine in each run; name '
        "one, for example --set target.backend=onnxruntime"
    )


def test_the_last_recipe_is_checked_before_the_first_runs(optpipe: Call, home: Path) -> None:
    edit(home / "other.toml", 'name = "practise"', 'name = "ekg"')
    edit(home / "other.toml", "steps = 10\n", "epochs = 1\n")
    err = refused(optpipe, home)
    assert "needs labelled calibration images" in err


def test_a_method_that_refuses_a_latency_budget_is_refused(optpipe: Call) -> None:
    code, _, err = optpipe("sweep", ROOT / "recipes/dllp.toml", "--latency", "0.1", "--dry-run",
                           "--set", "method.granularity=weight")  # fmt: skip
    assert (code, '[budget]: granularity = "weight"' in err) == (2, True)


def test_folders_that_hold_something_else_are_refused(optpipe: Call, home: Path) -> None:
    out = home / "out"
    (out / "small-0.1").mkdir(parents=True)
    (out / "small-0.1" / "letter.txt").write_text("dear")
    code, _, err = optpipe("sweep", *both(home), "--latency", "0.1", "--out", out)
    assert (code, "small-0.1: holds files that are no optpipe run" in err) == (2, True)
    (out / "small-0.1" / "letter.txt").unlink()
    (out / "small-0.1" / "recipe.toml").write_text('[run]\nname = "another"\n')
    code, _, err = optpipe("sweep", *both(home), "--latency", "0.1", "--out", out)
    assert (code, "small-0.1: holds another run" in err) == (2, True)
    code, _, err = optpipe("sweep", *both(home), "--latency", "0.1", "--out", out / "small-0.1")
    assert (code, "is a run; name another folder for the sweep with --out" in err) == (2, True)
    code, _, err = optpipe("sweep", *both(home), "--latency", "0.1", "--out", home / "small.toml")
    assert (code, "is a file; name a folder with --out" in err) == (2, True)


def test_a_dry_run_lists_the_runs_and_writes_nothing(optpipe: Call, home: Path) -> None:
    out = home / "out"
    words = ("sweep", *both(home), "--latency", "0.1,0.25", "--out", out, "--dry-run")
    code, told, err = optpipe(*words)
    names = ["small-0.1", "small-0.25", "other-0.1", "other-0.25"]
    assert (code, told) == (0, "".join(f"{out / name}: new\n" for name in names))
    assert err == f"4 runs are fine; they would run in {out}\n"
    assert not out.exists()


# ---------------------------------------------------------------- the best for each budget


def lines(
    tmp_path: Path, *runs: tuple[str, float, float], agreement: float = 0.96, threads: Sequence[int] = ()
) -> tuple[sweep.Summary, comparison.Comparison]:
    """What a sweep makes of finished runs of these names, accuracies and latency ratios."""
    found: list[Line] = []
    for number, (name, top1, ratio) in enumerate(runs):
        recipe, _, asked = name.rpartition("-")
        report = make_report(result_top1=top1, ratio=ratio, ci95=(ratio - 0.01, ratio + 0.01))
        spread = 0.02
        quality = replace(report.result.quality, ci95=(top1 - spread, top1 + spread))
        agreed = replace(report.result.quality, metric="agreement", value=agreement)
        latency = report.result.latency
        count = threads[number] if threads else 2
        latency = replace(latency, fingerprint=replace(latency.fingerprint, threads=count))
        result = replace(report.result, quality=quality, agreement=agreed, latency=latency)
        met = ratio <= 1 - float(asked)
        budget = schema.BudgetReport(Budget(latency_reduction=float(asked)), met, "")
        report = replace(
            report, name=name, result=result, budget=budget, sha256={"original weights": "a" * 64}
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(store.to_json(report))
        seconds = sum(stage.seconds for stage in report.stages.values())
        folder = str(tmp_path / name)
        found.append(Line(name, recipe, "practise", float(asked), folder, "finished", seconds=seconds))
    folders = [Path(line.folder) for line in found]
    compared = comparison.side_by_side(folders, comparison.Allowed(machines=True))
    return sweep.summarise(found, compared), compared


def test_the_best_is_the_most_accurate_that_meets_the_budget_as_measured(tmp_path: Path) -> None:
    summary, _ = lines(
        tmp_path, ("a-0.1", 0.90, 0.88), ("a-0.2", 0.86, 0.79), ("b-0.1", 0.93, 0.91), ("b-0.2", 0.91, 0.75)
    )
    mild, strong = summary.best
    assert (mild.asked, mild.run, mild.of) == (0.1, "b-0.2", 3), (
        "asked for more, it is better; b-0.1 missed it"
    )
    assert (strong.asked, strong.run, strong.of) == (0.2, "b-0.2", 2)


def test_of_equally_accurate_runs_the_fastest_is_the_best(tmp_path: Path) -> None:
    summary, _ = lines(tmp_path, ("a-0.1", 0.9, 0.85), ("b-0.1", 0.9, 0.8))
    assert summary.best[0].run == "b-0.1"
    assert summary.best[0].level == ("a-0.1",)


def test_runs_whose_accuracy_is_within_the_interval_are_told(tmp_path: Path) -> None:
    summary, _ = lines(tmp_path, ("a-0.1", 0.9, 0.85), ("b-0.1", 0.89, 0.8), ("c-0.1", 0.8, 0.8))
    assert summary.best[0].level == ("b-0.1",)


def test_networks_that_hardly_differ_are_told_apart_sooner(tmp_path: Path) -> None:
    runs = ("a-0.1", 0.915, 0.85), ("b-0.1", 0.89, 0.8)
    (tmp_path / "loose").mkdir()
    (tmp_path / "close").mkdir()
    loose, _ = lines(tmp_path / "loose", *runs, agreement=0.7)
    close, _ = lines(tmp_path / "close", *runs, agreement=0.99)
    assert (loose.best[0].level, close.best[0].level) == (("b-0.1",), ())


def test_a_budget_that_no_run_meets_has_no_best(tmp_path: Path) -> None:
    summary, _ = lines(tmp_path, ("a-0.1", 0.9, 0.85), ("a-0.4", 0.9, 0.7))
    assert (summary.best[1].run, summary.best[1].of) == (None, 0)
    assert "| -40% | none of the runs meets it |  |  |  |" in sweep.as_markdown(summary)


def test_a_run_that_was_finished_elsewhere_is_shown_and_is_the_best_of_none(tmp_path: Path) -> None:
    runs = ("a-0.1", 0.95, 0.8), ("b-0.1", 0.9, 0.85), ("c-0.1", 0.89, 0.85)
    summary, _ = lines(tmp_path, *runs, threads=[1, 2, 2])
    assert [line.elsewhere for line in summary.lines] == [True, False, False]
    assert summary.best[0].run == "b-0.1"
    text = sweep.as_markdown(summary)
    assert "| yes | measured elsewhere |" in text
    assert "1 of the runs was measured on another machine or with other versions" in text


# ---------------------------------------------------------------- what is told


def test_the_table_tells_of_every_run(tmp_path: Path) -> None:
    summary, compared = lines(tmp_path, ("a-0.1", 0.90, 0.88), ("b-0.1", 0.85, 0.95))
    failed = Line("c-0.1", "c", "ekg", 0.1, str(tmp_path / "c-0.1"), "failed", "no widths\nmeet the budget")
    later = Line("c-0.2", "c", "ekg", 0.2, str(tmp_path / "c-0.2"), "not yet")
    summary = sweep.summarise([*summary.lines, failed, later], compared)
    assert (summary.finished, summary.failed) == (2, 1)
    text = sweep.as_markdown(summary)
    assert text.splitlines()[:6] == [
        "| run | method | asked | latency (95% interval) | top1 (95% interval) | met | front | took, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| a-0.1 | practise | -10% | -12.0% (-13.0% to -11.0%) | 90.00% (88.0% to 92.0%) | yes | yes | 21 |",
        "| b-0.1 | practise | -10% | -5.0% (-6.0% to -4.0%) | 85.00% (83.0% to 87.0%) | no |  | 21 |",
        "| c-0.1 | ekg | -10% | failed |  |  |  |  |",
        "| c-0.2 | ekg | -20% | not yet |  |  |  |  |",
    ]
    assert "\n- c-0.1 failed: no widths meet the budget\n" in text
    assert "| -10% | a-0.1 | 90.00% (88.0% to 92.0%) | -12.0% | no other met it |" in text
    assert "best of 2 runs by the evaluation images themselves" in text
    assert "confirm it on images that no run has seen" in text


def test_the_files_hold_the_same_and_the_figure_has_a_look_for_each_recipe(tmp_path: Path) -> None:
    summary, compared = lines(tmp_path, ("a-0.1", 0.90, 0.88), ("a-0.2", 0.87, 0.75), ("b-0.1", 0.85, 0.85))
    sweep.write(summary, compared, tmp_path / "out")
    drawn = sweep.figure(summary, compared)
    dots = {curve.name: curve.x for curve in drawn.curves if curve.style == "dots"}
    assert dots == {"original": (100,), "a": pytest.approx((88, 75)), "b": pytest.approx((85,))}
    (front,) = [curve for curve in drawn.curves if curve.name == "Pareto front"]
    assert front.x == pytest.approx((75, 88, 100))
    svg = (tmp_path / "out" / "sweep.svg").read_text(encoding="utf-8")
    assert all(word in svg for word in ("95% interval", "Pareto front", "all runs"))
    text = (tmp_path / "out" / "sweep.md").read_text(encoding="utf-8")
    assert sweep.as_markdown(summary) in text
    assert "(sweep.svg)" in text
    found = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    assert (found["schema"], found["finished"]) == ("optpipe.sweep/1", 3)
    assert [line["row"]["in_front"] for line in found["lines"]] == [True, True, False]
    assert [one["run"] for one in found["best"]] == ["a-0.1", "a-0.2"]


def test_before_the_first_run_is_finished_there_is_no_figure(tmp_path: Path) -> None:
    line = Line("a-0.1", "a", "ekg", 0.1, str(tmp_path / "a-0.1"), "failed", "no widths meet the budget")
    sweep.write(sweep.summarise([line], None), None, tmp_path)
    assert not (tmp_path / "sweep.svg").exists()
    assert "best" not in (tmp_path / "sweep.md").read_text(encoding="utf-8")
