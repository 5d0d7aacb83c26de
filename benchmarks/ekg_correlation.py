"""Fig. 2 of EKG: does validation loss or the condition number foretell a sub-network's potential loss?

    python -m benchmarks.ekg_correlation                      # ResNet-56, 30 networks, two cores
    python -m benchmarks.ekg_correlation --network resnet20
    python -m benchmarks.ekg_correlation --paper --device cuda

Random sub-networks are made as the paper's A.3 says: like its search, but layers in random order and filters
by a random score, for every third network by the L1 norm so that better ones occur. Of each are taken: the
validation loss (32 training images a class, batch statistics), the condition number along the gradient
(Eq. 6, on some of the validation images) and, after plain fine-tuning on the other training images, the
potential loss: cross-entropy on the test images in eval mode. Test images serve for nothing else. The
original is not fine-tuned beforehand. Rows are written as they come and a run that was stopped goes on;
settings that are no default go into the names of the results.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import fx

from benchmarks.ekg_correlation_tables import (
    PAPER,
    PREDICTORS,
    VALIDATION,
    Record,
    Row,
    Score,
    Settings,
    correlated,
    figure_of,
    line_of,
    markdown,
)
from optpipe import data, graph, landscape, models, store, tune
from optpipe import recipe as recipes
from optpipe.errors import RunError
from optpipe.files import write_atomically
from optpipe.graph.trace import total
from optpipe.timing import Stopwatch
from optpipe.types import ChannelGroup, Plan, Tune

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPE = (3, 32, 32)
STEP = 0.2  # of a layer's filters go at once, as in the paper's search
REDUCTION = (0.2, 0.6)  # of the MACs


@dataclass(frozen=True, slots=True)
class Subject:
    """The network that all sub-networks are cut from, and its images."""

    original: fx.GraphModule
    groups: tuple[ChannelGroup, ...]
    training: data.ImageSet
    validation: data.ImageSet
    test: data.ImageSet


def main(words: Sequence[str] | None = None) -> None:
    arguments, settings = parse(words)
    path = arguments.out / f"{name_of(settings)}.json"
    record = resume(path, settings, machine_of(arguments.device))
    subject = load(settings.network)
    done = {row.index for row in record.rows}
    for index in range(settings.networks):
        if index in done:
            continue
        try:
            row = measure(subject, index, settings, arguments.device)
            record = dataclasses.replace(record, rows=(*record.rows, row))
            print(f"{index + 1} of {settings.networks}: {line_of(row)}", flush=True)
        except RunError as error:
            record = dataclasses.replace(record, failed=(*record.failed, (index, str(error))))
            print(f"{index + 1} of {settings.networks}: {error}", flush=True)
        record = correlated(record)
        publish(path, record)
    print(markdown(record))


def parse(words: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=["resnet20", "resnet56"], default="resnet56")
    parser.add_argument("--paper", action="store_true", help="50 networks, 200 epochs, 21 points")
    parser.add_argument("--scale", dest="epochs", type=float, help="epochs of fine-tuning [4]")
    parser.add_argument("--networks", type=int, help="sub-networks [30]")
    parser.add_argument("--lr", type=float, help="of fine-tuning [0.01]")
    parser.add_argument("--points", type=int, help="on the line along the gradient [5]")
    parser.add_argument("--iterations", type=int, help="Hessian products a point [8]")
    parser.add_argument("--images", type=int, help="of each class in the condition number [4]")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    settings = dataclasses.replace(PAPER if arguments.paper else Settings(), **given)
    if not 1 <= settings.images <= VALIDATION:
        parser.error(f"--images {settings.images}: the validation set has {VALIDATION} of each class")
    return arguments, settings


def name_of(settings: Settings) -> str:
    """The results' name: what is neither the default nor the paper's is in it."""
    names = [field.name for field in dataclasses.fields(Settings)]
    departures = {
        prefix: [name for name in names if getattr(settings, name) != getattr(usual, name)]
        for prefix, usual in (("", Settings()), ("-paper", PAPER))
    }
    prefix = min(departures, key=lambda each: len(departures[each]))
    shown = [
        settings.network if name == "network" else f"{getattr(settings, name):g}{name}"
        for name in departures[prefix]
    ]
    return "-".join([f"ekg_correlation{prefix}", *shown])


def resume(path: Path, settings: Settings, machine: str) -> Record:
    """The rows that are there already, if they were made with these settings on this machine."""
    versions = tuple((package, version(package)) for package in ("torch", "torch-pruning", "scipy"))
    fresh = Record(settings, datetime.now(UTC).date().isoformat(), machine, versions)
    if not path.exists():
        return fresh
    stored = store.from_json(Record, path.read_bytes())
    same = stored.settings == settings and stored.machine == machine and stored.versions == versions
    # A network that failed is tried again.
    return dataclasses.replace(stored, date=fresh.date, failed=()) if same else fresh


def machine_of(device: str) -> str:
    what = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
    return f"{platform.platform()}, {what}"


# ---------------------------------------------------------------- the network and its images


def load(network: str) -> Subject:
    recipe = recipes.load(ROOT / f"recipes/cifar10/practise_{network}.toml")
    original = graph.trace(models.load_model(recipe.model, recipe.folder), SHAPE)
    everything = dataclasses.replace(recipe.data.calibration, labels=True, count=None, skip=0)
    images, test = (
        data.load_images(spec, recipe.data.preprocess, SHAPE[0], recipe.folder)
        for spec in (everything, recipe.data.evaluation)
    )
    validation, training = split(labels_of(images), VALIDATION)
    # Filters inside the blocks: narrowing one layer's narrows no other's, so MACs are linear in each.
    groups = [group for group in graph.inspect(original, SHAPE).groups if group.prunable]
    return Subject(
        original,
        tuple(group for group in groups if len(group.layers) == 1),
        data.part(images, training),
        data.part(images, validation),
        test,
    )


def labels_of(images: data.ImageSet) -> torch.Tensor:
    assert images.labels is not None
    return images.labels


def split(labels: torch.Tensor, each: int) -> tuple[list[int], list[int]]:
    """(the first ``each`` images of every class, all others), both in the order of the set."""
    seen: dict[int, int] = {}
    first: list[int] = []
    others: list[int] = []
    for index, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        (first if seen[label] <= each else others).append(index)
    return first, others


# ---------------------------------------------------------------- one sub-network


def measure(subject: Subject, index: int, settings: Settings, device: str) -> Row:
    """One row. Raises RunError where its loss is no number any more."""
    rng = np.random.default_rng([settings.seed, index])
    score: Score = "l1" if index % 3 == 0 else "random"
    network = cut(subject, score, rng)
    here = copy.deepcopy(network).to(device)
    labels = labels_of(subject.validation)
    everything = landscape.objective(here, subject.validation.batch(slice(None)).to(device), labels)
    validation_loss = everything.loss(everything.origin())
    few, _ = split(labels, settings.images)
    watch = Stopwatch()
    line = landscape.gradient_direction_condition(
        here,
        subject.validation.batch(few),
        labels[few],
        generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        points=settings.points,
        iterations=settings.iterations,
    )
    condition_s, watch = watch.seconds, Stopwatch()
    recovery = fine_tuning(settings, len(subject.training), device)
    trained = tune.train(network, None, subject.training, recovery, seed=settings.seed, device=device)
    tune_s = watch.seconds
    logits, wanted = tune.logits(network, subject.test, device), labels_of(subject.test)
    before, after = total(subject.original), total(network)
    return Row(
        index=index,
        score=score,
        macs_reduction=1 - after[1] / before[1],
        parameters_reduction=1 - after[0] / before[0],
        validation_loss=validation_loss,
        condition=line.mean,
        line=line.condition_numbers,
        residual=float(np.median([e.smallest_residual / e.largest for e in line.extremes])),
        training_loss=trained.loss_last,
        potential_loss=float(F.cross_entropy(logits, wanted)),
        test_error=float((logits.argmax(1) != wanted).float().mean()),
        condition_s=condition_s,
        tune_s=tune_s,
    )


def fine_tuning(settings: Settings, count: int, device: str) -> Tune:
    """The paper's training of CIFAR networks, for as many epochs and at the rate that the settings say."""
    plain = Tune(
        steps=0,
        epochs=settings.epochs,
        batch=128,
        lr=settings.lr,
        nesterov=True,
        weight_decay=5e-4,
        schedule="milestones",
        milestones=(0.3, 0.6, 0.8),
        decay=0.2,
        loss="labels",
        trainable="all",
        augment="shift",
        autocast="auto",
    )
    return tune.on_this_machine(tune.with_steps(plain, count), device)


