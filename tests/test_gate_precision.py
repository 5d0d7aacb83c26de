"""``optpipe gate`` holding another of the shipped engines against the limits than the target's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import Call, make_latency, make_report

from optpipe import files, store
from optpipe import recipe as recipes
from optpipe.errors import UsageError
from optpipe.report import gate, limits
from optpipe.report.schema import PrecisionReport, Report
from optpipe.types import Limits, Quality


def engine(
    precision: str, top1: float, ratio: float, agreement: float = 0.9, *, failed: str = ""
) -> PrecisionReport:
    """An engine whose intervals reach a point to each side; none where it failed."""
    quality = Quality("top1", top1, (top1 - 0.01, top1 + 0.01), 423, "evaluation")
    same = Quality("agreement", agreement, (agreement - 0.01, agreement + 0.01), 423, "evaluation")
    return PrecisionReport(
        precision=precision,  # type: ignore[arg-type]
        latency=None if failed else make_latency(8.0 * ratio, ratio, (ratio - 0.01, ratio + 0.01)),
        quality=None if failed else quality,
        agreement=None if failed else same,
        source_bytes=200_000,
        engine_bytes=200_000,
        build_s=0.1,
        max_rel=0.01,
        failed=failed,
    )


def shipped(*, top1: float = 0.80, ratio: float = 0.50) -> Report:
    """A run whose fp32 engine saves 25% for a point, and its int8 engine half for 11 points."""
    engines = (
        engine("fp32", 0.905, 0.75),
        engine("int8", top1, ratio),
        engine("bf16", 0, 0, failed="OpenVINO computes in f32"),
    )
    return dataclasses.replace(make_report(), precisions=engines, sha256={"original weights": "0" * 64})


def test_the_engine_of_the_precision_is_held_against_the_same_limits() -> None:
    given = Limits(max_accuracy_drop=1.0, min_agreement=95.0, min_latency_reduction=30.0)
    own = gate.judge("run", shipped(), given)
    other = gate.judge("run", shipped(), dataclasses.replace(given, precision="int8"))
    assert [check.outcome for check in own.checks] == ["passed", "passed", "failed"]
    assert [check.outcome for check in other.checks] == ["failed", "failed", "passed"]
    assert [check.value for check in other.checks] == pytest.approx([11.5, 90.0, 50.0])
    assert (own.precision, other.precision) == ("fp32", "int8")


def test_the_targets_own_precision_is_the_result_itself() -> None:
    given = Limits(min_latency_reduction=30.0)
    for report in (shipped(), make_report()):  # reports of one precision list none
        named = gate.judge("run", report, dataclasses.replace(given, precision="fp32"))
        assert named == gate.judge("run", report, given)


def test_a_baseline_is_held_at_the_same_precision() -> None:
    given = Limits(precision="int8")
    old = gate.Baseline("old", shipped(top1=0.81, ratio=0.4))
    accuracy, latency = gate.judge("run", shipped(), given, old).checks
    assert accuracy.value == pytest.approx(1.0)
    assert latency.value == pytest.approx(25.0)
    with pytest.raises(UsageError, match=r"^old: has no int8 engine, only fp32; "):
        gate.judge("run", shipped(), given, gate.Baseline("old", make_report()))


def test_what_is_written_names_the_precision() -> None:
    verdict = gate.judge("run", shipped(), Limits(min_latency_reduction=30.0, precision="int8"))
    assert 'name="optpipe gate practise int8"' in gate.junit(shipped(), verdict)
    assert "onnxruntime int8 at batch 16" in gate.markdown(shipped(), verdict)
    assert json.loads(gate.as_json(verdict))["precision"] == "int8"


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    files.write_atomically(tmp_path / "run" / "report.json", store.to_json(shipped()))
    return tmp_path / "run"


def test_the_option_names_the_engine(optpipe: Call, run: Path) -> None:
    words = ("gate", run, "--min-latency-reduction", 30)
    assert optpipe(*words)[0] == 1
    code, out, _ = optpipe(*words, "--precision", "int8")
    assert code == 0
    assert out.startswith("PASSED latency: latency reduction 50.00%")


def test_the_recipes_precision_holds_where_none_is_given(optpipe: Call, run: Path) -> None:
    limits.write(run, Limits(min_latency_reduction=30.0, precision="int8"))
    assert optpipe("gate", run)[0] == 0
    assert optpipe("gate", run, "--precision", "fp32")[0] == 1


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("fp8", "--precision fp8: must be one of fp32, bf16, fp16, int8"),
        (
            "fp16",
            "{run}: has no fp16 engine, only fp32 and int8; add 'fp16' to [export] precisions and run it "
            "anew",
        ),
        (
            "bf16",
            "{run}: its bf16 engine is left out: OpenVINO computes in f32; hold another --precision",
        ),
    ],
)
def test_a_precision_that_is_not_there_is_one_line(
    optpipe: Call, run: Path, precision: str, message: str
) -> None:
    found = optpipe("gate", run, "--min-latency-reduction", 2, "--precision", precision)
    assert found == (2, "", f"Error: {message.format(run=run)}\n")


def test_a_recipe_names_the_precision(tmp_path: Path) -> None:
    shown = Path(__file__).resolve().parents[1] / "recipes" / "practise.toml"
    assert recipes.load(shown, ['gate.precision="int8"']).gate == Limits(precision="int8")
    with pytest.raises(UsageError, match=r"\[gate\] precision"):
        recipes.load(shown, ['gate.precision="fp8"'])


def test_limits_that_an_older_run_recorded_still_read(run: Path) -> None:
    (run / limits.NAME).write_text('{"max_accuracy_drop": 1.0, "strict": false}')
    assert limits.read(run) == Limits(max_accuracy_drop=1.0)
