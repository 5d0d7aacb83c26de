"""The command for a machine with a GPU, tried on a CPU: rows, tables, resuming, and failing engines."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from optpipe import building, graph, store
from optpipe.errors import UsageError
from optpipe.types import Session, Target

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import eager, gpu, roofline  # noqa: E402
from benchmarks.contenders import Network, RandomImages, subject  # noqa: E402
from benchmarks.gpu_plan import Scale  # noqa: E402
from benchmarks.gpu_tables import Record, Row  # noqa: E402

SHAPE = (3, 8, 8)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class Tiny(nn.Module):
    """Two blocks of one shape: dropping either leaves the same structure."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.first, self.second = Residual(), Residual()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(torch.relu(self.stem(x))))
        logits: Tensor = self.linear(torch.flatten(self.pool(x), 1))
        return logits


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These times mean nothing: no need to wait until nobody else measures."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def options(out: Path, **changes: object) -> gpu.Options:
    scale = Scale((2,), ("fp32",), (2,), 0.01, 4, every_eager=False)
    asked = gpu.Options(
        {"tiny": Network(Tiny, SHAPE)}, "quick", scale, "cpu", 1, ("onnxruntime",), out, False
    )
    return dataclasses.replace(asked, **changes)  # type: ignore[arg-type]


def record(out: Path) -> Record:
    return store.from_json(Record, (out / "gpu.json").read_bytes())


def rows(found: Record, engine: str) -> dict[str, Row]:
    return {row.kind: row for row in found.rows if row.engine == engine}


def test_a_backend_that_fails_is_a_row_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = iter(["no kernel for this device", "no driver"])

    def broken(model: nn.Module, bench: building.Workbench, folder: Path) -> Path:
        raise RuntimeError(next(reasons))

    monkeypatch.setattr(building, "export", broken)
    text = gpu.run(options(tmp_path))
    first = record(tmp_path)
    # The original failed, so nothing was tried that would be timed in turn with it; the rest was measured.
    assert [row.failure for row in first.rows if row.engine == "onnxruntime"] == [
        "RuntimeError: no kernel for this device"
    ]
    assert "- onnxruntime, tiny, fp32, batch 2, the original: RuntimeError: no kernel" in text
    assert "no kernel for this device" in capsys.readouterr().err
    assert set(rows(first, "torch eager")) == {"original"}
    last = rows(first, "torch eager channels_last")
    assert set(last) == {"original", "single", "depth"}
    check_rows(list(last.values()))

    text = gpu.run(options(tmp_path))
    second = record(tmp_path)
    assert [row.failure for row in second.rows if row.failure] == ["RuntimeError: no driver"]
    assert [row for row in second.rows if row.latency] == [row for row in first.rows if row.latency]
    assert [visit.rows for visit in second.visits] == [5, 1]
    assert "no kernel" not in text


def test_what_a_failed_engine_held_is_released_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[nn.Module]] = []
    left: list[bool] = []

    def broken(model: nn.Module, bench: building.Workbench, folder: Path) -> Path:
        memory = nn.Linear(1, 1)
        memory.__dict__["itself"] = memory
        held.append(weakref.ref(memory))
        raise RuntimeError("no kernel for this device")

    load = eager.load

    def loading(model: nn.Module, target: Target, variant: eager.Variant) -> Session:
        left.extend(reference() is not None for reference in held)
        return load(model, target, variant)

    monkeypatch.setattr(building, "export", broken)
    monkeypatch.setattr(eager, "load", loading)
    gpu.run(options(tmp_path))
    assert left
    assert not any(left)


@pytest.mark.slow
def test_a_rerun_goes_on_from_what_is_there(tmp_path: Path) -> None:
    asked = options(tmp_path)
    gpu.run(dataclasses.replace(asked, scale=dataclasses.replace(asked.scale, depths=())))
    first = record(tmp_path)
    assert set(rows(first, "onnxruntime")) == {"original", "single"}
    text = gpu.run(asked)
    second = record(tmp_path)
    check_rows(list(rows(second, "onnxruntime").values()))
    assert second.rows[: len(first.rows)] == first.rows
    assert [visit.rows for visit in second.visits] == [5, 2]
    assert "| first, second | -36.3% |" in text
    assert "What did not run" not in text
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8") == text

    before = (tmp_path / "gpu.json").read_bytes()
    assert gpu.run(asked) == text
    assert (tmp_path / "gpu.json").read_bytes() == before


def check_rows(found: list[Row]) -> None:
    """An original, one of its blocks dropped, and both."""
    kinds = {row.kind: row for row in found}
    assert (kinds["single"].alike, kinds["single"].dropped) == (("first", "second"), ("first",))
    assert kinds["depth"].dropped == ("first", "second")
    assert kinds["depth"].macs < kinds["single"].macs < kinds["original"].macs
    for row in found:
        assert row.latency is not None and row.latency.ratio_ci95 is not None and row.reference_ms is not None
        assert row.latency.samples >= 4 and row.max_rel is not None and row.max_rel < 1e-3


