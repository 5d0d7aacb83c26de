"""What is checked once a recipe's method and images are loaded: whose recovery, how long, which labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from optpipe import plugins, preparation
from optpipe import recipe as recipes
from optpipe.errors import MissingError, UsageError
from optpipe.methods import practise
from optpipe.types import Budget, Choice, Images, Method, ModelGraph, Plan, Scene, Search, Tune

RECIPE = """
[model]
name = "zoo:resnet20_cifar"

[data]
calibration = { source = "calibration.npz" }
evaluation = { source = "evaluation.npz" }
preprocess = { mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25] }

[target]
batch = 4
threads = 1

[method]
name = "practise"

[budget]
macs_reduction = 0.3
"""
LABELS = Tune(steps=0, epochs=3, batch=8, loss="labels", trainable="all", augment="shift")


@dataclass
class Learner:
    """A method that learns from labels, and asks nothing."""

    Config: type = practise.Config
    RECOVER: Tune = LABELS
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
        pass

    def search(self, scene: Scene, config: object) -> Search:
        yield []
        return Choice(Plan(), scene.recover, "")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with all that it needs beside it; "learner" is a method too."""
    for seed, name in enumerate(("calibration", "evaluation")):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(20) % 10)
    found = plugins.method
    learner: Method = Learner()
    monkeypatch.setattr(plugins, "method", lambda name: learner if name == "learner" else found(name))
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def recovery(recipe: Path, *overrides: str) -> Tune:
    return preparation.prepare(recipes.load(recipe, overrides)).recover


def refusal(recipe: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        recovery(recipe, *overrides)
    return str(error.value).removeprefix(f"{recipe}: ")


def test_the_recovery_is_the_running_methods_own(recipe: Path) -> None:
    own = recovery(recipe)
    assert (own.steps, own.loss) == (practise.RECOVER.steps, "mimic")


def test_a_named_methods_recovery_takes_its_place_with_the_recipes_keys_on_top(recipe: Path) -> None:
    other = recovery(recipe, "recover.name=learner", "recover.lr=0.5")
    assert (other.loss, other.trainable, other.lr) == ("labels", "all", 0.5)


def test_epochs_become_steps_of_the_calibration_images(recipe: Path) -> None:
    # 3 epochs of 20 images in batches of 8 are 7.5 steps.
    assert recovery(recipe, "recover.name=learner").steps == 8
    assert recovery(recipe, "recover.name=learner", "recover.steps=5").steps == 5


def test_the_frozen_copy_prepares_to_the_same(recipe: Path) -> None:
    first = preparation.prepare(recipes.load(recipe, ["recover.name=learner"]))
    recipe.write_text(first.frozen, encoding="utf-8")
    again = preparation.prepare(recipes.load(recipe))
    assert (again.recover, again.frozen) == (first.recover, first.frozen)


def test_a_gpu_to_train_on_is_missed_before_anything_is_computed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match=r'\[run\] trainer = "cuda": torch finds no GPU'):
        preparation.prepare(recipes.load(recipe, ['run.trainer="cuda"']))


def test_an_unknown_method_to_recover_as_is_named_with_its_place(recipe: Path) -> None:
    assert refusal(recipe, "recover.name=practice") == (
        '[recover] name = "practice": there is no such method; did you mean practise?'
    )


NETWORKS = """
from torch import nn


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )


def single():
    return nn.Sequential(nn.Conv2d(3, 10, 16), nn.Flatten())
"""


def refused(recipe: Path, *overrides: str) -> str:
    """The refusal, which stands behind the recipe's path and before anything was written."""
    (recipe.parent / "networks_to_refuse.py").write_text(NETWORKS, encoding="utf-8")
    before = sorted(recipe.parent.iterdir())
    with pytest.raises(UsageError) as error:
        preparation.prepare(recipes.load(recipe, overrides))
    assert [path for path in sorted(recipe.parent.iterdir()) if path.name != "__pycache__"] == before
    path, _, text = str(error.value).partition(": ")
    assert path == str(recipe)
    return text


