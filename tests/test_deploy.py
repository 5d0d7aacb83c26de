from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

import optpipe
from optpipe import deploy, store
from optpipe.data import Preprocess
from optpipe.deploy import bundle, run_engine
from optpipe.errors import UsageError
from optpipe.models import ModelSpec
from optpipe.types import Fingerprint, Plan, Target

NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(x))


class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.second(self.first(torch.relu(self.stem(x)))).mean((2, 3)))


def network(classes):
    return Network(classes)
"""
SHAPE = (1, 8, 8)
TARGET = Target("onnxruntime", 4, SHAPE, threads=1)
MACHINE = Fingerprint("a processor", "Linux 6", (("onnxruntime", "1.22"),), 1)
ORIGIN = deploy.Origin(MACHINE, "c" * 64, 7, ("a.png", "b.png"))
ENGINE = deploy.BundledEngine("fp32", "onnxruntime", "model.onnx", "model.onnx", 0.5, ("head",))


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run's folder with a bundle: a network without its second block, weights other than the recipe's."""
    import torch

    from optpipe import graph, models

    module = f"network_of_{request.node.name.partition('[')[0]}"
    (tmp_path / f"{module}.py").write_text(NETWORK, encoding="utf-8")
    spec = ModelSpec(f"{module}:network", classes=3)
    plan = Plan(drop_blocks=("second",))
    candidate = graph.apply(models.load_model(spec, tmp_path), plan, SHAPE)
    generator = torch.Generator().manual_seed(1)
    for parameter in candidate.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    folder = tmp_path / "run"
    (folder / "deploy").mkdir(parents=True)
    (folder / "deploy" / "model.onnx").write_bytes(b"an engine")
    (folder / "deploy" / ".model.onnx.1.tmp").write_bytes(b"left by a killed process")
    saved = deploy.Saved(spec, str(tmp_path), plan, SHAPE, Preprocess((0.5,), (0.5,)))
    deploy.write_bundle(folder / "deploy", candidate, saved, TARGET, ORIGIN, [ENGINE])
    torch.save(candidate(torch.ones(2, *SHAPE)), tmp_path / "expected.pt")
    return folder


def test_the_network_comes_back_with_its_weights(run: Path) -> None:
    import torch

    expected = torch.load(run.parent / "expected.pt", weights_only=True)
    for path in (run, str(run), run / "deploy"):
        loaded = optpipe.load(path)
        assert not loaded.training
        assert "second.conv.weight" not in loaded.state_dict()
        assert torch.equal(loaded(torch.ones(2, *SHAPE)), expected)


def test_a_narrowed_network_comes_back_where_the_caller_wants_no_gradients(run: Path) -> None:
    import torch

    from optpipe import graph, models

    spec = json.loads((run / "deploy" / "plan.json").read_text())["model"]
    original = models.load_model(ModelSpec(**spec), run.parent)
    group = next(group for group in graph.inspect(original, SHAPE).groups if group.prunable)
    plan = Plan(keep_channels=((group.name, (0,)),))
    narrowed = graph.apply(original, plan, SHAPE)
    saved = deploy.Saved(ModelSpec(**spec), str(run.parent), plan, SHAPE, Preprocess((0.5,), (0.5,)))
    deploy.write_bundle(run / "deploy", narrowed, saved, TARGET, ORIGIN, [ENGINE])
    with torch.inference_mode():
        loaded = optpipe.load(run)
        assert torch.equal(loaded(torch.ones(2, *SHAPE)), narrowed(torch.ones(2, *SHAPE)))


def test_images_are_prepared_as_the_manifest_says(run: Path) -> None:
    import numpy as np
    import torch

    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    for path in (run, str(run), run / "deploy"):
        prepare = optpipe.preprocess(path)
        assert torch.equal(prepare(pixels[1]), torch.from_numpy(pixels[1]).permute(2, 0, 1) / 255 * 2 - 1)
        assert torch.equal(prepare(list(pixels))[1], prepare(pixels[1]))
    with pytest.raises(UsageError, match="images are uint8 arrays"):
        prepare(pixels[0] / 255)
    with pytest.raises(UsageError, match="has the run finished"):
        optpipe.preprocess(run.parent / "nothing")


