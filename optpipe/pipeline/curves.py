"""Losses between the original, the pruned and the recovered networks (PRACTISE, Figs 3 and 4, Eq. 11)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from optpipe import data, graph, landscape, seals, store, tune
from optpipe.errors import UsageError
from optpipe.pipeline import leakage
from optpipe.preparation import Setup
from optpipe.report import schema
from optpipe.results import Recovered
from optpipe.types import Choice, Curve, Emit, Event, Figure, Table

MOST_IMAGES = 256
"""Evaluation images at the most on which a line is followed: each point of it is a pass over them."""
_ROOM, _ANSWER = "curves", "curves.json"
# A branch of zeros is as good as none to within this part of the largest feature.
_SAME = 1e-3
State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Curves:
    """curves.json: figures and a table for the report, loss leakage, and what could not be drawn."""

    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    halves: schema.HalvesReport
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Losses:
    """Of each image (N,): the feature error and, where there are labels, cross-entropy and mistakes."""

    features: NDArray[np.float64]
    entropy: NDArray[np.float64] | None
    wrong: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class _Line:
    """A line between two networks: its name, its figure, and the losses at each of SHARES."""

    name: str
    figure: str
    points: tuple[Losses, ...]


def refuse(setup: Setup) -> None:
    """UsageError, before anything runs, where curves are asked for that cannot be drawn."""
    if not setup.recipe.report.curves:
        return
    recover, path = setup.recover, setup.recipe.path
    if recover.loss != "mimic" or not recover.steps:
        raise UsageError(
            f"{path}: [report] curves = true: follows losses between networks recovered by mimicking; set "
            '[recover] loss = "mimic" with steps above 0, or curves = false'
        )
    if len(setup.calibration) < 2:
        raise UsageError(
            f"{path}: [report] curves = true: recovers on two halves of the calibration images, and there is "
            f"{len(setup.calibration)}; give at least 2"
        )


def draw(setup: Setup, opened: store.Run, choice: Choice, recovered: Recovered, emit: Emit) -> Curves | None:
    """The curves of a run, where its recipe asks for them or they were drawn before.

    Recovers the pruned network three times more: on each of two random halves of the calibration images,
    and by adaptors alone; a run that was killed goes on where it was.
    """
    key = leakage.measured_key("curves 1", setup, choice, recovered)
    stored = opened.answer(_ROOM, key, _ANSWER, Curves)
    if stored is not None:
        return stored[0]
    if not setup.recipe.report.curves:
        return None
    folder = opened.folder / _ROOM / key
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(setup, opened, choice, folder, emit)
    opened.store_answer(_ROOM, key, _ANSWER, drawn)
    return drawn


def _draw(setup: Setup, opened: store.Run, choice: Choice, folder: Path, emit: Emit) -> Curves:
    pruned, whole = (leakage.load(setup, opened, choice, stage) for stage in ("prune", "recover"))
    order = np.random.default_rng((setup.recipe.run.seed, 11)).permutation(len(setup.calibration))
    size = len(order) // 2
    halves: list[State] = []
    for name, chosen in (("half-a", order[:size]), ("half-b", order[size : 2 * size])):
        half = data.part(setup.calibration, sorted(int(index) for index in chosen))
        recovering = copy.deepcopy(pruned)
        _train(setup, recovering, half, choice, folder / name, emit)
        halves.append(recovering.state_dict())
    follow = _Follower(setup)
    notes: list[str] = []
    lines = _original_lines(setup, choice, pruned, whole, follow, notes)
    figure = "from the pruned network to recovered ones (PRACTISE, Fig. 4a)"
    lines.append(
        follow.line("pruned to recovered", figure, pruned, (pruned.state_dict(), whole.state_dict()))
    )
    adapted = _adapted(setup, choice, folder, emit)
    if adapted is None:
        notes.append("no curve to adaptors alone: the plan does more than drop blocks")
    else:
        ends = (pruned.state_dict(), adapted)
        lines.append(follow.line("pruned to adaptors alone", figure, pruned, ends))
        ends = (adapted, whole.state_dict())
        lines.append(follow.line("adaptors alone to recovered", figure, pruned, ends))
    between = follow.line(
        f"recovered on {size} images to {size} others",
        "between networks recovered on two halves (PRACTISE, Fig. 4b)",
        pruned,
        (halves[0], halves[1]),
    )
    lines.append(between)
    found = landscape.leakage(
        landscape.SHARES,
        [point.features for point in between.points],
        follow.losses(whole).features,
        np.random.default_rng(setup.recipe.run.seed),
    )
    return Curves(
        figures=_figures(lines),
        tables=(_table(lines),),
        halves=schema.HalvesReport(
            images=size,
            half=found.half,
            whole=found.whole,
            leakage=leakage.interval(found.leakage),
            relative=leakage.interval(found.relative),
            union=leakage.interval(found.union),
        ),
        notes=tuple(notes),
    )


def _train(
    setup: Setup, student: fx.GraphModule, images: data.ImageSet, choice: Choice, path: Path, emit: Emit
) -> None:
    """Recover ``student`` in place as the run did, on these images; read where it was done before."""
    weights = path.with_suffix(".safetensors")
    if seals.is_whole(weights):
        store.load_tensors(student, weights)
        return
    emit(Event("note", "curves", f"recovering {path.name}, {len(images)} images"))
    tuning = choice.recover
    if path.name == "adaptors":
        tuning = dataclasses.replace(tuning, trainable="adaptors", batch_norm="eval")
    checkpoint = store.DiskCheckpoint(
        path.with_name(f"{path.name}-checkpoint.safetensors"), setup.recipe.run.checkpoint_every
    )
    tune.train(
        student,
        setup.original,
        images,
        tuning,
        seed=setup.recipe.run.seed,
        checkpoint=checkpoint,
        emit=emit,
        device=tune.usable(setup.device),
    )
    store.save_tensors(weights, student.state_dict())
    checkpoint.path.unlink(missing_ok=True)


def _adapted(setup: Setup, choice: Choice, folder: Path, emit: Emit) -> State | None:
    """The pruned network with nothing but adaptors trained, folded; None where there is no place for any."""
    if choice.plan.keep_channels or choice.plan.input_hw is not None or choice.start is not None:
        return None
    shape = setup.target.input_shape
    network = graph.with_adaptors(setup.original, choice.plan, shape)
    if not graph.adaptors(network):
        return None
    _train(setup, network, setup.calibration, choice, folder / "adaptors", emit)
    return graph.fold(network).state_dict()


def _original_lines(
    setup: Setup,
    choice: Choice,
    pruned: fx.GraphModule,
    whole: fx.GraphModule,
    follow: _Follower,
    notes: list[str],
) -> list[_Line]:
    """From the original to the pruned and to the recovered network, in the original's structure."""
    original, shape = setup.original, setup.target.input_shape
    begin = original.state_dict()
    lines: list[_Line] = []
    for name, network in (("original to pruned", pruned), ("original to recovered", whole)):
        state = landscape.embed(original, choice.plan, shape, network.state_dict())
        inside = copy.deepcopy(original)
        inside.load_state_dict(state)
        if not follow.same(inside, network):
            notes.append(f"no curve from the {name}: zeros for what was taken out give another network")
            continue
        figure = "from the original to the pruned network (PRACTISE, Fig. 3a)"
        lines.append(follow.line(name, figure, original, (begin, state)))
    return lines


