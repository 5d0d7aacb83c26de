"""A small folder in which everything is fine: a recipe, images, weights, a model and a finished run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_report
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image
from torch import nn

from optpipe import models
from optpipe.data import Preprocess
from optpipe.deploy import BundledEngine, Origin, Saved, write_bundle
from optpipe.models import ModelSpec
from optpipe.report import build
from optpipe.types import Fingerprint, Plan, Target

CLASSES = ("ant", "bee", "cat", "dog")

RECIPE = """\
[model]
name = "mine:network"
weights = "weights.pth"
classes = 4

[data]
calibration = { source = "photos" }
evaluation = { source = "many.npz" }

[data.preprocess]
size = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]

[method]
name = "practise"

[budget]
drop_blocks = 1
"""

NETWORK = """\
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return (x + self.bn(self.conv(x))).relu()


def network(classes=4, in_channels=3):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), Block(), Block(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""

MANIFEST_PATH = "run/deploy/manifest.json"

Change = Callable[[Path], object]


def make(folder: Path) -> None:
    """Fill an empty folder."""
    rng = np.random.default_rng(0)
    (folder / "small.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "mine.py").write_text(NETWORK, encoding="utf-8")
    for name in CLASSES:
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    images = rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "many.npz", images=images, labels=np.arange(12) % 4)
    network = models.load_model(ModelSpec("mine:network", classes=4), folder)
    torch.save(network.state_dict(), folder / "weights.pth")
    write_onnx(folder / "model.onnx")
    _make_run(folder, network)


def _make_run(folder: Path, network: nn.Module) -> None:
    run = folder / "run"
    build.write(run, make_report())
    (run / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    bundle = run / "deploy"
    bundle.mkdir()
    write_onnx(bundle / "model.onnx")
    target = Target("onnxruntime", 2, (3, 16, 16), threads=1)
    preprocess = Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (16, 16))
    saved = Saved(ModelSpec("mine:network", classes=4), str(folder), Plan(), (3, 16, 16), preprocess)
    origin = Origin(Fingerprint("a processor", "an OS", (), 1), "0" * 64, 0, ())
    engine = BundledEngine("fp32", "onnxruntime", "model.onnx", "model.onnx", 0.1)
    write_bundle(bundle, network, saved, target, origin, [engine])


def write_onnx(path: Path, change: Callable[[Any], object] = lambda model: None) -> None:
    """A network of one convolution for images 3 x 16 x 16, written as ``change`` leaves it."""
    kernel = np.random.default_rng(0).standard_normal((4, 3, 3, 3), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "w"], ["x"], pads=[1, 1, 1, 1]),
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["logits"]),
        ],
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(kernel, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    change(model)
    save(model, path)


# ---------------------------------------------------------------- ways to spoil it


def nothing(folder: Path) -> None:
    """Leave everything as it is."""


def wrote(name: str, content: str | bytes) -> Change:
    """A file of this content, in the place of what was there."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def cut(name: str, share: float) -> Change:
    """Only the first part of a file."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def recipe(old: str, new: str) -> Change:
    """The recipe with a piece of it replaced."""
    assert RECIPE.count(old) >= 1, old
    return wrote("small.toml", RECIPE.replace(old, new, 1))


def arrays(name: str, **named: Any) -> Change:
    """An .npz of these arrays."""

    def change(folder: Path) -> None:
        np.savez(folder / name, **named)

    return change


def json_at(name: str, *keys: str | int, value: object) -> Change:
    """A JSON file with one of its values replaced."""

    def change(folder: Path) -> None:
        path = folder / name
        whole = found = json.loads(path.read_text(encoding="utf-8"))
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value
        path.write_text(json.dumps(whole), encoding="utf-8")

    return change


def listed(name: str, content: str | bytes | None = None) -> Change:
    """A file of the bundle as it now is, or with this content, and its digest in the manifest."""

    def change(folder: Path) -> None:
        path = folder / "run" / "deploy" / name
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entry = {"sha256": digest, "bytes": path.stat().st_size}
        json_at("run/deploy/manifest.json", "files", name, value=entry)(folder)

    return change


def both(*changes: Change) -> Change:
    """Several changes, one after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change