def test_the_manifest_lists_every_file_and_no_leftover(run: Path) -> None:
    manifest = json.loads((run / "deploy" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["schema"] == "optpipe.manifest/2"
    assert sorted(manifest["files"]) == ["model.onnx", "model.safetensors", "plan.json", "run_engine.py"]
    assert manifest["files"]["model.onnx"]["bytes"] == len(b"an engine")
    assert manifest["target"]["batch"] == 4
    assert manifest["preprocess"]["mean"] == [0.5]


def test_the_manifest_says_where_the_bundle_comes_from(run: Path) -> None:
    manifest = bundle.open_bundle(run)[1]
    assert manifest.origin == ORIGIN
    assert manifest.built_on == MACHINE
    assert manifest.engines == (ENGINE,)


def test_the_program_that_travels_is_the_packages_own(run: Path) -> None:
    assert (run / "deploy" / "run_engine.py").read_bytes() == Path(run_engine.__file__).read_bytes()


def test_a_manifest_with_a_changed_digit_is_refused_by_optpipe_and_by_the_bundles_own_runner(
    run: Path,
) -> None:
    path = run / "deploy" / "manifest.json"
    assert run_engine.read_manifest(run / "deploy")["preprocess"]["mean"] == [0.5]
    path.write_text(path.read_text().replace("0.5", "0.6", 1))
    with pytest.raises(UsageError, match=r"manifest.json: it is not what was written: .*; get the bundle"):
        deploy.verify(run)
    with pytest.raises(run_engine.RunnerError, match="cannot be used: it is not what was written") as error:
        run_engine.read_manifest(run / "deploy")
    assert error.value.code == 2


def test_files_that_may_not_be_read_are_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, refused = Path.open, {"plan.json"}

    def opened(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name in refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opening(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", opened)
    assert deploy.verify(run) == ["plan.json: cannot be read: Permission denied"]
    with pytest.raises(UsageError, match=r"deploy: plan.json: cannot be read: Permission denied"):
        optpipe.load(run)
    refused.add("manifest.json")
    with pytest.raises(UsageError, match=r"manifest.json: cannot be read: Permission denied"):
        optpipe.load(run)


def test_a_whole_bundle_verifies(run: Path) -> None:
    assert deploy.verify(run) == []
    assert deploy.verify(run / "deploy") == []


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "plan.json", "run_engine.py"])
def test_one_flipped_bit_is_found(run: Path, name: str) -> None:
    path = run / "deploy" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (problem,) = deploy.verify(run)
    assert problem.startswith(f"{name}: sha256 is ")
    with pytest.raises(UsageError) as error:
        optpipe.load(run)
    assert str(error.value) == f"{run / 'deploy'}: {problem}"


def test_a_missing_file_is_found(run: Path) -> None:
    (run / "deploy" / "model.onnx").unlink()
    (run / "deploy" / "plan.json").unlink()
    assert deploy.verify(run) == ["model.onnx: is missing", "plan.json: is missing"]


def test_a_run_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        deploy.verify(tmp_path)
    assert str(error.value) == f"{tmp_path}: holds no deploy bundle (no manifest.json); has the run finished?"


@pytest.mark.parametrize("content", ["{", "{}", '{"schema": 1}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"manifest\.json: is no manifest of optpipe: \d+ errors$"):
        deploy.verify(tmp_path)


def test_a_bundle_is_opened_from_the_run_or_from_its_folder(run: Path) -> None:
    assert bundle.open_bundle(run) == bundle.open_bundle(run / "deploy")
    assert bundle.open_bundle(run)[1].target == TARGET


def test_weights_of_another_network_are_refused_in_one_line(run: Path) -> None:
    from torch import nn

    with pytest.raises(UsageError) as error:
        store.load_tensors(nn.Linear(2, 2), run / "deploy" / "model.safetensors")
    message = str(error.value)
    assert message.startswith(f"{run / 'deploy' / 'model.safetensors'}: does not fit the network: ")
    assert "\n" not in message


def test_weights_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    from torch import nn

    path = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match=r"model\.safetensors: cannot be read: "):
        store.load_tensors(nn.Linear(2, 2), path)
    path.write_bytes(b"\x10")
    with pytest.raises(UsageError, match=r"model\.safetensors: cannot be read: "):
        store.load_tensors(nn.Linear(2, 2), path)
