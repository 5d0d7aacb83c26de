"""A run whose search leaves several networks: the ensemble in the bundle, its price in the report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from whole_runs import Ran, take, write_images

import optpipe
from optpipe import deploy, graph, preparation, rebuild, store, uncertainty
from optpipe import recipe as recipes
from optpipe.deploy import bundle
from optpipe.errors import RunError, UsageError
from optpipe.pipeline import ensembles
from optpipe.report import build
from optpipe.results import Exported
from optpipe.types import Plan

# Whole runs with real engines: the ensemble itself is in test_ensemble.py.
pytestmark = pytest.mark.slow

NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def make():
    return Net()
"""
# Two copies of the original, each a little off it, in one module; any of their blocks may go.
METHOD = '''
"""Two networks beside the original, without training."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from optpipe.types import Choice, Fit, Fitted, Member, Plan, Start, Tune

NEEDS_LABELS = False
RECOVER = Tune(steps=0)


@dataclass(frozen=True, slots=True)
class Config:
    members: int = 2


class NoObjective:
    def loss(self, which, images):
        raise AssertionError("nothing is trained")

    def state(self):
        return {}

    def restore(self, saved):
        pass


def check(shown, calibration, budget, config, recover, validation=None):
    pass


def search(scene, config):
    def make():
        twins = nn.ModuleDict()
        for number, name in enumerate(("one", "two")):
            twins[name] = copy.deepcopy(scene.model)
            generator = torch.Generator().manual_seed(number)
            for parameter in twins[name].parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        return twins, NoObjective()

    (fitted,) = yield [Fit("twins", "version 1", Tune(steps=0), make)]
    assert isinstance(fitted, Fitted)
    plan, other = Plan(("blocks.0",)), Plan(("blocks.1",))
    members = (
        Member(plan, Start(fitted.key, Plan(), "two.")),
        Member(other, Start(fitted.key, Plan(), "one.")),
    )
    start = Start(fitted.key, Plan(), "one.")
    return Choice(plan, scene.recover, "any will do", start=start, members=members[: config.members])
'''
RECIPE = """
[model]
name = "twice_residual_network:make"

[data]
calibration = { source = "calibration.npz" }
evaluation = { source = "evaluation.npz" }
preprocess = { mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25], size = [16, 16] }

[target]
backend = "onnxruntime"
batch = 8
threads = 1

[export]
precisions = ["fp32"]
uncertainty = true

[timing]
tolerance = 0.5
budget_s = 0.05
final_budget_s = 0.05
drift = 1000

[method]
name = "twins"

[budget]
drop_blocks = 1
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pipeline_uncertainty")
    (folder / "twice_residual_network.py").write_text(NETWORK)
    (folder / "twins_method.py").write_text(METHOD)
    package = folder / "twins-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: twins\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[optpipe.methods]\ntwins = twins_method\n")
    write_images(folder / "calibration.npz", 16, seed=1)
    write_images(folder / "evaluation.npz", 40, seed=2)
    (folder / "twins.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("twins_method", None)


@pytest.fixture(scope="module")
def finished(home: Path) -> Ran:
    return take(preparation.prepare(recipes.load(home / "twins.toml")), home / "finished")


@pytest.fixture
def copied(finished: Ran, tmp_path: Path) -> Path:
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


def outputs(finished: Ran) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the bundle's ensemble says of the evaluation images."""
    images = finished.setup.evaluation.batch(slice(None)).numpy()
    path = finished.folder / "deploy" / "uncertainty.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits, doubt = session.run(["logits", "uncertainty"], {session.get_inputs()[0].name: images})
    return logits, doubt


def test_the_ensemble_is_the_result_with_the_choices_members(finished: Ran) -> None:
    setup = finished.setup
    images = setup.evaluation.batch(slice(None))
    (key,) = [path.parent.name for path in (finished.folder / "trials").glob("*/weights.safetensors")]
    run = store.Run(finished.folder, None)
    shape = setup.target.input_shape
    networks = [optpipe.load(finished.folder)]
    for plan, part in ((("blocks.0",), "two."), (("blocks.1",), "one.")):
        whole = graph.apply(setup.original, Plan(), shape)
        store.load_tensors(whole, run.weights(key), part)
        networks.append(graph.apply(whole, Plan(plan), shape).eval())
    with torch.inference_mode():
        members = torch.stack([torch.softmax(network(images), 1) for network in networks]).numpy()
    expected = uncertainty.decompose(members)
    logits, doubt = outputs(finished)
    np.testing.assert_allclose(np.exp(logits), expected.mean, atol=1e-5)
    np.testing.assert_allclose(doubt[:, 0], expected.aleatoric, atol=1e-4)
    np.testing.assert_allclose(doubt[:, 1], expected.epistemic, atol=1e-4)
    assert expected.epistemic.max() > 1e-3


