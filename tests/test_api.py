"""The calls of Python programs: a whole small run, what comes back, and what is refused."""

from __future__ import annotations

import copy
import doctest
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import optpipe
from optpipe import models, store
from optpipe import recipe as recipes
from optpipe.api import optimizing, running
from optpipe.report import markdown
from optpipe.types import Event

ROOT = Path(__file__).resolve().parents[1]
HALF = [0.5, 0.5, 0.5]
# Both blocks go, so that the plan does not hang on what is timed.
TABLES: dict[str, dict[str, object]] = {
    "budget": {"drop_blocks": 2},
    "target": {"batch": 8, "threads": 1},
    "timing": {"tolerance": 0.5, "budget_s": 0.05, "final_budget_s": 0.05, "drift": 1000},
    "recover": {"steps": 10, "batch": 8},
    "export": {"precisions": ["fp32"]},
}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, classes: int, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        found: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return found


class Doubled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def make(classes: int = 4) -> nn.Module:
    """The architecture by name: "test_api:make"."""
    return Net(classes)


def doubled(classes: int = 4) -> nn.Module:
    return Doubled(classes)


def noise(count: int, seed: int, size: int = 16) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Net(4).train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def optimize(network: nn.Module | str, out: Path, **changed: Any) -> optpipe.Result:
    """The one small run of this file, or another."""
    arguments: dict[str, Any] = {
        "calibration": noise(20, seed=1),
        "mean": HALF,
        "std": HALF,
        "tables": TABLES,
        **changed,
    }
    return optpipe.optimize(network, out=out, **arguments)


@pytest.fixture(scope="module")
def result(network: nn.Module, runs: Path) -> optpipe.Result:
    return optimize(network, runs / "live", calibration=noise(20, seed=1))


@pytest.fixture(scope="module")
def named(network: nn.Module, runs: Path) -> optpipe.Result:
    return optimize(
        network,
        runs / "named",
        evaluation=noise(6, seed=3),
        evaluation_labels=[0, 1, 2, 3, 0, 1],
        architecture="test_api:make",
        classes=4,
    )


# ---------------------------------------------------------------- what comes back


def test_a_live_module_is_optimized_and_left_as_it_is(network: nn.Module, runs: Path) -> None:
    before, digest = copy.deepcopy(network.state_dict()), models.weights_digest(network)
    result = optimize(network, runs / "live")
    assert network.training
    assert models.weights_digest(network) == digest
    assert network.state_dict().keys() == before.keys()
    assert result.report.plan.drop_blocks == ("blocks.0", "blocks.1")
    assert result.report.model == "live:Net"


def test_a_result_prints_as_the_command_line_ends(result: optpipe.Result) -> None:
    assert str(result) == "\n".join(markdown.summary(result.report, str(result.folder)))
    assert "  dropped     blocks.0 blocks.1\n" in str(result)
    assert str(result).endswith("/live/report.md")