def test_rows_that_no_longer_fit_are_left_out(tmp_path: Path) -> None:
    asked = options(tmp_path)
    gpu.run(dataclasses.replace(asked, scale=dataclasses.replace(asked.scale, minutes=0.0)))
    assert not (tmp_path / "gpu.json").exists()


def test_results_of_another_machine_are_not_added_to(tmp_path: Path) -> None:
    asked = options(tmp_path, backends=("openvino",))
    asked = dataclasses.replace(
        asked, scale=dataclasses.replace(asked.scale, precisions=("fp16",), depths=())
    )
    gpu.run(asked)
    found = record(tmp_path)
    assert [absent[:2] for absent in found.absent] == [("fp16", "every backend")]
    other = dataclasses.replace(found, machine=dataclasses.replace(found.machine, device="another"))
    (tmp_path / "gpu.json").write_text(store.to_json(other), encoding="utf-8")
    with pytest.raises(UsageError, match="holds results of another"):
        gpu.run(asked)
    gpu.run(dataclasses.replace(asked, fresh=True))
    assert record(tmp_path).machine == found.machine


@pytest.mark.parametrize(
    "words", [["--smoke"], ["--device", "cpu"], ["--smoke", "--out", str(gpu.RESULTS / "x")]]
)
def test_a_trial_never_lands_among_the_results(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(words) == 2
    assert "is for results of a GPU" in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 3
    assert "torch finds no NVIDIA GPU" in capsys.readouterr().err


def test_work_counts_what_a_layer_moves_and_computes() -> None:
    traced = graph.trace(Tiny(), SHAPE)
    found = roofline.work(traced, 2, "fp16")
    stem, first, second, pool, linear = found.layers
    # 2 images of 3x8x8 in fp32, 4x8x8 in fp16, 108 weights; 27 multiply-adds for each number written.
    assert (stem.bytes, stem.flops) == (2 * 192 * 4 + 2 * 256 * 2 + 108 * 2, 2 * 2 * 256 * 27)
    # A block reads its input twice: for the convolution and for the addition.
    assert first == second
    assert (first.bytes, first.flops) == (2 * 3 * 256 * 2 + 144 * 2, 2 * 2 * 256 * 36)
    assert (pool.bytes, pool.flops) == (2 * 256 * 2 + 2 * 4 * 2, 0)
    assert (linear.bytes, linear.flops) == (2 * 4 * 2 + 2 * 5 * 2 + 25 * 2, 2 * 2 * 5 * 4)
    assert found.compulsory_bytes == 2 * 192 * 4 + 2 * 5 * 4 + (108 + 2 * 144 + 25) * 2


def test_the_floor_takes_the_slower_of_memory_and_arithmetic() -> None:
    roof = roofline.Roof("fp32", bytes_per_s=1e6, flops_per_s=1e9, copied_bytes=1, matrix=1, samples=1)
    layers = (roofline.Layer(1000, 500_000), roofline.Layer(100, 3_000_000))
    found = roofline.floor(roofline.Work(layers, 200), roof)
    assert found.layers_ms == pytest.approx(1.0 + 3.0)
    assert found.whole_ms == pytest.approx(3.5)
    assert (found.memory_bound_layers, found.layers, found.memory_bound_whole) == (1, 2, False)


def test_what_a_gpu_does_before_its_clocks_are_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.perf_counter()

    def run_once(work: object) -> float:
        time.sleep(0.001)
        return 9.0 if time.perf_counter() - begin < 0.1 else 1.0

    monkeypatch.setattr(roofline, "_cuda_s", run_once)
    assert roofline._median_s(lambda: None, "cuda", 5) == 1.0


def test_activations_of_a_random_network_are_of_ordinary_size() -> None:
    found = subject(Network(Tiny, SHAPE))
    assert isinstance(found.model, fx.GraphModule) and not found.model.training
    images = RandomImages(SHAPE, 8).batch(slice(None))
    hidden = found.model.get_submodule("first.bn")(
        found.model.get_submodule("first.conv")(torch.relu(found.model.get_submodule("stem")(images)))
    )
    assert hidden.std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.gpu
def test_the_command_runs_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no NVIDIA GPU")
    assert gpu.main(["--smoke", "--out", str(tmp_path)]) == 0
    found = store.from_json(Record, (tmp_path / "gpu-smoke.json").read_bytes())
    assert not [row.failure for row in found.rows if row.failure]
    graphs = [row for row in found.rows if row.engine.endswith("CUDA graph")]
    assert {row.precision for row in graphs} == {"fp16", "fp32"}
    assert all(row.latency and row.latency.headline == "GPU Compute Time" for row in graphs)