def test_the_report_says_what_it_costs_to_know(finished: Ran) -> None:
    report = finished.report
    joined, labels = report.ensemble, finished.setup.evaluation.labels
    assert joined is not None and labels is not None
    assert joined.latency is not None and joined.quality is not None and joined.reliability is not None
    logits, doubt = outputs(finished)
    found, sure = uncertainty.probabilities(logits), logits.argmax(axis=1) == labels.numpy()
    assert joined.members == 3
    assert joined.max_abs is not None and max(joined.max_abs) < 1e-3
    assert joined.latency.ratio_ci95 is not None
    assert (
        joined.latency.ratio_to_original is not None and report.result.latency.ratio_to_original is not None
    )
    assert joined.latency.ratio_to_original > report.result.latency.ratio_to_original
    assert joined.quality.value == sure.mean()
    wanted = uncertainty.reliability(found, labels.numpy())
    assert joined.reliability.calibration.error == pytest.approx(wanted.calibration.error, abs=1e-4)
    assert joined.reliability.selective == wanted.selective
    assert joined.by_information == uncertainty.selective_accuracy(doubt[:, 1].astype(np.float64), sure)
    assert (joined.expected_entropy, joined.mutual_information) == pytest.approx(doubt.mean(axis=0), abs=1e-5)
    assert joined.aleatoric_variance == pytest.approx(
        uncertainty.aleatoric_variance(found, labels.numpy()), abs=1e-5
    )
    assert report.warnings == ()
    assert build.read(finished.folder) == report
    text = (finished.folder / "report.md").read_text()
    assert "**The price of knowing.** `uncertainty.onnx` joins 3 networks" in text
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ensemble of 3")]
    assert rows == ["| ensemble of 3", "| ensemble of 3, sure by mutual information"]
    assert (finished.folder / "06-benchmark" / "samples-ensemble.npy").is_file()


def test_the_bundle_verifies_and_is_rebuilt_with_the_ensemble(copied: Path) -> None:
    before = bundle.open_bundle(copied)[1].files["uncertainty.onnx"]
    assert deploy.verify(copied) == []
    rebuild.rebuild(copied, gpu=False, emit=lambda event: None)
    assert deploy.verify(copied) == []
    assert bundle.open_bundle(copied)[1].files["uncertainty.onnx"] == before


def test_the_bundles_runner_tells_how_sure_the_ensemble_is(finished: Ran, home: Path) -> None:
    pixels = np.load(home / "evaluation.npz")["images"]
    np.save(home / "images.npy", pixels)
    done = subprocess.run(
        [
            sys.executable,
            str(finished.folder / "deploy" / "run_engine.py"),
            str(home / "images.npy"),
            "--uncertainty",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["images"]
    found = [(image["expected_entropy"], image["mutual_information"]) for image in told]
    # The run's own order of its images is another than the file's.
    np.testing.assert_allclose(sorted(found), sorted(map(tuple, outputs(finished)[1].tolist())), atol=1e-4)


def test_an_ensemble_whose_engine_cannot_be_built_is_shipped_without_its_price(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RunError("the builder gave up")

    monkeypatch.setattr(ensembles, "_priced", refuse)
    ran = take(preparation.prepare(recipes.load(home / "twins.toml")), tmp_path / "run")
    joined = ran.report.ensemble
    assert joined is not None and joined.latency is None and joined.reliability is None
    assert joined.failed == "the builder gave up"
    assert "the ensemble has no price: the builder gave up" in ran.report.warnings
    assert "What it costs is not known: the builder gave up." in (ran.folder / "report.md").read_text()
    assert deploy.verify(ran.folder) == []
    assert (ran.folder / "deploy" / "uncertainty.onnx").is_file()


def test_a_search_that_leaves_one_network_makes_no_ensemble(home: Path, tmp_path: Path) -> None:
    setup = preparation.prepare(recipes.load(home / "twins.toml", ["method.members=0"]))
    with pytest.raises(UsageError) as error:
        take(setup, tmp_path / "run")
    assert str(error.value) == (
        f"{home}/twins.toml: [export] uncertainty = true: twins left the chosen network alone, and an "
        "ensemble takes several; set it to false, or search with a method that samples networks"
    )
    assert not (tmp_path / "run" / "deploy").exists()


def test_who_does_not_ask_for_it_gets_none(home: Path, tmp_path: Path) -> None:
    setup = preparation.prepare(recipes.load(home / "twins.toml", ["export.uncertainty=false"]))
    ran = take(setup, tmp_path / "run")
    exported = store.Run(ran.folder, None).stage_result("export", Exported)
    assert exported is not None and exported.ensemble is None and ran.report.ensemble is None
    assert "uncertainty.onnx" not in exported.sha256
    assert "price of knowing" not in (ran.folder / "report.md").read_text()
