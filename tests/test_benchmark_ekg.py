"""EKG's benchmark: which runs it makes, what it keeps of them, and what its tables say of the numbers."""

from __future__ import annotations

import dataclasses
import os
import sys
import tomllib
from pathlib import Path

import pytest
from torch import fx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import ekg, ekg_rival, ekg_rows, ekg_tables, ekg_tiny, runs, runs_tables  # noqa: E402
from benchmarks.ekg_rows import Settings, Variant, searched_s  # noqa: E402
from benchmarks.runs import Facts, Figures, Record, Row  # noqa: E402
from optpipe import graph, store  # noqa: E402
from optpipe import recipe as recipes  # noqa: E402
from optpipe.errors import UsageError  # noqa: E402
from optpipe.report import build, schema  # noqa: E402
from optpipe.types import Plan, Table  # noqa: E402
from optpipe.zoo.cifar_resnet import resnet20  # noqa: E402

FACTS = Facts("a processor, 2 threads", "Linux", {"torch": "2.15"}, 4660, 423)


def call(tmp_path: Path, *words: str) -> list[str]:
    return [*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]


def jobs(tmp_path: Path, *words: str) -> list[ekg_rows.Job]:
    arguments = ekg.parse(call(tmp_path, *words))
    return list(ekg.jobs_of(arguments, ekg.base_recipe(arguments)))


def figures(top1: float, *, saving: float = 30.0, macs: float = 47.0, **stages: float) -> Figures:
    seconds = {"ingest": 1.0, "analyze": 10.0, "recover": 20.0} | stages
    return Figures(
        saving, saving - 0.5, saving + 0.5, macs, 40.0, 93.85, 50.0, top1, 96.0, met=True, stages=seconds
    )


def variant(name: str) -> Variant:
    if name.startswith("tp-"):
        return Variant(name, "torch-pruning", "none", "mimicking")
    if name.startswith("ekg-"):
        _, guide, teachers = name.split("-")
        return Variant(name, "taylor", guide, teachers)
    return Variant(name, name, "none", "none")


def rows(top1s: dict[str, list[float]]) -> list[ekg_rows.Row]:
    return [
        Row(variant(name), seed, figures(top1))
        for name, values in top1s.items()
        for seed, top1 in enumerate(values)
    ]


def record(table: str, made: list[ekg_rows.Row]) -> ekg_rows.Record:
    settings = Settings(table, "resnet56", ("budget.macs_reduction=0.47",), 4.0, 300, (), "Linux")
    return Record(settings, "2026-11-21", FACTS, tuple(made))


def overrides(job: ekg_rows.Job) -> dict[str, str]:
    given = [word for before, word in zip(job.command, job.command[1:], strict=False) if before == "--set"]
    return dict(word.split("=", 1) for word in given)


def test_the_first_seed_of_every_configuration_comes_before_the_second(tmp_path: Path) -> None:
    found = jobs(tmp_path, "macs", "--seeds", "0", "1", "2")
    assert len(found) == 24
    assert [job.seed for job in found] == [0] * 8 + [1] * 8 + [2] * 8
    assert found[0].folder.name == "macs-ekg-ensemble-none-seed0"
    assert len({job.folder for job in found}) == 24


def test_configurations_differ_in_nothing_but_what_is_compared(tmp_path: Path) -> None:
    compared = {"method.score", "method.guide", "recover.teachers"}
    found = [overrides(job) for job in jobs(tmp_path, "macs", "--seeds", "0")]
    rest = [{key: value for key, value in one.items() if key not in compared} for one in found]
    assert all(one == rest[0] for one in rest)
    assert rest[0]["recover.epochs"] == "4.0" and rest[0]["method.timed"] == '"last"'
    assert len({tuple(one[key] for key in sorted(compared)) for one in found}) == 8


@pytest.mark.parametrize("table", ["macs", "latency", "time", "tiny"])
def test_every_command_is_a_recipe_with_one_budget(tmp_path: Path, table: str) -> None:
    for job in jobs(tmp_path, table, "--network", "resnet20", "--seeds", "1"):
        loaded = recipes.load(
            next(Path(word) for word in job.command if word.endswith(".toml")),
            [f"{key}={value}" for key, value in overrides(job).items()],
        )
        assert loaded.run.seed == loaded.data.calibration.seed == 1
        assert loaded.model.name == "zoo:resnet20_cifar" and loaded.method_name == "ekg"
        assert loaded.recover_name == ("practise" if job.variant.teachers == "mimicking" else None)


