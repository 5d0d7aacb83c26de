"""Small runs of every kind, for campaigns that stop, damage or starve them: seconds each, always alike.

Latencies are the one thing in a run that no two processes find alike. The campaigns run with
:func:`pretended`: engines are built, loaded and computed with as ever, but how long one takes is said by the
weights in its file instead of a clock. Two undisturbed runs then agree in all but wall time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx, nn
from whole_runs import write_images

from optpipe import files, onnx_export, seals, store
from optpipe.backends import onnxruntime
from optpipe.report import figures
from optpipe.timing import clock
from optpipe.types import Sample

NETWORK = """\
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(12, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)

    def forward(self, x):
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def make(count, classes=4):
    stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    blocks = nn.Sequential(*(Block(24) for _ in range(count)))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, classes))


def two(classes=4):
    return make(2, classes)


def three(classes=4):
    return make(3, classes)
"""

RECIPE = """\
[model]
name = "small:{network}"
classes = 4

[data]
calibration = {{ source = "calibration.npz" }}
evaluation = {{ source = "evaluation.npz" }}
preprocess = {{ mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25], size = [12, 12] }}

[target]
batch = 8
threads = 1

[export]
{export}

[timing]
tolerance = 0.5
budget_s = 0.02
final_budget_s = 0.02

[method]
{method}

[recover]
{recover}

[budget]
{budget}

[run]
checkpoint_every = 2
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A small run: its recipe's tables, and what is set on the command line beside it.

    ``weight`` is how many of a campaign's kills it gets, in relation to the others.
    """

    name: str
    method: str
    recover: str
    budget: str
    network: str = "two"
    export: str = 'precisions = ["fp32"]'
    sets: tuple[str, ...] = ()
    weight: int = 5
    sweeps: bool = False

    def make(self, home: Path) -> None:
        """Write the recipe and all that it needs into an empty folder."""
        write_home(home)
        recipe = RECIPE.format(
            network=self.network,
            export=self.export,
            method=self.method,
            recover=self.recover,
            budget=self.budget,
        )
        (home / "small.toml").write_text(recipe, encoding="utf-8")
        if self.sweeps:
            other = recipe.replace(self.method, 'name = "filters"').replace(
                self.recover, "steps = 4\nbatch = 8"
            )
            (home / "other.toml").write_text(other, encoding="utf-8")

    def words(self, out: Path) -> tuple[str, ...]:
        """The command line that takes it to its end in the folder ``out``."""
        sets = [word for one in self.sets for word in ("--set", one)]
        if self.sweeps:
            return ("sweep", "small.toml", "other.toml", "--latency", "0.1", "--out", str(out), *sets)
        return ("run", "small.toml", "--out", str(out), *sets)


def write_home(home: Path) -> None:
    """The network and the images of all small runs."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "small.py").write_text(NETWORK, encoding="utf-8")
    write_images(home / "calibration.npz", 24, seed=1, size=12)
    write_images(home / "evaluation.npz", 16, seed=2, size=12)


_EXACT = 'name = "practise"\nscorer = "exact"\nexact_steps = 4'
_TRAINED = "steps = 12\nbatch = 8"
PRACTISE = Kind("practise", _EXACT, _TRAINED, "drop_blocks = 1", export='precisions = ["fp32", "int8"]')
EKG = Kind(
    "ekg",
    'name = "ekg"\nratio = 0.4\nscore_images = 3\ntuning_images = 4',
    f"{_TRAINED}\nbank = 3",
    "macs_reduction = 0.3",
    weight=4,
)
THREE_D = Kind(
    "three_d",
    'name = "three_d"\nrounds = 1\nepochs = 0.5',
    "epochs = 1\nbatch = 8",
    "macs_reduction = 0.5",
    network="three",
    weight=2,
)
DLLP = Kind(
    "dllp, shipped as an ensemble",
    'name = "dllp"\nepochs = 1\nbatch = 8\ntravel = 4\naugment = "none"',
    "steps = 4\nbatch = 8",
    "macs_reduction = 0.3",
    export='precisions = ["fp32"]\nuncertainty = true',
    weight=4,
)
SWEEP = Kind("a sweep of practise and filters", _EXACT, _TRAINED, "drop_blocks = 1", sweeps=True, weight=4)
KINDS = (
    PRACTISE,
    Kind(
        "practise, recovered with labels and a memory bank",
        'name = "practise"\nfast_images = 8',
        f'name = "ekg"\nteachers = "ensemble"\n{_TRAINED}\nbank = 2',
        "drop_blocks = 1",
    ),
    EKG,
    THREE_D,
    DLLP,
    Kind(
        "practise with two workers",
        _EXACT,
        _TRAINED,
        "drop_blocks = 1",
        sets=('run.workers="local:2"',),
        weight=4,
    ),
    SWEEP,
)