def test_the_model_of_a_result_computes_what_its_engine_does(result: optpipe.Result) -> None:
    import onnxruntime

    images = result.preprocess(noise(8, seed=2))
    with torch.inference_mode():
        expected = result.model(images).numpy()
    assert not result.model.training
    assert result.model is result.model
    assert result.engine == result.onnx
    session = onnxruntime.InferenceSession(str(result.engine), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_fifth_of_the_images_is_held_out_where_no_others_are_given(result: optpipe.Result) -> None:
    assert result.report.data.calibration_count == 16
    assert result.report.data.evaluation_count == 4
    assert result.report.result.quality.metric == "agreement"


def test_the_same_call_again_reads_the_run_back(network: nn.Module, result: optpipe.Result) -> None:
    events: list[Event] = []
    again = optimize(network, result.folder, on_event=events.append)
    assert again == result
    stages = [event.detail for event in events if event.kind == "stage"]
    assert stages == ["reused"] * 6


def test_other_images_or_weights_are_another_run(network: nn.Module, result: optpipe.Result) -> None:
    with pytest.raises(optpipe.UsageError, match=r"holds another run \(it differs in data\.calibration"):
        optimize(network, result.folder, calibration=noise(20, seed=7))
    with pytest.raises(optpipe.UsageError, match=r"holds another run \(it differs in model\.weights"):
        optimize(Net(4), result.folder)


def test_without_a_name_loading_needs_the_architecture_again(result: optpipe.Result) -> None:
    with pytest.raises(optpipe.UsageError, match=r"live module.*optpipe\.load\(run, model=module\)"):
        optpipe.load(result.folder)
    loaded = optpipe.load(result.folder, model=Net(4))
    assert models.weights_digest(loaded) == models.weights_digest(result.model)


@pytest.mark.parametrize("other", [Net(4, channels=8), nn.Sequential(nn.Conv2d(3, 4, 3))])
def test_another_architecture_is_refused(result: optpipe.Result, other: nn.Module) -> None:
    with pytest.raises(optpipe.UsageError):
        optpipe.load(result.folder, model=other)


def test_with_a_name_nothing_is_needed_to_load_it(named: optpipe.Result) -> None:
    assert named.report.model == "test_api:make"
    assert named.report.result.quality.metric == "top1"
    loaded = optpipe.load(named.folder)
    assert models.weights_digest(loaded) == models.weights_digest(named.model)


def test_what_a_program_held_lies_beside_the_run(network: nn.Module, result: optpipe.Result) -> None:
    beside = result.folder.with_name("live.inputs")
    images = [np.load(path)["images"] for path in beside.glob("calibration-*.npz")]
    assert any(np.array_equal(one, noise(20, seed=1)) for one in images)
    frozen = tomllib.loads((result.folder / store.RECIPE).read_text())
    stored = models.load_model(
        models.ModelSpec("test_api:make", weights=frozen["model"]["weights"], classes=4), Path()
    )
    assert models.weights_digest(stored) == models.weights_digest(network)


# ---------------------------------------------------------------- a recipe


def test_a_mapping_is_the_same_recipe_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "recipes")
    file = recipes.load(ROOT / "recipes" / "practise.toml", ["budget.latency_reduction=0.3"])
    tables = tomllib.loads((ROOT / "recipes" / "practise.toml").read_text())
    kept = copy.deepcopy(tables)
    mapping = running.load(tables, ["budget.latency_reduction=0.3"])
    assert tables == kept
    assert mapping.folder == file.folder
    assert mapping.frozen({}, {}) == file.frozen({}, {})
    assert mapping.run.name == "practise"
    named = running.load({**tables, "method": {"name": "filters"}}, ())
    assert named.run.name == "filters"


@pytest.mark.parametrize("kind", ["file", "mapping"])
def test_a_named_run_is_that_of_a_recipe(named: optpipe.Result, kind: str) -> None:
    file = named.folder / store.RECIPE
    recipe = str(file) if kind == "file" else tomllib.loads(file.read_text())
    events: list[Event] = []
    again = optpipe.run(recipe, out=named.folder, on_event=events.append)
    assert again == named
    assert [event.detail for event in events if event.kind == "stage"] == ["reused"] * 6


def test_a_recipe_that_is_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        optpipe.OptpipeError, match=r"<mapping>: \[budgt\]: unknown table; did you mean budget"
    ):
        optpipe.run({"budgt": {}})
    with pytest.raises(optpipe.UsageError, match=r"none\.toml: there is no such recipe"):
        optpipe.run(tmp_path / "none.toml")


