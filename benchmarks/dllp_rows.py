"""What ``benchmarks.dllp`` keeps of its runs besides what every benchmark of runs does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from benchmarks import runs

CUT = "Cutting the spike out"
"""How the title of the method's table of the masked and the cut network begins."""
SAMPLED = "masks sampled"
UNSETTLED = "masks by the threshold, before settling"
MASKED = "masks by the threshold, at the end"
AFTER = "cut, nothing trained since"


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of a table: its name, and what it sets besides what all rows do."""

    name: str
    sets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Spike:
    """Accuracies of one network, in percent, up to the cut, and how far its logits are apart at the cut.

    ``sampled`` and ``unsettled`` are of masks as they were learnt, drawn and by the threshold; None where none
    were. ``masked`` are the masks at the end, ``cut`` is the network without what they hide.
    """

    masked: float
    cut: float
    apart: float
    sampled: float | None = None
    unsettled: float | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """The particles' networks as one: top-1 and calibration error in percent, latency over the original's."""

    members: int
    top1: float
    calibration: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured. Calibration errors are in percent of the test images.

    ``steps`` are those of all trainings, of ``particles`` networks at a time, ``trained_s`` their seconds.
    """

    measured: runs.Figures
    original_calibration: float
    calibration: float
    particles: int
    steps: int
    trained_s: float
    sparsity: float
    spike: Spike | None = None
    joined: Joined | None = None

    @property
    def top1(self) -> float:
        """Percent."""
        return self.measured.top1


@dataclass(frozen=True, slots=True)
class Reading:
    """What one set of members says of one set of images, means over the images.

    ``variance`` is 1/d^2, ``entropy`` the members' mean entropy and ``information`` the mutual information, both
    in nats, ``disagreement`` the variance over members of the probabilities. ``top1`` and ``calibration`` are
    those of the mean prediction, in percent.
    """

    members: str
    images: str
    variance: float
    entropy: float
    information: float
    disagreement: float
    top1: float
    calibration: float


@dataclass(frozen=True, slots=True)
class Observed:
    """What the ensemble that a run left says, and of how many training images it is.

    ``learnt`` is 1/d^2 of each particle as the training left it. ``measured_s`` is what reading took.
    """

    count: int
    steps: int
    trained_s: float
    measured_s: float
    pruned_top1: float
    macs_saving: float
    learnt: tuple[float, ...]
    readings: tuple[Reading, ...]

    @property
    def top1(self) -> float:
        """Percent: of the one network that is shipped."""
        return self.pruned_top1


@dataclass(frozen=True, slots=True)
class Settings:
    """What must be equal for rows to stand in one table.

    ``epochs`` are of all training images. ``training`` is what the benchmark sets of the training for all rows
    alike, ``overrides`` what the caller sets besides. ``draws`` are masks of each particle, and ``equal`` is what
    fewer training images are trained for as many of: steps, or epochs.
    """

    table: str
    network: str
    budget: str
    epochs: float
    training: tuple[str, ...]
    overrides: tuple[str, ...]
    machine: str
    workers: int = 1
    draws: int = 0
    equal: str = ""
    images: int = 0


Job: TypeAlias = runs.Job[Variant]
Row: TypeAlias = runs.Row[Variant, Figures]
Record: TypeAlias = runs.Record[Settings, Variant, Figures]
Seen: TypeAlias = runs.Row[Variant, Observed]
SeenRecord: TypeAlias = runs.Record[Settings, Variant, Observed]
