"""EKG through all six stages, and its recovery after another method's search."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from whole_runs import Ran, interrupt, recovered_sha256, take, write_images

import optpipe
from optpipe import bank, graph, preparation, store, tune
from optpipe import recipe as recipes
from optpipe.errors import RunError
from optpipe.pipeline import memory
from optpipe.pipeline import search as stages
from optpipe.types import Choice, Plan, Tune

# Whole runs with real engines: the search itself is in test_ekg_search.py.
pytestmark = pytest.mark.slow

NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def make():
    return Net()
"""
RECIPE = """
[model]
name = "narrow_residual_network:make"

[data]
calibration = { source = "calibration.npz" }
evaluation = { source = "evaluation.npz" }
preprocess = { mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25], size = [16, 16] }

[target]
batch = 8
threads = 1

[export]
precisions = ["fp32"]

[timing]
tolerance = 0.5
budget_s = 0.05
final_budget_s = 0.05
drift = 1000

[method]
name = "ekg"
ratio = 0.4
score_images = 3
tuning_images = 4

[recover]
steps = 12
batch = 8
bank = 3

[budget]
macs_reduction = 0.3

[run]
checkpoint_every = 3
"""
OTHER = RECIPE.replace(
    'name = "ekg"\nratio = 0.4\nscore_images = 3\ntuning_images = 4', 'name = "practise"\nfast_images = 8'
)
OTHER = OTHER.replace("[recover]\n", '[recover]\nname = "ekg"\n').replace(
    "macs_reduction = 0.3", "drop_blocks = 1"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline_ekg")
    (folder / "narrow_residual_network.py").write_text(NETWORK)
    write_images(folder / "calibration.npz", 40, seed=1)
    write_images(folder / "evaluation.npz", 24, seed=2)
    (folder / "ekg.toml").write_text(RECIPE)
    (folder / "practise.toml").write_text(OTHER)
    return folder


@pytest.fixture(scope="module")
def setup(home: Path) -> preparation.Setup:
    return preparation.prepare(recipes.load(home / "ekg.toml"))


@pytest.fixture(scope="module")
def finished(home: Path, setup: preparation.Setup) -> Ran:
    """A run of EKG that nothing interrupted."""
    return take(setup, home / "finished")


def test_the_result_is_the_original_narrowed_to_the_budget(finished: Ran, setup: preparation.Setup) -> None:
    report = finished.report
    assert (report.method, report.budget.met, report.warnings) == ("ekg", True, ())
    assert report.plan.keep_channels and not report.plan.drop_blocks
    assert report.result.macs <= 0.7 * report.original.macs
    result = optpipe.load(finished.folder)
    shape = setup.target.input_shape
    assert graph.count(graph.trace(result, shape), shape) == (report.result.parameters, report.result.macs)
    assert [table.title for table in report.tables[:2]] == [
        "Predicted and measured saving, step by step",
        "Widths",
    ]
    assert all(row[7] is not None for row in report.tables[0].rows)
    labels = setup.evaluation.labels
    assert labels is not None
    right = (tune.logits(result, setup.evaluation).argmax(1) == labels).float().mean()
    assert report.result.quality.value == pytest.approx(float(right))


def test_the_pruned_network_stands_on_the_weights_that_the_search_trained(
    finished: Ran, setup: preparation.Setup
) -> None:
    from safetensors.torch import load_file

    choice = finished.choice
    assert choice.start is not None
    trained = load_file(store.Run(finished.folder, None).weights(choice.start.key))
    pruned = load_file(finished.folder / "03-prune" / "weights.safetensors")
    kept = dict(choice.plan.keep_channels)
    rows = list(kept.get("stem", range(12)))
    assert torch.equal(pruned["stem.weight"], trained["stem.weight"][rows])
    assert not torch.equal(pruned["stem.weight"], setup.original.state_dict()["stem.weight"][rows])


def test_networks_on_the_way_teach_and_their_bank_goes_when_it_has_served(
    finished: Ran, setup: preparation.Setup
) -> None:
    losses = [one.loss for one in finished.choice.interim]
    assert len(losses) >= 3
    assert None not in losses
    teachers = bank.spaced([loss for loss in losses if loss is not None], 3)
    (note,) = finished.notes("memory bank")
    assert note.startswith(f"teachers x images x classes: {len(teachers)} x 40 x 4 in float16, ")
    assert not list(finished.folder.glob("04-recover/bank-*"))


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [(store.DiskCheckpoint, "save", 2), (bank, "_write", 1)],
    ids=["train", "bank"],
)
def test_a_recovery_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, finished: Ran, setup: preparation.Setup, owner: object, name: str, after: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    for stage in ("04-recover", "05-export", "06-benchmark"):
        (folder / stage / "result.json").unlink()
    for path in folder.glob("04-recover/checkpoint-*"):
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, after)
        with pytest.raises(KeyboardInterrupt):
            take(setup, folder)
    assert len(list(folder.glob("04-recover/bank-*"))) == 1
    again = take(setup, folder)
    assert " of the teachers stored before" in again.notes("memory bank")[0]
    assert recovered_sha256(folder) == recovered_sha256(finished.folder)
    assert again.report.plan == finished.report.plan


