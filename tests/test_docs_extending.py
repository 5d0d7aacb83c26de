"""The examples of docs/extending.md, taken from the page: a model, a method and a backend."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optpipe
from optpipe import onnx_export, plugins
from optpipe import recipe as recipes
from optpipe.types import Target

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
MODULES = ("my_network", "largest_first", "onnx_reference")


def written(folder: Path) -> None:
    """Every code block of the page that has a file's name, in a folder."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (folder / name).write_text(content, encoding="utf-8")


def install(folder: Path) -> None:
    """The page's entry points, as an installed package has them."""
    installed = folder / "theirs-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items()]
    (installed / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    written(tmp_path)
    install(tmp_path)
    (tmp_path / "calibration_data").symlink_to(ROOT / "calibration_data")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_model_and_the_method_make_a_run(home: Path) -> None:
    """Both blocks that may go do, so that nothing hangs on what is timed."""
    quick = ["target.threads=1", "timing.budget_s=0.05", "timing.final_budget_s=0.05", "timing.tolerance=0.5"]
    quick += ["recover.steps=5", "recover.batch=8", "export.precisions=[]"]
    result = optpipe.run("my_network.toml", out=home / "run", overrides=quick)
    blocks = ("blocks.0", "blocks.1", "blocks.2")
    assert len(result.report.plan.drop_blocks) == 2
    assert set(result.report.plan.drop_blocks) < set(blocks)
    assert result.report.reason == "the 2 blocks with most parameters"


def test_the_method_says_what_it_cannot_do(home: Path) -> None:
    tables = tomllib.loads((home / "my_network.toml").read_text())
    with pytest.raises(optpipe.UsageError, match="largest_first takes latency_reduction or drop_blocks"):
        optpipe.run({**tables, "budget": {"macs_reduction": 0.2}})
    with pytest.raises(optpipe.UsageError, match=r"\[method\] mots = 2: unknown key; did you mean most"):
        method = plugins.method("largest_first")
        recipes.bind(method.Config, {"mots": 2}, Path("r.toml"), "method")


def test_the_backend_computes_what_torch_does(home: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    onnx_export.export(network, (3, 8, 8), 4, home / "model.onnx")
    backend, target = plugins.backend("onnx_reference"), Target("onnx_reference", 4, (3, 8, 8), threads=1)
    assert backend.missing(target) is None
    session = backend.load(backend.build(home / "model.onnx", target, home), target)
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8), dtype=np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(images), expected, atol=1e-5)
    assert session.sample().compute_ms > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_backend_conforms(tmp_path: Path) -> None:
    """All of the conformance test, in a process of its own, with the page's own way to have it found."""
    written(tmp_path)
    module = tmp_path / "module"
    module.mkdir()
    (tmp_path / "onnx_reference.py").rename(module / "onnx_reference.py")
    shown = (tmp_path / "conftest.py").read_text()
    (tmp_path / "found_there.py").write_text(shown.replace("/folder/of/the/module", str(module)))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "found_there", "-p", "no:cacheprovider"),
            *("tests/backends/test_conformance.py", "-k", "onnx_reference"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 20
