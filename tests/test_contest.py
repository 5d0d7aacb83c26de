from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import fx, nn

from optpipe import building, contest, graph, precision
from optpipe.data import ImageSet
from optpipe.errors import MissingError, RunError
from optpipe.types import Backend, DeviceState, Engine, Event, Fingerprint, Precision, Sample, Target

SHAPE = (3, 8, 8)


@dataclass
class Pretended:
    """A backend that runs torch, takes as long as it is told to, and may be wrong or fail."""

    network: nn.Module
    compute_ms: float
    add: float = 0.0
    fails: str = ""
    lacks: str = ""
    SOURCE: Literal["onnx", "program"] = "onnx"
    CACHES_BUILDS: bool = False
    INT8_REST: Literal["fp32", "fp16"] = "fp32"
    headline: str = "Latency"
    notes: tuple[str, ...] = ()
    closed: int = 0
    device: DeviceState | None = None

    def precisions(self, device: str) -> tuple[Precision, ...]:
        return ("fp32",)

    def missing(self, target: Target) -> str | None:
        return None

    def fingerprint(self, target: Target) -> Fingerprint:
        return Fingerprint("pretended", "none", ((target.backend, "1"),), 1)

    def build(self, source: Path, target: Target, folder: Path) -> Engine:
        if self.fails:
            raise RunError(self.fails)
        if self.lacks:
            raise MissingError(self.lacks)
        return Engine(source, "0" * 64, 0.5)

    def load(self, engine: Engine, target: Target) -> Pretended:
        return self

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = self.network(torch.from_numpy(images)).numpy() + self.add
        return logits

    def sample(self) -> Sample:
        return Sample(self.compute_ms)

    def state(self) -> DeviceState | None:
        return self.device

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def network() -> fx.GraphModule:
    torch.manual_seed(0)
    return graph.trace(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval(),
        SHAPE,
    )


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pretended backends run torch and read no file: writing one would only take time."""

    def export(model: nn.Module, bench: building.Workbench, folder: Path) -> Path:
        return folder / building.ONNX

    monkeypatch.setattr(building, "export", export)


@pytest.fixture
def images() -> Iterator[ImageSet]:
    pixels = torch.randint(0, 256, (8, *SHAPE), generator=torch.Generator().manual_seed(1)).byte()
    yield ImageSet(pixels, None, tuple("abcdefgh"), (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


def hold(
    network: fx.GraphModule, images: ImageSet, folder: Path, backends: dict[str, Backend]
) -> tuple[contest.Contest, list[Event]]:
    events: list[Event] = []
    benches = [
        building.Workbench(backend, Target(name, 4, SHAPE, threads=1), images, precision.Settings(), 0)
        for name, backend in backends.items()
    ]
    held = contest.hold(network, benches, folder, budget_s=0.05, seed=0, emit=events.append)
    return held, events


def test_the_fastest_that_computes_what_torch_does_is_chosen(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    reference, fast = Pretended(network, 2.0), Pretended(network, 1.0)
    wrong, broken = Pretended(network, 0.1, add=1.0), Pretended(network, 0.1, fails="out of memory")
    held, events = hold(
        network, images, tmp_path, {"broken": broken, "fast": fast, "onnxruntime": reference, "wrong": wrong}
    )
    assert (held.chosen, held.reference) == ("fast", "onnxruntime")
    found = {entry.backend: entry for entry in held.entries}
    assert list(found) == ["broken", "fast", "onnxruntime", "wrong"]
    assert found["fast"].latency is not None
    assert found["fast"].latency.ratio_to_original == pytest.approx(0.5)
    assert found["onnxruntime"].latency is not None
    assert found["onnxruntime"].latency.ratio_to_original is None
    assert found["broken"].out_because == "out of memory"
    assert "differs from torch" in found["wrong"].out_because
    assert (reference.closed, fast.closed, wrong.closed) == (1, 1, 1)
    assert [event.name for event in events if event.kind == "warning"] == ["broken", "wrong"]


def test_a_backend_that_lacks_something_to_build_is_out_and_the_others_go_on(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    backends: dict[str, Backend] = {
        "lacking": Pretended(network, 1.0, lacks="no compiler"),
        "onnxruntime": Pretended(network, 2.0),
    }
    held, _ = hold(network, images, tmp_path, backends)
    assert held.chosen == "onnxruntime"
    assert held.entries[0].out_because == "no compiler"


def test_an_engine_of_another_shape_is_out_and_closed(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    narrow = Pretended(nn.Sequential(network, nn.Linear(3, 2)), 1.0)
    held, _ = hold(network, images, tmp_path, {"narrow": narrow, "onnxruntime": Pretended(network, 2.0)})
    assert "returns logits of shape (8, 2), torch (8, 3)" in held.entries[0].out_because
    assert narrow.closed == 1


def test_a_measurement_that_may_mislead_is_told(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    hot = DeviceState(1200, 3201, 88, throttle=("thermal",))
    _, events = hold(network, images, tmp_path, {"onnxruntime": Pretended(network, 2.0, device=hot)})
    (warning,) = (event for event in events if event.kind == "warning")
    assert warning.name == "onnxruntime"
    assert "throttled (thermal" in warning.detail


def test_the_reference_wins_where_all_others_are_slower(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    held, _ = hold(
        network, images, tmp_path, {"onnxruntime": Pretended(network, 1.0), "slow": Pretended(network, 3.0)}
    )
    assert held.chosen == "onnxruntime"


def test_without_onnxruntime_the_first_is_the_reference(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    held, _ = hold(network, images, tmp_path, {"a": Pretended(network, 2.0), "b": Pretended(network, 1.0)})
    assert (held.reference, held.chosen) == ("a", "b")


def test_where_none_is_right_the_run_ends_with_every_reason(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="a: out of memory; b: differs from torch"):
        hold(
            network,
            images,
            tmp_path,
            {"a": Pretended(network, 1.0, fails="out of memory"), "b": Pretended(network, 1.0, add=1.0)},
        )


def test_the_table_shows_all_and_those_that_do_not_load(
    network: fx.GraphModule, images: ImageSet, tmp_path: Path
) -> None:
    backends: dict[str, Backend] = {"fast": Pretended(network, 1.0), "onnxruntime": Pretended(network, 2.0)}
    held, _ = hold(network, images, tmp_path, backends)
    shown = contest.table(held, (("tensorrt", "does not run on cpu"),))
    assert [row[0] for row in shown.rows] == ["fast", "onnxruntime", "tensorrt"]
    assert shown.rows[0][2] is not None and str(shown.rows[0][2]).startswith("-50.0%")
    assert [row[-1] for row in shown.rows] == ["chosen", "", "does not run on cpu"]
