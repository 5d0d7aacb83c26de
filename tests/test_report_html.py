from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest
from conftest import make_latency, make_report

from optpipe import store
from optpipe.report import html, html_parts, html_tables, html_tradeoff, reliability, schema
from optpipe.types import (
    Budget,
    Calibration,
    CalibrationBin,
    Candidate,
    Curve,
    DeviceState,
    EngineCount,
    Figure,
    Plan,
    Quality,
    Reliability,
    Selective,
    Surface,
    Table,
)

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = """<script>alert("x")</script> & 'quoted' \x00\x1b ]]> <!-- -->"""


class Page(HTMLParser):
    """Reads a page, and holds its elements, its text and whatever is not nested as it should be."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.text).split())


def page(report: schema.Report) -> Page:
    read = Page(html.render(report))
    assert read.wrong == []
    assert read.open == []
    return read


def trusted(error: float = 0.05) -> Reliability:
    bins = (CalibrationBin(0.0, 0.5, 0, None, None), CalibrationBin(0.5, 1.0, 423, 0.95, 0.9))
    return Reliability(Calibration(error, bins), (Selective(0.0, 423, 0.9), Selective(0.05, 402, 0.925)))


def candidate(name: str, ratio: float, accuracy: float | None = None, *, chosen: bool = False) -> Candidate:
    quality = None
    if accuracy is not None:
        quality = Quality("top1", accuracy, (accuracy - 0.01, accuracy + 0.01), 500, "calibration")
    interval = (ratio - 0.01, ratio + 0.01)
    return Candidate(name, 200_000, 30_000_000, 8 * ratio, ratio, interval, quality, chosen)


def full() -> schema.Report:
    """A report with all that one can hold."""
    plain = make_report(warnings=("the clock was throttled",))
    timed = make_latency(7.0, 0.875, (0.87, 0.88))
    int8 = schema.PrecisionReport(
        "int8", timed, plain.result.quality, plain.result.agreement, 800_000, 300_000, 1.5, 0.02,
        kept_in_float=("conv1",), notes=("slower than fp32",), reliability=trusted(),
    )  # fmt: skip
    fp32 = replace(int8, precision="fp32", latency=plain.result.latency, notes=(), kept_in_float=())
    broken = schema.PrecisionReport("fp16", None, None, None, 0, 0, 0.0, None, failed="no fp16 here")
    line = Curve("depth", (0.25, 0.5, 1.0), (0.8, 0.9, 0.95), "dots")
    surface = Surface((0.0, 1.0), (0.0, 1.0), ((0.125, None), (0.375, 0.625)), "loss")
    interval = schema.Interval(0.1, (0.05, 0.15))
    state = DeviceState(1500, 7000, 60, throttle=("power",))
    return replace(
        plain,
        original=replace(
            plain.original, reliability=trusted(), latency=replace(plain.original.latency, before=state)
        ),
        precisions=(fp32, int8, broken),
        plan=Plan(("layer1.1",), (("layer2.0.conv1", (0, 1, 2)),), (24, 24)),
        engines=EngineCount(5, 4, 1, (0.5, 0.75), 2.5, 0.5),
        notes=("chosen for being fastest",),
        figures=(
            Figure("Blocks", "depth", "accuracy", (line,)),
            Figure("Loss around the result", "one way", "another", (line,), surface),
        ),
        ensemble=schema.EnsembleReport(
            3, 2_000_000, 1.0, make_latency(16.0, 2.0, (1.9, 2.1)), plain.result.quality, None, trusted(),
            0.00135, 0.0521, 0.0055, trusted().selective, (1e-6, 1e-6),
        ),
        leakage=schema.LeakageReport(
            "More images would help.", 0.1, 0.2, 50, 423, interval, interval, interval
        ),
        data=replace(
            plain.data, contact_sheet="synthesized.png", validation_count=7, validation_sha256="f" * 64
        ),
        candidates=(
            candidate("without layer1.1", 0.8, 0.9),
            candidate("without layer2.2", 0.7, 0.85, chosen=True),
            candidate("without layer3.1", 0.9, 0.8),
            candidate("3 groups narrowed", 0.95),
        ),
    )  # fmt: skip


@cache
def source() -> str:
    """The page of the full report, drawn once."""
    return html.render(full())


# ---------------------------------------------------------------- content


def test_the_first_screen_says_what_was_asked_what_came_out_and_whether_that_is_enough() -> None:
    shown = page(make_report()).shown
    first = shown[: shown.index("In this report")]
    for words in (
        "practise: practise on zoo:resnet20_cifar",
        "Budget met: latency -25.0%",
        "a latency 22.0% below the original's",
        "91.50% (89.0% to 93.0%)",
        "90.50% (88.0% to 92.0%)",
        "-1.00 points",
        "8.000",
        "6.000",
        "-25.0% (-26.0% to -24.0%)",
        "Accuracy over latency",
    ):
        assert words in first


def test_a_budget_that_was_not_met_is_said_so() -> None:
    shown = page(make_report(met=False)).shown
    assert "Budget NOT met:" in shown
    assert "Budget met" not in shown


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Budget(latency_ms=5.5), "a latency of at most 5.5 ms"),
        (Budget(macs_reduction=0.4), "40.0% fewer MACs"),
        (Budget(parameters_reduction=0.3), "30.0% fewer parameters"),
        (Budget(sparsity=0.5), "50.0% of the weights zero"),
        (Budget(drop_blocks=2), "2 blocks dropped"),
    ],
)
def test_each_kind_of_budget_is_put_in_words(asked: Budget, words: str) -> None:
    assert html.in_words(asked) == words


def test_all_that_a_report_holds_is_in_the_page() -> None:
    report = full()
    shown = Page(source()).shown
    for table in report.tables:
        assert table.title in shown
        assert all(column in shown for column in table.columns)
    for words in (
        "the clock was throttled",
        "chosen for being fastest",
        "none: no fp16 here",
        "1 nodes kept in float: conv1",
        "layer2.0.conv1 3 channels kept",
        "24 x 24 pixels",
        "ensemble of 3",
        "0.0521 nats",
        "More images would help.",
        "50 calibration images",
        "SM 1500 MHz, memory 7000 MHz, 60 C, throttled: power",
        "its second build, with a warm cache, s 0.50",
        "300 steps of batch 64, loss mimic",
        "validation 7 others",
        "d" * 64,
        "f" * 64,
        "torch 2.11",
        reliability.TITLE,
    ):
        assert words in shown


def test_every_figure_has_its_numbers_below_it() -> None:
    drawn = re.findall(r"<figure.*?</figure>", source(), re.DOTALL)
    titles = [
        html_tradeoff.TITLE, html_tradeoff.SIZE_TITLE, html_tables.DISTRIBUTION, "Blocks",
        "Loss around the result", reliability.TITLE,
    ]  # fmt: skip
    assert [re.findall('<figure aria-label="(.*?)"', one)[0] for one in drawn] == titles
    assert all("<svg " in one and "<details><summary>" in one and "<table" in one for one in drawn)
    assert ">0.625</td>" in drawn[4]


def test_a_figure_stands_below_the_table_of_its_title() -> None:
    section = source()[source().index(">Blocks</h2>") :]
    assert section.index("<table") < section.index("<figure") < section.index("</section>")


def test_numbers_sort_by_all_their_digits_and_other_cells_by_their_text() -> None:
    shown = html_parts.sheet(Table("T", ("a", "b"), (("x", 0.123456789), (True, 12), (None, float("inf")))))
    assert shown.rows[0][1] == html_parts.Entry("0.1235", 0.123456789)
    assert shown.rows[1] == (html_parts.Entry("yes"), html_parts.Entry("12", 12.0))
    assert shown.rows[2] == (html_parts.Entry(), html_parts.Entry("inf"))
    assert 'data-value="0.123456789">0.1235</td>' in html_parts.table(shown)


def test_a_table_with_a_row_too_long_or_short_still_shows_all_that_it_has() -> None:
    shown = html_parts.sheet(Table("T", ("a", "b"), (("x",), ("y", 1, "z"))))
    assert shown.columns == ("a", "b", "")
    assert [[entry.text for entry in row] for row in shown.rows] == [["x", "", ""], ["y", "1", "z"]]


# ---------------------------------------------------------------- the trade-off


def test_the_front_is_what_nothing_beats_in_both() -> None:
    found = html_tradeoff.networks(replace(make_report(), candidates=full().candidates))
    mine = [one for one in found if one.quality is not None and one.quality.split == "calibration"]
    assert [one.name for one in html_tradeoff.front(mine)] == ["without layer2.2", "without layer1.1"]
    assert [one.name for one in html_tradeoff.front(found[:2])] == ["result, fp32 (chosen)", "original"]


def test_fronts_join_what_was_measured_on_the_same_images_alone() -> None:
    drawn = html_tradeoff.figure(full())
    fronts = {curve.name: curve for curve in drawn.curves if curve.name.startswith("Pareto")}
    assert list(fronts) == ["Pareto front, evaluation images", "Pareto front, calibration images"]
    assert fronts["Pareto front, calibration images"].x == pytest.approx((70.0, 80.0))
    assert fronts["Pareto front, calibration images"].y == pytest.approx((85.0, 90.0))


def test_every_candidate_is_in_the_picture_and_the_chosen_one_apart() -> None:
    drawn = html_tradeoff.figure(full())
    curves = {curve.name: curve for curve in drawn.curves}
    assert curves["candidate (calibration images)"].x == pytest.approx((80.0, 90.0))
    assert curves["chosen, before recovery (calibration images)"].y == pytest.approx((85.0,))
    assert curves["result, fp32 (chosen)"].x == pytest.approx((75.0,))
    timed = curves["candidate, only timed"]
    assert timed.x == pytest.approx((95.0,))
    assert timed.style == "ticks"
    assert timed.y[0] < min(y for curve in drawn.curves if curve is not timed for y in curve.y)
    assert curves["budget"].x == pytest.approx((78.0, 78.0))
    assert len(html_tradeoff.sheet(full()).rows) == 1 + 2 + 1 + 4


def test_macs_predict_what_is_held_against_the_measurement() -> None:
    rows = html_tradeoff.size_sheet(make_report()).rows
    assert [entry.text for entry in rows[0]] == [
        "result, fp32 (chosen)", "73.2%", "75.0%", "74.0% to 76.0%", "+1.8 points",
    ]  # fmt: skip
    assert html_tradeoff.size_figure(make_report()) is None
    drawn = html_tradeoff.size_figure(full())
    assert drawn is not None
    assert {curve.name for curve in drawn.curves} >= {"original", "result, fp32 (chosen)", "as MACs predict"}


def test_a_report_of_agreement_without_labels_renders() -> None:
    report = make_report()
    said = Quality("agreement", 1.0, (0.99, 1.0), 423, "evaluation")
    shown = page(replace(report, original=replace(report.original, quality=said))).shown
    assert "agreement on 423 evaluation images" in shown


# ---------------------------------------------------------------- alone and unharmed


def test_the_page_asks_for_nothing() -> None:
    read = Page(source())
    assert "http://" not in source()
    assert "https://" not in source()
    assert "@import" not in source()
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", source()))
    asked = [attributes for _, attributes in read.elements if "src" in attributes or "srcset" in attributes]
    assert asked == []
    assert read.all("link") == []
    links = {attributes["href"] for _, attributes in read.elements if "href" in attributes}
    assert {link for link in links if not link.startswith("#")} == {"synthesized.png"}
    assert read.all("meta")[1]["content"].startswith("default-src 'none'")


def test_a_link_can_name_a_file_beside_the_page_alone() -> None:
    report = make_report()
    data = replace(report.data, contact_sheet='javascript:alert("x")')
    links = [attributes["href"] for attributes in page(replace(report, data=data)).all("a")]
    assert "javascript%3Aalert%28%22x%22%29" in links


def test_whatever_a_report_says_is_shown_and_never_obeyed() -> None:
    report = full()
    drawn = Figure(HOSTILE, HOSTILE, HOSTILE, (Curve(HOSTILE, (0.0, 1.0), (0.0, 1.0)),))
    hostile = replace(
        report,
        name=HOSTILE,
        method=HOSTILE,
        model=HOSTILE,
        reason=HOSTILE,
        warnings=(HOSTILE,),
        notes=(HOSTILE,),
        budget=replace(report.budget, verdict=HOSTILE),
        plan=Plan((HOSTILE,), ((HOSTILE, (0,)),)),
        tables=(Table(HOSTILE, (HOSTILE,), ((HOSTILE,),)),),
        figures=(drawn, replace(drawn, title=f"{HOSTILE} 2")),
        environment=schema.EnvironmentReport(HOSTILE, HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}),
        sha256={HOSTILE: HOSTILE},
        leakage=None if report.leakage is None else replace(report.leakage, advice=HOSTILE),
        candidates=(replace(report.candidates[0], name=HOSTILE),),
        stages={HOSTILE: schema.StageReport(1.0)},
    )
    read = page(hostile)
    assert len(read.all("script")) == 1
    assert """<script>alert("x")</script> & 'quoted'""" in read.shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", html.render(hostile))


def test_a_page_has_no_id_twice_and_no_reference_to_nowhere() -> None:
    read = Page(source())
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in read.elements:
        used = re.findall(r"#([\w.-]+)", attributes.get("href", "") + attributes.get("clip-path", ""))
        used += attributes.get("aria-labelledby", "").split()
        assert set(used) <= set(ids)


def test_no_style_of_a_figure_reaches_the_page() -> None:
    assert source().count("<style") == 1
    assert "<metadata" not in source()
    assert "#000000" not in source()[source().index("</style>") :]


def test_one_first_heading_and_every_table_named() -> None:
    read = Page(source())
    assert (read.wrong, read.open) == ([], [])
    assert len(read.all("h1")) == 1
    assert len(read.all("caption")) == len(read.all("table"))
    assert all(attributes["scope"] in ("row", "col") for attributes in read.all("th"))
    assert read.all("html")[0]["lang"] == "en"
    assert all(attributes["aria-label"] for attributes in read.all("svg"))


# ---------------------------------------------------------------- old and new reports


def test_a_report_from_before_there_were_candidates_reads_and_renders() -> None:
    value = json.loads(store.to_json(make_report()))
    for name in ("precisions", "engines", "figures", "ensemble", "leakage", "candidates", "notes"):
        del value[name]
    old = store.from_json(schema.Report, json.dumps(value))
    assert old.candidates == ()
    assert "Budget met" in page(old).shown


def test_candidates_come_back_from_json_as_they_were() -> None:
    report = full()
    assert store.from_json(schema.Report, store.to_json(report)) == report


def test_the_same_report_gives_the_same_bytes() -> None:
    assert html.render(full()) == source()
