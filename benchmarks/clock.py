"""Whether the clock can be trusted: an engine against itself, and pairing against timing alone.

    python benchmarks/clock.py --scale quick
    python benchmarks/clock.py --scale quick --backend openvino --precision bf16

Two questions, both answered on real engines (random weights: latency does not depend on them):

- The same engine in two sessions, timed in turn: how often does the 95% interval cover ratio 1?
- Two different networks: does timing in turn in one process agree with timing each alone, in processes of
  their own that alternate? For another backend than onnxruntime also one network on both of them.

Rows go to ``benchmarks/results/clock.json`` as they come, and a second call goes on where the first ended;
``clock.md`` is the table. Another scale, backend or precision has files of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from optpipe import plugins, program_export, timing
from optpipe.graph import apply
from optpipe.onnx_export import export
from optpipe.types import Backend, Engine, Plan, Precision, Session, Target
from optpipe.zoo.cifar_resnet import resnet20, resnet56

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
CIFAR, SMALL = (3, 32, 32), (3, 64, 64)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: self-pairs of each network, seconds of each, and processes of each network."""

    self_pairs: int
    seconds: float
    processes: int


@dataclass(frozen=True, slots=True)
class Network:
    """A network that is timed, at the shape of one input image."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A network on a backend at a precision."""

    network: str
    backend: str
    precision: Precision

    @property
    def module(self) -> Backend:
        """The backend's module."""
        return plugins.backend(self.backend)

    def target(self, threads: int) -> Target:
        """What its engine is built for."""
        shape = NETWORKS[self.network].input_shape
        return Target(self.backend, 16, shape, self.precision, threads=threads)

    def load(self, engine: Engine, threads: int) -> Session:
        """A session of its engine."""
        return self.module.load(engine, self.target(threads))


SCALES = {"quick": Scale(5, 2.0, 5), "full": Scale(30, 5.0, 8)}
RESNET56_DROPS = ("layer1.1", "layer1.4", "layer1.7", "layer2.3", "layer2.6", "layer3.4")
NETWORKS = {
    "resnet20": Network(resnet20, CIFAR),
    "resnet20 less 1 block": Network(lambda: apply(resnet20(), Plan(("layer1.1",)), CIFAR), CIFAR),
    "resnet56": Network(resnet56, CIFAR),
    "resnet56 less 6 blocks": Network(lambda: apply(resnet56(), Plan(RESNET56_DROPS), CIFAR), CIFAR),
    "resnet18@64": Network(lambda: torchvision.models.resnet18(weights=None), SMALL),
    "mobilenet_v2@64": Network(lambda: torchvision.models.mobilenet_v2(weights=None), SMALL),
}
SELF = ("resnet56",)
REFERENCE = "onnxruntime"
PAIRS = (
    ("resnet20", "resnet20 less 1 block"),
    ("resnet56", "resnet56 less 6 blocks"),
    ("resnet18@64", "mobilenet_v2@64"),
)


def main() -> None:
    """Measure what is missing from the results file, then write the table."""
    arguments = _arguments()
    threads: int = arguments.threads
    if arguments.alone is not None:
        engine = Engine(arguments.alone, arguments.alone_sha256, build_s=0.0)
        _alone(engine, _entrant(arguments.alone_network, arguments), threads, arguments.seconds)
        return
    scale = SCALES[arguments.scale]
    settings = {"scale": arguments.scale, **asdict(scale), "batch": 16, "threads": threads}
    settings |= {"backend": arguments.backend, "precision": arguments.precision}
    first = _entrant("resnet20", arguments)
    record: Row = {
        "settings": settings,
        "fingerprint": _jsonable(asdict(first.module.fingerprint(first.target(threads)))),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "self": {},
        "pairs": {},
    }
    path = arguments.out / f"{_file_name(arguments)}.json"
    record = _resume(path, record)
    with tempfile.TemporaryDirectory() as folder:
        for name in SELF:
            for index in range(scale.self_pairs):
                if (key := f"{name} #{index}") not in record["self"]:
                    entrant = _entrant(name, arguments)
                    record["self"][key] = _self_pair(entrant, Path(folder), threads, scale.seconds, index)
                    _save(path, record)
        for before, after in _pairs(arguments):
            key = f"{after.network} / {before.network}"
            key += "" if before.backend == after.backend else f" on {before.backend}"
            if key not in record["pairs"]:
                record["pairs"][key] = _both_ways(before, after, Path(folder), threads, scale)
                _save(path, record)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def _file_name(arguments: argparse.Namespace) -> str:
    parts = ["clock"]
    parts += [] if arguments.scale == "full" else [arguments.scale]
    parts += [] if arguments.backend == REFERENCE else [arguments.backend]
    parts += [] if arguments.precision == "fp32" else [arguments.precision]
    return "-".join(parts)


