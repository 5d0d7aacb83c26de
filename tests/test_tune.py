"""The training loop on a small residual network: what it moves, that it learns, and that it resumes."""

from __future__ import annotations

import copy
import math
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from optpipe import graph, interruption, store, tune
from optpipe.data import ImageSet
from optpipe.errors import MissingError, RunError
from optpipe.tune import evaluation
from optpipe.types import Event, Plan, Tune

SHAPE = (3, 16, 16)
DROPPED = Plan(drop_blocks=("early.1",))


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        stride = 1 if inside == outside else 2
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class Net(nn.Module):
    """Two stages with dropout and a batch-norm in the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.early = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8))
        self.late = nn.Sequential(Block(8, 16), nn.Dropout(0.5), Block(16, 16))
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.late(self.early(F.relu(self.stem(x))))
        logits: torch.Tensor = self.classifier(self.norm(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))
        return logits


@pytest.fixture(scope="module")
def original() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return graph.trace(Net(), SHAPE)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pixels = torch.randint(0, 256, (21, *SHAPE), generator=torch.Generator().manual_seed(1))
    names = tuple(str(number) for number in range(21))
    return ImageSet(pixels.byte(), None, names, (0.5,) * 3, (0.25,) * 3, digest="d" * 64)


def candidate(original: fx.GraphModule, settings: Tune) -> fx.GraphModule:
    make = graph.with_adaptors if settings.trainable == "adaptors" else graph.apply
    return make(original, DROPPED, SHAPE)


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def changed(before: Mapping[str, torch.Tensor], network: nn.Module) -> set[str]:
    after = network.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


class KilledError(Exception):
    pass


@dataclass
class Memory:
    """A checkpoint in memory that kills the training after so many saves."""

    every: int
    kill_after: int | None = None
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def load(self) -> dict[str, torch.Tensor] | None:
        return self.states[-1] if self.states else None

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        self.states.append({name: tensor.detach().clone() for name, tensor in state.items()})
        if self.kill_after is not None and len(self.states) >= self.kill_after:
            raise KilledError


SGD = Tune(steps=11, batch=8)
EVERY_KIND = {
    "sgd": SGD,
    "nesterov, warm-up, cosine": replace(SGD, nesterov=True, warmup=0.3, schedule="cosine", lr=0.1),
    "adamw, stages": replace(SGD, optimizer="adamw", lr=1e-3, stage_weight=1.0, augment="shift_cutmix"),
    "frozen batch-norm": replace(SGD, batch_norm="eval", augment="none"),
    "adaptors": replace(SGD, trainable="adaptors", batch_norm="eval"),
    "no momentum": replace(SGD, momentum=0.0),
    "bfloat16": replace(SGD, autocast="bf16"),
}


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("every", [1, 4])
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(
    original: fx.GraphModule, images: ImageSet, kind: str, every: int
) -> None:
    settings = EVERY_KIND[kind]
    whole = candidate(original, settings)
    expected = tune.train(whole, original, images, settings, seed=5)

    memory = Memory(every, kill_after=2)
    with pytest.raises(KilledError):
        tune.train(candidate(original, settings), original, images, settings, seed=5, checkpoint=memory)
    memory.kill_after = None
    resumed = candidate(original, settings)
    result = tune.train(resumed, original, images, settings, seed=5, checkpoint=memory)

    assert changed(weights(whole), resumed) == set()
    assert result == expected


@pytest.mark.parametrize("kind", ["sgd", "adamw, stages"])
def test_a_killed_training_goes_on_from_a_file(
    original: fx.GraphModule, images: ImageSet, tmp_path: Path, kind: str
) -> None:
    settings = EVERY_KIND[kind]
    disk = store.DiskCheckpoint(tmp_path / "checkpoint.safetensors", every=4)
    whole = candidate(original, settings)
    tune.train(whole, original, images, settings, seed=5)

    killed: list[Event] = []

    def kill_at_the_end(event: Event) -> None:
        killed.append(event)
        if event.done == settings.steps:
            raise KilledError

    with pytest.raises(KilledError):
        tune.train(
            candidate(original, settings),
            original,
            images,
            settings,
            seed=5,
            checkpoint=disk,
            emit=kill_at_the_end,
        )
    saved = disk.load()
    assert saved is not None
    assert int(saved["step"]) == 8
    resumed = candidate(original, settings)
    tune.train(resumed, original, images, settings, seed=5, checkpoint=disk)
    assert changed(weights(whole), resumed) == set()


def test_an_interrupted_training_keeps_the_step_that_it_was_at(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of the sixth step of eleven, with checkpoints at every hundredth."""
    monkeypatch.setattr(interruption, "GRACE_S", 300.0)
    settings = EVERY_KIND["sgd"]
    whole = candidate(original, settings)
    expected = tune.train(whole, original, images, settings, seed=5)

    memory = Memory(every=100)
    batch_indices = tune.batch_indices

    def interrupted(size: int, batch: int, seed: int, step: int) -> list[int]:
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return batch_indices(size, batch, seed, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), interruption.Watch(str):
        patch.setattr(tune, "batch_indices", interrupted)
        tune.train(candidate(original, settings), original, images, settings, seed=5, checkpoint=memory)
    assert [int(state["step"]) for state in memory.states] == [6]
    resumed = candidate(original, settings)
    assert tune.train(resumed, original, images, settings, seed=5, checkpoint=memory) == expected
    assert changed(weights(whole), resumed) == set()


