"""A plan of all three dimensions through the six stages, and what its bundle takes and gives afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import optpipe
from optpipe import (
    bench,
    data,
    deploy,
    graph,
    pipeline,
    plugins,
    preparation,
    quality,
    rebuild,
    store,
    survey,
    tune,
)
from optpipe import recipe as recipes
from optpipe.data import DataSpec, Preprocess
from optpipe.deploy.bundle import open_bundle
from optpipe.errors import UsageError
from optpipe.pipeline import memory
from optpipe.report import schema
from optpipe.results import Analyzed, Pruned
from optpipe.types import (
    Ask,
    Budget,
    Choice,
    Event,
    Images,
    Interim,
    ModelGraph,
    Plan,
    Scene,
    Search,
    Trial,
    Tune,
)

# A whole run with real engines; what the laboratory does at a resolution is in test_lab_resolution.py.
pytestmark = pytest.mark.slow

# Image files of this size are cropped to 32 x 32, or to 24 x 24 where the plan says so.
SOURCE_HW = (40, 36)
WHOLE, REDUCED = (3, 32, 32), (3, 24, 24)
NARROW = (("layer1.0.conv1", tuple(range(0, 16, 2))), ("layer3.2.conv1", tuple(range(40))))
PLAN = Plan(drop_blocks=("layer1.1", "layer2.2"), keep_channels=NARROW, input_hw=(24, 24))
LEARN = Tune(steps=2, batch=6, lr=0.01, loss="labels", trainable="all", augment="shift")
RECIPE = """
[model]
name = "zoo:resnet20_cifar"

[data]
calibration = { source = "calibration.npz" }
evaluation = { source = "evaluation.npz" }

[data.preprocess]
mean = [0.5, 0.4, 0.3]
std = [0.25, 0.25, 0.3]
size = [32, 32]
resize = "crop"

[target]
batch = 4
threads = 1

[export.quantize]
range_methods = ["minmax"]

[timing]
tolerance = 0.5
budget_s = 0.05
final_budget_s = 0.05
drift = 1000

[method]
name = "fixed"

[budget]
latency_reduction = 0.1

[run]
cache = false
"""


@dataclass(frozen=True, slots=True)
class Nothing:
    """No key of a recipe."""


@dataclass
class Fixed:
    """A method whose choice is known beforehand; it asks for its latency and quality."""

    choice: Choice
    asks: bool = True
    trials: list[Trial] = field(default_factory=list)
    Config: type = Nothing
    RECOVER: Tune = LEARN
    NEEDS_LABELS: bool = True

    def check(
        self,
        shown: ModelGraph,
        calibration: Images,
        budget: Budget,
        config: object,
        recover: Tune,
        validation: Images | None = None,
    ) -> None:
        """Anything goes."""

    def search(self, scene: Scene, config: object) -> Search:
        answers = yield [Ask(self.choice.plan, ("latency", "quality"))] if self.asks else []
        self.trials += [answer for answer in answers if isinstance(answer, Trial)]
        return self.choice


@dataclass
class Ran:
    """A finished run, the recipe's setup, and the method that it was made with."""

    setup: preparation.Setup
    folder: Path
    report: schema.Report
    method: Fixed

    @property
    def evaluation(self) -> data.ImageSet:
        """The evaluation images at the plan's resolution, read from their file."""
        home = self.folder.parent
        return data.load_images(
            DataSpec(str(home / "evaluation.npz")),
            Preprocess((0.5, 0.4, 0.3), (0.25, 0.25, 0.3), (24, 24), "crop"),
            3,
        )


def write_home(home: Path) -> None:
    for seed, (name, count) in enumerate((("calibration", 12), ("evaluation", 10))):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (count, *SOURCE_HW, 3), dtype=np.uint8)
        np.savez(home / f"{name}.npz", images=images, labels=np.arange(count) % 10)
    (home / "recipe.toml").write_text(RECIPE)


def prepare(home: Path, method: Fixed, *overrides: str) -> preparation.Setup:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "method", lambda name: method)
        return preparation.prepare(recipes.load(home / "recipe.toml", overrides))


def ignore(event: Event) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resolution")
    write_home(folder)
    return folder


@pytest.fixture(scope="module")
def ran(home: Path) -> Iterator[Ran]:
    method = Fixed(Choice(PLAN, LEARN, "it was said so"))
    setup = prepare(home, method)
    report = pipeline.run(setup, home / "run", fresh=False, emit=ignore)
    yield Ran(setup, home / "run", report, method)


