"""Three dimensions through all six stages: on one network by its latency, on others by their MACs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Call
from numpy.typing import NDArray
from onnx import shape_inference
from whole_runs import Ran, forget, interrupt, recovered_sha256, take, write_images

import optpipe
from optpipe import graph, models, preparation, store, timing, tune
from optpipe import recipe as recipes
from optpipe.backends import onnxruntime
from optpipe.deploy.bundle import open_bundle, verify
from optpipe.errors import RunError, UsageError
from optpipe.lab import further
from optpipe.methods.three_d import predictor, space
from optpipe.models import ModelSpec
from optpipe.report import markdown
from optpipe.types import DeviceState, Engine, Event, Plan, Sample, Session, Table, Target

NETWORK = """
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def make(classes):
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = nn.Sequential(*(Block() for _ in range(5)))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes))
"""
RECIPE = """
[model]
name = "{model}"
classes = {classes}

[data]
calibration = {{ source = "calibration.npz" }}
evaluation = {{ source = "evaluation.npz" }}
preprocess = {{ mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25], size = [{size}, {size}] }}

[target]
batch = 4
threads = 1

[export]
precisions = ["fp32"]

[timing]
tolerance = 0.5
budget_s = 0.02
final_budget_s = 0.02
drift = 1000

[method]
name = "three_d"
rounds = 2
epochs = 0.5

[recover]
epochs = 1
batch = 8

[budget]
{budget}

[run]
checkpoint_every = 1
"""
# (1, 1, 1), two rounds along each of three dimensions, one point between each two and one between all.
TRAININGS = 1 + 2 * 3 + 3 + 1


def write_home(
    home: Path, *, model: str, classes: int = 4, size: int = 16, budget: str = "macs_reduction = 0.5"
) -> None:
    write_images(home / "calibration.npz", 10 * classes, seed=1, size=size, classes=classes)
    write_images(home / "evaluation.npz", 12, seed=2, size=size, classes=classes)
    recipe = RECIPE.format(model=model, classes=classes, size=size, budget=budget)
    (home / "three_d.toml").write_text(recipe, encoding="utf-8")


def prepare(home: Path, *overrides: str) -> preparation.Setup:
    return preparation.prepare(recipes.load(home / "three_d.toml", overrides))


def column(shown: Table, name: str) -> list[object]:
    return [row[shown.columns.index(name)] for row in shown.rows]


# ---------------------------------------------------------------- a clock and a critic without noise


@dataclass
class Paced:
    """An engine that computes what it does, and takes the time that its convolutions' MACs say."""

    session: Session
    ms: float
    headline: str = "Latency"
    notes: tuple[str, ...] = ()

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.session.run(images)

    def sample(self) -> Sample:
        return Sample(compute_ms=self.ms)

    def state(self) -> DeviceState | None:
        return None

    def close(self) -> None:
        self.session.close()


