"""Training on what the original says: its answers, and features that go through each other's classifier."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe import graph, tune
from optpipe.data import ImageSet
from optpipe.errors import RunError, UsageError
from optpipe.types import Plan, Tune

SHAPE = (3, 8, 8)
COUNT = 16
DROPPED = Plan(drop_blocks=("second",))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.first, self.second = Block(width), Block(width)
        self.wide = nn.Conv2d(width, 8, 3, 2, 1)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.wide(self.second(self.first(F.relu(self.stem(x))))))
        logits: torch.Tensor = self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@pytest.fixture(scope="module")
def original() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Net()
        network.classifier.weight.data *= 8  # answers that differ between images
        return graph.trace(network, SHAPE)


@pytest.fixture
def student(original: fx.GraphModule) -> fx.GraphModule:
    return graph.apply(original, DROPPED, SHAPE)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Without labels: none is needed."""
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(COUNT))
    return ImageSet(pixels.byte(), None, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


KD = Tune(steps=9, batch=6, lr=0.05, loss="kd", temperature=2.0, augment="none", weight_decay=0.0)
CROSS = replace(KD, loss="cross")
BOTH = pytest.mark.parametrize("settings", [KD, CROSS], ids=["kd", "cross"])
TRAINABLE = pytest.mark.parametrize("trainable", ["backbone", "all"])


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> float:
    """T² KL(teacher || student), the mean over images, in double precision and by its definition."""
    total = 0.0
    for wanted, own in zip(teacher.double(), student.double(), strict=True):
        p, q = (wanted / temperature).softmax(0), (own / temperature).softmax(0)
        total += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(teacher)


def changed_classifier(student: fx.GraphModule) -> fx.GraphModule:
    """The student with another classifier than the original's."""
    layer = student.get_submodule("classifier")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(7)))
    return student


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def moved(before: Mapping[str, torch.Tensor], network: nn.Module) -> set[str]:
    after = network.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


# ---------------------------------------------------------------- what is minimised


def test_distillation_is_the_divergence_from_the_originals_answers_on_the_same_views(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet
) -> None:
    chosen = tune.batch_indices(COUNT, 6, 3, 0)
    batch = images.batch(chosen)
    with torch.no_grad():
        expected = divergence(original(batch), student(batch), 2.0)
    settings = replace(KD, steps=1, batch_norm="eval")
    assert expected > 0.01
    assert tune.train(student, original, images, settings, seed=3).loss_first == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("stage_weight", [0.0, 0.5])
def test_cross_distillation_adds_own_and_crossed_divergences_to_the_error_of_the_features(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet, stage_weight: float
) -> None:
    changed_classifier(student)
    batch = images.batch(tune.batch_indices(COUNT, 6, 3, 0))
    kept: dict[str, list[torch.Tensor]] = {"student": [], "original": []}
    with torch.no_grad():
        for name, network in (("student", student), ("original", original)):
            backbone = graph.split(network)[0]
            stream = network.get_submodule("wide").register_forward_pre_hook(
                lambda _, inputs, name=name: kept[name].append(inputs[0])
            )
            kept[name].insert(0, backbone(batch))
            stream.remove()
        own, wanted = kept["student"][0], kept["original"][0]
        classifier = graph.split(student)[1]
        answer = original(batch)
        expected = float((own - wanted).double().square().mean())
        expected += stage_weight * float((kept["student"][1] - kept["original"][1]).square().mean())
        expected += divergence(answer, classifier(wanted), 2.0) + divergence(answer, student(batch), 2.0)
    settings = replace(CROSS, steps=1, batch_norm="eval", stage_weight=stage_weight)
    found = tune.train(student, original, images, settings, seed=3).loss_first
    assert found == pytest.approx(expected, rel=1e-4)


def test_under_the_originals_classifier_nothing_is_crossed_and_features_and_answers_remain(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet
) -> None:
    batch = images.batch(tune.batch_indices(COUNT, 6, 3, 0))
    with torch.no_grad():
        own, wanted = (graph.split(network)[0](batch) for network in (student, original))
        expected = float((own - wanted).square().mean()) + divergence(original(batch), student(batch), 2.0)
    settings = replace(CROSS, steps=1, batch_norm="eval")
    found = tune.train(student, original, images, settings, seed=3).loss_first
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_free_classifier_learns_from_both_networks_features(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet
) -> None:
    """After one step of plain descent it stands where the two divergences alone send it."""
    settings = replace(CROSS, steps=1, momentum=0.0, trainable="all", batch_norm="eval")
    before = copy.deepcopy(changed_classifier(student))
    batch = images.batch(tune.batch_indices(COUNT, 6, 3, 0))
    backbone, classifier = graph.split(before)
    with torch.no_grad():
        target = (original(batch) / 2).softmax(1)
        seen = [graph.split(original)[0](batch), backbone(batch)]
    weight = before.get_submodule("classifier").get_parameter("weight")
    slopes = [
        torch.autograd.grad(
            4 * F.kl_div((classifier(features) / 2).log_softmax(1), target, reduction="batchmean"), weight
        )[0]
        for features in seen
    ]
    tune.train(student, original, images, settings, seed=3)
    after = student.get_submodule("classifier").get_parameter("weight")
    assert min(float(slope.abs().max()) for slope in slopes) > 1e-3
    assert torch.allclose(after, weight - 0.05 * (slopes[0] + slopes[1]), atol=1e-6)