def engine_logits(ran: Ran, name: str) -> NDArray[np.float32]:
    """The logits of a file of the bundle on an engine at the reduced size."""
    target = replace(ran.setup.target, input_shape=REDUCED)
    path = ran.folder / "deploy" / name
    session = ran.setup.backend.load(ran.setup.backend.build(path, target, path.parent), target)
    logits = session.run(ran.evaluation.batch(slice(None)).numpy())
    session.close()
    return logits


# ---------------------------------------------------------------- the stages


def test_the_candidate_is_counted_at_its_resolution_and_the_original_at_its_own(ran: Ran) -> None:
    candidate = graph.apply(ran.setup.original, PLAN, WHOLE)
    expected = graph.count(candidate, REDUCED)
    assert (ran.report.result.parameters, ran.report.result.macs) == expected
    assert (ran.report.original.parameters, ran.report.original.macs) == graph.count(
        ran.setup.original, WHOLE
    )
    (trial,) = ran.method.trials
    assert (trial.parameters, trial.macs) == expected
    assert trial.quality is not None and trial.quality.count == 12
    assert ran.report.result.latency.ratio_to_original is not None
    assert 0 < ran.report.result.latency.ratio_to_original < 1
    assert ran.report.target.input_shape == WHOLE


def test_every_score_is_taken_on_evaluation_images_at_the_plans_resolution(ran: Ran) -> None:
    images = ran.evaluation
    assert images.shape == REDUCED and images.labels is not None
    labels = images.labels.numpy()
    original = tune.logits(ran.setup.original, ran.setup.evaluation).numpy()
    candidate = graph.apply(ran.setup.original, PLAN, WHOLE)
    before = quality.score(tune.logits(candidate, images).numpy(), labels, original, "evaluation")
    pruned = store.Run(ran.folder, None).stage_result("prune", Pruned)
    assert pruned is not None and pruned.quality == before
    result = tune.logits(optpipe.load(ran.folder), images).numpy()
    assert ran.report.result.quality == quality.score(result, labels, original, "evaluation")
    assert ran.report.result.agreement == quality.agreement(result, original, "evaluation")
    fp32, int8 = ran.report.precisions
    assert (fp32.failed, int8.failed) == ("", "")
    assert int8.agreement == quality.agreement(engine_logits(ran, "model.int8.onnx"), original, "evaluation")