def test_the_same_seed_trains_the_same_network_whatever_the_global_random_state(
    original: fx.GraphModule, images: ImageSet
) -> None:
    trained = []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        network = candidate(original, SGD)
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            tune.train(network, original, images, SGD, seed=seed)
            assert torch.equal(before, torch.get_rng_state())
        trained.append(weights(network))
    assert changed(trained[0], _holder(trained[1])) == set()
    assert changed(trained[0], _holder(trained[2])) != set()


def _holder(state: dict[str, torch.Tensor]) -> nn.Module:
    class Holder(nn.Module):
        def state_dict(self, *_: object, **__: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return state

    return Holder()


def test_the_backbone_is_trained_and_the_classifier_is_not(
    original: fx.GraphModule, images: ImageSet
) -> None:
    network = candidate(original, SGD)
    before = weights(network)
    tune.train(network, original, images, SGD, seed=0)
    moved = changed(before, network)
    assert {name for name in before if name.startswith(("norm.", "classifier."))} & moved == set()
    assert moved == {name for name in before if not name.startswith(("norm.", "classifier."))}


def test_batch_norm_in_eval_mode_keeps_its_statistics(original: fx.GraphModule, images: ImageSet) -> None:
    settings = replace(SGD, batch_norm="eval")
    network = candidate(original, settings)
    before = weights(network)
    tune.train(network, original, images, settings, seed=0)
    moved = changed(before, network)
    assert not any("running" in name or "batches" in name for name in moved)
    assert "early.0.bn1.weight" in moved


def test_only_adaptors_are_trained_when_asked(original: fx.GraphModule, images: ImageSet) -> None:
    settings = replace(SGD, trainable="adaptors", batch_norm="eval")
    network = candidate(original, settings)
    before = weights(network)
    tune.train(network, original, images, settings, seed=0)
    expected = {f"{path}.weight" for path in graph.adaptors(network)}
    assert expected
    assert changed(before, network) == expected


def test_the_original_is_left_as_it_was(original: fx.GraphModule, images: ImageSet) -> None:
    teacher = copy.deepcopy(original)
    before = weights(teacher)
    modes = [module.training for module in teacher.modules()]
    tune.train(candidate(teacher, SGD), teacher, images, SGD, seed=0)
    tune.distance(candidate(teacher, SGD), teacher, images)
    assert changed(before, teacher) == set()
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_trained_network_is_in_eval_mode(original: fx.GraphModule, images: ImageSet) -> None:
    network = candidate(original, SGD)
    tune.train(network, original, images, SGD, seed=0)
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize(("trainable", "share"), [("backbone", 0.6), ("adaptors", 0.9)])
def test_training_brings_the_features_nearer_to_the_originals(
    original: fx.GraphModule, images: ImageSet, trainable: str, share: float
) -> None:
    settings = replace(SGD, steps=60, batch_norm="eval", augment="none", lr=0.1)
    settings = replace(settings, trainable=trainable)  # type: ignore[arg-type]
    network = candidate(original, settings)
    before = tune.distance(network, original, images)
    result = tune.train(network, original, images, settings, seed=0)
    assert result.loss_last < result.loss_first
    assert tune.distance(network, original, images) < share * before


def test_the_first_loss_is_that_of_the_first_batch(original: fx.GraphModule, images: ImageSet) -> None:
    settings = replace(SGD, steps=1, augment="none", batch_norm="eval")
    network = candidate(original, settings)
    chosen = images.batch(tune.batch_indices(len(images), settings.batch, 7, 0))
    with torch.no_grad():
        own, wanted = (graph.split(one)[0](chosen) for one in (network, original))
    result = tune.train(network, original, images, settings, seed=7)
    assert result.loss_first == pytest.approx((own - wanted).square().mean().item(), rel=1e-4)


def test_distance_is_the_mean_square_over_all_images(original: fx.GraphModule, images: ImageSet) -> None:
    network = candidate(original, SGD)
    everything = images.batch(slice(0, len(images)))
    with torch.no_grad():
        difference = graph.split(network)[0](everything) - graph.split(original)[0](everything)
    expected = difference.double().square().mean().item()
    assert tune.distance(network, original, images) == pytest.approx(expected, rel=1e-5)


def test_distance_does_not_depend_on_how_the_set_is_cut(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = candidate(original, SGD)
    whole = tune.distance(network, original, images)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 4)
    assert tune.distance(network, original, images) == pytest.approx(whole, rel=1e-6)


def test_the_original_is_at_distance_zero_from_itself(original: fx.GraphModule, images: ImageSet) -> None:
    assert tune.distance(copy.deepcopy(original), original, images) == 0.0


def test_logits_are_those_of_the_network_for_every_image_in_order(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 8)
    with torch.no_grad():
        expected = original(images.batch(slice(0, len(images))))
    assert torch.allclose(tune.logits(original, images), expected, atol=1e-5)


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order() -> None:
    seen = [index for step in range(42) for index in tune.batch_indices(21, 8, 0, step)]
    epochs = [seen[start : start + 21] for start in range(0, 16 * 21, 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 16


def test_the_images_of_a_step_follow_from_seed_and_step_alone() -> None:
    later = tune.batch_indices(21, 8, 3, 17)
    assert tune.batch_indices(21, 8, 3, 17) == later
    assert all(tune.batch_indices(21, 8, seed, step) != later for seed, step in ((4, 17), (3, 18)))


def test_a_batch_is_at_most_the_whole_set() -> None:
    assert sorted(tune.batch_indices(21, 64, 0, 3)) == list(range(21))


def test_the_step_schedule_divides_the_rate_by_ten_after_each_forty_percent() -> None:
    settings = Tune(steps=10)
    assert [tune.rate(step, settings) for step in range(10)] == pytest.approx(
        [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]
    )


def test_the_step_schedule_rises_over_its_warm_up() -> None:
    settings = Tune(steps=20, warmup=0.2)
    rates = [tune.rate(step, settings) for step in (0, 1, 2, 3, 4, 7, 8, 15, 16)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01])


def test_the_cosine_schedule_falls_from_one_towards_zero_after_its_warm_up() -> None:
    settings = Tune(steps=8, schedule="cosine", warmup=0.25)
    assert tune.rate(0, settings) == pytest.approx(0.5)
    assert tune.rate(1, settings) == pytest.approx(0.5 * (1 + math.cos(math.pi / 8)))
    assert tune.rate(4, settings) == pytest.approx(0.5)
    assert 0 < tune.rate(7, settings) < 0.05


def test_a_diverging_training_says_at_which_step_and_how_to_mend_it(
    original: fx.GraphModule, images: ImageSet
) -> None:
    settings = replace(SGD, steps=200, lr=1e6, batch_norm="eval")
    with pytest.raises(RunError, match=r"diverged at step \d+ of 200: the loss is (nan|inf), .* lower .*lr"):
        tune.train(candidate(original, settings), original, images, settings, seed=0)


def test_the_first_loss_that_is_no_number_is_named_with_its_step_and_rate(
    original: fx.GraphModule, images: ImageSet
) -> None:
    network = candidate(original, SGD)
    with torch.no_grad():
        next(iter(network.parameters())).fill_(math.nan)
    expected = (
        "training diverged at step 0 of 11: the loss is nan, it was nan before; lower lr = 0.02, in [recover]"
    )
    with pytest.raises(RunError, match=re.escape(expected)):
        tune.train(network, original, images, SGD, seed=0)


def test_adaptors_of_a_candidate_that_has_none_cannot_be_trained(
    original: fx.GraphModule, images: ImageSet
) -> None:
    settings = replace(SGD, trainable="adaptors")
    with pytest.raises(RunError, match="nothing to train: the candidate has no adaptors"):
        tune.train(graph.apply(original, DROPPED, SHAPE), original, images, settings, seed=0)


def test_dropout_stays_off_in_training(
    original: fx.GraphModule, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[bool] = []
    forward = nn.Dropout.forward

    def watched(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        modes.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(nn.Dropout, "forward", watched)
    tune.train(candidate(original, SGD), original, images, SGD, seed=0)
    assert modes
    assert not any(modes)


@pytest.mark.parametrize(
    ("target", "there", "device"), [("cuda", True, "cuda"), ("cuda", False, "cpu"), ("cpu", True, "cpu")]
)
def test_training_goes_where_the_target_is_if_torch_can(
    monkeypatch: pytest.MonkeyPatch, target: str, there: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert tune.training_device(target) == device


@pytest.mark.parametrize(
    ("target", "trainer", "device"),
    [("cpu", "cuda", "cuda"), ("cuda", "cpu", "cpu"), ("cpu", "cpu", "cpu"), ("cuda", "target", "cuda")],
)
def test_another_device_than_the_targets_may_train(
    monkeypatch: pytest.MonkeyPatch, target: str, trainer: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tune.training_device(target, trainer) == device


def test_a_gpu_that_is_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match=r'\[run\] trainer = "cuda": torch finds no GPU'):
        tune.training_device("cpu", "cuda")


@pytest.mark.parametrize(("native", "found"), [(True, "bf16"), (False, "off")])
def test_auto_is_bfloat16_where_the_gpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert tune.on_this_machine(Tune(steps=1, autocast="auto"), "cuda").autocast == found
    assert tune.on_this_machine(Tune(steps=1, autocast="off"), "cuda").autocast == "off"


def test_a_gpu_that_is_elsewhere_is_taken_to_compute_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.on_this_machine(Tune(steps=1, autocast="auto"), "cuda").autocast == "bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["sgd", "adamw, stages", "bfloat16"])
def test_training_on_a_gpu_brings_both_networks_back_as_near_as_on_the_processor(
    original: fx.GraphModule, images: ImageSet, kind: str
) -> None:
    settings = EVERY_KIND[kind]
    distances = []
    for device in ("cpu", "cuda"):
        network = candidate(original, settings)
        tune.train(network, original, images, settings, seed=0, device=device)
        assert {
            tensor.device.type for tensor in (*weights(network).values(), *weights(original).values())
        } == {"cpu"}
        distances.append(tune.distance(network, original, images, device))
    assert distances[1] == pytest.approx(distances[0], rel=0.2)


def test_progress_ends_with_the_last_step(original: fx.GraphModule, images: ImageSet) -> None:
    events: list[Event] = []
    tune.train(candidate(original, SGD), original, images, SGD, seed=0, emit=events.append)
    assert {event.kind for event in events} == {"progress"}
    assert (events[-1].done, events[-1].total) == (11, 11)