def _entrant(network: str, arguments: argparse.Namespace) -> Entrant:
    return Entrant(network, arguments.backend, arguments.precision)


def _pairs(arguments: argparse.Namespace) -> list[tuple[Entrant, Entrant]]:
    """Two networks on the backend, and one network on it and on the one that others are held against."""
    found = [(_entrant(first, arguments), _entrant(second, arguments)) for first, second in PAIRS]
    if arguments.backend != REFERENCE:
        found += [(Entrant(name, REFERENCE, "fp32"), _entrant(name, arguments)) for name in SELF]
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=sorted(SCALES), default="quick")
    parser.add_argument("--backend", choices=["onnxruntime", "openvino", "inductor"], default=REFERENCE)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    # What a process of its own is called with.
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone-network", help=argparse.SUPPRESS)
    parser.add_argument("--alone-sha256", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _self_pair(entrant: Entrant, folder: Path, threads: int, seconds: float, seed: int) -> Row:
    """Two fresh sessions of one engine, for the whole time; and where the default tolerance had stopped."""
    engine = _engine(entrant, folder, threads)
    load = os.getloadavg()[0]
    baseline, candidate = entrant.load(engine, threads), entrant.load(engine, threads)
    with timing.device_lock("cpu"):
        whole = timing.paired(baseline, candidate, tolerance=0.0, budget_s=seconds, seed=seed)
        early = timing.paired(baseline, candidate, budget_s=seconds, seed=seed)
    baseline.close()
    candidate.close()
    row = {"load": load, **_interval_row(whole), "early": _interval_row(early)}
    print(
        f"{entrant.network} against itself #{seed}: {_signed(row)}; at the default tolerance "
        f"{_signed(row['early'])}, {row['early']['pairs']} pairs",
        file=sys.stderr,
    )
    return row


def _both_ways(before: Entrant, after: Entrant, folder: Path, threads: int, scale: Scale) -> Row:
    """The ratio after / before in turn in one process, and from processes that alternate.

    In turn: the median over as many fresh pairs of sessions as there are processes, so that both ways have
    seen the same number of sessions.
    """
    engines = {entrant: _engine(entrant, folder, threads) for entrant in (before, after)}
    load = os.getloadavg()[0]
    in_turn, medians = [], []
    with timing.device_lock("cpu"):
        for index in range(scale.processes):
            baseline, candidate = before.load(engines[before], threads), after.load(engines[after], threads)
            in_turn.append(
                timing.paired(baseline, candidate, tolerance=0.0, budget_s=scale.seconds, seed=index).ratio
            )
            baseline.close()
            candidate.close()
            order = (before, after) if index % 2 == 0 else (after, before)
            alone = {
                entrant: _run_alone(entrant, engines[entrant], threads, scale.seconds / 2)
                for entrant in order
            }
            medians.append((alone[before], alone[after]))
    paired_ratio, paired_ci = _over_runs(np.array(in_turn))
    alone_ratio, alone_ci = _over_runs(np.array([later / earlier for earlier, later in medians]))
    row = {
        "load": load,
        "paired": {"ratio": paired_ratio, "ci95": paired_ci, "runs": in_turn},
        "alone": {"ratio": alone_ratio, "ci95": alone_ci, "medians_ms": medians},
        "agree": bool(paired_ci[0] <= alone_ci[1] and alone_ci[0] <= paired_ci[1]),
    }
    names = f"{after.network} on {after.backend} / {before.network} on {before.backend}"
    print(f"{names}: in turn {paired_ratio:.4f}, alone {alone_ratio:.4f}", file=sys.stderr)
    return row


def _run_alone(entrant: Entrant, engine: Engine, threads: int, seconds: float) -> float:
    """Median in ms of an engine timed in a process of its own."""
    command = [sys.executable, __file__, "--alone", str(engine.path), "--alone-network", entrant.network]
    command += ["--backend", entrant.backend, "--precision", entrant.precision]
    command += ["--threads", str(threads), "--seconds", str(seconds), "--alone-sha256", engine.sha256]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _alone(engine: Engine, entrant: Entrant, threads: int, seconds: float) -> None:
    session = entrant.load(engine, threads)
    found = timing.single(session, tolerance=0.0, budget_s=seconds, seed=0)
    print(timing.median(found.samples_ms))


def _engine(entrant: Entrant, folder: Path, threads: int) -> Engine:
    """The engine, built once in ``folder``."""
    kept = folder / f"{entrant.network}-{entrant.backend}-{entrant.precision}"
    if kept not in _BUILT:
        network = NETWORKS[entrant.network]
        torch.manual_seed(0)
        program = entrant.module.SOURCE == "program"
        source = kept / ("model.pt2" if program else "model.onnx")
        (program_export.export if program else export)(network.make(), network.input_shape, 16, source)
        _BUILT[kept] = entrant.module.build(source, entrant.target(threads), kept)
    return _BUILT[kept]


_BUILT: dict[Path, Engine] = {}


def _over_runs(ratios: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, tuple[float, float]]:
    return timing.median(ratios), timing.median_interval(ratios, np.random.default_rng(0))


def _interval_row(found: timing.PairedMeasurement) -> Row:
    low, high = found.ratio_ci95
    return {
        "ratio": found.ratio,
        "ci95": [low, high],
        "half_width": (high - low) / 2,
        "covers": bool(low <= 1.0 <= high),
        "pairs": len(found.samples_ms),
        "median_ms": timing.median(found.samples_ms[:, 0]),
        "variation": timing.coefficient_of_variation(found.samples_ms[:, 0]),
    }


def _resume(path: Path, fresh: Row) -> Row:
    """The rows that are there, if they were measured with the same settings on the same machine."""
    if not path.exists():
        return fresh
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    found["settings"] = {"backend": REFERENCE, "precision": "fp32"} | found["settings"]
    same = all(found[key] == fresh[key] for key in ("settings", "fingerprint", "versions"))
    return found if same else fresh


def _save(path: Path, record: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, json.dumps(record, indent=1)), (path.with_suffix(".md"), _markdown(record))):
        temporary = target.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(target)