def test_on_the_gpu_the_target_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[recipes.Recipe] = []

    def stop(recipe: recipes.Recipe, module: nn.Module | None = None) -> None:
        seen.append(recipe)
        raise optpipe.MissingError("no GPU")

    monkeypatch.setattr("optpipe.preparation.prepare", stop)
    with pytest.raises(optpipe.MissingError):
        optpipe.run(ROOT / "recipes" / "practise.toml", gpu=True)
    with pytest.raises(optpipe.MissingError):
        optpipe.optimize("zoo:resnet20_cifar", "images", "others", mean=HALF, std=HALF, gpu=True)
    assert [recipe.target.device for recipe in seen] == ["cuda", "cuda"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"calibration": noise(4, 0).astype(np.float32)},
            r"calibration is float32 of shape \(4, 16, 16, 3\)",
        ),
        ({"calibration": torch.zeros(4, 16, 16, 3)}, "calibration is a Tensor; give a uint8 array"),
        ({"calibration": noise(4, 0)[0, 0]}, r"calibration is uint8 of shape \(16, 3\)"),
        ({"calibration": noise(1, 0)}, "1 images cannot be split"),
        ({"labels": [0, 1]}, r"labels of calibration are int64 of shape \(2,\).*\(20,\)"),
        ({"labels": np.zeros(20)}, "labels of calibration are float64"),
        ({"calibration": "images/", "labels": [0]}, "images/ is no array"),
        ({"calibration": "absent/"}, "absent: no such file or folder"),
        ({"calibration": "synthesize", "size": (16, 16)}, r"count"),
        ({"evaluation_labels": [0]}, "there are no evaluation images"),
        ({"classes": 4}, "classes: a module has its own"),
        ({"weights": "w.safetensors"}, r"weights = 'w\.safetensors': a module has its own"),
        (
            {"architecture": "test_api:doubled"},
            r'"test_api:doubled": .* computes something else \(their logits',
        ),
        ({"architecture": "zoo:resnet20_cifar"}, "do not fit 'zoo:resnet20_cifar'"),
        ({"method": "practice"}, r'\[method\] name = "practice": there is no such method; did you mean'),
        ({"target": "onnx"}, r'\[target\] backend = "onnx": there is no such backend'),
        ({"latency_reduction": 22.0, "tables": {}}, r"<optimize>: \[budget\] latency_reduction = 22\.0"),
        ({"tables": {"recovr": {}}}, r"<optimize>: \[recovr\]: unknown table; did you mean recover"),
        ({"mean": [0.5]}, r"preprocess mean = \[0\.5\]: 1 values, but the network takes 3 channels"),
        ({"resize": "crup"}, r"<optimize>: \[data\.preprocess\] resize"),
    ],
)
def test_what_cannot_be_used_is_told_by_its_keyword(
    network: nn.Module, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(optpipe.UsageError, match=message):
        optimize(network, tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


def test_a_module_of_another_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(optpipe.UsageError, match=r"stem\.weight is torch\.float16; give the network in fp32"):
        optimize(Net(4).half(), tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model is a NoneType; give a torch.nn.Module, or the name of a network"),
        (nn.DataParallel(Net(4)), r"model is a DataParallel; give the network in it: model\.module"),
        (torch.compile(Net(4)), r"model is a OptimizedModule; .*: model\._orig_mod"),
    ],
    ids=["none", "parallel", "compiled"],
)
def test_what_is_no_bare_network_is_refused(tmp_path: Path, model: Any, message: str) -> None:
    with pytest.raises(optpipe.UsageError, match=message):
        optimize(model, tmp_path / "run")


def test_a_name_takes_no_architecture(tmp_path: Path) -> None:
    with pytest.raises(optpipe.UsageError, match=r'model = "test_api:make" is a name already'):
        optimize("test_api:make", tmp_path / "run", architecture="test_api:make")


# ---------------------------------------------------------------- the package itself


def test_importing_the_package_is_light_and_shows_what_it_has() -> None:
    code = (
        "import sys, optpipe\n"
        "assert issubclass(optpipe.UsageError, optpipe.OptpipeError)\n"
        "assert {'run', 'optimize', 'load', 'preprocess', 'Result'} <= set(dir(optpipe))\n"
        "heavy = {'torch', 'numpy', 'onnx', 'pydantic', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert optpipe.run.__doc__ and optpipe.optimize.__doc__\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'optpipe' has no attribute 'optimise'"):
        optpipe.optimise  # type: ignore[attr-defined]  # noqa: B018


@pytest.fixture
def beside_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    for name in ("calibration_data", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    return lambda: monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_of_the_docstring_runs(beside_the_data: Callable[[], None]) -> None:
    beside_the_data()
    found = doctest.testmod(optimizing)
    assert (found.failed, found.attempted) == (0, 11)
