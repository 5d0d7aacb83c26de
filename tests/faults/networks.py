"""Networks and weights that are wrong, and files of weights that would run code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faults.cases import Case
from faults.recipes import CHECK
from faults.workspace import NETWORK, Change, both, cut, nothing, recipe, wrote

LOOK = ("inspect", "small.toml")
MARK = "marked"
"""A file that code leaves behind where it is run; a case that finds it has run what it must not."""


def _model(name: str, model: str, says: str) -> Case:
    changed = recipe('name = "mine:network"\nweights = "weights.pth"\n', f"name = {json.dumps(model)}\n")
    return Case(name, changed, LOOK, 2, says)


def _code(name: str, text: str, says: str) -> Case:
    return Case(name, wrote("mine.py", text), LOOK, 2, says)


def _classes(name: str, given: str, says: str, model: str = "mine:network") -> Case:
    old = 'name = "mine:network"\nweights = "weights.pth"\nclasses = 4'
    return Case(name, recipe(old, f'name = "{model}"\n{given}'), LOOK, 2, says)


def _weights(name: str, make: Change, says: str, file: str = "weights.pth") -> Case:
    changed = make if file == "weights.pth" else both(recipe("weights.pth", file), make)
    return Case(name, changed, LOOK, 2, says)


def _state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """weights.pth as torch.save writes what ``change`` makes of the right weights."""

    def make(folder: Path) -> None:
        state = torch.load(folder / "weights.pth", weights_only=True)
        torch.save(change(state), folder / "weights.pth")

    return make


class _Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {MARK}",)


def _pickled(folder: Path) -> None:
    (folder / "weights.pth").write_bytes(pickle.dumps(_Bomb()))


def _safetensors(header: bytes, length: int | None = None, rest: bytes = b"") -> Change:
    size = len(header) if length is None else length
    return wrote("w.safetensors", struct.pack("<Q", size) + header + rest)


def _zip(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return content.getvalue()


def _entry(**changed: object) -> bytes:
    return json.dumps(
        {"0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}}
    ).encode()


CASES = (
    # names
    _model("a network without a source", "resnet56", "is not of the form"),
    _model("an empty name", "", "is not of the form"),
    _model("a colon alone", ":", "is not of the form"),
    _model("a name with a line break", "zoo:a\nb", "is unknown"),
    _model("an unknown network of the zoo", "zoo:resnet57_cifar", "resnet56_cifar"),
    _model("an unknown network of torchvision", "torchvision:resnet35", "resnet34"),
    _model("a detector of torchvision", "torchvision:fasterrcnn_resnet50_fpn", "no classification network"),
    _model("a module that is gone", "live:ResNet", "live module"),
    _model("a module that is not there", "nowhere:network", "does not import"),
    _model("a module in a folder above", "..mine:network", "does not import"),
    _model("a path for a module", "/etc/passwd:network", "does not import"),
    _model("a function that is not there", "mine:netwrk", "nearest: network"),
    _model("what is no function", "mine:__name__", "has no function"),
    _model("a function that makes no network", "os:getcwd", "cannot be called with"),
    # code that the recipe names
    _code("a module with an error in its syntax", "def network(:", "SyntaxError"),
    _code("a module of zero bytes", "\0\0", "does not import"),
    _code("a module that fails", "1 / 0", "ZeroDivisionError"),
    _code("a module that leaves", "import sys; sys.exit(0)", "SystemExit"),
    _code(
        "a function that fails", "def network(classes):\n    raise ValueError('a\\nb')", "failed: ValueError"
    ),
    _code("a function that leaves", "import sys\ndef network(classes):\n    sys.exit(0)", "SystemExit"),
    _code("a function that takes nothing", "def network(): ...", "cannot be called with (classes)"),
    _code("a function that returns nothing", "def network(classes): ...", "returned a NoneType"),
    _code("a function that never ends", "def network(classes): return network(classes)", "RecursionError"),
    _code(
        "a network without a convolution",
        "from torch import nn\ndef network(classes):\n    return nn.Linear(8, classes)",
        "do not fit",
    ),
    _code(
        "a network that no trace sees through",
        NETWORK.replace("return (x + ", "if x.sum() > 0: x = x + 1\n        return (x + "),
        "Block",
    ),
    _code(
        "a network that fails",
        NETWORK.replace("return (x +", "return (x.view(7, 7) +"),
        "does not take an image",
    ),
    # sizes
    _classes("no classes", "classes = 0", "classes = 0"),
    _classes("less than no classes", "classes = -3", "classes = -3"),
    _classes("a million million classes", f"classes = {10**12}", "classes"),
    _classes("no channels", "classes = 4\nin_channels = 0", "in_channels = 0"),
    _classes("a million million channels", f"classes = 4\nin_channels = {10**12}", "in_channels"),
    _classes("four channels of three", "in_channels = 4", "takes 3 input channels", "torchvision:resnet18"),
    _classes("one channel for colours", "in_channels = 1", "3 values", "zoo:resnet20_cifar"),
    _classes("a million million classes of the zoo", f"classes = {10**12}", "classes", "zoo:resnet20_cifar"),
    # weights
    _weights("weights that are not there", nothing, "no such file", "w.pth"),
    _weights("weights of another kind", wrote("w.bin", "x"), "is not supported", "w.bin"),
    _weights("a pickle for weights", wrote("w.pkl", "x"), "is not supported", "w.pkl"),
    _weights("a folder for weights", lambda folder: (folder / "w.pth").mkdir(), "no such file", "w.pth"),
    _weights("weights of a name for a network of one's own", nothing, "by name", "IMAGENET1K_V1"),
    _weights("empty weights", wrote("weights.pth", ""), "not a readable torch file"),
    _weights("text for weights", wrote("weights.pth", "no weights at all"), "weights.pth"),
    _weights("half of the weights' file", cut("weights.pth", 0.5), "not a readable torch file"),
    _weights("all but the end of the weights' file", cut("weights.pth", 0.99), "not a readable torch file"),
    _weights("an archive that climbs", wrote("weights.pth", _zip("../../evil", "/etc/x")), "weights.pth"),
    _weights("an archive of nothing", wrote("weights.pth", _zip()), "weights.pth"),
    _weights("a pickle that runs code", _pickled, "could run code"),
    _weights("weights that hold code", _state(lambda state: {**state, "x": _Bomb()}), "could run code"),
    _weights("a whole module", _state(lambda state: torch.nn.Linear(2, 2)), "could run code"),
    _weights("a list of weights", _state(lambda state: list(state.values())), "holds no state_dict"),
    _weights("a number for weights", _state(lambda state: 3), "holds no state_dict"),
    _weights("a word among weights", _state(lambda state: {**state, "x": "y"}), "holds no state_dict"),
    _weights("numbers for names", _state(lambda state: dict(enumerate(state.values()))), "weights.pth"),
    _weights("no weights", _state(lambda state: {}), "missing"),
    _weights("a weight too few", _state(lambda state: dict(list(state.items())[1:])), "1 missing"),
    _weights("a weight too many", _state(lambda state: {**state, "x": torch.ones(1)}), "1 unexpected: x"),
    _weights("a weight of another shape", _state(lambda s: {**s, "5.bias": torch.ones(9)}), "another shape"),
    _weights(
        "a weight that is no number", _state(lambda s: {**s, "5.bias": torch.full((4,), torch.nan)}), "NaN"
    ),
    _weights("an endless weight", _state(lambda s: {**s, "5.bias": torch.full((4,), torch.inf)}), "infinite"),
    _weights("a sparse weight", _state(lambda s: {**s, "5.weight": s["5.weight"].to_sparse()}), "5.weight"),
    _weights(
        "a weight without values", _state(lambda s: {**s, "5.bias": torch.ones(4, device="meta")}), "5.bias"
    ),
    _weights(
        "a complex weight", _state(lambda s: {**s, "5.bias": torch.ones(4, dtype=torch.complex64)}), "5.bias"
    ),
    # safetensors
    _weights("empty safetensors", wrote("w.safetensors", ""), "not a readable safetensors", "w.safetensors"),
    _weights(
        "torch's file called safetensors",
        lambda f: (f / "weights.pth").rename(f / "w.safetensors"),
        "not a readable safetensors",
        "w.safetensors",
    ),
    _weights(
        "safetensors of a header of 2^63 bytes", _safetensors(b"{}", 2**63), "safetensors", "w.safetensors"
    ),
    _weights("safetensors of a header of 2 GB", _safetensors(b"{}", 2**31), "safetensors", "w.safetensors"),
    _weights("safetensors of a header that is no JSON", _safetensors(b"{x"), "safetensors", "w.safetensors"),
    _weights("safetensors nested deeply", _safetensors(b'{"a":' * 10_000), "safetensors", "w.safetensors"),
    _weights("safetensors without their values", _safetensors(_entry()), "safetensors", "w.safetensors"),
    _weights(
        "safetensors of offsets beyond the end",
        _safetensors(_entry(data_offsets=[0, 2**62])),
        "safetensors",
        "w.safetensors",
    ),
    _weights(
        "safetensors of offsets before the start",
        _safetensors(_entry(data_offsets=[-4, 0])),
        "safetensors",
        "w.safetensors",
    ),
    _weights(
        "safetensors of an unknown type",
        _safetensors(_entry(dtype="F9"), rest=bytes(4)),
        "safetensors",
        "w.safetensors",
    ),
    _weights(
        "safetensors of 2^80 values",
        _safetensors(_entry(shape=[2**40, 2**40]), rest=bytes(4)),
        "safetensors",
        "w.safetensors",
    ),
    _weights(
        "safetensors of other names", _safetensors(_entry(), rest=bytes(4)), "do not fit", "w.safetensors"
    ),
    # the recipe that is begun
    Case(
        "a first recipe over another", nothing, ("init", "mine:network", "--out", "small.toml"), 2, "--force"
    ),
    Case(
        "a first recipe in a folder's place",
        nothing,
        ("init", "mine:network", "--out", "run"),
        2,
        "is a folder",
    ),
    Case("a first recipe of nothing", nothing, ("init", ""), 2, "is not of the form"),
    Case(
        "a first recipe of images that are not there",
        nothing,
        ("init", "mine:network", "--calibration", "nowhere"),
        2,
        "no such file or folder",
    ),
    Case("a first recipe of no classes", nothing, ("init", "mine:network", "--classes", "0"), 2, "--classes"),
    Case(
        "a first recipe of a gigantic size",
        nothing,
        ("init", "mine:network", "--size", "9999999", "9999999"),
        2,
        "at most",
    ),
    Case("a recipe for one's own code, without code", nothing, (*CHECK, "--no-code"), 2, "--no-code"),
)
