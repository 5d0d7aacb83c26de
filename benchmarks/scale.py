"""How much faster workers make a run: measured with two, simulated for 1, 8, 64 and 256.

    python -m benchmarks.scale                   # record what is missing, and simulate
    python -m benchmarks.scale --only resnet50   # one of the recorded runs, anew
    python -m benchmarks.scale --pairs 3         # local:2 against one process, on two free cores

A recording is an ordinary run in one process of one thread that takes no answer from another. The demo's
recipes are recorded as they are shipped. ResNet-50 has random weights and images of noise, which cost what
others do: ``--scale`` of the recipe's training is recorded (0.0004 of its images by default, in fewer steps of
fewer), and the seconds of training are multiplied by its inverse.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from benchmarks import runs
from benchmarks.runs import ROOT
from benchmarks.scale_simulation import Batch, Request, Workload
from benchmarks.scale_tables import Pair, Record, markdown
from optpipe import store
from optpipe.errors import OptpipeError, RunError, UsageError
from optpipe.files import write_atomically
from optpipe.report import schema

RESULT = runs.RESULTS / "scale.json"
PLAIN = ("run.cache=false", "target.threads=1", 'run.workers="serial"')
EXACT = 'method.scorer="exact"'
# One adaptor's steps and images, and the recovery's, of recipes/imagenet/practise_resnet50.toml with "exact".
RESNET50_STEPS, RESNET50_BATCH = 1000, 64
NOISE = 8
"""Images that ResNet-50 is recorded with; a batch has no more."""
NOISES = ("noise-calibration.npz", "noise-evaluation.npz")
WEIGHTS = "noise-weights.safetensors"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run that is recorded: its recipe, what it sets, and the factor of its training's seconds."""

    name: str
    recipe: str
    sets: tuple[str, ...]
    factor: float = 1.0


def recorded(scale: float, folder: Path) -> tuple[Recorded, ...]:
    """All of them; ``folder`` is where ResNet-50's weights and images are."""
    weights, calibration, evaluation = (json.dumps(str(folder / name)) for name in (WEIGHTS, *NOISES))
    steps = max(1, round(RESNET50_STEPS * RESNET50_BATCH * scale / NOISE))
    factor = RESNET50_STEPS * RESNET50_BATCH / (steps * NOISE)
    return (
        Recorded("demo: practise", "recipes/practise.toml", ()),
        Recorded("demo: practise, exact", "recipes/practise.toml", (EXACT,)),
        Recorded("demo: ekg", "recipes/ekg.toml", ()),
        Recorded("demo: three_d", "recipes/three_d.toml", ()),
        Recorded("demo: dllp", "recipes/dllp.toml", ()),
        Recorded(
            "resnet50: practise, exact",
            "recipes/imagenet/practise_resnet50.toml",
            (
                f"model.weights={weights}",
                f"data.calibration.source={calibration}",
                f"data.calibration.count={NOISE}",
                f"data.evaluation.source={evaluation}",
                "target.batch=1",
                EXACT,
                f"method.exact_steps={steps}",
                f"recover.steps={2 * steps}",
            ),
            factor,
        ),
    )


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    record = _record(arguments.out)
    for one in recorded(arguments.scale, arguments.runs.resolve()):
        known = any(found.name == one.name for found in record.workloads)
        if arguments.pairs or (known and not arguments.only):
            continue
        if arguments.only and not any(word in one.name for word in arguments.only):
            continue
        print(f"{one.name}: recorded now", flush=True)
        made = record_run(one, arguments.runs)
        kept = [found for found in record.workloads if found.name != one.name]
        record = _dated(dataclasses.replace(record, workloads=(*kept, made)), arguments.runs)
        _publish(arguments.out, record)
    for number in range(arguments.pairs):
        pair = measure(arguments, number)
        print(f"{pair.serial_s:.1f} s and {pair.local_s:.1f} s: {pair.ratio:.2f} times", flush=True)
        kept_pairs = record.pairs if number else ()
        record = _dated(dataclasses.replace(record, pairs=(*kept_pairs, pair)), arguments.runs)
        _publish(arguments.out, record)
    print(markdown(record))
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="record those with this in their name")
    parser.add_argument("--scale", type=float, default=0.0004, help="share of ResNet-50's training [0.0004]")
    parser.add_argument("--pairs", type=int, default=0, help="measure local:2 so many times")
    parser.add_argument("--network", choices=list(runs.NETWORKS), default="resnet56", help="of --pairs")
    parser.add_argument("--steps", type=int, default=100, help="of each score of --pairs [100]")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "scale", help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(words)
    if not 0 < arguments.scale <= 1:
        raise UsageError(f"--scale {arguments.scale:g}: must be above 0 and at most 1")
    return arguments


