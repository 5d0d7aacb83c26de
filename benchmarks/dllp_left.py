"""What a finished run of DLLP leaves in its folder: its trainings, its report's tables, and its members."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.dllp_rows import AFTER, CUT, MASKED, SAMPLED, UNSETTLED, Joined, Spike
from optpipe import data, deploy, graph, preparation, store, tune, uncertainty
from optpipe import recipe as recipes
from optpipe.errors import RunError
from optpipe.lab import begin
from optpipe.methods.dllp import members
from optpipe.methods.dllp.config import Config
from optpipe.methods.dllp.particles import Particles
from optpipe.report import schema
from optpipe.results import Analyzed
from optpipe.types import Cell, Table

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import fx

    Doubles = NDArray[np.float64]

GATES = "gates"
TRAININGS = (GATES, "settling")


@dataclass(frozen=True, slots=True)
class Training:
    """A training that a run's search asked for; ``seconds`` are those of the attempt that finished it."""

    name: str
    key: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    """A finished run, opened again: its recipe with model and images loaded, and what its search chose."""

    folder: Path
    setup: preparation.Setup
    analyzed: Analyzed

    @property
    def config(self) -> Config:
        """The method's settings."""
        assert isinstance(self.setup.config, Config)
        return self.setup.config

    @property
    def masks(self) -> graph.Masks:
        """The units that the particles gate."""
        original = self.setup.original
        widths = graph.width_map(original, self.setup.target.input_shape)
        return graph.Masks(original, widths, self.config.granularity)

    def particles(self) -> Particles:
        """The particles as the training of the gates left them. Raises RunError where there was none."""
        found = [training for training in trainings(self.folder) if training.name == GATES]
        if not found:
            raise RunError(f"{self.folder}: no training of gates: nothing to draw masks from")
        path = store.Run(self.folder, None).weights(found[-1].key)
        return members.restored(self.setup.original, self.masks, load_file(path))

    def networks(self) -> Iterator[fx.GraphModule]:
        """The networks that the search ended with, of each particle one, cut."""
        shape, opened = self.setup.target.input_shape, store.Run(self.folder, None)
        choice = self.analyzed.choice
        pairs = [
            (choice.plan, choice.start),
            *((member.plan, member.start) for member in choice.members),
        ]
        for plan, start in pairs:
            begun, left = begin(self.setup.original, start, plan, shape, opened)
            yield graph.apply(begun, left, shape)


def opened(folder: Path) -> Left:
    """A finished run's recipe, images and choice.

    Raises:
        RunError: it is not finished.
    """
    analyzed = store.Run(folder, None).stage_result("analyze", Analyzed)
    saved = folder / "deploy" / "plan.json"
    if analyzed is None or not saved.is_file():
        raise RunError(f"{folder}: this run is not finished")
    # Paths in a frozen recipe start where the recipe once lay.
    home = Path(store.from_json(deploy.Saved, saved.read_bytes()).search_folder)
    recipe = dataclasses.replace(recipes.load(folder / store.RECIPE), path=home / store.RECIPE)
    return Left(folder, preparation.prepare(recipe), analyzed)


def trainings(folder: Path) -> list[Training]:
    """The trainings of gates and those after them, each once, with what it took when it was computed."""
    found: dict[str, Training] = {}
    for text in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(text)
        if event["kind"] == "trial" and event["name"] in TRAININGS:
            key = event["fields"]["key"]
            if key not in found or event["detail"] == "computed":
                found[key] = Training(event["name"], key, event["seconds"])
    return list(found.values())


def config_of(folder: Path) -> Config:
    """The method's settings that a run was made with, all of them."""
    path = folder / store.RECIPE
    raw = tomllib.loads(path.read_text(encoding="utf-8"))["method"]
    raw.pop("name")
    return recipes.bind(Config, raw, path, "method")


def steps_of(config: Config, images: int) -> int:
    """Steps of all trainings together."""
    return max(1, math.ceil(config.epochs * images / min(config.batch, images) - 1e-9))


def spike_of(tables: Sequence[Table]) -> Spike | None:
    """What the report says of cutting the spike out, in percent; None where it says nothing."""
    table = next((one for one in tables if one.title.startswith(CUT)), None)
    if table is None:
        return None
    accuracies: dict[str, float] = {}
    apart = 0.0
    for name, accuracy, difference in table.rows:
        accuracies[str(name)] = 100 * _number(accuracy)
        apart = apart if difference is None else _number(difference)
    sampled = [value for name, value in accuracies.items() if name.startswith(SAMPLED)]
    return Spike(
        masked=accuracies[MASKED],
        cut=accuracies[AFTER],
        apart=apart,
        sampled=sampled[0] if sampled else None,
        unsettled=accuracies.get(UNSETTLED),
    )


def joined_of(report: schema.Report) -> Joined | None:
    """What the report says of the particles' networks together; None where they were not scored."""
    found = report.ensemble
    if found is None or found.quality is None:
        return None
    trusted = found.reliability
    return Joined(
        found.members,
        100 * found.quality.value,
        None if trusted is None else 100 * trusted.calibration.error,
        None if found.latency is None else found.latency.ratio_to_original,
    )


def calibration_of(network: schema.NetworkReport, name: str) -> float:
    """Expected calibration error in percent. Raises RunError where it was not measured."""
    if network.reliability is None:
        raise RunError(f"{name}: its calibration was not measured; its test images have no labels")
    return 100 * network.reliability.calibration.error


# ---------------------------------------------------------------- members


def sampled(left: Left, of: Particles, images: data.ImageSet, draws: int) -> Doubles:
    """Probabilities (S, N, C) of networks with masks drawn from theta, the same masks in every call."""
    generator = torch.Generator().manual_seed(left.setup.recipe.run.seed)
    found = members.sampled_probabilities(of, left.masks, images, draws, generator)
    return np.asarray(found.numpy())


def settled(networks: Sequence[fx.GraphModule], images: data.ImageSet) -> Doubles:
    """Probabilities (S, N, C) of networks as they are."""
    return np.stack(
        [uncertainty.probabilities(tune.logits(network, images, "cpu").numpy()) for network in networks]
    )


def variances(of: Particles) -> tuple[float, ...]:
    """1/d^2 of each particle's likelihood, as it was learnt."""
    return tuple(math.exp(-2 * float(precision)) for precision in of.log_precision)


def filtered(images: data.ImageSet, name: str) -> data.ImageSet:
    """The images ``sharpen``ed by the Laplacian, ``clean`` as they are, or blurred by ``blur RADIUS`` pixels."""
    from PIL import Image, ImageFilter

    if name == "clean":
        return images
    if name == "sharpen":
        what: ImageFilter.Filter = ImageFilter.SHARPEN()
    else:
        what = ImageFilter.GaussianBlur(float(name.removeprefix("blur ")))
    pixels = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).filter(what)) for image in images.pixels
    ]
    changed = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return dataclasses.replace(images, pixels=changed, digest=f"{images.digest} {name}")


def _number(cell: Cell) -> float:
    assert isinstance(cell, int | float)
    return float(cell)
