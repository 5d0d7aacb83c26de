import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from optpipe.errors import UsageError
from optpipe.models import ModelSpec, input_channels, load_model, weights_digest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("OPTPIPE_DATA", ROOT.parent / "shared"))
ZOO = "zoo:resnet20_cifar"


def state_of(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = {**load_model(ModelSpec(ZOO)).state_dict(), **changes}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_importing_the_specs_loads_no_torch() -> None:
    code = "import sys, optpipe.models, optpipe.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_random_weights_are_the_same_each_time_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_model(ModelSpec(ZOO))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert weights_digest(load_model(ModelSpec(ZOO))) == weights_digest(first)
    assert not first.training


def test_the_digest_sees_every_bit_name_and_type() -> None:
    def digest(**tensors: torch.Tensor) -> str:
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, tensor)
        return weights_digest(model)

    ones = torch.ones(2, 3)
    nudged = ones.clone()
    nudged[1, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert digest(a=ones, b=nudged) == digest(b=nudged, a=ones)
    different = [
        digest(a=ones),
        digest(b=ones),
        digest(a=nudged),
        digest(a=ones.view(3, 2)),
        digest(a=ones.int()),
    ]
    different += [digest(a=ones.bfloat16()), digest(a=ones, b=torch.tensor(0))]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("form", ["weights.safetensors", "plain.pth", "wrapped.pth", "parallel.pt"])
def test_weights_come_back_from_every_kind_of_file(form: str, tmp_path: Path) -> None:
    state = state_of(**{"linear.bias": torch.arange(10.0)})
    if form.endswith(".safetensors"):
        save_file(state, tmp_path / form)
    elif form == "wrapped.pth":
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / form)
    elif form == "parallel.pt":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / form)
    else:
        torch.save(state, tmp_path / form)
    model = load_model(ModelSpec(ZOO, weights=form), tmp_path)
    assert model.state_dict()["linear.bias"].tolist() == list(range(10))


def test_weights_without_batch_norm_counters_fit(tmp_path: Path) -> None:
    state = {name: value for name, value in state_of().items() if "num_batches" not in name}
    save_file(state, tmp_path / "w.safetensors")
    model = load_model(ModelSpec(ZOO, weights=str(tmp_path / "w.safetensors")))
    assert weights_digest(model) == weights_digest(load_model(ModelSpec(ZOO)))


def test_weights_that_do_not_fit_are_named_by_key(tmp_path: Path) -> None:
    state = state_of(**{"linear.bias": None, "extra": torch.ones(1), "linear.weight": torch.ones(5, 64)})
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError) as caught:
        load_model(ModelSpec(ZOO, weights="w.safetensors"), tmp_path)
    message = str(caught.value)
    assert "1 missing: linear.bias; 1 unexpected: extra; 1 of another shape: linear.weight" in message
    assert "(5, 64) in the file, (10, 64) in the network" in message


def test_only_the_first_five_misfits_are_listed(tmp_path: Path) -> None:
    save_file({"conv1.weight": state_of()["conv1.weight"]}, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"96 missing: (\S+, ){4}\S+ and 91 more$"):
        load_model(ModelSpec(ZOO, weights="w.safetensors"), tmp_path)


def test_nan_in_weights_is_refused(tmp_path: Path) -> None:
    save_file(state_of(**{"linear.bias": torch.full((10,), torch.nan)}), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"NaN or infinite values: 1 broken: linear\.bias"):
        load_model(ModelSpec(ZOO, weights="w.safetensors"), tmp_path)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save(load_model(ModelSpec(ZOO)), tmp_path / "whole_model.pth")
    with pytest.raises(UsageError, match=r"whole_model\.pth: refused, .* save model\.state_dict\(\)"):
        load_model(ModelSpec(ZOO, weights="whole_model.pth"), tmp_path)


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "empty.pth"])
def test_an_unreadable_weights_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"" if "empty" in name else b"PK\x03\x04 no weights here")
    with pytest.raises(UsageError, match=rf"{name}: (not a readable|refused)"):
        load_model(ModelSpec(ZOO, weights=name), tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("zoo:resnet20_cifra"), "did you mean 'zoo:resnet20_cifar'"),
        (ModelSpec("torchvision:resnet35"), r"no classification network 'resnet35'; nearest: resnet"),
        (ModelSpec("resnet34"), r"not of the form .*; nearest: resnet34"),
        (ModelSpec("torchvision:resnet18", in_channels=1), "takes 3 input channels, not 1"),
        (
            ModelSpec("torchvision:resnet18", weights="IMAGENET"),
            "do not exist for 'resnet18'; there are IMAGENET1K",
        ),
        (ModelSpec(ZOO, weights="DEFAULT"), "only torchvision's networks have weights by name"),
        (ModelSpec(ZOO, weights="none.safetensors"), r"none\.safetensors: no such file"),
        (ModelSpec(ZOO, weights="model.onnx"), r"file type '\.onnx' is not supported; use \.safetensors"),
        (ModelSpec("no_such_module:net"), "module 'no_such_module' does not import"),
        (ModelSpec("optpipe.zoo:biuld"), "has no function 'biuld'; nearest: build"),
        (ModelSpec("optpipe.zoo:architectures"), r"returned a dict, not a torch\.nn\.Module"),
        (ModelSpec("optpipe.zoo:architectures", classes=3), r"cannot be called with \(classes\)"),
    ],
)
def test_what_cannot_be_loaded_gets_one_line(spec: ModelSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def test_torchvision_networks_take_the_number_of_classes() -> None:
    model = load_model(ModelSpec("torchvision:mobilenet_v3_small", classes=7))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert input_channels(model) == 3


def test_a_function_beside_the_recipe_makes_the_network(tmp_path: Path) -> None:
    (tmp_path / "my_sizes.py").write_text("WIDTH = 4\n")
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\nfrom my_sizes import WIDTH\n"
        "def net(classes=2, in_channels=3):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, WIDTH, 3), nn.Linear(WIDTH, classes))\n"
        "def broken():\n    raise RuntimeError('no\\nluck')\n"
    )
    path_before = list(sys.path)
    model = load_model(ModelSpec("my_network:net", in_channels=1), tmp_path)
    assert input_channels(model) == 1
    assert sys.path == path_before
    with pytest.raises(UsageError, match="'my_network:broken' failed: RuntimeError: no luck"):
        load_model(ModelSpec("my_network:broken"), tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize(("depth", "expected"), [(20, 0.91), (56, 0.93)])
def test_public_cifar_weights_score_as_published(depth: int, expected: float) -> None:
    from optpipe.data import DataSpec, Preprocess, load_images

    if not SHARED.is_dir():
        pytest.skip(f"no shared data folder at {SHARED}")
    weights = str(SHARED / f"weights/resnet{depth}_cifar10.safetensors")
    model = load_model(ModelSpec(f"zoo:resnet{depth}_cifar", weights))
    preprocess = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = load_images(DataSpec(str(SHARED / "data/cifar10/test_423.npz")), preprocess, 3, classes=10)
    assert images.labels is not None
    with torch.no_grad():
        predicted = torch.cat([model(images.batch(slice(i, i + 64))).argmax(1) for i in range(0, 423, 64)])
    top1 = (predicted == images.labels).float().mean().item()
    assert expected < top1 < expected + 0.02
