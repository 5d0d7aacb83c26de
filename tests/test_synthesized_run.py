"""Calibration images that a run makes from its network: when they are made, kept, taken up and refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from whole_runs import interrupt, write_images

from optpipe import data, graph, inspection, pipeline, preparation, store
from optpipe import recipe as recipes
from optpipe.errors import UsageError
from optpipe.pipeline import synthesizing
from optpipe.report import markdown, schema
from optpipe.report.contact import contact_sheet
from optpipe.types import Event

NETWORK = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = norm()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = norm()

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.blocks(F.relu(self.stem(x))), 1), 1))


def normalised():
    return Net(lambda: nn.BatchNorm2d(8))


def plain():
    return Net(nn.Identity)


def undroppable():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
"""
RECIPE = """
[model]
name = "networks_to_dream_of:normalised"

[data]
calibration = { source = "synthesize", count = 10, seed = 3 }
evaluation = { source = "evaluation.npz" }
preprocess = { mean = [0.4, 0.5, 0.6], std = [0.2, 0.25, 0.3], size = [8, 8] }

[data.synthesize]
steps = 3
batch = 4

[target]
batch = 4
threads = 1

[method]
name = "practise"

[budget]
drop_blocks = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with all that it needs beside it; three batches of images are to be made."""
    (tmp_path / "networks_to_dream_of.py").write_text(NETWORK, encoding="utf-8")
    write_images(tmp_path / "evaluation.npz", 12, seed=2, size=8)
    path = tmp_path / "dream.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def prepare(recipe: Path, *overrides: str) -> preparation.Setup:
    return preparation.prepare(recipes.load(recipe, overrides))


def make(setup: preparation.Setup, folder: Path) -> tuple[preparation.Setup, list[Event]]:
    """The setup with its images, and what was told on the way."""
    told: list[Event] = []
    with store.open_run(folder, setup.frozen, fresh=False, cache=None) as opened:
        return synthesizing.synthesized(setup, opened, told.append), told


def arrays(folder: Path) -> dict[str, NDArray[np.generic]]:
    """What a run keeps."""
    with np.load(folder / data.SYNTHESIZED) as file:
        return dict(file)


def steps_of(told: list[Event]) -> list[tuple[int | None, int | None]]:
    return [(event.done, event.total) for event in told if event.kind == "progress"]


def test_preparing_and_inspecting_make_no_image(recipe: Path) -> None:
    before = sorted(recipe.parent.iterdir())
    setup = prepare(recipe)
    assert inspection.inspect_recipe(recipes.load(recipe)).input_shape == (3, 8, 8)
    assert [path for path in sorted(recipe.parent.iterdir()) if path.name != "__pycache__"] == before
    assert (len(setup.calibration), setup.calibration.shape) == (10, (3, 8, 8))
    assert setup.calibration.labels is not None
    assert sorted(torch.bincount(setup.calibration.labels).tolist()) == [2, 2, 3, 3]
    # Whoever took the set for images would be stopped.
    with pytest.raises(TypeError, match="meta"):
        setup.calibration.pixels.numpy()


def test_the_frozen_recipe_holds_the_settings_and_prepares_to_the_same(recipe: Path) -> None:
    setup = prepare(recipe)
    assert "[data.synthesize]\nsteps = 3\nlr = 0.2\nbatch = 4\n" in setup.frozen
    recipe.write_text(setup.frozen, encoding="utf-8")
    assert prepare(recipe).frozen == setup.frozen
    table = RECIPE[RECIPE.index("[data.synthesize]") : RECIPE.index("[target]")]
    from_file = RECIPE.replace(table, "").replace('"synthesize"', '"../calibration.npz"')
    recipe.parent.joinpath("elsewhere").mkdir()
    write_images(recipe.parent / "calibration.npz", 10, seed=5, size=8)
    other = recipe.parent / "elsewhere" / "dream.toml"
    other.write_text(from_file.replace('"evaluation.npz"', '"../evaluation.npz"'), encoding="utf-8")
    (other.parent / "networks_to_dream_of.py").write_text(NETWORK, encoding="utf-8")
    assert "synthesize" not in prepare(other).frozen


