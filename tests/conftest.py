"""What several tests share: reports and networks made by hand, small and without torch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optpipe import cli
from optpipe.report import schema
from optpipe.types import Budget, Fingerprint, Latency, Plan, Quality, Table, Target, Tune

FINGERPRINT = Fingerprint("a processor", "Linux 6", (("onnxruntime", "1.22"),), 2)


def make_latency(
    median_ms: float, ratio: float | None = None, ci95: tuple[float, float] | None = None
) -> Latency:
    """A latency whose other figures follow from the median."""
    return Latency(
        median_ms=median_ms,
        mean_ms=median_ms * 1.02,
        min_ms=median_ms * 0.9,
        max_ms=median_ms * 1.5,
        p90_ms=median_ms * 1.1,
        p95_ms=median_ms * 1.2,
        p99_ms=median_ms * 1.3,
        samples=200,
        warmup=20,
        fingerprint=FINGERPRINT,
        ratio_to_original=ratio,
        ratio_ci95=ci95,
    )


def make_report(
    *,
    original_top1: float = 0.915,
    result_top1: float = 0.905,
    ratio: float = 0.75,
    ci95: tuple[float, float] = (0.74, 0.76),
    met: bool = True,
    warnings: tuple[str, ...] = (),
) -> schema.Report:
    """A finished report in which every optional part is present."""
    original = Quality("top1", original_top1, (0.89, 0.93), 423, "evaluation", top5=0.99)
    result = Quality("top1", result_top1, (0.88, 0.92), 423, "evaluation", top5=0.98)
    return schema.Report(
        schema=schema.SCHEMA,
        name="practise",
        method="practise",
        model="zoo:resnet20_cifar",
        seed=0,
        target=Target("onnxruntime", 16, (3, 32, 32), threads=2),
        budget=schema.BudgetReport(Budget(latency_reduction=0.22), met, "latency -25.0%"),
        original=schema.NetworkReport(original, make_latency(8.0), 270_000, 41_000_000, 1_100_000),
        result=schema.NetworkReport(
            result,
            make_latency(8.0 * ratio, ratio, ci95),
            200_000,
            30_000_000,
            800_000,
            Quality("agreement", 0.96, (0.94, 0.98), 423, "evaluation"),
        ),
        quality_before_recovery=Quality("top1", 0.5, (0.45, 0.55), 423, "evaluation"),
        plan=Plan(drop_blocks=("layer1.1", "layer2.2")),
        recover=Tune(steps=300),
        reason="the two blocks with the lowest score",
        tables=(
            Table(
                "Blocks",
                ("block", "R", "dropped", "why not"),
                (("layer1.1", 0.125, True, None), ("a|b", 1, False, "τ is not above 0")),
            ),
        ),
        data=schema.DataReport(500, "c" * 64, 423, "e" * 64),
        stages={
            name: schema.StageReport(float(number))
            for number, name in enumerate(
                ("ingest", "analyze", "prune", "recover", "export", "benchmark"), start=1
            )
        },
        environment=schema.EnvironmentReport("0.1.0", "3.11.9", "Linux", "a processor", {"torch": "2.11"}),
        sha256={"model.onnx": "d" * 64},
        warnings=warnings,
    )


@pytest.fixture
def report() -> schema.Report:
    return make_report()


@pytest.fixture(scope="session", autouse=True)
def heeds_interrupts() -> None:
    """Begun in the background a process ignores Ctrl-C, and so would what is tested for heeding it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


WriteOnnx = Callable[..., Path]


@pytest.fixture
def write_onnx(tmp_path: Path) -> WriteOnnx:
    """A function that writes a network of ``layers`` convolutions, and returns its path."""
    from onnx import TensorProto, helper, numpy_helper, save

    def write(name: str, *, layers: int = 1, batch: int | str = "batch", size: int = 16) -> Path:
        rng = np.random.default_rng(0)
        nodes, weights = [], []
        for layer in range(layers):
            shape = (8, 3 if layer == 0 else 8, 3, 3)
            kernel = rng.standard_normal(shape, dtype=np.float32)
            weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
            source = "images" if layer == 0 else f"x{layer - 1}"
            nodes.append(helper.make_node("Conv", [source, f"w{layer}"], [f"x{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("GlobalAveragePool", [f"x{layers - 1}"], ["pooled"]))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"]))
        graph = helper.make_graph(
            nodes,
            "network",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 8])],
            weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = tmp_path / name
        save(model, path)
        return path

    return write


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def optpipe(capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs a command line, and returns exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        code: int | str | None = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call