def _markdown(record: Row) -> str:
    machine, settings = record["fingerprint"], record["settings"]
    versions = ", ".join(
        f"{name} {version}" for name, version in [*machine["versions"], *record["versions"].items()]
    )
    lines = [
        "# The clock",
        "",
        f"{record['date']}, {machine['device']}, {machine['threads']} threads, {machine['driver']}, "
        f"{versions}; {settings['backend']} at {settings['precision']}, batch {settings['batch']}, "
        f"{settings['seconds']:g} s a measurement, "
        f"scale {settings['scale']}. "
        "Written by `benchmarks/clock.py`. Load is the machine's when the row began (one minute's average): "
        "what else ran there.",
        "",
        "## The same engine in two sessions, timed in turn",
        "",
        "| engine | time spent | measurements | interval covers 1 | median half-width | largest distance "
        "of the ratio from 1 | median pairs | median ms | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SELF:
        rows = [row for key, row in record["self"].items() if key.startswith(f"{name} #")]
        if rows:
            load = _spread([row["load"] for row in rows])
            lines.append(_self_line(name, "all of it", rows, load))
            lines.append(_self_line(name, "to the default tolerance", [row["early"] for row in rows], load))
    lines += [
        "",
        "## Timing in turn against timing alone",
        "",
        "Median over runs and its 95% bootstrap interval; in turn: fresh sessions in one process each "
        "run; alone: a process for each engine, alternating.",
        "",
        "| candidate / baseline | in turn | alone | intervals overlap | difference | load |",
        "|---|---|---|---|---|---|",
    ]
    for key, row in record["pairs"].items():
        paired, alone = row["paired"], row["alone"]
        lines.append(
            f"| {key} | {_ratio(paired)} | {_ratio(alone)} | {'yes' if row['agree'] else 'no'} | "
            f"{paired['ratio'] / alone['ratio'] - 1:+.2%} | {row['load']:.1f} |"
        )
    return "\n".join(lines)


def _self_line(name: str, spent: str, rows: list[Row], load: str) -> str:
    half_width = np.median([row["half_width"] for row in rows])
    farthest = max(abs(row["ratio"] - 1) for row in rows)
    pairs = np.median([row["pairs"] for row in rows])
    time_ms = np.median([row["median_ms"] for row in rows])
    covered = sum(row["covers"] for row in rows)
    return (
        f"| {name} | {spent} | {len(rows)} | {covered} of {len(rows)} | {half_width:.2%} | {farthest:.2%} | "
        f"{pairs:.0f} | {time_ms:.2f} | {load} |"
    )


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.4f} ({row['ci95'][0]:.4f} to {row['ci95'][1]:.4f})"


def _spread(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def _signed(row: Row) -> str:
    return f"{row['ratio'] - 1:+.2%} ± {row['half_width']:.2%}{'' if row['covers'] else ' (misses)'}"


def _jsonable(value: Row) -> Row:
    """The same with lists for tuples, as it reads back."""
    plain: Row = json.loads(json.dumps(value))
    return plain


if __name__ == "__main__":
    if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
        # As the command line does it: torch's threads must not spin, and read this when they are loaded.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