@pytest.mark.slow
def test_a_search_that_was_stopped_ends_as_one_that_was_not(
    home: Path, finished: Ran, setup: preparation.Setup, tmp_path: Path
) -> None:
    from optpipe.methods.ekg.reward import Judge

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Judge, "facts", 1)
        with pytest.raises(KeyboardInterrupt):
            take(setup, folder)
    again = take(setup, folder)
    trials = {event.name: event.detail for event in again.events if event.kind == "trial"}
    assert [trials[name] for name in ("trained original", "step 1", "step 2")] == [
        *["reused"] * 2,
        "computed",
    ]
    assert again.choice.plan == finished.choice.plan
    assert recovered_sha256(folder) == recovered_sha256(finished.folder)


def test_a_budget_out_of_reach_ends_the_run_before_the_search(home: Path, tmp_path: Path) -> None:
    setup = preparation.prepare(recipes.load(home / "ekg.toml", ["budget.macs_reduction=0.999"]))
    with pytest.raises(RunError, match="no widths meet the budget: the narrowest layers in all 3 groups"):
        take(setup, tmp_path / "run")


def test_weights_that_are_gone_end_the_run_with_what_to_do(
    tmp_path: Path, finished: Ran, setup: preparation.Setup
) -> None:
    gone, start = store.Run(tmp_path, None), finished.choice.start
    assert start is not None
    with pytest.raises(RunError) as refused:
        stages.prune(setup, gone, finished.choice)
    assert str(refused.value) == (
        f"{gone.weights(start.key)}: the weights that a training goes on from are gone; "
        "start anew with --fresh"
    )
    with pytest.raises(RunError, match="start anew with --fresh"):
        stages.recover(setup, gone, finished.choice, lambda event: None)


@pytest.mark.slow
def test_a_recovery_by_mimicking_finds_the_features_whole(home: Path, tmp_path: Path) -> None:
    setup = preparation.prepare(recipes.load(home / "ekg.toml", ["recover.name=practise"]))
    ran = take(setup, tmp_path / "run")
    assert {name for name, _ in ran.report.plan.keep_channels} == {"blocks.0.conv1", "blocks.1.conv1"}
    assert (ran.report.recover.loss, ran.report.budget.met) == ("mimic", True)
    assert {row[0]: row[-1] for row in ran.report.tables[1].rows}["stem"] == (
        "the recovery compares its channels with the original's"
    )
    assert not ran.notes("memory bank")


# ---------------------------------------------------------------- after another method


@pytest.fixture(scope="module")
def other(home: Path) -> preparation.Setup:
    return preparation.prepare(recipes.load(home / "practise.toml"))


@pytest.mark.slow
def test_another_methods_result_recovers_with_labels_and_teachers(
    home: Path, other: preparation.Setup
) -> None:
    ran = take(other, home / "practise")
    assert (ran.report.method, len(ran.report.plan.drop_blocks)) == ("practise", 1)
    assert (ran.report.recover.loss, ran.report.recover.teachers) == ("labels", "ensemble")
    assert ran.report.recover.steps == 12
    assert any(note.startswith("teachers x images x classes: ") for note in ran.notes("memory bank"))
    assert [event.done for event in ran.events if event.kind == "progress" and event.name == "training"][
        -1
    ] == 12


@pytest.mark.parametrize("loss", ["labels", "mimic"])
def test_a_bank_is_built_only_where_the_recovery_asks_for_one(
    tmp_path: Path, other: preparation.Setup, loss: str
) -> None:
    recover = Tune(steps=1, loss="labels", teachers="none") if loss == "labels" else Tune(steps=1)
    choice = Choice(Plan(drop_blocks=("blocks.0",)), recover, "")
    assert memory.bank_of(other, tmp_path / "bank", other.original, choice, lambda event: None) is None
    assert not (tmp_path / "bank").exists()


def test_the_single_teacher_is_the_original(tmp_path: Path, other: preparation.Setup) -> None:
    recover = Tune(steps=1, loss="labels", teachers="single")
    choice = Choice(Plan(drop_blocks=("blocks.0",)), recover, "")
    built = memory.bank_of(other, tmp_path / "bank", other.original, choice, lambda event: None)
    assert built is not None and len(built.losses) == 1
    expected = tune.logits(other.original, other.calibration, batch_norm="batch")
    assert torch.allclose(built.mean((0,), range(40)), expected, atol=2e-3)


def test_where_a_method_left_no_networks_on_the_way_the_original_alone_teaches(
    other: preparation.Setup,
) -> None:
    choice = Choice(Plan(drop_blocks=("blocks.0",)), other.recover, "")
    assert memory.spaced(other, other.original, choice, lambda event: None) == [Plan()]