def conv_macs(path: Path) -> int:
    """The MACs of a file's convolutions for one image."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    shown = shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {
        value.name: [one.dim_value for one in value.type.tensor_type.shape.dim] for value in shown.value_info
    }
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in shown.initializer}
    convs = [node for node in shown.node if node.op_type == "Conv"]
    return sum(sizes[node.input[1]] * int(np.prod(shapes[node.output[0]][2:])) for node in convs)


def load_paced(load: Callable[[Engine, Target], Session], engine: Engine, target: Target) -> Session:
    return Paced(load(engine, target), ms=0.1 + conv_macs(engine.path) / 1e6)


@pytest.fixture(scope="module", autouse=True)
def without_noise() -> Iterator[None]:
    """Engines take the time of their MACs, and accuracies are highest half way down every dimension.

    Networks of so few steps know nothing, and what they score would put the optimum anywhere.
    """

    def told(
        points: NDArray[np.float64],
        values: NDArray[np.float64],
        rank: int,
        degree: int,
        seed: int,
        monotone: bool,
    ) -> predictor.Predictor:
        assert ((values >= 0) & (values <= 1)).all()
        half_way = points[-1]
        # Such accuracies rise where more is taken out, which no monotone fit would follow.
        made_up = np.prod(1 - (points - half_way) ** 2, axis=1)
        return fit(points, made_up, rank, degree, seed, monotone=False)

    fit = predictor.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "load", partial(load_paced, onnxruntime.load))
        patch.setattr(predictor, "fit", told)
        yield


# ---------------------------------------------------------------- by latency


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline_three_d")
    (folder / "network_of_one_stage.py").write_text(NETWORK, encoding="utf-8")
    write_home(folder, model="network_of_one_stage:make", budget="latency_reduction = 0.4")
    return folder


@pytest.fixture(scope="module")
def setup(home: Path) -> preparation.Setup:
    return prepare(home)


@pytest.fixture(scope="module")
def finished(home: Path, setup: preparation.Setup) -> Ran:
    """A run that nothing interrupted."""
    return take(setup, home / "finished")


def trained(events: list[Event], detail: str) -> list[object]:
    """The keys of the candidates that were trained, or read from the run's own folder."""
    told = [event for event in events if event.kind == "trial" and event.name.startswith("trained ")]
    return [dict(event.fields)["key"] for event in told if event.detail == detail]


