"""The scorers' comparison: what is refreshed stays beside what is not, and ratios and ranks are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks import scoring

BLOCKS = ("a", "b", "c", "d", "e")


def row(number: int) -> scoring.Row:
    error = float(number)
    return scoring.Row(
        network="resnet20",
        block=BLOCKS[number],
        exact=error,
        fast=-error,
        l2=abs(error - 2),
        exact_s=9.0,
        fast_s=1.0,
        recover_s=5.0,
        feature_error=error,
        disagreement=error / 10,
        test_error=0.1 + error / 10,
    )


def timing(block: str, exact_s: float, fast_s: float) -> scoring.Timing:
    return scoring.Timing("resnet20", block, 100, 1, 3 * exact_s, 3 * fast_s, exact_s, fast_s, "2026-01-02")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    scale = {"exact_steps": 100, "recover_steps": 80, "seed": 0}
    record = scoring.Record(scale, [row(number) for number in range(5)], [], [], "2026-01-01", "a machine")
    scoring.publish(tmp_path / "scoring.json", record)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> None:
    words = ["scoring", "--out", str(out), "--networks", "resnet20", *options]
    monkeypatch.setattr(sys, "argv", words)
    scoring.main()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scorers that cost nothing: fast ranks as the recovered errors do, on draw 2 the other way round."""

    def prepared(network: str, seed: int | None = None) -> tuple[None, SimpleNamespace]:
        return None, SimpleNamespace(seed=seed)

    def fast(setup: SimpleNamespace, blocks: list[str]) -> tuple[float, ...]:
        sign = -1.0 if setup.seed == 2 else 1.0
        return tuple(sign * BLOCKS.index(block) for block in blocks)

    monkeypatch.setattr(scoring, "prepared", prepared)
    monkeypatch.setattr(scoring, "fast_errors", fast)
    monkeypatch.setattr(scoring, "exact_error", lambda setup, block, steps, seed: 0.0)


def test_fast_is_scored_anew_and_all_else_stays(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    before = json.loads((published / "scoring.json").read_text())
    run(monkeypatch, published, "--again", "--draws", "1", "2")
    after = json.loads((published / "scoring.json").read_text())
    assert [found["fast"] for found in after["rows"]] == [0, 1, 2, 3, 4]
    for old, new in zip(before["rows"], after["rows"], strict=True):
        assert {**new, "fast": None, "fast_s": None} == {**old, "fast": None, "fast_s": None}
    same = ("date", "platform", "scale")
    assert [after[key] for key in same] == [before[key] for key in same]
    shown = capsys.readouterr().out
    assert f"scored by fast anew on {after['fast_on']}" in shown
    assert "| fast, images of seed 1 | 1.000" in shown
    assert "| fast, images of seed 2 | -1.000" in shown


def test_scorers_are_timed_in_turn_on_blocks_spread_over_the_network(
    published: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    run(monkeypatch, published, "--time", "2", "--time-steps", "7")
    record = scoring.load(published / "scoring.json")
    assert record is not None
    assert [(found.block, found.exact_steps) for found in record.timings] == [("b", 7), ("d", 7)]
    assert "exact with 7 steps on b, d" in capsys.readouterr().out


def test_nothing_is_refreshed_where_no_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--again")
    assert "measure the rows first" in capsys.readouterr().err


def test_the_ratio_is_of_means_and_has_an_interval_from_three_pairs_on() -> None:
    assert scoring.times_less([(30.0, 1.0), (60.0, 2.0)]) == "30"
    assert scoring.times_less([(30.0, 1.0)] * 3) == "30.0 (30.0 to 30.0)"
    ratio = scoring.times_less([(20.0, 1.0), (40.0, 1.0), (30.0, 1.0)])
    assert ratio.startswith("30.0 (2")
    text = "\n".join(scoring.seconds([timing("a", 40.0, 1.0), timing("b", 20.0, 1.0)]))
    assert "exact 30.0 s of computing a block, fast 1.00 s, that is 30 times less; by wall time 30." in text


def test_resampled_ranks_are_spearmans() -> None:
    score, wanted = np.array([3.0, 1.0, 2.0, 5.0, 5.0]), np.array([2.0, 1.0, 3.0, 3.0, 9.0])
    draws = np.array([[0, 1, 2, 3, 4], [0, 0, 1, 2, 4], [2, 2, 2, 2, 2]])
    found = scoring.resampled(score, wanted, draws)
    assert found[:2] == pytest.approx([spearmanr(score[draw], wanted[draw]).statistic for draw in draws[:2]])
    assert np.isnan(found[2])


def test_the_gain_over_exact_is_taken_on_the_same_blocks() -> None:
    found = scoring.correlations([row(number) for number in range(5)])
    # Exact ranks as the errors do, fast the other way round, whichever blocks are drawn.
    assert found["exact"]["feature error"] == pytest.approx((1, 1, 1))
    assert found[scoring.GAIN]["feature error"] == pytest.approx((-2, -2, -2))