def test_recovery_trains_at_the_plans_resolution(ran: Ran) -> None:
    expected = graph.apply(ran.setup.original, PLAN, WHOLE)
    images = data.resized(ran.setup.calibration, (24, 24))
    tune.train(expected, ran.setup.original, images, LEARN, seed=0)
    found = optpipe.load(ran.folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_a_choice_that_would_mimic_at_another_size_is_refused_before_it_is_trained(
    home: Path, ran: Ran
) -> None:
    mimic = replace(LEARN, loss="mimic")
    setup = prepare(home, Fixed(Choice(Plan(input_hw=(24, 24)), mimic, ""), asks=False))
    shutil.copytree(ran.folder, home / "mimic")
    for path in (home / "mimic").glob("0[2-6]-*/result.json"):
        path.unlink()
    with pytest.raises(UsageError, match=r'loss = "mimic" compares .* images of one size.*24x24.*32x32'):
        pipeline.run(setup, home / "mimic", fresh=False, emit=ignore)
    assert store.Run(home / "mimic", None).stage_result("analyze", Analyzed) is None


def test_a_size_above_the_originals_is_refused(home: Path) -> None:
    plan = Plan(input_hw=(40, 32))
    setup = prepare(home, Fixed(Choice(plan, LEARN, "")))
    with pytest.raises(UsageError, match="input_hw is 40x32"):
        setup.at(plan)


def test_at_the_originals_size_a_setup_stays_as_it_is(ran: Ran) -> None:
    for plan in (Plan(), Plan(input_hw=(32, 32))):
        resolved = ran.setup.at(plan)
        assert resolved.calibration() is ran.setup.calibration
        assert resolved.evaluation() is ran.setup.evaluation
        assert resolved.bench() == ran.setup.bench
        assert resolved.preprocess == ran.setup.recipe.data.preprocess


# ---------------------------------------------------------------- the bundle


def test_the_manifest_has_the_reduced_size_and_the_plan_the_originals(ran: Ran) -> None:
    folder, manifest = open_bundle(ran.folder)
    assert manifest.target.input_shape == REDUCED
    assert manifest.preprocess == Preprocess((0.5, 0.4, 0.3), (0.25, 0.25, 0.3), (24, 24), "crop")
    saved = store.from_json(deploy.Saved, (folder / "plan.json").read_bytes())
    assert (saved.input_shape, saved.plan, saved.preprocess) == (WHOLE, PLAN, manifest.preprocess)


def test_the_network_the_engine_and_the_runner_agree_on_images_of_any_size(ran: Ran) -> None:
    with np.load(ran.folder.parent / "evaluation.npz") as file:
        pixels = file["images"]
    network, prepared = optpipe.load(ran.folder), optpipe.preprocess(ran.folder)
    with torch.no_grad():
        found = network(prepared(pixels)).numpy()
    assert prepared(pixels[0]).shape == REDUCED
    # The set is in a random order, its names say which.
    order = [int(name.partition("[")[2].rstrip("]")) for name in ran.evaluation.names]
    scored = engine_logits(ran, "model.onnx")
    np.testing.assert_allclose(found[order], scored, rtol=1e-3, atol=1e-4)
    home = ran.folder.parent
    program = [sys.executable, str(ran.folder / "deploy" / "run_engine.py"), str(home / "evaluation.npz")]
    done = subprocess.run(
        [*program, "--json", "--duration", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["images"]
    best = np.argsort(-scored, axis=1)[:, :5].tolist()
    assert [told[index]["classes"] for index in order] == best
    powers = np.exp(scored.astype(np.float64) - scored.max(axis=1, keepdims=True))
    shares = np.sort(powers / powers.sum(axis=1, keepdims=True))[:, :-6:-1]
    np.testing.assert_allclose([told[index]["probabilities"] for index in order], shares, rtol=1e-5)


def test_engines_are_built_again_at_the_reduced_size(ran: Ran, tmp_path: Path) -> None:
    built = rebuild.rebuild(ran.folder, gpu=False, emit=ignore, out=tmp_path / "again")
    assert [engine.precision for engine in built.engines] == ["fp32", "int8"]
    assert open_bundle(tmp_path / "again")[1].target.input_shape == REDUCED


def test_a_run_is_timed_against_a_model_of_the_original_size(ran: Ran) -> None:
    original = ran.folder / "01-ingest" / "model.onnx"
    found = bench.bench(ran.folder, original, batch=None, threads=None, warmup_ms=1, duration_s=0.05)
    assert found.other is not None
    assert (found.model.target.input_shape, found.other.target.input_shape) == (REDUCED, WHOLE)
    assert found.model.latency.ratio_to_original is not None


def test_a_landscape_shows_each_network_images_of_its_own_size(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}

    def seen(name: str, network: object, images: torch.Tensor, *others: object) -> tuple[None, None]:
        shapes[name] = tuple(images.shape)
        if name == "result":
            raise InterruptedError
        return None, None

    with monkeypatch.context() as patch:
        patch.setattr(plugins, "method", lambda name: ran.method)
        patch.setattr(survey, "examine", seen)
        with pytest.raises(InterruptedError):
            survey.survey(ran.folder, survey.Settings(images=1), tmp_path / "landscape", emit=ignore)
    assert shapes == {"original": (10, *WHOLE), "pruned": (10, *REDUCED), "result": (10, *REDUCED)}


# ---------------------------------------------------------------- teachers


def test_each_teacher_sees_images_of_its_own_size(ran: Ran, tmp_path: Path) -> None:
    middle, later = Plan(input_hw=(28, 28)), Plan(("layer1.1",), input_hw=(20, 24))
    losses = {Plan(): 1.0, middle: 2.0, later: 3.0, PLAN: 4.0}
    interim = tuple(Interim(plan, loss) for plan, loss in losses.items())
    tuning = replace(LEARN, teachers="ensemble", bank=3)
    choice = Choice(PLAN, tuning, "", interim=interim)
    bank = memory.bank_of(ran.setup, tmp_path / "bank", ran.setup.original, choice, ignore)
    assert bank is not None and len(bank.logits) == 3
    expected = [
        tune.logits(
            graph.apply(ran.setup.original, plan, WHOLE),
            data.resized(ran.setup.calibration, size),
            batch_norm="batch",
        ).numpy()
        for plan, size in ((later, (20, 24)), (middle, (28, 28)), (Plan(), (32, 32)))
    ]
    for stored, own in zip(bank.logits, expected, strict=True):
        np.testing.assert_allclose(stored, own, atol=2e-3, rtol=2e-3)
    # Where the search measured no losses, they are taken at these sizes too.
    unknown = replace(choice, interim=tuple(replace(one, loss=None) for one in interim))
    found = memory.spaced(ran.setup, ran.setup.original, unknown, ignore)
    assert set(found) <= set(losses) and found
