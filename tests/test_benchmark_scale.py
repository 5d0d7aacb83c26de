"""The simulation of runs with workers: hand-computed schedules, recordings, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.scale_simulation import Request, Workload, bottleneck, simulate
from benchmarks.scale_tables import Pair, Record, markdown
from optpipe.errors import RunError, UsageError


def load(*batches: tuple[Request, ...], start_s: float = 3.0, recover_s: float = 0.0) -> Workload:
    return Workload("a run", "optpipe run", 1.0, start_s, 1.0, batches, recover_s, 2.0)


def scores(count: int, seconds: float, timing_s: float = 0.0) -> tuple[Request, ...]:
    return tuple(Request(f"block {number}", seconds, timing_s) for number in range(count))


def test_one_process_computes_and_times_one_after_the_other() -> None:
    found = simulate(load(scores(4, 10.0, 2.0), scores(1, 0.0, 5.0)), 1)
    assert found.search_s == 40 + 8 + 5
    assert found.timing_s == 13
    assert found.start_s == 0


def test_workers_start_share_a_batch_and_are_there_for_the_next() -> None:
    found = simulate(load(scores(4, 10.0), scores(2, 10.0)), 2)
    assert found.search_s == (3 + 20) + 10
    assert found.start_s == 3


def test_a_worker_takes_the_next_request_as_soon_as_it_is_free() -> None:
    uneven = (
        Request("long", 10.0, 0.0),
        Request("b", 4.0, 0.0),
        Request("c", 4.0, 0.0),
        Request("d", 4.0, 0.0),
    )
    found = simulate(load(uneven, start_s=0.0), 2)
    assert found.search_s == 12  # 10 beside 4 + 4 + 4
    assert found.queued_s == 8  # the last is taken at 8
    assert found.last_s == 4


def test_more_workers_than_requests_gain_nothing() -> None:
    work = load(scores(7, 10.0, 1.0))
    for workers in (7, 64, 256):
        found = simulate(work, workers)
        assert (found.search_s, found.start_s, found.queued_s, found.last_s) == (3 + 10 + 7, 3, 0, 10)


def test_those_that_start_late_join_those_that_are_there() -> None:
    found = simulate(load(scores(1, 10.0), scores(2, 10.0)), 2)
    # The first batch needs one worker; in the second the other starts while the first computes.
    assert found.search_s == (3 + 10) + (3 + 10)


def test_timing_meanwhile_hides_the_shorter_of_the_two() -> None:
    work = load(scores(2, 10.0, 8.0), start_s=0.0)
    assert simulate(work, 2).search_s == 10 + 16
    assert simulate(work, 2, meanwhile=True).search_s == 16


@pytest.mark.parametrize(
    ("work", "workers", "named"),
    [
        (load(scores(8, 10.0)), 1, "computing that more workers would share"),
        (load(scores(8, 10.0)), 8, "requests that are already on a worker"),
        (load(scores(8, 10.0)), 2, "computing that more workers would share"),
        (load(scores(8, 1.0), start_s=9.0), 8, "workers that start"),
        (load(scores(8, 1.0, 5.0)), 8, "timing on the one target"),
        (load(scores(8, 1.0), recover_s=99.0), 8, "the recovery"),
        (load(scores(1, 0.5), start_s=0.0), 8, "ingest, export and benchmark"),
    ],
)
def test_the_bottleneck_is_what_most_seconds_go_by_on(work: Workload, workers: int, named: str) -> None:
    assert bottleneck(work, simulate(work, workers)) == named


def events(*lines: dict[str, object]) -> list[dict[str, object]]:
    return [
        {"kind": "trial", "name": "", "detail": "", "fields": {}, "seconds": 0.0, **line} for line in lines
    ]


def test_a_recording_tells_timing_from_computing() -> None:
    told = events(
        {"name": "a", "done": 1, "total": 2, "seconds": 5.0, "fields": {"key": "k1", "ratio": 0.9}},
        {"name": "b", "done": 2, "total": 2, "seconds": 7.0, "fields": {"key": "k2", "ratio": 0.9}},
        {"name": "steps", "done": 1, "total": 1, "seconds": 4.0, "fields": {"key": "k3"}},
        {"name": "handed", "done": 1, "total": 1, "seconds": 4.0},
    )
    examined = {"k1": scale.Examined(0.25, waits=True, trains=True), "k2": scale.Examined(0.5, False, False)}
    found = list(scale.batches(told, examined, 8.0))
    assert found == [
        (Request("a", 2.0, 4.75), Request("b", 0.0, 7.0)),  # the driver's own stays with it
        (Request("steps", 4.0, 0.0),),
    ]


def test_a_trial_waits_for_a_worker_as_the_lab_has_it(tmp_path: Path) -> None:
    path = tmp_path / "trial.json"
    for wants, tune, waits in (
        (["latency"], None, False),
        (["latency", "quality"], None, True),
        (["latency"], {}, True),
    ):
        path.write_text(json.dumps({"ask": {"wants": wants, "tune": tune}, "seconds": 2.0}))
        assert scale.Examined.of(path) == scale.Examined(2.0, waits, tune is not None)


def test_a_batch_is_from_being_handed_over_to_its_last_answer(tmp_path: Path) -> None:
    lines = [
        ("2026-01-01T00:00:00.000+00:00", "workers", "3 requests are handed over"),
        ("2026-01-01T00:00:07.500+00:00", "a", "computed by worker 1"),
        ("2026-01-01T00:00:09.000+00:00", "b", "computed by worker 2"),
        ("2026-01-01T00:00:20.000+00:00", "workers", "1 requests are handed over"),
        ("2026-01-01T00:00:30.000+00:00", "c", "computed by worker 2"),
    ]
    text = "\n".join(json.dumps({"at": at, "name": name, "detail": detail}) for at, name, detail in lines)
    (tmp_path / "events.jsonl").write_text(text)
    begun, first, last = scale.handed_over(tmp_path)
    assert (first - begun, last - begun) == (7.5, 9.0)


def test_a_run_that_handed_nothing_over_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    with pytest.raises(RunError, match="no request was handed over"):
        scale.handed_over(tmp_path)


def test_the_page_shows_measured_pairs_and_simulated_runs() -> None:
    pairs = (Pair("resnet56", 100, 25, 120.0, 60.0, 6.0), Pair("resnet56", 100, 25, 120.0, 80.0, 6.0))
    page = markdown(Record("2026-01-01", "a machine", (load(scores(16, 10.0, 1.0)),), pairs))
    assert "Median of 2: 1.75 times (1.50 to 2.00)." in page
    # 16 scores of 10 s by 8 workers that start in 3 s, then 16 s of timing: 160 + 16 against 23 + 16 s.
    assert "| 8 | 39.0 | 4.51 | 23.0 | 42.0 | 4.26 | timing on the one target |" in page


def test_a_scale_is_a_share() -> None:
    with pytest.raises(UsageError, match="at most 1"):
        scale.parse(["--scale", "2"])


def test_resnet50_is_recorded_at_a_share_of_its_training() -> None:
    one = next(found for found in scale.recorded(0.0004, Path("images")) if "resnet50" in found.name)
    steps = next(int(word.partition("=")[2]) for word in one.sets if "exact_steps" in word)
    assert steps * scale.NOISE * one.factor == pytest.approx(1000 * 64)