# ---------------------------------------------------------------- what it does


@BOTH
@TRAINABLE
def test_the_student_comes_nearer_to_the_original_and_trains_no_more_than_it_may(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet, settings: Tune, trainable: str
) -> None:
    settings = replace(settings, steps=60, trainable=trainable)  # type: ignore[arg-type]
    before, theirs = weights(student), weights(original)
    wanted = tune.logits(original, images)

    def error() -> float:
        return divergence(wanted, tune.logits(student, images), 1.0)

    at_first = error()
    tune.train(student, original, images, settings, seed=0)
    assert error() < 0.5 * at_first
    still = set(before) - moved(before, student)
    assert {name for name in still if not name.endswith("num_batches_tracked")} == (
        set() if trainable == "all" else {"classifier.weight", "classifier.bias"}
    )
    assert moved(theirs, original) == set()
    assert all(parameter.grad is None for parameter in original.parameters())


class KilledError(Exception):
    pass


@dataclass
class Memory:
    """A checkpoint in memory that kills the training after its first save."""

    every: int = 4
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def load(self) -> dict[str, torch.Tensor] | None:
        return self.states[-1] if self.states else None

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in state.items()})
        if len(self.states) == 1:
            raise KilledError


@BOTH
@TRAINABLE
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet, settings: Tune, trainable: str
) -> None:
    settings = replace(settings, trainable=trainable, augment="shift_cutmix")  # type: ignore[arg-type]
    resumed, memory = copy.deepcopy(student), Memory()
    expected = tune.train(student, original, images, settings, seed=5)
    with pytest.raises(KilledError):
        tune.train(copy.deepcopy(resumed), original, images, settings, seed=5, checkpoint=memory)
    assert tune.train(resumed, original, images, settings, seed=5, checkpoint=memory) == expected
    assert moved(weights(student), resumed) == set()


@BOTH
def test_half_precision_computes_the_loss_in_float32(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet, settings: Tune
) -> None:
    half = copy.deepcopy(student)
    settings = replace(settings, trainable="all")
    whole = tune.train(student, original, images, settings, seed=0)
    found = tune.train(half, original, images, replace(settings, autocast="bf16"), seed=0)
    assert found.loss_first == pytest.approx(whole.loss_first, rel=0.05)
    assert found.loss_first != whole.loss_first
    # The classifier learned in half precision too.
    assert torch.allclose(
        half.get_submodule("classifier").get_parameter("weight"),
        student.get_submodule("classifier").get_parameter("weight"),
        atol=0.05,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@BOTH
@TRAINABLE
def test_on_a_gpu_both_networks_come_back_and_the_loss_is_that_of_the_processor(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet, settings: Tune, trainable: str
) -> None:
    settings = replace(settings, trainable=trainable)  # type: ignore[arg-type]
    found = []
    for device in ("cpu", "cuda"):
        network = copy.deepcopy(student)
        found.append(tune.train(network, original, images, settings, seed=0, device=device))
        tensors = (*weights(network).values(), *weights(original).values())
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert found[1].loss_first == pytest.approx(found[0].loss_first, rel=1e-2)
    assert found[1].loss_last == pytest.approx(found[0].loss_last, rel=0.1)


# ---------------------------------------------------------------- what cannot be trained


@BOTH
def test_the_original_must_be_there(student: fx.GraphModule, images: ImageSet, settings: Tune) -> None:
    line = f'loss = "{settings.loss}" compares with the original network: none was given'
    with pytest.raises(UsageError, match=line):
        tune.train(student, None, images, settings, seed=0)


@pytest.mark.parametrize("loss", ["mimic", "cross"])
def test_features_of_another_shape_are_refused_and_what_compares_none_is_named(
    original: fx.GraphModule, images: ImageSet, loss: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = Net()
        other.wide, other.classifier = nn.Conv2d(6, 5, 3, 2, 1), nn.Linear(5, 4)
    settings = replace(KD, loss=loss)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as error:
        tune.train(graph.trace(other, SHAPE), original, images, settings, seed=0)
    assert str(error.value) == (
        f'[recover] loss = "{loss}" compares feature maps of one shape: the student has (5, 4, 4), the '
        'original (8, 4, 4); use loss = "kd" or "labels"'
    )
    assert tune.train(graph.trace(other, SHAPE), original, images, KD, seed=0).loss_last > 0


@BOTH
def test_a_diverging_training_says_so(
    original: fx.GraphModule, student: fx.GraphModule, images: ImageSet, settings: Tune
) -> None:
    with pytest.raises(RunError, match=r"diverged at step \d+ of 200: the loss is (nan|inf)"):
        tune.train(student, original, images, replace(settings, steps=200, lr=1e12), seed=0)
