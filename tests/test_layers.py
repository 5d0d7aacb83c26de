"""How long each layer takes: asked of a backend, and shown in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteOnnx, make_latency

from optpipe import plugins, store
from optpipe.backends import onnxruntime as backend
from optpipe.backends._onnxruntime import times_of_profile
from optpipe.backends.openvino import _median_ms
from optpipe.errors import RunError
from optpipe.pipeline import layers as asked
from optpipe.report import html, layers, markdown, schema
from optpipe.types import Engine, LayerTime, LayerTimes, Target

ORIGINAL = (
    LayerTime("stem", "Conv", 2.0),
    LayerTime("/layer1/conv1/Conv", "Conv", 1.0),
    LayerTime("join", "Add", 0.75),
    LayerTime("head", "Gemm", 0.25),
)
RESULT = (LayerTime("stem", "Conv", 1.5), LayerTime("head", "Gemm", 0.5))
FOUND = LayerTimes(ORIGINAL, RESULT, 50)
TARGET = Target("onnxruntime", 2, (3, 16, 16), threads=1)


def test_kinds_are_summed_with_their_shares_of_each_engine() -> None:
    kinds, _ = layers.tables(FOUND)
    assert kinds.columns[:4] == ("kind", "original layers", "original ms", "original share")
    assert kinds.rows == (
        ("Conv", 2, 3.0, "75.0%", 1, 1.5, "75.0%"),
        ("Add", 1, 0.75, "18.8%", 0, 0.0, "0.0%"),
        ("Gemm", 1, 0.25, "6.2%", 1, 0.5, "25.0%"),
    )


def test_the_slowest_layers_stand_beside_each_other_by_rank() -> None:
    _, slowest = layers.tables(FOUND)
    assert slowest.rows == (
        (1, "stem (Conv)", 2.0, "50.0%", "stem (Conv)", 1.5, "75.0%"),
        (2, "/layer1/conv1/Conv", 1.0, "25.0%", "head (Gemm)", 0.5, "25.0%"),
        (3, "join (Add)", 0.75, "18.8%", None, None, None),
        (4, "head (Gemm)", 0.25, "6.2%", None, None, None),
    )
    many = tuple(LayerTime(f"conv{number}", "conv", float(number)) for number in range(30))
    _, slowest = layers.tables(LayerTimes(many, many, 50))
    assert [row[1] for row in slowest.rows] == [f"conv{number}" for number in range(29, 19, -1)]


def test_the_report_says_that_the_times_do_not_add_up_to_the_latency(report: schema.Report) -> None:
    told = replace(report, layers=FOUND)
    for shown in (markdown.render(told), html.render(told)):
        assert "4.000 ms in all layers of the original, 2.000 ms in those of the result" in shown
        assert "medians of 50 inferences" in shown
        assert "do not add up to the latency" in shown
        assert "/layer1/conv1/Conv" in shown
    assert "## Time by layer: the 10 slowest" in markdown.render(told)


def test_a_report_says_why_there_are_no_times(report: schema.Report) -> None:
    told = replace(report, layers=LayerTimes((), (), 0, "inductor does not tell"))
    for shown in (markdown.render(told), html.render(told)):
        assert "No times of layers: inductor does not tell." in shown
        assert "10 slowest" not in shown


def test_a_report_from_before_that_still_reads_and_shows_nothing_of_it(report: schema.Report) -> None:
    written = json.loads(store.to_json(replace(report, layers=FOUND)))
    assert store.from_json(schema.Report, json.dumps(written)).layers == FOUND
    del written["layers"]
    old = store.from_json(schema.Report, json.dumps(written))
    assert old.layers is None
    assert "Time by layer" not in markdown.render(old)
    assert "Time by layer" not in html.render(old)


# ---------------------------------------------------------------- asking


def test_both_engines_are_asked_for_about_a_second(write_onnx: WriteOnnx, tmp_path: Path) -> None:
    sides = [
        (backend.build(write_onnx(f"{count}.onnx", layers=count), TARGET, tmp_path), TARGET)
        for count in (3, 1)
    ]
    module = plugins.backend("onnxruntime")
    found = asked.times(module, sides[0], sides[1], make_latency(100.0))
    assert (found.repeats, found.failed) == (10, "")
    assert [sum(layer.kind == "Conv" for layer in one) for one in (found.original, found.result)] == [3, 1]
    assert all(layer.ms > 0 for layer in found.original if layer.kind == "Conv")
    assert asked.times(module, sides[0], sides[1], make_latency(0.01)).repeats == 50
    assert asked.times(module, sides[0], sides[1], make_latency(5000.0)).repeats == 5


def test_what_cannot_be_told_fails_no_run(tmp_path: Path) -> None:
    absent = Engine(tmp_path / "absent.onnx", "0" * 64, 0.0)

    def failed(target: Target) -> str:
        module = plugins.backend(target.backend)
        found = asked.times(module, (absent, target), (absent, target), make_latency(1.0))
        assert (found.original, found.result) == ((), ())
        return found.failed

    assert failed(replace(TARGET, backend="inductor")) == (
        "inductor does not tell: what it compiles to are no layers any more"
    )
    assert failed(replace(TARGET, device="cuda")) == (
        "onnxruntime on 'cuda' does not tell how long a layer takes"
    )
    assert "absent.onnx" in failed(TARGET)


def test_a_profile_gives_medians_of_its_last_inferences(tmp_path: Path) -> None:
    def event(name: str, kind: str, index: int, microseconds: int) -> dict[str, object]:
        args = {"op_name": kind, "node_index": str(index)}
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": args}

    events: list[dict[str, object]] = [{"cat": "Session", "name": "model_run", "dur": 1, "args": {}}]
    for first, second in ((9000, 9000), (100, 30), (400, 10), (200, 20)):
        events += [event("conv", "Conv", 4, first), event("", "Relu", 5, second), event("", "Relu", 6, 1)]
    events.append({"cat": "Node", "name": "conv_fence_before", "dur": 7, "args": {"op_name": "Conv"}})
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(events), encoding="utf-8")
    assert times_of_profile(path, 3) == (
        LayerTime("conv", "Conv", 0.2),
        LayerTime("Relu", "Relu", 0.02),
        LayerTime("Relu", "Relu", 0.001),
    )


@pytest.mark.parametrize("content", ["", '[{"cat": "Node", "na'])
def test_a_profile_that_was_cut_off_is_told(tmp_path: Path, content: str) -> None:
    """ONNX Runtime does not tell that the disk is full."""
    path = tmp_path / "profile.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"profile.json: ONNX Runtime has not written its profile"):
        times_of_profile(path, 3)
    with pytest.raises(RunError, match="has not written"):
        times_of_profile(tmp_path / "absent", 3)


def test_openvinos_means_of_all_inferences_so_far_are_taken_apart() -> None:
    """1 ms each for ten inferences, then 2 ms each for ten, 2 again, and 12 in a disturbance."""
    told = [("conv", "Convolution", *one) for one in ((1.0, 10), (1.5, 20), (50 / 30, 30), (170 / 40, 40))]
    assert _median_ms(told) == pytest.approx(2.0)
    assert _median_ms([("a", "b", 0.003, 3), ("a", "b", 0.001, 6)]) == 0.0, "rounded, not less than nothing"


def test_a_profiled_session_is_set_as_the_timed_one_and_leaves_no_file(
    write_onnx: WriteOnnx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    options = backend._options

    def kept(target: Target, profile: Path | None) -> Any:
        made.append(options(target, profile))
        return made[-1]

    monkeypatch.setattr(backend, "_options", kept)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    engine = backend.build(write_onnx("a.onnx"), TARGET, tmp_path)
    backend.load(engine, TARGET).close()
    backend.layer_times(engine, TARGET, 2)
    timed, profiled = made
    assert (timed.enable_profiling, profiled.enable_profiling) == (False, True)
    for name in (
        "intra_op_num_threads",
        "inter_op_num_threads",
        "execution_mode",
        "graph_optimization_level",
    ):
        assert getattr(timed, name) == getattr(profiled, name)
    key = "session.intra_op.allow_spinning"
    assert timed.get_session_config_entry(key) == profiled.get_session_config_entry(key) == "0"
    with pytest.raises(RunError, match="sha256"):
        backend.layer_times(replace(engine, sha256="0" * 64), TARGET, 2)
    assert list(temporary.iterdir()) == []