def cut(subject: Subject, score: Score, rng: np.random.Generator) -> fx.GraphModule:
    """A random sub-network, with the MACs reduced by as near a random share of 20 to 60% as a step allows."""
    wanted = float(rng.uniform(*REDUCTION))
    orders = [order_of(subject.original, group, score, rng) for group in subject.groups]
    states = list(removal([group.channels for group in subject.groups], rng))
    whole = total(subject.original)[1]
    low, high = 0, len(states) - 1
    while low < high:
        middle = (low + high) // 2
        reached = 1 - total(narrowed(subject, orders, states[middle]))[1] / whole
        low, high = (low, middle) if reached >= wanted else (middle + 1, high)
    return narrowed(subject, orders, states[low])


def order_of(
    network: fx.GraphModule, group: ChannelGroup, score: Score, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The group's channels, the first to go first."""
    if score == "random":
        return rng.permutation(group.channels)
    weight = network.get_submodule(group.name).weight
    assert isinstance(weight, torch.Tensor)
    return np.argsort(weight.detach().flatten(1).abs().sum(1).numpy(), kind="stable")


def removal(channels: Sequence[int], rng: np.random.Generator) -> Iterator[tuple[int, ...]]:
    """How many channels each group has lost after each step, until all have one left.

    A step takes a fifth of what a random layer has, at least one.
    """
    lost = [0] * len(channels)
    while open_ones := [i for i, count in enumerate(channels) if lost[i] < count - 1]:
        chosen = open_ones[int(rng.integers(len(open_ones)))]
        left = channels[chosen] - lost[chosen]
        lost[chosen] += min(left - 1, max(1, round(STEP * left)))
        yield tuple(lost)


def narrowed(subject: Subject, orders: Sequence[NDArray[np.int64]], lost: Sequence[int]) -> fx.GraphModule:
    kept = tuple(
        (group.name, tuple(sorted(int(channel) for channel in order[count:])))
        for group, order, count in zip(subject.groups, orders, lost, strict=True)
        if count
    )
    return graph.apply(subject.original, Plan(keep_channels=kept), SHAPE)


def publish(path: Path, record: Record) -> None:
    """Write all rows so far as JSON, Markdown and the two figures."""
    write_atomically(path, store.to_json(record))
    write_atomically(path.with_suffix(".md"), markdown(record))
    for name in PREDICTORS[:2]:
        write_atomically(path.with_name(f"{path.stem}-{name.split()[0]}.svg"), figure_of(record, name))


if __name__ == "__main__":
    main()
