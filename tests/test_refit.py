"""Recoverability in closed form: exact where the answer is known, and of sensible order elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe import graph, tune
from optpipe.data import ImageSet
from optpipe.errors import UsageError
from optpipe.types import Plan

SHAPE = (3, 8, 8)
COUNT = 24
NAMES = ("linear", "kink", "faint")
WHOLE = Plan()


class Branch(nn.Module):
    """One 3x3 convolution added to the stream: what a refitted convolution can be exactly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return x + y


class Kinked(nn.Module):
    """A branch that is no linear map of its stream, scaled by ``scale``."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv2(F.relu(self.conv1(x)))
        return x + y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = Branch(6)
        self.kink = Kinked(6, 3.0)
        self.faint = Kinked(6, 0.05)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.faint(self.kink(self.linear(self.stem(x))))
        logits: torch.Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@pytest.fixture(scope="module")
def original() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return graph.trace(Net().eval(), SHAPE)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(COUNT))
    return ImageSet(pixels.byte(), None, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


def errors(
    original: nn.Module, images: ImageSet, dropped: Plan = WHOLE, count: int = COUNT
) -> dict[str, float]:
    names = [name for name in NAMES if name not in dropped.drop_blocks]
    found = graph.refit_errors(original, dropped, names, images, SHAPE, count)
    return dict(zip(names, found, strict=True))


def plain_distance(original: fx.GraphModule, images: ImageSet, *names: str) -> float:
    """The error of dropping blocks without any substitute."""
    return tune.distance(graph.apply(original, Plan(drop_blocks=names), SHAPE), original, images)


def test_a_block_that_is_a_convolution_of_its_stream_is_replaced_without_error(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_substitute = plain_distance(original, images, "linear")
    assert errors(original, images)["linear"] < 1e-3 * without_substitute
    # What is left of it is the ridge.
    monkeypatch.setattr("optpipe.graph.refit.RIDGE", 1e-9)
    assert errors(original, images)["linear"] < 1e-9 * without_substitute


def test_blocks_are_ordered_by_what_no_convolution_can_replace(
    original: fx.GraphModule, images: ImageSet
) -> None:
    found = errors(original, images)
    assert found["linear"] < found["faint"] < found["kink"]


def test_a_substitute_is_better_than_none(original: fx.GraphModule, images: ImageSet) -> None:
    for name, error in errors(original, images).items():
        assert 0 <= error < plain_distance(original, images, name)


def test_the_error_of_a_set_is_the_same_whichever_of_its_blocks_is_named(
    original: fx.GraphModule, images: ImageSet
) -> None:
    beside_kink = errors(original, images, Plan(drop_blocks=("kink",)))
    beside_faint = errors(original, images, Plan(drop_blocks=("faint",)))
    assert beside_kink["faint"] == pytest.approx(beside_faint["kink"], rel=1e-9)
    assert beside_kink["faint"] > errors(original, images)["faint"]


def test_dropped_blocks_are_refitted_too(original: fx.GraphModule, images: ImageSet) -> None:
    beside_linear = errors(original, images, Plan(drop_blocks=("linear",)))
    # A convolution takes the linear block's place without error, so that the other's error is left.
    assert beside_linear["kink"] == pytest.approx(errors(original, images)["kink"], rel=0.01)


def test_later_blocks_are_mapped_towards_what_the_original_has_there(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three maps after one another, found by another least squares, all of one pixel."""
    parts = graph.trace(original, SHAPE)
    with torch.no_grad():
        stream = parts.get_submodule("stem")(images.batch(slice(0, COUNT)))
        linear = stream + parts.get_submodule("linear.conv")(stream)
        kink = linear + _branch(parts, "kink", linear)
        features = kink + _branch(parts, "faint", kink)
        replaced = _mapped(stream, linear)
        then = _mapped(replaced + _branch(parts, "kink", replaced), kink)
        then = _mapped(then + _branch(parts, "faint", then), features)
        without = replaced + _branch(parts, "kink", replaced)
        without = without + _branch(parts, "faint", without)
    monkeypatch.setattr("optpipe.graph.refit.MAX_INPUTS", 54)
    found = errors(original, images)["linear"]
    assert found == pytest.approx(float(F.mse_loss(then, features)), rel=1e-3)
    assert found < 0.98 * float(F.mse_loss(without, features))


def _branch(parts: fx.GraphModule, name: str, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = parts.get_submodule(f"{name}.conv2")(F.relu(parts.get_submodule(f"{name}.conv1")(x)))
    return y


def _mapped(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The map of ``x``, one pixel at a time, that is nearest to ``y``."""
    rows = F.pad(x.permute(0, 2, 3, 1).flatten(0, 2).double(), (0, 1), value=1.0)
    fitted = rows @ torch.linalg.lstsq(rows, y.permute(0, 2, 3, 1).flatten(0, 2).double()).solution
    found: torch.Tensor = fitted.float().unflatten(0, (len(y), *y.shape[2:])).permute(0, 3, 1, 2)
    return found


def test_only_the_first_images_are_looked_at(original: fx.GraphModule, images: ImageSet) -> None:
    first = ImageSet(images.pixels[:8], None, images.names[:8], images.mean, images.std, digest=images.digest)
    assert errors(original, images, count=8) == errors(original, first, count=1000)


def test_the_batch_size_is_of_no_account(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = errors(original, images)
    monkeypatch.setattr("optpipe.graph.refit.BATCH", 7)
    cut = errors(original, images)
    assert cut == pytest.approx(whole, rel=1e-3, abs=1e-8)


def test_maps_that_see_every_third_place_are_nearly_as_good(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = errors(original, images)
    monkeypatch.setattr("optpipe.graph.refit.MAX_PLACES", COUNT * 3 * 3)
    found = errors(original, images)
    assert found != whole
    # Fewer places than the maps were fitted on: what they do elsewhere is a little worse.
    assert 1 <= found["kink"] / whole["kink"] < 2


def test_a_wide_stream_gets_a_convolution_of_one_pixel(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optpipe.graph.refit.MAX_INPUTS", 54)
    narrow = errors(original, images)
    monkeypatch.undo()
    assert narrow["linear"] > 10 * errors(original, images)["linear"]


def test_a_map_is_not_fitted_where_it_would_learn_its_places(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow_places, wide_places = 3 * 7, 3 * 55
    assert narrow_places < 64 < wide_places  # one image has 64 places
    monkeypatch.setattr("optpipe.graph.refit.MAX_INPUTS", 54)
    narrow = errors(original, images, count=1)
    monkeypatch.undo()
    assert errors(original, images, count=1) == narrow
    monkeypatch.setattr("optpipe.graph.refit.MIN_PLACES", 10)
    first = ImageSet(images.pixels[:1], None, images.names[:1], images.mean, images.std, digest=images.digest)
    for name, error in errors(original, images, count=1).items():
        assert error == pytest.approx(plain_distance(original, first, name), rel=1e-4)


def test_scoring_changes_nothing_of_the_network(original: fx.GraphModule, images: ImageSet) -> None:
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    code, state = original.code, torch.get_rng_state()
    errors(original, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert (original.code, list(before)) == (code, list(original.state_dict()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_that_does_not_exist_is_refused(original: fx.GraphModule, images: ImageSet) -> None:
    with pytest.raises(UsageError, match="no residual block is named 'lineal'; did you mean 'linear'"):
        graph.refit_errors(original, Plan(drop_blocks=("lineal",)), ["kink"], images, SHAPE, COUNT)
