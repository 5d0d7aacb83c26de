"""The shipped recipe taken through the pipeline with each loss of ``[recover]``, in few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import interrupt, recovered_sha256, take

from optpipe import preparation, store, tune
from optpipe import recipe as recipes
from optpipe.pipeline import search as stages

ROOT = Path(__file__).resolve().parents[1]
STEPS = 16
QUICK = (
    f"recover.steps={STEPS}",
    "recover.batch=16",
    "recover.lr=0.02",  # the paper's; practise's own is for the error of features, and others diverge at it
    "recover.autocast=off",
    "timing.budget_s=0.05",
    "timing.final_budget_s=0.05",
    "timing.tolerance=0.5",
    "timing.drift=1000",
    "target.threads=1",
    "export.precisions=['fp32']",
    "method.criterion=first",  # scores nothing: which blocks go is not asked here
    "run.checkpoint_every=5",
)
LOSSES = {
    "mimic": (),
    "kd": ("recover.temperature=2.0",),
    "cross": ("recover.trainable=all",),
    # PRACTISE's "BP (block)": one view, no teachers.
    "labels": ("recover.augment=resized_crop", "recover.trainable=all", "data.calibration.labels=true"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipe, two blocks its budget: how many a latency takes is the machine's affair."""
    text = (ROOT / "recipes" / "practise.toml").read_text(encoding="utf-8")
    for old, new in (
        ('"weights/', f'"{ROOT}/recipes/weights/'),
        ('"../', f'"{ROOT}/'),
        ("latency_reduction = 0.25", "drop_blocks = 2"),
    ):
        assert old in text
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("recoveries") / "practise.toml"
    path.write_text(text, encoding="utf-8")
    return path


def setup_of(recipe: Path, loss: str, *overrides: str) -> preparation.Setup:
    chosen = (f"recover.loss={loss}", *LOSSES[loss], *QUICK, *overrides)
    return preparation.prepare(recipes.load(recipe, chosen))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_shipped_recipe_recovers_by_each_loss_and_goes_on_where_it_was_killed(
    recipe: Path, loss: str
) -> None:
    setup = setup_of(recipe, loss, "recover.name=practise")
    ran = take(setup, recipe.parent / loss)
    assert (ran.report.recover.loss, ran.report.recover.steps) == (loss, STEPS)
    assert len(ran.report.plan.drop_blocks) == 2
    assert ran.report.recover.stage_weight == (1.0 if loss in ("mimic", "cross") else 0.0)
    assert f'recovery {STEPS} steps of batch 16, loss "{loss}"' in (ran.folder / "report.md").read_text()
    assert ran.report.result.quality.value > ran.report.quality_before_recovery.value + 0.05

    opened, expected = store.Run(ran.folder, None), recovered_sha256(ran.folder)
    weights = ran.folder / "04-recover" / "weights.safetensors"
    weights.unlink()
    for checkpoint in weights.parent.glob("checkpoint-*"):
        checkpoint.unlink()
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, tune.parts, "views_of", after=8)
        with pytest.raises(KeyboardInterrupt):
            stages.recover(setup, opened, ran.choice, lambda event: None)
    assert list(weights.parent.glob("checkpoint-*.safetensors")) and not weights.exists()
    stages.recover(setup, opened, ran.choice, lambda event: None)
    assert recovered_sha256(ran.folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kd", "cross"])
def test_a_recovery_without_labels_needs_none(recipe: Path, loss: str) -> None:
    assert setup_of(recipe, loss).calibration.labels is None