EKG = "method.name=ekg"


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("method.ratio=0.95", "[method] ratio = 0.95: must be above 0 and at most 0.9"),
        ("method.score_images=0", "[method] score_images = 0: must be above 0"),
        ("method.tuning_images=0", "[method] tuning_images = 0: must be above 0"),
        ("method.tries=-1", "[method] tries = -1: must be above 0, or 0 for no limit"),
        (
            "model.name=networks_to_refuse:single",
            "[method] ekg: the network has no channel group that can be narrowed (its channels are the "
            "classes); `optpipe inspect` says why not for each",
        ),
    ],
)
def test_what_ekg_cannot_search_is_refused_with_the_recipes_path(
    recipe: Path, override: str, text: str
) -> None:
    assert refused(recipe, EKG, override) == text


@pytest.mark.parametrize("budget", ["latency_reduction = 0.3", "latency_ms = 0.3"])
def test_a_latency_budget_with_its_last_step_alone_timed_is_refused(recipe: Path, budget: str) -> None:
    recipe.write_text(RECIPE.replace("macs_reduction = 0.3", budget), encoding="utf-8")
    assert refused(recipe, EKG, "method.timed=last") == (
        '[method] timed = "last": a latency budget needs every step timed; set "every"'
    )


def test_blocks_to_drop_are_no_budget_of_ekgs(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("macs_reduction = 0.3", "drop_blocks = 2"), encoding="utf-8")
    assert refused(recipe, EKG).startswith(
        "[budget] drop_blocks: ekg narrows layers and drops no block; give"
    )


def test_a_class_of_one_image_is_too_few_for_ekg(recipe: Path) -> None:
    path = recipe.parent / "calibration.npz"
    np.savez(path, images=np.load(path)["images"][:-1], labels=np.arange(19) % 10)
    assert refused(recipe, EKG) == (
        "[data] calibration: class 9 has 1 images; ekg needs at least two of each (32 to score and 256 to "
        "tune, if there are): raise count, or give images of that class"
    )


def test_a_network_without_droppable_blocks_is_refused_with_the_recipes_path(recipe: Path) -> None:
    assert refused(recipe, "model.name=networks_to_refuse:chain").startswith(
        "[method] practise: the network has no droppable block"
    )
    assert preparation.prepare(
        recipes.load(recipe, [EKG, "model.name=networks_to_refuse:chain"])
    ).graph.groups


VALIDATION = "data.validation.source=validation.npz"


def write_validation(recipe: Path, size: int = 16, *, highest: int = 9, labelled: bool = True) -> None:
    rng = np.random.default_rng(7)
    arrays = {"images": rng.integers(0, 256, (12, size, size, 3), dtype=np.uint8)}
    if labelled:
        arrays["labels"] = np.minimum(np.arange(12), 9) * highest // 9
    np.savez(recipe.parent / "validation.npz", **arrays)  # type: ignore[arg-type]


def test_validation_images_are_loaded_like_the_others(recipe: Path) -> None:
    write_validation(recipe)
    setup = preparation.prepare(recipes.load(recipe, [VALIDATION, "data.validation.count=8"]))
    assert setup.validation is not None
    assert (len(setup.validation), setup.validation.shape) == (8, setup.calibration.shape)
    assert setup.validation.mean == setup.calibration.mean
    assert preparation.prepare(recipes.load(recipe)).validation is None
    recipe.write_text(setup.frozen, encoding="utf-8")
    again = preparation.prepare(recipes.load(recipe))
    assert again.validation is not None and again.validation.digest == setup.validation.digest
    assert again.frozen == setup.frozen


