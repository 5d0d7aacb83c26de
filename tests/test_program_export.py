from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from optpipe.errors import RunError
from optpipe.program_export import export

SHAPE = (3, 12, 12)


class Net(nn.Module):
    """A residual block whose second batch-norm reads a sum, and whose first convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.grouped_norm = nn.BatchNorm2d(8, eps=0.1)
        self.plain = nn.Conv2d(8, 8, 1)
        self.plain_norm = nn.BatchNorm2d(8, affine=False)
        self.twice = nn.Conv2d(8, 8, 1)
        self.twice_norm = nn.BatchNorm2d(8)
        self.sum_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(images)))
        x = x + self.plain_norm(self.plain(self.grouped_norm(self.grouped(x))))
        y = self.twice(x)
        x = self.sum_norm(x + y) + self.twice_norm(y)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Branching(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Broken(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return {"logits": images}["features"]


def network(seed: int = 0) -> Net:
    """A network whose batch-norms are not the identity."""
    torch.manual_seed(seed)
    made = Net().train()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
    for _ in range(5):
        made(2 * torch.randn(8, *SHAPE) + 1)
    return made.eval()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    export(network(), SHAPE, 4, path)
    return path


def test_the_program_computes_what_the_network_does(program: Path) -> None:
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network()(images)
        got = torch.export.load(program).module()(images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_batch_norm_is_folded_into_the_convolutions_that_only_it_reads(program: Path) -> None:
    exported = torch.export.load(program)
    norms = [node for node in exported.graph.nodes if "batch_norm" in str(node.target)]
    assert len(norms) == 2  # of a sum, and of a convolution that is read twice
    assert not any(name.startswith(("stem", "grouped", "plain")) for name in exported.state_dict)


def test_batch_and_shape_are_those_asked_for(program: Path) -> None:
    inputs = torch.export.load(program).example_inputs
    assert inputs is not None
    assert inputs[0][0].shape == (4, *SHAPE)
    assert inputs[0][0].is_contiguous()


def test_a_batch_of_one_can_be_exported(tmp_path: Path) -> None:
    export(network(), SHAPE, 1, tmp_path / "one.pt2")
    assert torch.export.load(tmp_path / "one.pt2").module()(torch.zeros(1, *SHAPE)).shape == (1, 4)


def test_the_same_weights_give_the_same_bytes(program: Path, tmp_path: Path) -> None:
    export(network(), SHAPE, 4, tmp_path / "again.pt2")
    export(network(1), SHAPE, 4, tmp_path / "other.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == program.read_bytes()
    assert (tmp_path / "other.pt2").read_bytes() != program.read_bytes()


def test_the_file_tells_nothing_of_the_machine_that_wrote_it(program: Path) -> None:
    with zipfile.ZipFile(program) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    for trace in (
        str(Path(__file__).parent),
        str(Path(torch.__file__).parent),
        "stack_trace",
        "site-packages",
    ):
        assert trace.encode() not in content


def test_the_export_is_silent_and_leaves_the_model_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, SHAPE, 2, tmp_path / "model.pt2")
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert os.listdir(tmp_path) == ["model.pt2"]  # noqa: PTH208 - hidden files too


@pytest.mark.parametrize("model", [Branching(), Broken()], ids=lambda model: type(model).__name__)
def test_a_network_that_cannot_be_exported_is_named(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"torch cannot export {type(model).__name__} to a program: .+; its"):
        export(model, SHAPE, 2, tmp_path / "model.pt2")
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/model\.pt2: cannot be written"):
        export(network(), SHAPE, 2, tmp_path / "file" / "model.pt2")
