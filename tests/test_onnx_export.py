from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from optpipe.backends import onnxruntime as backend
from optpipe.errors import RunError
from optpipe.onnx_export import Parity, check_parity, export, narrow, parity, structure_digest
from optpipe.types import Sample, Session, Target

SHAPE = (3, 12, 12)


class Net(nn.Module):
    """A small residual network; ``width`` is what changes its structure."""

    def __init__(self, width: int = 8, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stem(images)
        for block in self.blocks:
            features = torch.relu(features + block(features))
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]


class Photographs:
    """Images held in memory."""

    labels = None
    digest = ""

    def __init__(self, count: int) -> None:
        self.images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int] | slice) -> torch.Tensor:
        return self.images[indices]


class Altered:
    """A session whose logits of one image are changed."""

    headline = "Latency"
    notes: tuple[str, ...] = ()

    def state(self) -> None:
        return None

    def __init__(self, inner: Session, index: int, add: float) -> None:
        self.inner, self.index, self.add, self.seen = inner, index, add, 0

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = self.inner.run(images)
        if 0 <= self.index - self.seen < len(images):
            logits[self.index - self.seen, 1] += self.add
        self.seen += len(images)
        return logits

    def sample(self) -> Sample:
        return self.inner.sample()

    def close(self) -> None:
        self.inner.close()


def network(seed: int, width: int = 8, blocks: int = 1) -> Net:
    torch.manual_seed(seed)
    made = Net(width, blocks).train()
    made(torch.randn(8, *SHAPE))  # running statistics that are not the identity
    return made.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of two seeds and of two other structures."""
    folder = tmp_path_factory.mktemp("exports")
    for name, made in {
        "a": network(0),
        "again": network(0),
        "b": network(1),
        "wide": network(0, width=12),
        "deep": network(0, blocks=2),
    }.items():
        export(made, SHAPE, 4, folder / f"{name}.onnx")
    return folder


@pytest.fixture
def session(folder: Path) -> Session:
    target = Target("onnxruntime", 4, SHAPE, threads=1)
    return backend.load(backend.build(folder / "a.onnx", target, folder), target)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_engine_computes_what_torch_does_on_more_images_than_a_batch(session: Session) -> None:
    found = parity(network(0), session, Photographs(150), atol=1e-5, rtol=1e-4, count=150)
    check_parity(found)
    assert found.passed
    assert (found.count, found.top1_agreement) == (150, 1.0)
    assert 0 <= found.max_abs < 1e-5


def test_same_weights_give_the_same_bytes(folder: Path) -> None:
    assert sha256(folder / "a.onnx") == sha256(folder / "again.onnx")
    assert sha256(folder / "a.onnx") != sha256(folder / "b.onnx")


def test_batch_is_free_and_names_and_opset_are_as_stated(folder: Path) -> None:
    graph = onnx.load(folder / "a.onnx")
    source, sink = graph.graph.input[0], graph.graph.output[0]
    assert (source.name, sink.name) == ("input", "logits")
    assert source.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [d.dim_value for d in source.type.tensor_type.shape.dim][1:] == list(SHAPE)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
    onnx.checker.check_model(graph, full_check=True)


def test_batch_norm_is_folded_into_convolutions(folder: Path) -> None:
    operators = {node.op_type for node in onnx.load(folder / "a.onnx").graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators


def test_the_file_tells_nothing_of_the_machine_that_wrote_it(folder: Path) -> None:
    text = str(onnx.load(folder / "a.onnx"))
    assert "stack_trace" not in text
    assert "metadata_props" not in text
    assert str(Path(__file__).parent) not in text
    assert str(Path(torch.__file__).parent) not in text


def test_the_export_is_silent_and_leaves_the_model_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = network(0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, SHAPE, 1, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert os.listdir(tmp_path) == ["model.onnx"]  # noqa: PTH208 - hidden files too


def test_the_digest_follows_the_structure_and_not_the_weights(folder: Path) -> None:
    digests = {path.stem: structure_digest(path) for path in folder.glob("*.onnx")}
    assert digests["a"] == digests["again"] == digests["b"]
    assert len({digests["a"], digests["wide"], digests["deep"]}) == 3


def test_the_digest_follows_attributes_and_not_names(folder: Path, tmp_path: Path) -> None:
    renamed, strided = onnx.load(folder / "a.onnx"), onnx.load(folder / "a.onnx")
    for node in renamed.graph.node:
        node.name = f"other_{node.name}"
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = name if name in ("input", "logits", "") else f"other_{name}"
    for tensor in renamed.graph.initializer:
        tensor.name = f"other_{tensor.name}"
    convolution = next(node for node in strided.graph.node if node.op_type == "Conv")
    strides = next(attribute for attribute in convolution.attribute if attribute.name == "strides")
    strides.ints[:] = [2, 2]
    onnx.save(renamed, tmp_path / "renamed.onnx")
    onnx.save(strided, tmp_path / "strided.onnx")
    original = structure_digest(folder / "a.onnx")
    assert structure_digest(tmp_path / "renamed.onnx") == original
    assert structure_digest(tmp_path / "strided.onnx") != original


def test_one_wrong_logit_fails_and_names_its_image_and_size(session: Session) -> None:
    found = parity(network(0), Altered(session, 97, 0.5), Photographs(120), atol=1e-4, rtol=1e-4, count=120)
    assert not found.passed
    assert found.worst_index == 97
    assert found.max_abs == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(RunError, match=r"up to 0\.5.*image 97.*0\.0001"):
        check_parity(found)


def test_a_logit_that_is_not_a_number_never_passes(session: Session) -> None:
    found = parity(network(0), Altered(session, 3, float("nan")), Photographs(8), atol=1e9, rtol=1e9, count=8)
    assert (found.passed, found.worst_index, found.max_abs) == (False, 3, float("inf"))


def test_relative_difference_is_of_the_images_largest_logit() -> None:
    class Logits(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.001, -4.0]]).repeat(len(images), 1)

    class Nearly:
        headline = "Latency"
        notes: tuple[str, ...] = ()

        def state(self) -> None:
            return None

        def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.tile(np.array([[0.003, -4.0]], np.float32), (len(images), 1))

        def sample(self) -> Sample:
            return Sample(1.0)

        def close(self) -> None:
            pass

    found = parity(Logits(), Nearly(), Photographs(2), atol=0.0, rtol=0.001, count=9)
    assert isinstance(found, Parity)
    assert (found.max_abs, found.max_rel) == pytest.approx((0.002, 0.0005), rel=1e-3)
    assert (found.passed, found.count) == (True, 2)


def test_a_network_that_branches_on_data_is_refused_in_one_line(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    with pytest.raises(RunError, match="cannot export Branching") as caught:
        export(Branching(), SHAPE, 2, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_run_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match=r"model\.onnx: cannot be written: "):
        export(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), SHAPE, 2, tmp_path / "file" / "model.onnx")


def test_a_file_that_is_not_onnx_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    with pytest.raises(RunError, match=r"cannot read .*broken\.onnx"):
        structure_digest(tmp_path / "broken.onnx")


class Carried(nn.Module):
    """A depthwise convolution between two others, and a classifier that reads a flattened map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, width, 1)
        self.carry = nn.Conv2d(width, width, 3, stride=4, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 9, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.carry(torch.relu(self.expand(images)))))
        return self.head(torch.flatten(features, 1))  # type: ignore[no-any-return]


