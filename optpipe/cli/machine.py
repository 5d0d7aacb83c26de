"""Commands about this machine: bench, rebuild, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from optpipe.cli.options import DEBUG, MOST, PATH, RUN, Finite
from optpipe.errors import MissingError


@click.command()
@click.argument("model", type=PATH, metavar="MODEL.onnx|RUN")
@click.option("--vs", type=PATH, help="Another model or run, timed in turn with the first.")
@click.option("--batch", type=click.IntRange(1, MOST), help="Images in a batch [the run's, or 1].")
@click.option("--threads", type=click.IntRange(1, MOST), help="Threads [the run's, or all cores].")
@click.option("--backend", metavar="NAME", help="The engine [the run's, or what suits the device].")
@click.option("--gpu", is_flag=True, help="Time on the NVIDIA GPU.")
@click.option("--warmUp", "warmup_ms", type=click.IntRange(min=0), default=200, show_default=True, help="ms.")
@click.option("--duration", type=Finite(min=0.1), default=5.0, show_default=True, help="Seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEBUG
def bench(
    model: Path,
    vs: Path | None,
    *,
    batch: int | None,
    threads: int | None,
    backend: str | None,
    gpu: bool,
    warmup_ms: int,
    duration: float,
    as_json: bool,
    debug: bool,
) -> None:
    """Time an ONNX model or a run's result; with --vs two of them in turn, with the ratio's interval."""
    from optpipe import bench as benches

    measured = benches.bench(
        model,
        vs,
        batch=batch,
        threads=threads,
        warmup_ms=warmup_ms,
        duration_s=duration,
        backend=backend,
        gpu=gpu,
    )
    click.echo(benches.as_json(measured) if as_json else benches.as_text(measured), nl=False)


@click.command()
@RUN
@click.option("--gpu", is_flag=True, help="Build engines for the NVIDIA GPU.")
@click.option("--backend", metavar="NAME", help="The engine [the bundle's, or what suits the device].")
@click.option("--out", type=PATH, help="A new folder for the bundle [in its place].")
@DEBUG
def rebuild(run: Path, *, gpu: bool, backend: str | None, out: Path | None, debug: bool) -> None:
    """Build the engines of a RUN's deploy bundle anew on this machine."""
    from optpipe import rebuild as rebuilds
    from optpipe.console import EventConsole

    with EventConsole() as console:
        rebuilt = rebuilds.rebuild(run, gpu=gpu, out=out, backend=backend, emit=console.show)
    click.echo(rebuilds.as_text(rebuilt), nl=False)


@click.command()
@click.option("--gpu", is_flag=True, help="What engines on an NVIDIA GPU take, and a self-test of them.")
@click.option("--self-test", is_flag=True, help="Build, compare and time a small engine of each kind.")
@click.option("--workers", is_flag=True, help="What workers a run can have here.")
@click.option("--address", metavar="HOST:PORT", help="And on the Ray cluster that listens there.")
@DEBUG
def doctor(*, gpu: bool, self_test: bool, workers: bool, address: str | None, debug: bool) -> None:
    """Say what this machine can run, and what is missing for the rest."""
    from optpipe import environment

    lacking: list[str] = []

    def show(finding: environment.Finding, otherwise: str = "missing") -> None:
        mend = f"; {finding.mend}" if finding.mend else ""
        click.echo(f"{'ok     ' if finding.fine else otherwise} {finding.subject}: {finding.detail}{mend}")
        if finding.needed and not finding.fine:
            lacking.append(finding.subject)

    if workers or address:
        from optpipe.pipeline.workers import offer

        for finding in offer.examine(address, Path.cwd()):
            show(finding)
    else:
        for finding in environment.examine_gpu() if gpu else environment.examine(Path.cwd()):
            show(finding)
    if gpu or self_test:
        from optpipe import selftest

        for finding in selftest.check("cuda" if gpu else "cpu"):
            show(finding, "failed ")
    if lacking:
        raise MissingError(f"not fine: {', '.join(lacking)}")