def _record(path: Path) -> Record:
    if not path.exists():
        return Record("", "")
    return store.from_json(Record, path.read_bytes())


def _dated(record: Record, folder: Path) -> Record:
    """The record with today's date, and with what the last run in ``folder`` was executed on."""
    newest = max(folder.glob("*/environment.json"), key=lambda path: path.stat().st_mtime)
    found = store.from_json(schema.EnvironmentReport, newest.read_bytes())
    machine = f"{found.executed_on}, {found.platform}; torch {found.versions['torch']}"
    return dataclasses.replace(record, date=datetime.now(UTC).date().isoformat(), machine=machine)


def _publish(path: Path, record: Record) -> None:
    write_atomically(path, store.to_json(record))
    write_atomically(path.with_suffix(".md"), markdown(record))


# ---------------------------------------------------------------- recordings


def record_run(one: Recorded, folder: Path) -> Workload:
    """Run it now, and read what each request took."""
    make_noise(folder)
    where = folder / one.name.replace(": ", "-").replace(", ", "-")
    take(one.recipe, where, (*PLAIN, *one.sets))
    start = start_s(one, folder)
    words = " ".join(f"--set {word}" for word in one.sets if "noise" not in word)
    return workload(one.name, f"optpipe run {one.recipe} {words}".strip(), where, start, one.factor)


def make_noise(folder: Path) -> None:
    """Images of smooth noise, and a ResNet-50 with random weights whose batch-norms know such images.

    With what it begins with its features grow from block to block, and no training is stable; nor is one on
    images of which a crop that is made larger looks like nothing that the network knows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(NOISES):
        images = smooth_noise(seed)
        pixels = (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        np.savez(folder / name, images=pixels, labels=np.arange(NOISE))
    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
            torch.nn.init.constant_(layer.weight, 0.02)
    with torch.no_grad():
        network.train()(smooth_noise(0) * 2 - 1)
    store.save_tensors(folder / WEIGHTS, network.state_dict())


def smooth_noise(seed: int) -> torch.Tensor:
    """Images (N, 3, 224, 224) from 0 to 1."""
    small = torch.rand(NOISE, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=224, mode="bilinear")


def take(recipe: str, where: Path, sets: Sequence[str]) -> None:
    """An ordinary run in an empty folder, with one thread; RunError where it fails."""
    shutil.rmtree(where, ignore_errors=True)
    given = (word for one in sets for word in ("--set", one))
    command = [*runs.optpipe_run(ROOT / recipe), "--out", str(where), *given]
    done = subprocess.run(
        command, check=False, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RunError(f"{where.name}: {runs.reason(done.stderr, done.returncode)}")


def _environment() -> dict[str, str]:
    shared = os.environ.get("OPTPIPE_DATA", str(ROOT.parent / "shared"))
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "OPTPIPE_DATA": shared}


def start_s(one: Recorded, folder: Path) -> float:
    """Seconds until a process has loaded the network and the images, as a worker does before it computes."""
    given = [word for item in (*PLAIN, *one.sets) for word in ("--set", item)]
    loads = (
        "import sys, time, pathlib; begun = time.monotonic(); from optpipe import preparation, recipe; "
        "preparation.prepare(recipe.load(pathlib.Path(sys.argv[1]), sys.argv[3::2])); "
        "print(time.monotonic() - begun)"
    )
    command = [sys.executable, "-c", loads, str(ROOT / one.recipe), *given]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout)


def workload(name: str, said: str, folder: Path, start: float, factor: float = 1.0) -> Workload:
    """What a finished run's events and trials say of its seconds."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    examined = {path.parent.name: Examined.of(path) for path in folder.glob("trials/*/trial.json")}
    stages = {
        event["name"]: float(event["seconds"])
        for event in events
        if event["kind"] == "stage" and event["detail"] == "finished"
    }
    return Workload(
        name=name,
        recorded=said,
        factor=factor,
        start_s=start,
        before_s=stages["ingest"],
        batches=tuple(batches(events, examined, factor)),
        recover_s=stages["recover"] * factor,
        after_s=stages["prune"] + stages["export"] + stages["benchmark"],
    )