# ---------------------------------------------------------------- a clock that is alike each time


def pretended() -> None:
    """From now on, in this process, engines take the time that the weights in their files say.

    It grows with the weights and the images. A profile is taken as ever, since its runs must be real.
    """
    session = onnxruntime._CpuSession
    begin, sample = session.__init__, session.sample
    times: dict[int, float] = {}

    def begun(self: Any, engine: Any, target: Any, profile: Path | None = None) -> None:
        begin(self, engine, target, profile)
        times.pop(id(self), None)
        if profile is None:
            times[id(self)] = _pretended_ms(engine.path, target.input_shape)

    def sampled(self: Any) -> Sample:
        return Sample(compute_ms=times[id(self)]) if id(self) in times else sample(self)

    session.__init__ = begun  # type: ignore[method-assign]
    session.sample = sampled  # type: ignore[method-assign]
    clock._warm_up = lambda sessions, warmup_s: 3  # nothing is warmed by waiting


def _pretended_ms(path: Path, shape: tuple[int, int, int]) -> float:
    import onnx

    weights = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
    return 0.5 + weights * shape[1] * shape[2] / 1e6


def without_figures() -> None:
    """From now on, in this process, figures are no more than their titles: drawing takes most of a report."""
    figures.figure_svg = lambda figure, **settings: f"<svg>{figure.title}</svg>"


def keep_exports(folder: Path) -> None:
    """From now on, in this process, a network that was exported before is not exported again.

    An export hangs on nothing but the network, and takes most of a small run's time. It is written as ever.
    """
    export = onnx_export.export

    def kept(
        model: nn.Module,
        input_shape: Sequence[int],
        batch: int,
        path: Path,
        *,
        input_name: str = "input",
        output_names: Sequence[str] = ("logits",),
    ) -> None:
        code = [one.code for one in model.modules() if isinstance(one, fx.GraphModule)]
        tensors = seals.tensors_sha256(model.state_dict())
        key = store.digest(repr(model), *code, tensors, *input_shape, batch, input_name, *output_names)
        made = folder / f"{key}.onnx"
        if not made.exists():
            export(model, input_shape, batch, made, input_name=input_name, output_names=output_names)
        files.write_atomically(path, made.read_bytes())

    onnx_export.export = kept


# ---------------------------------------------------------------- what a run came to

VOLATILE = frozenset(
    {"seconds", "build_s", "builds_s", "layers", "stages", "at", "converged", "seal", "folder", "run"}
)
"""Keys of what wall time says, anywhere in a file, and of where the folder is."""
SKIPPED = frozenset({"events.jsonl", "environment.json", "report.html", "report.md", "failure.json"})
"""Files that tell of a sitting, or that show what report.json holds."""


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run or sweep came to, by the files' names: values of JSON, sha256 of the rest.

    ``<files>`` are the names of all files that are there.
    """
    found: dict[str, Any] = {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in SKIPPED)
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            try:
                found[name] = _steady(json.loads(path.read_bytes()))
            except ValueError:
                found[name] = "is damaged"
        elif path.suffix not in {".svg", ".md"}:
            found[name] = store.file_sha256(path)
    found["<files>"] = [path.relative_to(folder).as_posix() for path in paths]
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(inner) for key, inner in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_steady(inner) for inner in value]
    return value


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """In what two outcomes differ, a few words each."""
    wrong: list[str] = []
    for name in sorted({*wanted, *found}):
        if name not in found:
            wrong.append(f"{name} is missing")
        elif name not in wanted:
            wrong.append(f"{name} is too much")
        elif wanted[name] != found[name]:
            wrong.append(f"{name}: {_first(wanted[name], found[name])}")
    return wrong


def _first(wanted: Any, found: Any, place: str = "") -> str:
    """The first place in which two values differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in {**wanted, **found}:
            if wanted.get(key) != found.get(key):
                return _first(wanted.get(key), found.get(key), f"{place}.{key}")
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
            if one != other:
                return _first(one, other, f"{place}[{number}]")
    return f"{place or 'all of it'} is {str(found)[:80]}, not {str(wanted)[:80]}"


Tell = Callable[[str], None]