@pytest.mark.parametrize("other", ["calibration", "evaluation"])
def test_validation_images_are_none_of_the_others(recipe: Path, other: str) -> None:
    override = f"data.validation={{source='{other}.npz', skip=14}}"
    assert refused(recipe, override) == (
        f"[data]: 6 validation images are also {other} images; the accuracy would flatter the result: give "
        "disjoint sets"
    )
    disjoint = [f"data.{other}.count=14", override]
    assert preparation.prepare(recipes.load(recipe, disjoint)).validation is not None


def test_validation_images_of_another_shape_are_refused(recipe: Path) -> None:
    write_validation(recipe, 8)
    assert refused(recipe, VALIDATION) == (
        "[data] validation: images are (3, 8, 8), calibration images (3, 16, 16); give [data.preprocess] size"
    )


def test_validation_labels_must_be_the_networks(recipe: Path) -> None:
    write_validation(recipe, highest=18)
    with pytest.raises(UsageError, match=r"validation\.npz: labels go from 0 to 18.*10 classes"):
        preparation.prepare(recipes.load(recipe, [VALIDATION]))
    write_validation(recipe, labelled=False)
    assert refused(recipe, VALIDATION, "method.name=learner") == (
        "[method] name = 'learner': needs labelled validation images, and validation.npz has no labels; give "
        "labels, or leave [data] validation out"
    )
    assert preparation.prepare(recipes.load(recipe, [VALIDATION])).validation is not None


def test_a_misspelt_key_of_the_validation_images_is_refused(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"\[data\.validation\] skp = 3: unknown key; did you mean skip\?"):
        recipes.load(recipe, [VALIDATION, "data.validation.skp=3"])


def test_three_d_refuses_a_recovery_by_mimicking_before_anything_is_built(recipe: Path) -> None:
    three_d = ("method.name=three_d", "method.resolution_step=4")
    line = refused(recipe, *three_d, "recover.name=practise")
    assert line.startswith('[recover] loss = "mimic": three_d trains on labels')
    assert recovery(recipe, *three_d).loss == "labels"


def test_a_class_of_one_image_is_enough_for_three_d_beside_validation_images(recipe: Path) -> None:
    three_d = ("method.name=three_d", "data.calibration.count=10")
    assert "three_d needs at least two of each" in refused(recipe, *three_d)
    write_validation(recipe)
    np.savez(
        recipe.parent / "calibration.npz",
        images=np.load(recipe.parent / "calibration.npz")["images"][:10],
        labels=np.arange(10),
    )
    assert recovery(recipe, *three_d, VALIDATION).loss == "labels"


UNLABELLED = "data.calibration.labels=false"
LACK = "needs labelled calibration images, and calibration.npz has no labels"


def test_a_method_that_learns_from_labels_says_what_to_set(recipe: Path) -> None:
    assert refusal(recipe, "method.name=learner", UNLABELLED) == (
        f"[method] name = 'learner': {LACK} (labels = false); set [data.calibration] labels = true"
    )


def test_a_recovery_that_learns_from_labels_says_what_to_set(recipe: Path) -> None:
    assert refusal(recipe, "recover.name=learner", UNLABELLED) == (
        f"[recover] name = 'learner': {LACK} (labels = false); set [data.calibration] labels = true, or "
        "leave [recover] name out"
    )
    assert refusal(recipe, "recover.loss=labels", "recover.augment=shift", UNLABELLED) == (
        f'[recover] loss = "labels": {LACK} (labels = false); set [data.calibration] labels = true, or '
        'set [recover] loss = "mimic"'
    )


def test_images_without_labels_of_their_own_are_told_apart(recipe: Path) -> None:
    images = np.load(recipe.parent / "calibration.npz")["images"]
    np.savez(recipe.parent / "calibration.npz", images=images)
    assert refusal(recipe, "method.name=learner") == (
        f"[method] name = 'learner': {LACK}; give a folder with a folder for each class, or an .npz file "
        "with labels"
    )
    assert recovery(recipe).loss == "mimic"