@dataclass(frozen=True, slots=True)
class Examined:
    """What a trial took but for its engine; ``waits`` is whether a worker would do it."""

    seconds: float
    waits: bool
    trains: bool

    @classmethod
    def of(cls, path: Path) -> Examined:
        """That of a trial.json."""
        found = json.loads(path.read_text(encoding="utf-8"))
        trains = found["ask"]["tune"] is not None
        return cls(float(found["seconds"]), trains or found["ask"]["wants"] != ["latency"], trains)


def batches(
    events: Sequence[Mapping[str, Any]], examined: Mapping[str, Examined], factor: float
) -> Iterator[Batch]:
    """The requests of a search in their batches.

    ``examined`` are its trials by their keys; of these alone training is multiplied by ``factor``. What the
    driver does itself beside the timing (a candidate is cut and counted for it) counts as timing.
    """
    found: list[Request] = []
    for event in events:
        if event["kind"] != "trial" or "key" not in event["fields"]:
            continue
        seconds, trial = float(event["seconds"]), examined.get(event["fields"]["key"])
        if trial is None:  # a step, or a training whose weights stay
            found.append(Request(event["name"], seconds, 0.0))
        elif trial.waits:
            scaled = trial.seconds * (factor if trial.trains else 1.0)
            found.append(Request(event["name"], scaled, max(0.0, seconds - trial.seconds)))
        else:
            found.append(Request(event["name"], 0.0, seconds))
        if event["done"] == event["total"]:
            yield tuple(found)
            found = []


# ---------------------------------------------------------------- two workers


def measure(arguments: argparse.Namespace, number: int) -> Pair:
    """One batch of scores by one process and by two workers, the other way round every second time."""
    sets = (
        *PLAIN[:2],
        *runs.NETWORKS[arguments.network],
        EXACT,
        f"method.exact_steps={arguments.steps}",
        "recover.steps=1",
        "export.precisions=[]",
        "timing.budget_s=0.2",
        "timing.final_budget_s=1",
    )
    folders = {}
    for workers in ("serial", "local:2") if number % 2 == 0 else ("local:2", "serial"):
        folders[workers] = arguments.runs / f"pair-{workers.replace(':', '')}"
        take(str(runs_recipe()), folders[workers], (*sets, f'run.workers="{workers}"'))
    serial = largest(folders["serial"])
    handed, first, last = handed_over(folders["local:2"])
    return Pair(
        network=arguments.network,
        steps=arguments.steps,
        requests=len(serial),
        serial_s=sum(serial),
        local_s=last - handed,
        start_s=max(0.0, first - handed - min(serial)),
    )


def runs_recipe() -> Path:
    """The recipe that the scores are of."""
    return ROOT / "recipes" / "cifar10" / "practise_resnet56.toml"


def largest(folder: Path) -> list[float]:
    """Seconds of each score of the batch that took longest."""
    found = workload("", "", folder, 0.0)
    batch = max(found.batches, key=lambda one: sum(request.compute_s for request in one))
    return [request.compute_s for request in batch if request.compute_s]


def handed_over(folder: Path) -> tuple[float, float, float]:
    """When the first batch was handed over, first answered and last answered, in seconds since 1970."""
    begun: float | None = None
    answered: list[float] = []
    for text in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(text)
        at = datetime.fromisoformat(event["at"]).timestamp()
        if event["name"] == "workers" and "handed over" in event.get("detail", ""):
            if begun is not None:
                break
            begun = at
        elif event.get("detail", "").startswith("computed by"):
            answered.append(at)
    if begun is None or not answered:
        raise RunError(f"{folder.name}: no request was handed over")
    return begun, answered[0], answered[-1]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
