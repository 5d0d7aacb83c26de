"""``optpipe init``: the recipes that it writes load, run dry, and say what only the user can know."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from PIL import Image
from safetensors.torch import save_file

from optpipe import recipe as recipes
from optpipe.models import ModelSpec, load_model

RESNET = "zoo:resnet20_cifar"
MODELS = """
from torch import nn

def plain():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return self.conv(x).mean((2, 3))

class Stiff(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4 * 14 * 14, 4)

    def forward(self, x):
        return self.out(self.conv(x).flatten(1))

class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with networks of one's own and two sets of images, labelled from 0 to 9."""
    (tmp_path / "own_networks.py").write_text(MODELS, encoding="utf-8")
    for seed, name in enumerate(("calibration", "evaluation")):
        write_images(tmp_path / f"{name}.npz", seed, classes=10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_images(path: Path, seed: int, *, classes: int, count: int = 40) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % classes)


IMAGES = ("--calibration", "calibration.npz", "--evaluation", "evaluation.npz")


def comments(path: Path) -> str:
    """All comments of a recipe in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(" ".join(line.lstrip("# ") for line in lines if line.startswith("#")).split())


# ---------------------------------------------------------------- what is written


def test_with_weights_and_images_the_recipe_runs_dry(optpipe: Call, home: Path) -> None:
    save_file(load_model(ModelSpec(RESNET)).state_dict(), home / "mine.safetensors")
    code, out, err = optpipe("init", RESNET, "--weights", "mine.safetensors", *IMAGES, "--size", 32, 32)
    assert (code, err) == (0, "")
    assert out.startswith('recipe.toml: method "practise": 7 residual blocks can be dropped; ')
    assert out.endswith("Then: optpipe run recipe.toml --dry-run\n")
    written = tomllib.loads((home / "recipe.toml").read_text(encoding="utf-8"))
    assert written["model"] == {"name": RESNET, "weights": "mine.safetensors"}
    assert written["data"]["calibration"] == {"source": "calibration.npz"}
    assert written["method"] == {"name": "practise"}
    code, _, err = optpipe("run", "recipe.toml", "--dry-run")
    assert code == 0, err


def test_without_images_the_recipe_loads_and_marks_what_is_missing(optpipe: Call, home: Path) -> None:
    code, out, _ = optpipe("init", RESNET)
    assert code == 0
    lines = (home / "recipe.toml").read_text(encoding="utf-8").splitlines()
    marked = [number for number, line in enumerate(lines, start=1) if "# FILL IN: " in line]
    assert [out.count(f"line {number}: ") for number in marked] == [1] * len(marked)
    assert [lines[number - 1].split()[0] for number in marked] == [
        "#",  # weights
        "calibration",
        "evaluation",
        "[data.preprocess]",
    ]
    assert recipes.load(home / "recipe.toml").method_name == "practise"
    assert 'source = "synthesize"' in comments(home / "recipe.toml"), "it has batch-norm layers"
    code, _, err = optpipe("run", "recipe.toml", "--dry-run")
    assert (code, err) == (2, f"Error: data {home}/path/to/calibration: no such file or folder\n")


def test_what_was_found_stands_in_the_comments(optpipe: Call, home: Path) -> None:
    optpipe("init", RESNET, *IMAGES)
    said = comments(home / "recipe.toml")
    for words in (
        "traces it with an image of 3 x 32 x 32. 10 classes, 269,722 parameters,",
        "7 residual blocks can be dropped, 9 of 11 channel groups can be narrowed, there are 19 batch-norm",
        "practise is taken: 7 residual blocks can be dropped",
        "filters can work too: 9 of 11 channel groups can be narrowed",
        "ekg can work too: 9 of 11 channel groups can be narrowed; needs labels",
    ):
        assert words in said


def test_without_residual_blocks_a_method_that_narrows_is_taken(optpipe: Call, home: Path) -> None:
    code, out, _ = optpipe("init", "own_networks:plain", "--calibration", "calibration.npz")
    assert code == 0
    assert out.startswith('recipe.toml: method "filters": 2 of 3 channel groups can be narrowed; ')
    said = comments(home / "recipe.toml")
    assert "practise cannot work: the network has no droppable block" in said
    assert "there are no batch-norm layers" in said
    assert "synthesize" not in said
    written = recipes.load(home / "recipe.toml")
    assert written.data.preprocess.size == (32, 32), "as large as the images are"


def test_labels_of_another_network_are_left_out_and_methods_that_need_them_say_so(
    optpipe: Call, home: Path
) -> None:
    code, _, _ = optpipe("init", "own_networks:plain", *IMAGES)
    text = (home / "recipe.toml").read_text(encoding="utf-8")
    assert code == 0
    assert text.count("labels = false }    # labels go from 0 to 9, the network has 4 classes") == 2
    assert "ekg cannot work: needs labelled calibration images, and labels go from 0 to 9, the" in comments(
        home / "recipe.toml"
    )
    code, _, err = optpipe("run", "recipe.toml", "--dry-run")
    assert code == 0, err


def test_a_method_says_itself_what_it_lacks(optpipe: Call, home: Path) -> None:
    write_images(home / "few.npz", 2, classes=10, count=12)
    optpipe("init", RESNET, "--calibration", "few.npz")
    assert "ekg cannot work: [data] calibration: class 2 has 1 images" in comments(home / "recipe.toml")


def test_one_folder_for_both_is_divided(optpipe: Call, home: Path) -> None:
    code, _, _ = optpipe(
        "init", RESNET, "--calibration", "calibration.npz", "--evaluation", "calibration.npz"
    )
    written = recipes.load(home / "recipe.toml").data
    assert code == 0
    assert (written.calibration.count, written.calibration.skip) == (20, 0)
    assert (written.evaluation.count, written.evaluation.skip) == (None, 20)
    code, _, err = optpipe("run", "recipe.toml", "--dry-run")
    assert code == 0, err


def test_folders_without_labels_do(optpipe: Call, home: Path) -> None:
    for folder in ("train", "held out"):
        (home / folder).mkdir()
        for number in range(3):
            pixels = np.random.default_rng(len(folder) + number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / folder / f"{number}.png")
    code, _, _ = optpipe("init", RESNET, "--calibration", "train", "--evaluation", "held out")
    assert code == 0
    assert "the images have no labels; scored by agreement" in (home / "recipe.toml").read_text(
        encoding="utf-8"
    )
    code, _, err = optpipe("run", "recipe.toml", "--dry-run")
    assert code == 0, err


def test_many_images_are_not_all_taken_where_few_are_enough(optpipe: Call, home: Path) -> None:
    write_images(home / "many.npz", 3, classes=10, count=600)
    optpipe("init", RESNET, "--calibration", "many.npz")
    assert recipes.load(home / "recipe.toml").data.calibration.count == 500


def test_a_recipe_in_another_folder_finds_everything(optpipe: Call, home: Path) -> None:
    code, _, err = optpipe("init", RESNET, *IMAGES, "--out", "recipes/new/mine.toml")
    assert (code, err) == (0, "")
    written = recipes.load(home / "recipes/new/mine.toml")
    assert written.data.calibration.source == "../../calibration.npz"
    code, _, err = optpipe("run", "recipes/new/mine.toml", "--dry-run")
    assert code == 0, err


def test_torchvisions_networks_get_their_own_preparation(optpipe: Call, home: Path) -> None:
    """Nothing is downloaded: the name of weights says how they take images."""
    code, out, _ = optpipe("init", "torchvision:mobilenet_v2", "--weights", "IMAGENET1K_V2")
    written = recipes.load(home / "recipe.toml")
    assert code == 0
    assert written.model.weights == "IMAGENET1K_V2"
    assert (written.data.preprocess.size, written.data.preprocess.resize) == ((224, 224), "crop")
    assert written.data.preprocess.mean == (0.485, 0.456, 0.406)
    assert out.count("\n  line ") == 2, "the two sets of images, no more"


def test_classes_and_channels_are_passed_on(optpipe: Call, home: Path) -> None:
    code, _, err = optpipe("init", RESNET, "--classes", 7, "--channels", 1)
    assert (code, err) == (0, "")
    written = recipes.load(home / "recipe.toml")
    assert (written.model.classes, written.model.in_channels) == (7, 1)
    assert written.data.preprocess.mean == (0.5,)


# ---------------------------------------------------------------- what is refused


def test_a_recipe_that_is_there_is_replaced_by_force_alone(optpipe: Call, home: Path) -> None:
    path = home / "recipe.toml"
    path.write_text("mine", encoding="utf-8")
    code, out, err = optpipe("init", RESNET)
    assert (code, out) == (2, "")
    assert err == (
        "Error: recipe.toml: is there already; replace it with --force, or name another with --out\n"
    )
    assert path.read_text(encoding="utf-8") == "mine"
    code, _, _ = optpipe("init", RESNET, "--force")
    assert (code, recipes.load(path).model.name) == (0, RESNET)
    code, _, err = optpipe("init", RESNET, "--out", home, "--force")
    assert (code, err) == (2, f"Error: {home}: is a folder; name a .toml file in it with --out\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("zoo:resnet21_cifar",), "model 'zoo:resnet21_cifar' is unknown; did you mean"),
        (("own_networks:plane",), "has no function 'plane'; nearest: plain"),
        (("own_networks:Branches",), "own_networks:Branches: torch.fx cannot trace Branches"),
        (("own_networks:Stiff",), "(looked at with images of 224 x 224: --size sets another)"),
        (("own_networks:Bare",), "own_networks:Bare: no method can work on it: practise: the network has no"),
        ((RESNET, "--weights", "none.pth"), "none.pth: no such file"),
        ((RESNET, "--calibration", "none"), "none: no such file or folder"),
    ],
)
def test_what_no_recipe_can_be_written_for_is_refused_in_one_line(
    optpipe: Call, home: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = optpipe("init", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (home / "recipe.toml").exists()


def test_the_size_that_is_given_is_looked_at(optpipe: Call, home: Path) -> None:
    code, _, _ = optpipe("init", "own_networks:Stiff", "--size", 16, 16)
    assert code == 0
    assert recipes.load(home / "recipe.toml").data.preprocess.size == (16, 16)