class _Follower:
    """Follows losses on a fixed choice of evaluation images, the original's features computed once."""

    def __init__(self, setup: Setup) -> None:
        self._images = leakage.spread(setup.evaluation, MOST_IMAGES)
        self._device = setup.device
        self._wanted = leakage.features(setup.original, self._images, tune.usable(setup.device))

    def line(self, name: str, figure: str, network: fx.GraphModule, ends: tuple[State, State]) -> _Line:
        """The losses at each of SHARES between two states of the network's structure."""

        def measure(moving: nn.Module) -> Losses:
            assert isinstance(moving, fx.GraphModule)
            return self.losses(moving)

        return _Line(name, figure, landscape.along(network, ends, landscape.SHARES, measure))

    def losses(self, network: fx.GraphModule) -> Losses:
        """The losses of one network."""
        backbone, head = (part.eval().to(self._device) for part in graph.split(network))
        errors: list[NDArray[np.float64]] = []
        entropies: list[Tensor] = []
        wrong: list[Tensor] = []
        labels = self._images.labels
        with torch.inference_mode():
            for batch, wanted in zip(leakage.batches(len(self._images)), self._wanted, strict=True):
                features = backbone(self._images.batch(batch).to(self._device))
                errors.append(leakage.squares(features, wanted))
                if labels is not None:
                    logits = head(features).float().cpu()
                    entropies.append(F.cross_entropy(logits, labels[batch], reduction="none"))
                    wrong.append(logits.argmax(1) != labels[batch])
        network.to("cpu")
        if labels is None:
            return Losses(np.concatenate(errors), None, None)
        entropy, mistaken = (torch.cat(parts).double().numpy() for parts in (entropies, wrong))
        return Losses(np.concatenate(errors), entropy, mistaken)

    def same(self, one: fx.GraphModule, other: fx.GraphModule) -> bool:
        """Whether two networks have the same features."""
        images = data.part(self._images, range(min(8, len(self._images))))
        (a,), (b,) = (leakage.features(network, images, self._device) for network in (one, other))
        return bool((a - b).abs().max() <= _SAME * b.abs().max())


