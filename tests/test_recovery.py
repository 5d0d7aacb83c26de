"""What each loss of a recovery can use: refusals by their message, and what an inherited setting becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optpipe import recipe as recipes
from optpipe.errors import UsageError
from optpipe.methods import practise
from optpipe.types import Tune

PLAIN = Tune(steps=5, augment="shift")
TAUGHT = replace(PLAIN, loss="labels", teachers="ensemble", views=2, trainable="all")
FROM_ORIGINAL = pytest.mark.parametrize("loss", ["mimic", "kd", "cross"])


def recovery(base: Tune, **table: recipes.Value) -> Tune:
    return recipes.recovery(base, table, Path("mine.toml"))


def refused(base: Tune, **table: recipes.Value) -> str:
    with pytest.raises(UsageError) as error:
        recovery(base, **table)
    return str(error.value).removeprefix("mine.toml: [recover] ")


@pytest.mark.parametrize("loss", ["kd", "cross"])
@pytest.mark.parametrize("trainable", ["backbone", "all"])
def test_what_the_original_says_teaches_the_backbone_or_all(loss: str, trainable: str) -> None:
    found = recovery(PLAIN, loss=loss, trainable=trainable, temperature=2.0)
    assert (found.loss, found.trainable, found.temperature) == (loss, trainable, 2.0)


@FROM_ORIGINAL
def test_the_original_alone_is_heard_and_on_one_view(loss: str) -> None:
    heard = {
        "mimic": "compares features with the original's alone and hears no teacher's logits",
        "kd": "runs the original on every view and hears no other teacher",
        "cross": "runs the original on every view and hears no other teacher",
    }[loss]
    assert refused(TAUGHT, loss=loss, trainable="backbone", views=1) == (
        f'teachers = "ensemble": loss = "{loss}" {heard}; set loss = "labels" or teachers = "none"'
    )
    assert refused(TAUGHT, loss=loss, trainable="backbone", teachers="none") == (
        f'views = 2: loss = "{loss}" compares networks on one view of an image; set loss = "labels" or '
        "views = 1"
    )
    assert recovery(TAUGHT, loss=loss, trainable="backbone", teachers="none", views=1).loss == loss


@pytest.mark.parametrize("loss", ["kd", "labels"])
def test_a_loss_that_reads_no_features_refuses_a_weight_of_the_stages(loss: str) -> None:
    assert refused(PLAIN, loss=loss, stage_weight=1.0) == (
        f'stage_weight = 1.0: loss = "{loss}" reads no features on the way; leave it out, or set loss = '
        '"mimic" or "cross"'
    )


@pytest.mark.parametrize(("loss", "weight"), [("mimic", 1.0), ("cross", 1.0), ("kd", 0.0), ("labels", 0.0)])
def test_practises_weight_of_the_stages_stays_where_features_are_compared(loss: str, weight: float) -> None:
    assert practise.RECOVER.stage_weight == 1.0
    assert recovery(practise.RECOVER, loss=loss, augment="shift").stage_weight == weight


@pytest.mark.parametrize("weight", [-1.0, float("inf")])
def test_a_weight_of_the_stages_is_a_number_from_0(weight: float) -> None:
    with pytest.raises(UsageError, match="stage_weight"):
        recovery(PLAIN, stage_weight=weight)


@FROM_ORIGINAL
def test_views_that_mix_classes_do_where_no_label_is_asked(loss: str) -> None:
    assert recovery(PLAIN, loss=loss, augment="shift_cutmix").augment == "shift_cutmix"
    assert refused(PLAIN, loss="labels", augment="shift_cutmix").startswith('augment = "shift_cutmix": puts')


def test_an_unknown_loss_names_those_there_are() -> None:
    message = refused(PLAIN, loss="bp")
    assert message.startswith('loss = "bp": ')
    assert all(f"'{loss}'" in message for loss in ("mimic", "kd", "cross", "labels"))


@pytest.mark.parametrize("loss", ["mimic", "kd", "cross", "labels"])
def test_a_checked_recovery_written_out_whole_is_read_back_the_same(loss: str) -> None:
    found = recovery(practise.RECOVER, loss=loss, augment="shift", steps=7)
    written = recipes._plain(found)
    assert isinstance(written, dict)
    assert recovery(practise.RECOVER, **written) == found