class Before(nn.Module):
    """A batch-norm that no convolution can take in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(torch.relu(self.conv(images)))
        return self.head(features.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [Net, Carried])
def test_a_file_cut_to_the_widths_of_a_network_has_the_structure_of_its_export(
    tmp_path: Path, network: type[Net | Carried]
) -> None:
    wide, slim = network(8).eval(), network(5).eval()
    for name, model in (("wide", wide), ("slim", slim)):
        export(model, SHAPE, 4, tmp_path / f"{name}.onnx")
    assert narrow(tmp_path / "wide.onnx", slim, tmp_path / "cut.onnx")
    digests = {name: structure_digest(tmp_path / f"{name}.onnx") for name in ("wide", "slim", "cut")}
    assert digests["cut"] == digests["slim"] != digests["wide"]
    target = Target("onnxruntime", 4, SHAPE, threads=1)
    session = backend.load(backend.build(tmp_path / "cut.onnx", target, tmp_path), target)
    assert session.run(np.zeros((4, *SHAPE), np.float32)).shape == (4, 4)
    session.close()


def test_a_file_with_weights_of_other_layers_is_not_cut(tmp_path: Path) -> None:
    export(Before(8).eval(), SHAPE, 4, tmp_path / "wide.onnx")
    assert not narrow(tmp_path / "wide.onnx", Before(5).eval(), tmp_path / "cut.onnx")
    assert not (tmp_path / "cut.onnx").exists()


def test_a_network_that_is_wider_cannot_be_cut_from_a_file(tmp_path: Path) -> None:
    export(Net(5).eval(), SHAPE, 4, tmp_path / "slim.onnx")
    assert not narrow(tmp_path / "slim.onnx", Net(8).eval(), tmp_path / "cut.onnx")