def test_the_runs_images_are_calibration_images_like_any_others(recipe: Path, tmp_path: Path) -> None:
    setup, told = make(prepare(recipe), tmp_path / "run")
    images = setup.calibration
    assert steps_of(told) == [(3, 9), (6, 9), (9, 9)]
    assert all(bench.images is images for bench in setup.benches)
    kept = arrays(tmp_path / "run")
    assert kept["images"].dtype == np.uint8 and kept["images"].shape == (10, 8, 8, 3)
    assert (
        images.pixels.dtype == torch.uint8 and len({image.numpy().tobytes() for image in images.pixels}) == 10
    )
    assert images.batch([0, 1]).shape == (2, 3, 8, 8)
    # In the set's own order, each with its label.
    places = [int(name.split("[")[1][:-1]) for name in images.names]
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), kept["images"][places])
    assert images.labels is not None and images.labels.tolist() == kept["labels"][places].tolist()
    with Image.open(tmp_path / "run" / synthesizing.SHEET) as sheet:
        assert sheet.size == (102, 12)
    assert (
        make(prepare(recipe, "data.calibration.labels=false"), tmp_path / "bare")[0].calibration.labels
        is None
    )


def test_images_hang_on_the_seed_alone(recipe: Path, tmp_path: Path) -> None:
    first, again = (make(prepare(recipe), tmp_path / name)[0].calibration for name in ("a", "b"))
    other = make(prepare(recipe, "data.calibration.seed=4"), tmp_path / "c")[0].calibration
    assert first.digest == again.digest != other.digest


def test_a_resumed_run_makes_what_is_missing_and_no_more(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = prepare(recipe)
    whole = make(setup, tmp_path / "whole")[0].calibration
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, np, "savez", 1)
        make(setup, folder)
    assert len(arrays(folder)["images"]) == 3
    resumed, told = make(setup, folder)
    assert steps_of(told) == [(6, 9), (9, 9)]
    assert resumed.calibration.digest == whole.digest
    assert (folder / data.SYNTHESIZED).read_bytes() == (tmp_path / "whole" / data.SYNTHESIZED).read_bytes()
    finished, told = make(setup, folder)
    assert told == [] and finished.calibration.digest == whole.digest


def test_images_of_another_network_are_not_taken_up(recipe: Path, tmp_path: Path) -> None:
    setup = prepare(recipe)
    make(setup, tmp_path / "run")
    before = (tmp_path / "run" / data.SYNTHESIZED).read_bytes()
    with pytest.raises(
        UsageError, match=r"synthesized\.npz: these images were made from another network; name"
    ):
        make(dataclasses.replace(setup, model_digest="another"), tmp_path / "run")
    assert (tmp_path / "run" / data.SYNTHESIZED).read_bytes() == before
    (tmp_path / "run" / data.SYNTHESIZED).write_bytes(before[:100])
    with pytest.raises(UsageError, match=r"synthesized\.npz: cannot be read .*; start anew with --fresh"):
        make(setup, tmp_path / "run")


def test_the_run_goes_on_with_them_from_its_first_stage(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[data.ImageSet] = []

    def ends(setup: preparation.Setup, *others: object) -> None:
        seen.append(setup.calibration)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["optpipe.pipeline.run"], "_decide", ends)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(prepare(recipe), tmp_path / "run", fresh=False, emit=lambda event: None)
    assert seen[0].digest == seen[1].digest and seen[0].digest in (tmp_path / "run/inputs.json").read_text()


def test_what_competes_is_the_original_without_its_cheapest_block(recipe: Path, tmp_path: Path) -> None:
    setup = prepare(recipe, "data.synthesize.competition=10.0")
    student = synthesizing._student(setup)
    assert len(graph.inspect(student, (3, 8, 8)).blocks) == len(setup.graph.blocks) - 1
    alone = make(prepare(recipe), tmp_path / "alone")[0].calibration
    assert make(setup, tmp_path / "run")[0].calibration.digest != alone.digest


