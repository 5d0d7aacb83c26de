"""int8 on the CPU: accuracy and latency beside fp32 and bf16, in ONNX Runtime and in OpenVINO.

    python -m benchmarks.int8
    python -m benchmarks.int8 --networks --run runs/practise_resnet56

Every engine is timed in turn with ONNX Runtime's fp32 engine of the unpruned network, in two sessions of one
process, and scored on the recipe's evaluation images; ranges and placement of int8 come from its calibration
images. ``--run`` adds a finished run, whose pruned network is measured against its original: both savings in
one table. ``--scale`` multiplies the seconds of each measurement; 1 is 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optpipe import data, deploy, models, onnx_export, plugins, precision, quality, timing
from optpipe import recipe as recipes
from optpipe.errors import RunError
from optpipe.files import write_atomically
from optpipe.precision import Converted
from optpipe.store import from_json
from optpipe.timing import Stopwatch
from optpipe.types import Precision, Quality, Session, Target

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parents[1] / "recipes"
NETWORKS = {
    "resnet56": RECIPES / "cifar10" / "practise_resnet56.toml",
    "resnet20": RECIPES / "cifar10" / "practise_resnet20.toml",
    "digits": RECIPES / "practise.toml",
}
SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine that is measured; ``rest`` is the int8_rest option of OpenVINO."""

    backend: str
    precision: Precision
    rest: str = ""

    @property
    def name(self) -> str:
        """As the tables call it."""
        return f"{self.backend} {self.precision}" + (f", rest {self.rest}" if self.rest else "")

    def target(self, base: Target) -> Target:
        """The target of this engine on the machine of ``base``."""
        options = (("int8_rest", self.rest),) if self.rest else ()
        return Target(
            self.backend, base.batch, base.input_shape, self.precision, "cpu", base.threads, options
        )