def count_steps(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that every training step is added to."""
    steps: list[int] = []

    def counted(count: int, batch: int, seed: int, step: int) -> list[int]:
        steps.append(step)
        return batch_indices(count, batch, seed, step)

    batch_indices = tune.batch_indices
    patch.setattr(tune, "batch_indices", counted)
    return steps


@pytest.mark.slow
def test_the_result_takes_something_off_each_dimension_and_meets_the_budget(
    finished: Ran, setup: preparation.Setup
) -> None:
    report = finished.report
    assert (report.method, report.budget.met, report.warnings) == ("three_d", True, ())
    assert report.plan.drop_blocks and report.plan.keep_channels and report.plan.input_hw
    ratio = report.result.latency.ratio_to_original
    assert ratio is not None and ratio <= 0.6
    result = optpipe.load(finished.folder)
    shape = setup.at(report.plan).shape
    assert graph.count(graph.trace(result, shape), shape) == (report.result.parameters, report.result.macs)
    labels = setup.evaluation.labels
    assert labels is not None
    right = (tune.logits(result, setup.at(report.plan).evaluation()).argmax(1) == labels).float().mean()
    assert report.result.quality.value == pytest.approx(float(right))


@pytest.mark.slow
def test_the_bundle_takes_images_of_the_plans_size(finished: Ran) -> None:
    folder, manifest = open_bundle(finished.folder)
    size = finished.report.plan.input_hw
    assert size is not None and size < (16, 16)
    assert manifest.target.input_shape == (3, *size)
    assert manifest.preprocess.size == size
    assert verify(finished.folder) == []
    shapes = onnx.load(folder / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [one.dim_value for one in shapes][1:] == [3, *size]


@pytest.mark.slow
def test_the_report_shows_what_the_search_saw(finished: Ran) -> None:
    report, shown = finished.report, {table.title: table for table in finished.report.tables}
    assert list(shown) == [
        "Discrimination of blocks",
        "Ratios of channels on this target",
        "The optimum, predicted and built",
        "Accuracy along each dimension",
        "Accuracy predictors",
        "The surface of the latency",
    ]
    assert len(shown["Accuracy along each dimension"].rows) == TRAININGS
    assert column(shown["Discrimination of blocks"], "verdict").count("dropped") == len(
        report.plan.drop_blocks
    )
    assert column(shown["The optimum, predicted and built"], "verdict").count("chosen") == 1
    text = (finished.folder / "report.md").read_text(encoding="utf-8")
    paths = markdown.figure_paths(report.figures)
    assert len(paths) == 2
    for path in paths:
        assert f"]({path})" in text
        assert (finished.folder / path).read_text(encoding="utf-8").startswith("<svg ")
    assert all(title in text for title in shown)


@pytest.mark.slow
def test_a_round_starts_where_the_last_one_ended_and_no_candidate_is_trained_twice(finished: Ran) -> None:
    keys = trained(finished.events, "computed")
    assert len(keys) == len(set(keys)) == TRAININGS
    assert trained(finished.events, "reused") == []
    for key in keys:
        assert (finished.folder / "trials" / str(key) / "weights.safetensors").is_file()
    assert not list(finished.folder.glob("trials/*/checkpoint*"))


@pytest.mark.slow
def test_a_finished_run_given_again_computes_nothing(finished: Ran, setup: preparation.Setup) -> None:
    again = take(setup, finished.folder)
    assert again.report == finished.report
    assert again.details("stage") == [(stage, "reused") for stage in store.STAGES]
    assert again.details("trial") == again.details("progress") == []


@pytest.mark.slow
def test_a_search_given_again_is_answered_from_the_disk(
    finished: Ran, setup: preparation.Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = finished.choice
    forget(finished.folder, "analyze")
    interrupt(monkeypatch, tune, "train", 0)
    interrupt(monkeypatch, timing, "paired", 0)
    again = take(setup, finished.folder)
    assert {detail for _, detail in again.details("trial")} == {"reused"}
    assert again.choice == choice
    assert again.details("stage")[3:] == [(stage, "reused") for stage in store.STAGES[2:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "after", "done"),
    # A training has two steps, the first of them stored: the sixth training is stopped before its second.
    [(tune, "train", 6, 6), (tune, "batch_indices", 11, 5), (timing, "paired", 21, 0)],
    ids=["between trainings", "in a training", "in the timings"],
)
def test_a_search_that_was_stopped_ends_as_one_that_was_not(
    home: Path, tmp_path: Path, finished: Ran, setup: preparation.Setup, owner: object, name: str, after: int,
    done: int,
) -> None:  # fmt: skip
    # In the home, timings come from the cache that the finished run filled; trainings never do.
    folder = (tmp_path if name == "paired" else home) / f"stopped by {name}"
    before, then = list[Event](), list[Event]()
    with pytest.MonkeyPatch.context() as patch:
        steps = count_steps(patch)
        with pytest.MonkeyPatch.context() as stopping:
            interrupt(stopping, owner, name, after)
            with pytest.raises(KeyboardInterrupt):
                take(setup, folder, events=before)
        assert not (folder / "02-analyze" / "result.json").exists()
        again = take(setup, folder, events=then)
    once, rest = trained(before, "computed"), trained(then, "computed")
    assert len(once) == done
    assert trained(then, "reused") == once
    assert once + rest == trained(finished.events, "computed")
    assert len(steps) == 2 * TRAININGS + again.report.recover.steps
    assert again.choice == finished.choice
    assert recovered_sha256(folder) == recovered_sha256(finished.folder)


@pytest.mark.slow
def test_two_dimensions_leave_the_third_whole(home: Path, tmp_path: Path) -> None:
    ran = take(prepare(home, 'method.dimensions=["depth", "width"]'), home / "depth and width")
    plan = ran.report.plan
    assert ran.report.budget.met
    assert plan.drop_blocks and plan.keep_channels and plan.input_hw is None
    assert len(trained(ran.events, "computed")) == 1 + 2 * 2 + 1
    assert open_bundle(ran.folder)[1].target.input_shape == (3, 16, 16)
    assert len(markdown.figure_paths(ran.report.figures)) == 2


@pytest.mark.slow
def test_smaller_images_alone_are_no_smaller_than_the_budget_needs(home: Path) -> None:
    ran = take(prepare(home, 'method.dimensions=["resolution"]'), home / "resolution")
    plan = ran.report.plan
    assert ran.report.budget.met
    assert plan == Plan(input_hw=plan.input_hw) and plan.input_hw is not None
    assert trained(ran.events, "computed") == []
    assert open_bundle(ran.folder)[1].target.input_shape == (3, *plan.input_hw)
    original, parts = graph.inspect(ran.setup.original, (3, 16, 16)), plan.input_hw[0] + 1
    larger = graph.count(ran.setup.original, (3, parts, parts))[1]
    assert larger > 0.6 * original.macs


@pytest.mark.slow
def test_a_budget_out_of_reach_says_what_can_be_reached(home: Path) -> None:
    setup = prepare(home, "budget.latency_reduction=0.99", 'method.dimensions=["depth"]')
    with pytest.raises(RunError, match=r"the most that depth alone can do leaves \d+\.\d% of the latency"):
        take(setup, home / "out of reach")


# ---------------------------------------------------------------- other networks


OTHERS = {
    "densenet": ("zoo:densenet40_cifar", 4, 16, "dense"),
    "vgg": ("zoo:vgg11_cifar", 4, 32, "plain"),
    "efficientnet": ("torchvision:efficientnet_b0", 10, 32, "residual"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_go_through_all_stages(tmp_path: Path, name: str) -> None:
    model, classes, size, kind = OTHERS[name]
    write_home(tmp_path, model=model, classes=classes, size=size)
    setup = prepare(tmp_path)
    assert {unit.kind for unit in setup.graph.units} == {kind}
    ran = take(setup, tmp_path / "run")
    report = ran.report
    assert report.budget.met and report.result.macs <= 0.5 * report.original.macs
    assert report.plan.drop_blocks and report.plan.keep_channels and report.plan.input_hw
    assert len(trained(ran.events, "computed")) == TRAININGS
    shape = setup.at(report.plan).shape
    result = graph.trace(optpipe.load(ran.folder), shape)
    assert graph.count(result, shape) == (report.result.parameters, report.result.macs)
    assert verify(ran.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("zoo:resnet20_cifar", 16),
        ("zoo:densenet40_cifar", 16),
        ("zoo:vgg11_cifar", 32),
        ("torchvision:efficientnet_b0", 32),
        ("torchvision:resnet50", 32),
    ],
)
def test_channel_groups_keep_their_names_when_units_of_depth_go(model: str, size: int) -> None:
    shape = (3, size, size)
    original = graph.trace(models.load_model(ModelSpec(model, classes=4)), shape)
    widths = graph.width_map(original, shape)
    units = [unit.name for unit in graph.inspect(original, shape).units]
    before = {group.name: group.channels for group in widths.groups}
    kept = space.keep(widths, graph.channel_scales(original, widths), 0.5)
    for gone in (units[::2], units):
        shallow = graph.apply(original, Plan(tuple(gone)), shape)
        left = {group.name: group.channels for group in graph.width_map(shallow, shape).groups}
        assert left == {group: before[group] for group in left}
        assert len(left) < len(before) or "resnet" in model
        whole = Plan(tuple(gone), tuple((group, own) for group, own in kept if group in left))
        nested = graph.apply(shallow, further(Plan(tuple(gone)), whole), shape)
        at_once = graph.apply(original, Plan(tuple(gone), kept), shape)
        assert [(path, own.shape) for path, own in nested.state_dict().items()] == [
            (path, own.shape) for path, own in at_once.state_dict().items()
        ]
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(nested(images), at_once(images))


# ---------------------------------------------------------------- what no search can be made of


FLAT = """
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


def make(classes):
    stem, head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16 * 16, classes)
    return nn.Sequential(stem, Block(), nn.Flatten(), head)