def test_runs_beside_each_other_share_the_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for job in jobs(tmp_path, "latency", "--seeds", "0", "--workers", str(os.cpu_count() or 1)):
        assert (os.cpu_count() == 1) == ("target.threads" not in overrides(job))
        assert overrides(job).get("target.threads", "1") == "1"
    with pytest.raises(SystemExit):
        ekg.parse(call(tmp_path, "time", "--workers", "2"))
    assert "time compares seconds" in capsys.readouterr().err


def test_runs_whose_seconds_are_compared_are_anew_and_in_turn(tmp_path: Path) -> None:
    found = jobs(tmp_path, "time", "--seeds", "0", "1")
    assert [job.variant.teachers for job in found] == ["ensemble", "none", "none", "ensemble"]
    for job in found:
        assert "--fresh" in job.command and overrides(job)["run.cache"] == "false"


def test_a_trial_has_files_of_its_own(tmp_path: Path) -> None:
    arguments = ekg.parse(call(tmp_path, "macs", "--network", "resnet20", "--scale", "0.5"))
    assert ekg.suffix(arguments) == "-resnet20-0.5epochs"
    assert ekg.suffix(ekg.parse(call(tmp_path, "macs"))) == ""
    assert ekg.epochs_of(ekg.parse(call(tmp_path, "macs", "--paper"))) == 100