BASELINE = Variant("onnxruntime", "fp32")
VARIANTS = (
    BASELINE,
    Variant("onnxruntime", "int8"),
    Variant("openvino", "fp32"),
    Variant("openvino", "bf16"),
    Variant("openvino", "int8"),
    Variant("openvino", "int8", "bf16"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A network to measure: its original, and pruned where it comes from a run, as ONNX files."""

    name: str
    original: Path
    pruned: Path | None
    calibration: data.ImageSet
    evaluation: data.ImageSet
    settings: precision.Settings


@dataclass(frozen=True, slots=True)
class Row:
    """One engine: percent, ms, and the ratio to ONNX Runtime fp32 of the original, timed in turn."""

    network: str
    file: str
    engine: str
    top1: float
    top1_low: float
    top1_high: float
    change: float
    agreement: float
    median_ms: float
    baseline_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    converged: bool
    notes: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--run", dest="runs", type=Path, action="append", default=[], metavar="RUN")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="int8", help="of the files in --out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[Row] = []
    conversions: dict[str, Converted] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments, Path(folder)):
            for row in measure(case, arguments, Path(folder), conversions):
                rows.append(row)
                publish(arguments, rows, conversions)
                print(line_of(row), flush=True)


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """The networks that were asked for, exported."""
    for name in arguments.networks:
        recipe = recipes.load(NETWORKS[name])
        yield case_of(name, recipe, recipe.folder, folder, None)
    for run in arguments.runs:
        bundle, _ = deploy.bundle.open_bundle(run)
        saved = from_json(deploy.Saved, (bundle / "plan.json").read_bytes())
        recipe = recipes.load(run / "recipe.toml")
        yield case_of(run.name, recipe, Path(saved.search_folder), folder, bundle / "model.onnx")


def case_of(
    name: str, recipe: recipes.Recipe, search_folder: Path, folder: Path, pruned: Path | None
) -> Case:
    model = models.load_model(recipe.model, search_folder)
    channels, prepared = models.input_channels(model), recipe.data.preprocess
    calibration, evaluation = (
        data.load_images(spec, prepared, channels, search_folder)
        for spec in (recipe.data.calibration, recipe.data.evaluation)
    )
    original = folder / f"{name}.onnx"
    onnx_export.export(model, calibration.shape, 16, original)
    return Case(name, original, pruned, calibration, evaluation, recipe.export.quantize)


def measure(
    case: Case, arguments: argparse.Namespace, folder: Path, conversions: dict[str, Converted]
) -> Iterator[Row]:
    """A row for every engine that this machine can run."""
    base = Target("onnxruntime", arguments.batch, case.calibration.shape, "fp32", "cpu", arguments.threads)
    files = {"original": case.original} | ({"pruned": case.pruned} if case.pruned else {})
    images = case.evaluation.batch(slice(None)).numpy()
    labels = None if case.evaluation.labels is None else case.evaluation.labels.numpy()
    with opened(BASELINE, case.original, base, folder) as baseline:
        reference = baseline.run(images)
    exact = quality.score(reference, labels, reference, "evaluation")
    for file, source in files.items():
        watch = Stopwatch()
        converted = precision.convert(
            source, folder / f"{case.name}-{file}.int8.onnx", "int8", case.calibration, case.settings
        )
        conversions[f"{case.name}, {file}, {watch.seconds:.0f} s"] = converted
        for variant in VARIANTS:
            backend = plugins.backend(variant.backend)
            if backend.missing(variant.target(base)) is not None:
                continue
            chosen = converted.path if variant.precision == "int8" else source
            with (
                opened(BASELINE, case.original, base, folder) as baseline,
                opened(variant, chosen, base, folder) as candidate,
            ):
                yield row_of(
                    case.name, file, variant, exact, images, labels, reference, baseline, candidate, arguments
                )


@contextmanager
def opened(variant: Variant, source: Path, base: Target, folder: Path) -> Iterator[Session]:
    backend, target = plugins.backend(variant.backend), variant.target(base)
    session = backend.load(backend.build(source, target, folder), target)
    try:
        yield session
    finally:
        session.close()


def row_of(
    network: str,
    file: str,
    variant: Variant,
    exact: Quality,
    images: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    reference: NDArray[np.float32],
    baseline: Session,
    candidate: Session,
    arguments: argparse.Namespace,
) -> Row:
    logits = candidate.run(images)
    found = quality.score(logits, labels, reference, "evaluation")
    if not np.isfinite(logits).all():
        raise RunError(f"{network}, {variant.name}: logits are not finite")
    with timing.device_lock("cpu"):
        both = timing.paired(baseline, candidate, budget_s=SECONDS * arguments.scale, seed=0)
    return Row(
        network=network,
        file=file,
        engine=variant.name,
        top1=100 * found.value,
        top1_low=100 * found.ci95[0],
        top1_high=100 * found.ci95[1],
        change=100 * (found.value - exact.value),
        agreement=100 * quality.agreement(logits, reference, "evaluation").value,
        median_ms=timing.median(both.samples_ms[:, 1]),
        baseline_ms=timing.median(both.samples_ms[:, 0]),
        ratio=both.ratio,
        ratio_low=both.ratio_ci95[0],
        ratio_high=both.ratio_ci95[1],
        converged=both.converged,
        notes=candidate.notes,
    )


def line_of(row: Row) -> str:
    return (
        f"| {row.network} | {row.file} | {row.engine} | {row.top1:.2f} ({row.top1_low:.1f} to "
        f"{row.top1_high:.1f}) | {row.change:+.2f} | {row.agreement:.2f} | {row.median_ms:.2f} | "
        f"{row.baseline_ms:.2f} | {row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f}) | "
        f"{1 / row.ratio:.2f} |"
    )


def publish(arguments: argparse.Namespace, rows: list[Row], conversions: dict[str, Converted]) -> None:
    """Write all rows so far as JSON and Markdown."""
    target = Target("onnxruntime", arguments.batch, (3, 32, 32), threads=arguments.threads)
    machine = plugins.backend("onnxruntime").fingerprint(target)
    versions = dict(machine.versions)
    if plugins.backend("openvino").missing(VARIANTS[2].target(target)) is None:
        versions |= dict(plugins.backend("openvino").fingerprint(VARIANTS[2].target(target)).versions)
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "executed_on": f"{machine.device}, {machine.threads} threads",
        "platform": machine.driver,
        "versions": versions,
        "scale": arguments.scale,
        "batch": arguments.batch,
        "load": os.getloadavg()[0],
        "rows": [asdict(row) for row in rows],
        "conversions": {
            name: asdict(converted) | {"path": converted.path.name} for name, converted in conversions.items()
        },
    }
    out = arguments.out / arguments.name
    write_atomically(out.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    write_atomically(out.with_suffix(".md"), markdown(facts, rows, conversions))


def markdown(facts: dict[str, object], rows: list[Row], conversions: dict[str, Converted]) -> str:
    lines = [
        "# int8 on the CPU",
        "",
        f"{facts['date']}, {facts['executed_on']}, {facts['platform']}; batch {facts['batch']}, scale "
        f"{facts['scale']}; load at the end {facts['load']:.1f}; versions {facts['versions']}. Written by "
        "`benchmarks/int8.py`.",
        "",
        "Latency and ratio are to ONNX Runtime fp32 of the original, timed in turn; its own row is a second "
        "session of the same engine. Top-1 on the evaluation images with its Wilson interval; change and "
        "agreement are against the original in ONNX Runtime fp32. Nothing was chosen by these images.",
        "",
        "| network | file | engine | top-1, % (95% interval) | change, points | agreement, % | median ms | "
        "original fp32 ms | ratio (95% interval) | times faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line_of(row) for row in rows),
        "",
        "How each int8 file was chosen, on calibration images; the error is the noise of the logits as a "
        "fraction of their power.",
        "",
        "| network, file, time to convert | ranges | left in float | error | all that was tried |",
        "|---|---|---|---|---|",
    ]
    for name, converted in conversions.items():
        tried = "; ".join(
            f"{trial.range_method}{' without ' + ', '.join(trial.in_float) if trial.in_float else ''} "
            f"{trial.error:.2%}"
            for trial in converted.trials
        )
        kept = ", ".join(converted.kept_in_float) or "nothing"
        lines.append(f"| {name} | {converted.range_method} | {kept} | {converted.error:.2%} | {tried} |")
    lines += ["", "| network | file | engine | how it runs |", "|---|---|---|---|"]
    lines += [
        f"| {row.network} | {row.file} | {row.engine} | {'; '.join(row.notes)} |" for row in rows if row.notes
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