"""


def refused(call: Call, home: Path, *overrides: str) -> str:
    """The one line that a recipe is refused with."""
    words = [word for override in overrides for word in ("--set", override)]
    code, out, err = call("run", home / "three_d.toml", "--out", home / "run", *words)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    (line,) = [line for line in lines if line.startswith("Error: ")]
    assert line == lines[-1]
    return line


def test_images_without_labels_are_refused_before_anything_is_written(optpipe: Call, tmp_path: Path) -> None:
    write_home(tmp_path, model="zoo:resnet20_cifar")
    for name in ("calibration", "evaluation"):
        with np.load(tmp_path / f"{name}.npz") as file:
            images = file["images"]
        np.savez(tmp_path / f"{name}.npz", images=images)
    line = refused(optpipe, tmp_path)
    assert "[method] name = 'three_d': needs labelled calibration images" in line
    assert not (tmp_path / "run").exists()


def test_a_network_of_one_size_is_refused_with_what_is_left(optpipe: Call, tmp_path: Path) -> None:
    (tmp_path / "flat_headed_network.py").write_text(FLAT, encoding="utf-8")
    write_home(tmp_path, model="flat_headed_network:make")
    line = refused(optpipe, tmp_path)
    assert "three_d: the network takes images of one size: an image of 12x12 fails at " in line
    assert line.endswith('set [method] dimensions = ["depth", "width"]')
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.dimensions=[]"], "[method] dimensions = []: name at least one"),
        (['method.dimensions=["hight"]'], "dimensions"),
        (["method.rounds=0"], "[method] rounds = 0: must be at least 1"),
        (["method.round=3"], "[method] round = 3: unknown key; did you mean rounds?"),
        (["data.calibration.count=5"], "three_d needs at least two of each"),
    ],
)
def test_a_recipe_of_no_search_is_refused_before_anything_is_written(
    optpipe: Call, tmp_path: Path, overrides: list[str], words: str
) -> None:
    write_home(tmp_path, model="zoo:resnet20_cifar")
    line = refused(optpipe, tmp_path, *overrides)
    assert words in line
    assert not (tmp_path / "run").exists()


def test_a_budget_in_blocks_is_refused_before_anything_is_written(optpipe: Call, tmp_path: Path) -> None:
    write_home(tmp_path, model="zoo:resnet20_cifar", budget="drop_blocks = 2")
    line = refused(optpipe, tmp_path)
    assert line.endswith(
        "three_d weighs blocks against channels and pixels; give latency_reduction, latency_ms, "
        "macs_reduction or parameters_reduction"
    )
    assert not (tmp_path / "run").exists()


def test_a_recovery_that_takes_no_labels_is_refused_before_anything_is_written(
    optpipe: Call, tmp_path: Path
) -> None:
    write_home(tmp_path, model="zoo:resnet20_cifar")
    line = refused(optpipe, tmp_path, "recover.name=practise")
    assert '[recover] loss = "mimic": three_d trains on labels' in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_validation_images_score_and_the_original_teaches(tmp_path: Path) -> None:
    (tmp_path / "network_of_one_stage.py").write_text(NETWORK, encoding="utf-8")
    write_home(tmp_path, model="network_of_one_stage:make")
    write_images(tmp_path / "validation.npz", 8, seed=5)
    words = ("data.validation.source=validation.npz", "recover.teachers=single", "method.rounds=1")
    run = tmp_path / "run"
    first = take(prepare(tmp_path, *words), run)
    data = first.report.data
    assert (data.calibration_count, data.validation_count, data.evaluation_count) == (40, 8, 12)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "Calibration: 40 images; validation: 8 others; evaluation: 12 others." in text
    assert f"- validation images: `{data.validation_sha256}`" in text
    origin = open_bundle(run)[1].origin
    assert len(origin.validation_images) == 8 and origin.validation_images[0].startswith("validation.npz[")
    assert 'source = "validation.npz"' in (run / "recipe.toml").read_text(encoding="utf-8")
    shown = next(table for table in first.report.tables if table.title == "Accuracy along each dimension")
    accuracies = [float(str(value)) for value in column(shown, "accuracy")]
    assert all(8 * one == round(8 * one) for one in accuracies)
    # One bank of the original's logits, which stays with the run.
    assert len(list(run.glob("trials/*/teacher-0.npy"))) == 1
    forget(run, "analyze")
    again = take(prepare(tmp_path, *words), run)
    assert {detail for _, detail in again.details("trial")} == {"reused"}
    write_images(tmp_path / "validation.npz", 8, seed=6)
    with pytest.raises(UsageError, match="was begun with other validation data"):
        take(prepare(tmp_path, *words), run)
