"""The landscape of a finished run: what is measured on what, what is written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optpipe import deploy, graph, landscape, pipeline, preparation, store, survey
from optpipe import recipe as recipes
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.report import figures
from optpipe.results import Inputs
from optpipe.types import Event, Fingerprint, Plan, Target

NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def make():
    return Net()
"""
RECIPE = """
[model]
name = "network_with_a_landscape:make"

[data]
calibration = { source = "calibration.npz" }
evaluation = { source = "evaluation.npz" }
preprocess = { mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25] }

[target]
batch = 4
threads = 1

[export]
precisions = ["fp32"]

[timing]
tolerance = 0.5
budget_s = 0.05
final_budget_s = 0.05
drift = 1000

[method]
name = "practise"
fast_images = 8

[recover]
steps = 2
batch = 4

[budget]
drop_blocks = 1

[run]
name = "small"
seed = 3
"""
SHAPE = (3, 8, 8)
PLAN = Plan(drop_blocks=("blocks.0",))
FEW = survey.Settings(images=2, points=3, iterations=3, grid=3)
OPTIONS = ("--images", 2, "--points", 3, "--iterations", 3, "--grid", 3)
NAMES = ("original", "pruned", "result")

Call = Callable[..., tuple[int, str, str]]


@dataclass
class Made:
    """A run's folder, with what a finished run left of its networks, and what it was made from."""

    run: Path
    home: Path
    calibration: ImageSet
    networks: dict[str, nn.Module]


def write_images(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *SHAPE[1:], 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 4)


def write_home(home: Path) -> None:
    (home / "network_with_a_landscape.py").write_text(NETWORK)
    write_images(home / "calibration.npz", 14, seed=1)
    write_images(home / "evaluation.npz", 8, seed=2)
    (home / "recipe.toml").write_text(RECIPE)


def write_run(home: Path, run: Path, *overrides: str) -> Made:
    """What the stages leave for a survey, without searching, training or building an engine."""
    setup = preparation.prepare(recipes.load(home / "recipe.toml", overrides))
    pruned = graph.apply(setup.original, PLAN, SHAPE)
    result = graph.apply(setup.original, PLAN, SHAPE)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    run.mkdir()
    (run / "recipe.toml").write_text(setup.frozen)
    inputs = Inputs(setup.model_digest, setup.calibration.digest, setup.evaluation.digest)
    (run / "inputs.json").write_text(store.to_json(inputs))
    store.save_tensors(run / "03-prune" / "weights.safetensors", pruned.state_dict())
    saved = deploy.Saved(setup.recipe.model, str(home), PLAN, SHAPE, setup.recipe.data.preprocess)
    origin = deploy.Origin(Fingerprint("a processor", "an OS", (), 1), "0" * 64, 3, ())
    target = Target("onnxruntime", 4, SHAPE, threads=1)
    (run / "deploy").mkdir()
    (run / "deploy" / "model.onnx").write_bytes(b"nobody opens it")
    engine = deploy.BundledEngine("fp32", "onnxruntime", "model.onnx", "model.onnx", 0.0)
    deploy.write_bundle(run / "deploy", result, saved, target, origin, [engine])
    networks: dict[str, nn.Module] = {"original": setup.original, "pruned": pruned, "result": result}
    return Made(run, home, setup.calibration, networks)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    (tmp_path / "home").mkdir()
    write_home(tmp_path / "home")
    return write_run(tmp_path / "home", tmp_path / "run")