def _figures(lines: Sequence[_Line]) -> tuple[Figure, ...]:
    """For each loss and each kind of line a figure: the curves, and the chord of each."""
    figures: list[Figure] = []
    for label in ("feature error", "cross-entropy"):
        for title in dict.fromkeys(line.figure for line in lines):
            curves: list[Curve] = []
            for line in lines:
                values = _means(line, label)
                if line.figure == title and values is not None:
                    first, last = values[landscape.SHARES.index(0)], values[landscape.SHARES.index(1)]
                    curves.append(Curve(line.name, landscape.SHARES, values))
                    curves.append(Curve(f"chord, {line.name}", (0.0, 1.0), (first, last)))
            if curves:
                heading = f"{label.capitalize()} {title}"
                figures.append(
                    Figure(heading, "share of the way", f"mean {label}, unseen images", tuple(curves))
                )
    return tuple(figures)


def _table(lines: Sequence[_Line]) -> Table:
    """Each line's convexity in each loss."""
    rows: list[tuple[str | float, ...]] = []
    for line in lines:
        for label in ("feature error", "cross-entropy", "top-1 error"):
            values = _means(line, label)
            if values is None:
                continue
            found = landscape.convexity(landscape.SHARES, values)
            first, last = values[landscape.SHARES.index(0)], values[landscape.SHARES.index(1)]
            rows.append((line.name, label, first, last, found.below, found.excess, found.leakage, found.at))
    columns = (
        "line",
        "loss on unseen images",
        "at 0",
        "at 1",
        "share at or below the chord",
        "largest excess above it",
        "loss leakage (Eq. 11)",
        "at share",
    )
    return Table("Convexity between networks (PRACTISE, Sec. 3)", columns, tuple(rows))


def _means(line: _Line, label: str) -> tuple[float, ...] | None:
    """The mean loss at each point; None where it takes labels and there are none, or is not finite."""
    names = {"feature error": "features", "cross-entropy": "entropy", "top-1 error": "wrong"}
    values = [getattr(point, names[label]) for point in line.points]
    if any(one is None for one in values):
        return None
    means = tuple(float(one.mean()) for one in values)
    return means if np.isfinite(means).all() else None