def test_on_few_images_the_iterations_are_those_asked_for(tmp_path: Path) -> None:
    arguments = ekg.parse(call(tmp_path, "tiny"))
    for job in ekg.jobs_of(arguments, ekg.base_recipe(arguments)):
        given = overrides(job)
        assert given["recover.steps"] == "300" and "recover.epochs" not in given
        assert given["data.calibration.count"] == "500"
    base = tomllib.loads(ekg.base_recipe(arguments).read_text(encoding="utf-8"))
    assert "recover" not in base and base["budget"] == {}


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ekg.main([*call(tmp_path, "latency"), "--dry-run", "--only", "fpgm"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "budget.latency_reduction=0.3" in printed[0]
    assert not list(tmp_path.glob("*.json"))


def test_a_row_shows_what_the_report_holds(report: schema.Report) -> None:
    kept = (("layer1.0.conv1", (0, 2, 5)),)
    found = ekg.figures_of(dataclasses.replace(report, plan=Plan(keep_channels=kept)))
    assert found.saving == pytest.approx(25.0)
    assert found.saving_low == pytest.approx(24.0) and found.saving_high == pytest.approx(26.0)
    assert found.macs_saving == pytest.approx(100 * 11 / 41)
    assert found.change == pytest.approx(-1.0)
    assert (found.search_s, found.recover_s, found.whole_s) == (2.0, 4.0, 21.0)
    assert found.widths == (("layer1.0.conv1", 3),)


def fake(folder: Path, code: int, said: str = "", report: schema.Report | None = None) -> ekg_rows.Job:
    """A job whose command prints and ends as told; its report is there already."""
    if report is not None:
        build.write(folder, report)
    script = f"import sys; print({said!r}, file=sys.stderr); sys.exit({code})"
    return runs.Job(variant("l1"), 0, folder, (sys.executable, "-c", script))


def test_a_run_that_fails_is_a_row_that_says_why(tmp_path: Path, report: schema.Report) -> None:
    failed, _ = ekg.run(fake(tmp_path / "a", 4, "warning: x\nError: the budget cannot be reached"))
    assert (failed.figures, failed.failed) == (None, "the budget cannot be reached")
    missing, _ = ekg.run(fake(tmp_path / "b", 0))
    assert missing.figures is None and "there is no report" in missing.failed
    made, facts = ekg.run(fake(tmp_path / "c", 0, report=report))
    assert made.figures is not None and facts is not None and facts.evaluation_count == 423
    text = ekg_tables.markdown(record("macs", [failed, *rows({"fpgm": [93.0]})]))
    assert "- l1, seed 0: the budget cannot be reached" in text


def test_a_long_reason_is_cut() -> None:
    assert runs.reason("Error: " + "x" * 999 + "y", 4) == f"{'x' * 150} ... {'x' * 149}y"
    assert runs.reason("Killed", -9) == "Killed"
    assert runs.reason("", -9) == "exit code -9"


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such recipe; name another with --recipe"):
        ekg.main(["macs", "--recipe", str(tmp_path / "none.toml"), "--runs", str(tmp_path)])


def test_an_interrupt_ends_the_whole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ekg.run(fake(tmp_path, 130))


def test_rows_that_are_there_are_not_made_again(
    tmp_path: Path, report: schema.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([False, True, True])
    ran: list[str] = []

    def run(job: ekg_rows.Job, workers: int = 1) -> tuple[ekg_rows.Row, Facts | None]:
        ran.append(f"{job.variant.name} {job.seed}")
        if not next(outcomes):
            return Row(job.variant, job.seed, None, "no budget"), None
        return Row(job.variant, job.seed, ekg.figures_of(report)), runs.facts_of(report)

    monkeypatch.setattr(ekg, "run", run)
    asked = [*call(tmp_path, "macs"), "--only", "l1", "fpgm", "--seeds", "0"]
    ekg.main(asked)
    assert ran == ["l1 0", "fpgm 0"]
    ekg.main(asked)  # the one that failed is tried again
    assert ran == ["l1 0", "fpgm 0", "l1 0"]
    kept = store.from_json(ekg_rows.Record, (tmp_path / "ekg_macs.json").read_bytes())
    assert [row.variant.name for row in kept.rows] == ["fpgm", "l1"]
    assert "no budget" not in (tmp_path / "ekg_macs.md").read_text(encoding="utf-8")


def test_seconds_are_compared_within_one_sitting(tmp_path: Path) -> None:
    found = jobs(tmp_path, "time", "--seeds", "0")
    half = record("time", [Row(found[0].variant, 0, figures(93.0))])
    assert not ekg.is_done(half, found[0], found)
    whole = record("time", [Row(job.variant, 0, figures(93.0)) for job in found])
    assert ekg.is_done(whole, found[0], found)


def test_the_first_is_named_with_its_lead_and_whether_the_spread_hides_it() -> None:
    made = rows({"l1": [92.0, 92.2, 92.4], "ekg-ensemble-none": [93.0, 93.2, 93.4]})
    said = runs_tables.who_is_first(made, ekg_tables.SCORERS)
    assert said == (
        "`ekg-ensemble-none` 93.20 ± 0.20 is first, 1.00 points before `l1` 92.20 ± 0.20; mean ± sd do not "
        "overlap; ahead at 3 of 3 equal seeds."
    )
    close = rows({"l1": [92.0, 93.6], "ekg-ensemble-none": [93.0, 92.2]})
    said = runs_tables.who_is_first(close, ekg_tables.SCORERS)
    assert said.startswith("`l1` 92.80 ± 1.13 is first, 0.20 points before")
    assert said.endswith("mean ± sd overlap; ahead at 1 of 2 equal seeds.")
    level = runs_tables.who_is_first(rows({"l1": [92.0], "gbn": [92.0]}), ekg_tables.SCORERS)
    assert "are level; with a single seed there is no spread" in level


def test_a_ladder_holds_only_in_strict_order() -> None:
    top1s = {"ekg-ensemble-none": [93.0], "ekg-single-none": [92.5], "gbn": [92.0]}
    assert ekg_tables.ladder(rows(top1s), ekg_tables.GUIDES).startswith("true: ")
    top1s["ekg-single-none"] = [92.0]
    assert ekg_tables.ladder(rows(top1s), ekg_tables.GUIDES).startswith("false: ")
    assert "no figure of ekg-ensemble-ensemble" in ekg_tables.ladder(rows(top1s), ekg_tables.TEACHERS)


def test_the_accuracy_table_says_who_is_first_even_where_it_is_not_ekg() -> None:
    text = ekg_tables.markdown(record("macs", rows({"l1": [93.0, 93.2], "ekg-ensemble-none": [92.0, 92.4]})))
    assert (
        "EKG first of 2 scorers under the same recovery: false. `l1` 93.10 ± 0.14 is first, 0.90 points"
        in text
    )
    assert "| l1 | l1 | none | none | 2 | 93.10 ± 0.14 | -0.75 ± 0.14 |" in text
    # sqrt(92.65 * 7.35 / 423)
    assert "the standard error of one accuracy of 92.7% is 1.27" in text
    assert "the paper: 100 epochs" in text and 'method.timed = "last"' in text


def test_a_shared_search_counts_for_every_row_that_stands_on_it() -> None:
    made = [
        Row(variant("ekg-ensemble-none"), 0, figures(93.0, analyze=40.0)),
        Row(variant("ekg-ensemble-ensemble"), 0, figures(93.0, analyze=0.5)),
        Row(variant("ekg-none-none"), 0, figures(93.0, analyze=30.0)),
    ]
    assert [searched_s(made, row) for row in made] == [40.0, 40.0, 30.0]
    assert "| 40 | 20 | 61 |" in ekg_tables.single_rows(made)[4]


def test_the_bank_costs_what_the_pairs_show() -> None:
    made = [
        Row(variant("ekg-ensemble-ensemble"), 0, figures(93.0, recover=26.0)),
        Row(variant("ekg-ensemble-none"), 0, figures(93.0, recover=20.0)),
    ]
    text = ekg_tables.markdown(record("time", made))
    assert "| whole run | 1 | 1.194 | 1.194 | true |" in text
    assert "| recover stage (bank and fine-tuning) | 1 | 1.300 | 1.300 | true |" in text
    assert "| search, bank and fine-tuning over fine-tuning alone | 1 | 1.800 | 1.800 | false |" in text


def test_a_rival_that_saves_more_is_not_said_to_be_beaten() -> None:
    made = [
        Row(Variant("ekg-25-practise", "taylor", "ensemble", "mimicking"), 0, figures(92.0, saving=25.5)),
        Row(variant("tp-l1-50"), 0, figures(91.5, saving=23.4)),
        Row(variant("tp-l1-40"), 0, figures(92.3, saving=0.0)),
        Row(variant("tp-l1-60"), 0, figures(88.4, saving=28.9)),
        Row(variant("tp-l1-55"), 0, figures(92.0, saving=27.5)),
    ]
    (line,) = ekg_tiny.beaten(made)
    assert line == (
        "- ekg-25-practise, seed 0: 25.5% saved, top-1 92.00. Of rivals that save no more it beats tp-l1-50; "
        "it does not beat tp-l1-40; tp-l1-55 save more and are at least as good."
    )
    assert "| 50% | 23.4% | -49.6% | 44.2 | 91.5 |" in ekg_tables.markdown(record("tiny", made))


def test_widths_are_held_against_the_counts_that_save_time() -> None:
    tables = (
        Table(
            "Channel counts on this target",
            ("groups", "channels each", "measured saving", "low", "high", "verdict"),
            (
                ("9 of 16 channels (layer1.0.conv1, ...)", 10, 0.0, -0.01, 0.01, "passed over: no faster"),
                ("9 of 16 channels (layer1.0.conv1, ...)", 8, 0.1, 0.09, 0.11, "taken"),
            ),
        ),
        Table(
            "Widths",
            ("group", "layers", "channels", "kept", "verdict"),
            (
                ("conv1", 3, 16, 16, "tied"),
                ("layer1.0.conv1", 1, 16, 8, "narrowed"),
                ("layer1.1.conv1", 1, 16, 9, "narrowed"),
                ("layer1.2.conv1", 1, 16, 16, "whole"),
            ),
        ),
        Table(
            "Predicted and measured saving, step by step",
            ("step", "this step"),
            ((1, "saves time"), (2, "buys no time: removes MACs alone"), (3, "saves time"), (4, None)),
        ),
    )
    row = Row(
        Variant("ekg-25-ekg", "taylor", "ensemble", "ensemble"),
        0,
        dataclasses.replace(figures(92.0), tables=tables),
    )
    widths, near, steps = ekg_tiny.on_rungs(row)
    assert "1 of 2 narrowed groups keep a count that was measured to save time" in widths
    assert widths.endswith("layer1.1.conv1 9 of 16.")
    assert "10 of 16 passed over, kept by 0 groups" in near
    assert "2 saves time, 1 buys no time: removes MACs alone" in steps
    (none,) = ekg_tiny.on_rungs(dataclasses.replace(row, figures=figures(92.0)))
    assert "no table of channel counts" in none


def test_the_rival_keeps_the_channels_of_largest_norm() -> None:
    original: fx.GraphModule = graph.trace(resnet20().eval(), (3, 32, 32))
    first = original.get_parameter("layer1.0.conv1.weight")
    low = [3, 7, 11]
    for channel in low:
        first.data[channel] *= 0.01
    plan = ekg_rival.plan_of(original, 40, (3, 32, 32))
    kept = dict(plan.keep_channels)
    assert [len(kept[f"layer{stage}.1.conv1"]) for stage in (1, 2, 3)] == [9, 19, 38]
    assert len(kept) == 9 and not set(low) & set(kept["layer1.0.conv1"])
    assert graph.apply(original, plan, (3, 32, 32)).get_submodule("layer1.0.conv1").out_channels == 9