def ignore(event: Event) -> None:
    """Nobody listens."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def batch_loss(network: nn.Module, images: ImageSet) -> float:
    """The cross-entropy in training mode: batch-norm by the statistics of these images."""
    assert images.labels is not None
    with torch.no_grad():
        return float(F.cross_entropy(network.train()(images.batch(slice(None))), images.labels))


# ---------------------------------------------------------------- what comes out


def test_the_command_prints_a_row_for_each_network_and_touches_nothing_else(
    optpipe: Call, made: Made
) -> None:
    before = content(made.run)
    code, out, err = optpipe("landscape", made.run, *OPTIONS)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("small: loss on 8 calibration images of 4 classes, ")
    assert lines[2].split()[:2] == ["network", "loss"]
    assert [line.split()[0] for line in lines[3:6]] == list(NAMES)
    folder = made.run / "landscape"
    assert lines[-1] == f"{folder}: landscape.json, original.svg, pruned.svg, result.svg"
    shown = json.loads((folder / "landscape.json").read_text())
    assert float(lines[3].split()[1]) == pytest.approx(shown["networks"][0]["loss"], rel=1e-3)
    assert "landscape 1/3 pruned" in err
    written = {f"landscape/{name}" for name in ("landscape.json", *(f"{name}.svg" for name in NAMES))}
    after = content(made.run)
    assert set(after) - set(before) == written
    assert {name: after[name] for name in before} == before


def test_the_json_is_the_survey_with_its_settings_residuals_and_seconds(made: Made, tmp_path: Path) -> None:
    found = survey.survey(made.run, FEW, tmp_path / "out", emit=ignore)
    read = store.from_json(survey.Survey, (tmp_path / "out" / "landscape.json").read_bytes())
    assert read == found
    assert (read.schema, read.run, read.seed, read.device) == ("optpipe.landscape/1", "small", 3, "cpu")
    assert (read.settings, read.batch_norm, read.images, read.classes) == (FEW, "batch", 8, 4)
    assert read.seconds > sum(one.seconds for one in read.networks) > 0
    assert not (made.run / "landscape").exists()
    for one in read.networks:
        assert [point.step for point in one.along] == [-0.1, 0.0, 0.1]
        assert one.condition_number == one.along[1].condition_number
        assert one.condition_mean == pytest.approx(sum(point.condition_number for point in one.along) / 3)
        for point in one.along:
            ends = point.extremes
            assert point.condition_number == pytest.approx(abs(ends.smallest / ends.largest))
            scale = max(abs(ends.smallest), abs(ends.largest))
            assert max(ends.smallest_residual, ends.largest_residual) <= one.worst_residual * scale * 1.001
        assert len(one.surface.values) == len(one.surface.values[0]) == 3
        assert one.surface.values[1][1] == pytest.approx(one.loss, rel=1e-5)
        assert one.surface.values[1][0] == pytest.approx(one.along[0].loss, rel=1e-5)


def test_each_network_is_the_runs_own_on_the_images_that_its_seed_draws(made: Made, tmp_path: Path) -> None:
    found = survey.survey(made.run, FEW, tmp_path / "out", emit=ignore)
    images = survey.draw(made.calibration, FEW, seed=3)
    assert found.images_sha256 == images.digest
    assert [one.name for one in found.networks] == list(NAMES)
    for one in found.networks:
        network = made.networks[one.name]
        assert one.parameters == sum(parameter.numel() for parameter in network.parameters())
        assert one.loss == pytest.approx(batch_loss(network, images), rel=1e-4)
    assert found.networks[1].parameters < found.networks[0].parameters
    assert abs(found.networks[1].loss - found.networks[2].loss) > 1e-3


def test_with_enough_iterations_eq_6_is_that_of_the_whole_hessian(made: Made) -> None:
    """Of the classifier alone, which is small enough for every eigenvalue."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    images = made.calibration.batch(slice(None)).mean((2, 3), keepdim=True)
    labels = made.calibration.labels
    assert labels is not None
    settings = dataclasses.replace(FEW, iterations=20, points=1)
    found, _ = survey.examine("result", network, images, labels, settings, seed=0)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        logits = images.flatten(1).double() @ weights[:12].view(4, 3).T + weights[12:]
        return F.cross_entropy(logits, labels)

    here = nn.utils.parameters_to_vector(network.parameters()).detach()
    hessian: torch.Tensor = torch.func.jacrev(torch.func.jacrev(loss))(here)
    values = torch.linalg.eigvalsh(hessian)
    assert found.along[0].extremes.largest == pytest.approx(float(values[-1]), rel=1e-3)
    assert found.along[0].extremes.smallest == pytest.approx(float(values[0]), abs=1e-3 * float(values[-1]))
    assert found.worst_residual <= 1e-3