def test_a_jitter_that_was_found_out_is_told(recipe: Path, tmp_path: Path) -> None:
    def notes(folder: str, *overrides: str) -> list[str]:
        told = make(prepare(recipe, *overrides), tmp_path / folder)[1]
        return [event.detail for event in told if event.kind == "note"]

    begun, found, took = notes("auto")
    assert found in {f'jitter = "{one}" comes nearest to its statistics' for one in ("roll", "pad")}
    assert notes("pad", 'data.synthesize.jitter="pad"')[:-1] == [begun] and took.startswith("took ")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "model.name=networks_to_dream_of:plain",
            '[data.calibration] source = "synthesize": images cannot be made from this network: it has no '
            "batch-norm that keeps running statistics, from which they would be made; give a folder of "
            "images, of other things too",
        ),
        (
            "data.preprocess={mean=[0,0,0], std=[1,1,1]}",
            '[data.calibration] source = "synthesize": how large are the images? give [data.preprocess] '
            "size = [H, W]",
        ),
        (
            "data.calibration={source='synthesize'}",
            '[data.calibration] source = "synthesize": give how many in count, above 0, a seed not below 0, '
            "and no skip",
        ),
        ("data.synthesize.lr=0.0", "[data.synthesize] lr = 0.0: must be above 0 and finite"),
        ("data.synthesize.tv=-1.0", "[data.synthesize] tv = -1.0: must be finite and not below 0"),
        (
            "data.synthesize.jitter=shake",
            "[data.synthesize] jitter = \"shake\": should be 'auto', 'roll' or 'pad'",
        ),
        ("data.synthesize.stps=3", "[data.synthesize] stps = 3: unknown key; did you mean steps?"),
        (
            "data.calibration.source=evaluation.npz",
            '[data.synthesize]: needs [data.calibration] source = "synthesize"; leave this table out',
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is(recipe: Path, override: str, text: str) -> None:
    with pytest.raises(UsageError) as error:
        prepare(recipe, override)
    assert str(error.value) == f"{recipe}: {text}"


def test_a_competition_without_a_competitor_is_refused(recipe: Path) -> None:
    with pytest.raises(
        UsageError, match=r"\[data.synthesize\] competition = 1.0: needs a network with a block"
    ):
        prepare(recipe, "model.name=networks_to_dream_of:undroppable", "data.synthesize.competition=1.0")


def test_images_that_were_made_are_found_in_the_run(tmp_path: Path) -> None:
    given = data.DataSpec("images", count=5, seed=1)
    assert data.made(given, tmp_path) == given
    spec = data.DataSpec(data.SYNTHESIZE, count=5, seed=1, labels=False)
    assert data.made(spec, tmp_path) == data.DataSpec(str(tmp_path / data.SYNTHESIZED), labels=False)


def test_a_sheet_shows_ten_in_a_row(tmp_path: Path) -> None:
    images = np.zeros((13, 6, 4, 1), dtype=np.uint8)
    images[10] = 200
    (tmp_path / "sheet.png").write_bytes(contact_sheet(images))
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 + 2 * 8, 2 + 10 * 6)
    assert (pixels[10:16, 2:6] == 200).all() and (pixels[10:16, 8:12] == 0).all()
    assert (pixels[10:16, 20:] == 255).all()


def test_the_report_shows_the_sheet(report: schema.Report) -> None:
    assert "synthesised" not in markdown.render(report)
    shown = dataclasses.replace(report.data, contact_sheet=synthesizing.SHEET)
    text = markdown.render(dataclasses.replace(report, data=shown))
    assert "## Calibration images made from the original alone" in text
    assert "](figures/synthesized.png)" in text
    assert "- Calibration: 500 synthesised images" in text
