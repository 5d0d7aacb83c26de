"""ResNets on every engine that loads on a GPU: times, what each block costs, and how far from the floor.

    python -m benchmarks.gpu --scale quick

For ResNet-34 and ResNet-50 at 3x224x224, in fp16 and fp32, at batch 64 and 1: the original on every backend
and on torch eager; each block dropped by itself, in turn with the original on the same engine; the blocks of
the largest savings dropped together; and the floor that the measured memory bandwidth and matrix rate set.
Weights are random, which is enough for times, and nothing is downloaded.

Rows go to ``gpu.json`` and ``gpu.md`` as they come, the most telling first. A second call goes on where the
first ended, also at another scale, and tries again what failed. ``--minutes`` ends it in time: a row is begun
only if the slowest of its engine so far would still fit. ``--smoke`` tries the command on a tiny network, with
``--device cpu`` where there is no GPU; what that measures means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import eager, roofline
from benchmarks.contenders import (
    NETWORKS,
    SMOKE,
    Contender,
    Eager,
    Network,
    Opened,
    Subject,
    check,
    compiled,
    subject,
)
from benchmarks.gpu_plan import SCALES, Case, Scale, Task, plan, to_drop
from benchmarks.gpu_tables import SCHEMA, Record, Row, Visit, markdown
from optpipe import environment, files, graph, store, timing
from optpipe.errors import MissingError, OptpipeError, RunError, UsageError
from optpipe.types import Plan, Target

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. ``scale`` carries the limit of minutes that holds."""

    networks: Mapping[str, Network]
    scale_name: str
    scale: Scale
    device: str
    threads: int | None
    backends: tuple[str, ...] | None
    out: Path
    fresh: bool


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing from the results; the exit code."""
    try:
        print(run(options(words)))
    except OptpipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted: run again to go on from here", file=sys.stderr)
        return 130
    return 0


def options(words: Sequence[str] | None) -> Options:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=["quick", "full"], default="quick")
    parser.add_argument("--minutes", type=float, help="stop after so many (quick: 9, full: no limit)")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--backends", nargs="+", help="only these (default: all that load)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--threads", type=int, help="of the CPU (default: 1 on the CPU, all beside a GPU)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, to try the command")
    parser.add_argument("--fresh", action="store_true", help="begin the results anew")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(words)
    name = "smoke" if given.smoke else given.scale
    scale = SCALES[name]
    if given.minutes is not None:
        scale = replace(scale, minutes=given.minutes)
    networks = SMOKE if given.smoke else {network: NETWORKS[network] for network in given.networks}
    threads = given.threads or (1 if given.device == "cpu" else None)
    backends = None if given.backends is None else tuple(given.backends)
    found = Options(networks, name, scale, given.device, threads, backends, given.out, given.fresh)
    if RESULTS.resolve() in (given.out.resolve(), *given.out.resolve().parents) and (
        given.smoke or given.device != "cuda"
    ):
        raise UsageError(f"{given.out} is for results of a GPU; name another folder with --out")
    return found


def run(asked: Options) -> str:
    """Measure what is missing, as far as the time goes; the tables as Markdown."""
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            "torch finds no NVIDIA GPU: check nvidia-smi; to try the command without one: "
            "--smoke --device cpu --out FOLDER"
        )
    watch = timing.Stopwatch()
    engines, absent = compiled(asked.device, asked.scale.precisions, asked.backends)
    path = asked.out / ("gpu-smoke.json" if asked.scale_name == "smoke" else "gpu.json")
    record = replace(_opened(path, asked), absent=absent)
    with (
        timing.device_lock(asked.device, on_wait=_waiting),
        tempfile.TemporaryDirectory(prefix="optpipe-") as folder,
    ):
        record = _with_roofs(record, asked)
        subjects = {name: subject(network) for name, network in asked.networks.items()}
        bench = Bench(subjects, record, asked, Path(folder))
        log = Log(record, asked, path, watch)
        try:
            tasks = plan(asked.scale, asked.device, engines, subjects)
            measure(tasks, bench, log, asked.scale.minutes, watch)
        finally:
            bench.close()
    return markdown(log.record)


class Bench:
    """Measures rows, keeping the original that the last one was timed with open for the next.

    Raises nothing for what an engine fails at: that is the row's failure.
    """

    def __init__(self, subjects: Mapping[str, Subject], record: Record, asked: Options, folder: Path) -> None:
        self._subjects = subjects
        self._roofs = {roof.precision: roof for roof in record.roofs}
        self._asked = asked
        self._folder = folder
        self._reference: tuple[tuple[str, Case], Opened] | None = None
        self._candidate: tuple[tuple[str, tuple[str, ...]], torch.fx.GraphModule] | None = None

    def close(self) -> None:
        """Release the original."""
        held, self._reference = self._reference, None
        if held is not None:
            held[1].session.close()

    def measure(self, task: Task, dropped: tuple[str, ...]) -> Row:
        """The row, with its figures or with why there are none."""
        watch = timing.Stopwatch()
        row = task.row(dropped)
        try:
            row = self._timed(self._described(row), task)
        except Exception as error:  # an engine is others' code: whatever it raises must not end the rest
            if not isinstance(error, OptpipeError):
                traceback.print_exc()
            with contextlib.suppress(Exception):  # what broke the engine may break its release
                self.close()
            row = replace(row, failure=_reason(error))
        if row.failure:  # only now is the error gone, and with it all that its frames held
            gc.collect()
            torch.cuda.empty_cache()
        return replace(row, seconds=watch.seconds)

    def _described(self, row: Row) -> Row:
        model = self._model(row.network, row.dropped)
        parameters, macs = graph.count(model, self._subjects[row.network].input_shape)
        done = roofline.work(model, row.batch, row.precision)
        floor = roofline.floor(done, self._roofs[row.precision])
        return replace(row, parameters=parameters, macs=macs, floor=floor)

    def _timed(self, row: Row, task: Task) -> Row:
        """The row with its times: the original's beside torch eager, another's beside its original."""
        scale = self._asked.scale
        plain = Eager(eager.variants(self._asked.device)[0])
        against, name = task.contender, "the original on the same engine"
        if task.kind == "original":
            against, name = plain, plain.name
        reference = self._original(against, task.case).session
        opened = self._open(task.contender, task.case, row.dropped)
        try:
            model = self._model(row.network, row.dropped)
            max_rel = check(model, opened.session, self._target(task.case))
            both = timing.paired(
                reference, opened.session, budget_s=scale.seconds, min_pairs=scale.min_pairs, seed=0
            )
        finally:
            opened.session.close()
        return replace(
            row,
            latency=both.candidate(opened.fingerprint),
            reference=name,
            reference_ms=timing.median(both.samples_ms[:, 0]),
            max_rel=max_rel,
            export_s=opened.export_s,
            build_s=opened.build_s,
        )

    def _original(self, contender: Contender, case: Case) -> Opened:
        key = contender.name, case
        if self._reference is None or self._reference[0] != key:
            self.close()
            self._reference = key, self._open(contender, case, ())
        return self._reference[1]

    def _open(self, contender: Contender, case: Case, dropped: tuple[str, ...]) -> Opened:
        folder = self._folder / case[0] / ("-".join(dropped) or "original")
        return contender.open(self._model(case[0], dropped), self._target(case), folder)

    def _model(self, network: str, dropped: tuple[str, ...]) -> torch.fx.GraphModule:
        of = self._subjects[network]
        if not dropped:
            return of.model
        if self._candidate is None or self._candidate[0] != (network, dropped):
            model = graph.apply(of.model, Plan(dropped), of.input_shape)
            self._candidate = (network, dropped), model
        return self._candidate[1]

    def _target(self, case: Case) -> Target:
        network, wanted, batch = case
        shape = self._subjects[network].input_shape
        return Target("", batch, shape, wanted, self._asked.device, self._asked.threads)


class Log:
    """The record, written after each row that this call adds."""

    def __init__(self, record: Record, asked: Options, path: Path, watch: timing.Stopwatch) -> None:
        self.record = record
        self._earlier = record.visits
        self._asked = asked
        self._path = path
        self._watch = watch
        self._at = datetime.now(UTC).isoformat(timespec="seconds")
        self._before = eager.state(asked.device)
        self._rows = 0

    def add(self, row: Row, left_out: int) -> None:
        """Put a row in the place of an earlier one of its key, and write."""
        self._rows += 1
        others = tuple(other for other in self.record.rows if other.key != row.key)
        self.record = replace(self.record, rows=(*others, row))
        self.write(left_out)

    def write(self, left_out: int) -> None:
        """Write the record and its tables, unless this call has measured nothing."""
        if not self._rows:
            return
        minutes, after = self._watch.seconds / 60, eager.state(self._asked.device)
        visit = Visit(self._at, self._asked.scale_name, minutes, self._rows, left_out, self._before, after)
        self.record = replace(self.record, visits=(*self._earlier, visit))
        files.write_atomically(self._path, store.to_json(self.record))
        files.write_atomically(self._path.with_suffix(".md"), markdown(self.record))


def measure(
    tasks: Sequence[Task], bench: Bench, log: Log, minutes: float | None, watch: timing.Stopwatch
) -> None:
    """Measure the tasks that have no figures yet, as far as the minutes go."""
    slowest: dict[str, float] = {}
    for row in log.record.rows:
        slowest[row.engine] = max(row.seconds, slowest.get(row.engine, 0.0))
    broken: set[tuple[str, Case]] = set()
    left_out = 0
    for number, task in enumerate(tasks, start=1):
        place = task.contender.name, task.case
        if place in broken or any(row.latency and row.key == task.row().key for row in log.record.rows):
            continue
        needed_s = slowest.get(task.contender.name, 0.0)
        blocks = to_drop(log.record.rows, task, tasks)
        if blocks is None or (minutes is not None and watch.seconds + needed_s > 60 * minutes):
            left_out += 1
            continue
        row = bench.measure(task, blocks)
        log.add(row, left_out)
        slowest[row.engine] = max(row.seconds, needed_s)
        if row.kind == "original" and row.latency is None:
            broken.add(place)
        print(f"{number} of {len(tasks)}, {watch.seconds / 60:.1f} min: {_line(row)}", file=sys.stderr)
    log.write(left_out)


def _waiting() -> None:
    print("waiting: another process measures on this device", file=sys.stderr)


def _line(row: Row) -> str:
    what = f"without {', '.join(row.dropped)}" if row.dropped else "original"
    where = f"{row.network} {row.precision} batch {row.batch}, {row.engine}, {what}"
    if row.latency is None:
        return f"{where}: {row.failure}"
    ratio = row.latency.ratio_to_original
    against = "" if ratio is None else f", {ratio:.4f} of {row.reference}"
    return f"{where}: {row.latency.median_ms:.4f} ms{against} ({row.seconds:.1f} s)"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, OptpipeError) and text else f"{type(error).__name__}: {text}"


def _opened(path: Path, asked: Options) -> Record:
    """The record that is there, if it is of this machine; else a new one."""
    machine = eager.fingerprint(Target("", 1, (3, 224, 224), device=asked.device, threads=asked.threads))
    fresh = Record(SCHEMA, asked.device, machine, environment.describe(machine, asked.device), (), (), (), ())
    if asked.fresh or not path.exists():
        return fresh
    try:
        found = store.from_json(Record, path.read_bytes())
    except (OSError, ValueError):
        raise UsageError(
            f"{path}: holds no results that this version reads; move it away, or --fresh"
        ) from None
    if (found.schema, found.device, found.machine, found.environment.versions) != (
        fresh.schema,
        fresh.device,
        fresh.machine,
        fresh.environment.versions,
    ):
        raise UsageError(
            f"{path}: holds results of {found.machine.device}, {dict(found.machine.versions)}, not of this "
            "machine with these versions; name another folder with --out, or replace them with --fresh"
        )
    return found


def _with_roofs(record: Record, asked: Options) -> Record:
    known = {roof.precision for roof in record.roofs}
    threads = asked.threads or torch.get_num_threads()
    small = asked.scale_name == "smoke" or asked.device == "cpu"
    new = []
    for wanted in asked.scale.precisions:
        if wanted not in known:
            try:
                new.append(roofline.measure(asked.device, wanted, small=small, threads=threads))
            except RuntimeError as error:
                raise RunError(
                    f"torch cannot measure {asked.device} in {wanted}: {_reason(error)}"
                ) from error
    return replace(record, roofs=(*record.roofs, *new))


if __name__ == "__main__":
    sys.exit(main())