def test_the_same_run_gives_the_same_landscape(made: Made, tmp_path: Path) -> None:
    both = [survey.survey(made.run, FEW, tmp_path / name, emit=ignore) for name in "ab"]
    for a, b in zip(both[0].networks, both[1].networks, strict=True):
        assert dataclasses.replace(a, seconds=0.0) == dataclasses.replace(b, seconds=0.0)
    for name in NAMES:
        assert (tmp_path / "a" / f"{name}.svg").read_bytes() == (tmp_path / "b" / f"{name}.svg").read_bytes()


def test_the_figures_share_the_limits_of_their_colours(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float] | None] = []
    drawn = figures.surface_svg

    def recording(surface: figures.Grid, title: str, *, limits: tuple[float, float] | None) -> str:
        seen.append(limits)
        return drawn(surface, title, limits=limits)

    monkeypatch.setattr(figures, "surface_svg", recording)
    found = survey.survey(made.run, FEW, tmp_path, emit=ignore)
    every = [v for one in found.networks for row in one.surface.values for v in row if v is not None]
    assert seen == [(min(every), max(every))] * 3
    for one in found.networks:
        root = ElementTree.fromstring((tmp_path / one.figure).read_text())
        assert root.tag.endswith("svg")
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert title is not None and str(title.text).startswith("small: ")


def test_a_loss_without_end_is_null_in_the_json_and_no_limit_of_the_colours() -> None:
    row = (1.0, float("inf"), 2.0)
    steep = landscape.Surface((-1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (row, row, row), "gradient")
    flat = dataclasses.replace(steep, values=((1.0,) * 3,) * 3)
    assert survey._heights(steep).values[0] == (1.0, None, 2.0)
    assert survey._heights(steep).fluctuation is None
    assert survey._limits([steep, flat]) == (1.0, 2.0)
    assert survey._limits([flat]) is None
    nowhere = dataclasses.replace(steep, values=((float("nan"),) * 3,) * 3)
    assert survey._limits([nowhere]) is None


def test_images_are_drawn_evenly_from_the_classes(made: Made) -> None:
    images = made.calibration  # of the classes 4, 4, 3 and 3

    def drawn(count: int, at_most: int, seed: int = 0) -> Counter[int]:
        taken = survey.draw(images, survey.Settings(images=count, at_most=at_most), seed)
        assert taken.labels is not None
        assert len(set(taken.names)) == len(taken)
        return Counter(taken.labels.tolist())

    assert drawn(2, 128) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert drawn(9, 128) == {0: 4, 1: 4, 2: 3, 3: 3}
    assert drawn(2, 4) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert sorted(drawn(3, 10).values()) == [2, 2, 3, 3]
    names = [survey.draw(images, FEW, seed).names for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


# ---------------------------------------------------------------- what is refused


def refused(made: Made, folder: Path | None = None, settings: survey.Settings = FEW) -> str:
    """The message of the UsageError, in one line; nothing was written."""
    before = content(made.run)
    with pytest.raises(UsageError) as error:
        survey.survey(made.run, settings, folder or made.run / "landscape", emit=ignore)
    assert "\n" not in str(error.value)
    assert content(made.run) == before
    assert not (made.run / "landscape").exists()
    return str(error.value)


def test_a_run_without_labels_is_refused_in_one_line(optpipe: Call, made: Made, tmp_path: Path) -> None:
    run = tmp_path / "unlabelled"
    write_run(made.home, run, "data.calibration.labels=false")
    code, out, err = optpipe("landscape", run, *OPTIONS)
    assert (code, out) == (2, "")
    assert err == (
        f"Error: {run}: a loss landscape needs labelled calibration images, and calibration.npz was read "
        "without labels; run the recipe anew with [data.calibration] labels = true\n"
    )
    assert not (run / "landscape").exists()


def test_images_that_have_no_labels_are_told_apart_from_those_read_without(
    made: Made, tmp_path: Path
) -> None:
    with np.load(made.home / "calibration.npz") as file:
        np.savez(made.home / "bare.npz", images=file["images"])
    bare = write_run(made.home, tmp_path / "bare", 'data.calibration.source="bare.npz"')
    assert refused(bare).endswith("bare.npz has no labels; run the recipe anew with labelled images")


def test_a_run_whose_images_are_gone_or_have_changed_is_refused(made: Made) -> None:
    path = made.home / "calibration.npz"
    write_images(path, 14, seed=9)
    assert refused(made).endswith("the calibration images have changed since the run; run the recipe anew")
    path.unlink()
    assert refused(made) == (
        f"{made.run}: its calibration images are needed again: data {path}: no such file or folder"
    )


def test_a_run_whose_original_is_gone_or_has_changed_is_refused(made: Made) -> None:
    path = made.run / "inputs.json"
    inputs = json.loads(path.read_text())
    path.write_text(json.dumps({**inputs, "model": "0" * 64}))
    assert refused(made).endswith("the original's weights have changed since the run; run the recipe anew")
    recipe = made.run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[model]", '[model]\nweights = "gone.pth"'))
    message = refused(made)
    assert message.startswith(f"{made.run}: its original network is needed again: weights ")
    assert message.endswith("gone.pth: no such file")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("recipe.toml", "is no run's folder (no recipe.toml)"),
        ("inputs.json", "inputs.json: is missing; has the run finished?"),
        ("deploy/manifest.json", "holds no deploy bundle (no manifest.json); has the run finished?"),
        ("03-prune/weights.safetensors", "03-prune/weights.safetensors: cannot be read"),
        ("deploy/model.safetensors", "model.safetensors: is missing"),
    ],
)
def test_a_run_that_lacks_a_file_is_refused_by_its_name(made: Made, gone: str, message: str) -> None:
    (made.run / gone).unlink()
    assert message in refused(made)


def test_a_folder_that_cannot_be_made_is_said_before_the_work(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "examine", None)
    (tmp_path / "file").write_text("")
    message = refused(made, tmp_path / "file")
    assert message == f"{tmp_path / 'file'}: cannot be made: File exists; name another with --out"


def test_an_even_number_of_points_is_refused(made: Made) -> None:
    message = refused(made, settings=dataclasses.replace(FEW, points=4))
    assert message == "points = 4: give an odd number, so that one is at the weights"


def test_a_landscape_that_cannot_be_had_names_its_network(made: Made) -> None:
    network = made.networks["pruned"]
    with torch.no_grad():
        network.get_parameter("head.weight").fill_(float("nan"))
    images = made.calibration.batch(slice(None))
    labels = made.calibration.labels
    assert labels is not None
    with pytest.raises(RunError, match="pruned, before recovery: the loss is nan at this point"):
        survey.examine("pruned", network, images, labels, FEW, seed=0)


# ---------------------------------------------------------------- a whole run


@pytest.mark.slow
def test_a_run_from_beginning_to_end_has_a_landscape(
    optpipe: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_home(tmp_path)
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "locks"))
    setup = preparation.prepare(recipes.load(tmp_path / "recipe.toml"))
    pipeline.run(setup, tmp_path / "ran", fresh=False, emit=ignore)
    shutil.move(tmp_path / "ran", tmp_path / "moved")
    code, out, err = optpipe("landscape", tmp_path / "moved", *OPTIONS)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[3:6]] == list(NAMES)
    assert deploy.verify(tmp_path / "moved") == []
    pipeline.run(setup, tmp_path / "moved", fresh=False, emit=ignore)
    assert (tmp_path / "moved" / "landscape" / "landscape.json").is_file()
