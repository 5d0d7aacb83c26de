"""The gradient that particles follow, against Eqs 9 to 15 written out, and what a training remembers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributions import Normal

from optpipe import graph, tune
from optpipe.data import ImageSet
from optpipe.methods.dllp import particles as particles_module
from optpipe.methods.dllp import stein
from optpipe.methods.dllp.objective import DECAY, FALL, Settings, Stein
from optpipe.methods.dllp.particles import Particles, begin
from optpipe.methods.dllp.pressure import Kept
from optpipe.types import Tune

SHAPE = (3, 6, 6)
CLASSES = 3
COUNT = 12
RATE = 0.25
SPIKE = 20.0


class Net(nn.Module):
    """Four filters that a batch-norm follows, six that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.head = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> fx.GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return graph.trace(Net().eval(), SHAPE)


def masks_of(granularity: graph.Granularity = "filter") -> graph.Masks:
    model = network()
    return graph.Masks(model, graph.width_map(model, SHAPE), granularity)


def images() -> Tensor:
    return torch.randn(COUNT, *SHAPE, generator=seeded(2))


LABELS = torch.arange(COUNT) % CLASSES
BATCH = (1, 4, 6, 11)
OTHER = (0, 2, 3, 5)


def settings(**changes: object) -> Settings:
    given: dict[str, object] = {
        "steps": 10,
        "seed": 5,
        "images": COUNT,
        "beta": 2.0,
        "kernel": "median",
        "spike": SPIKE,
        "temperature": (1.0, 0.2),
        "aim": 1.0,
        "gate_rate": RATE,
        "scale_rate": RATE,
        "sharpen": 1.0,
    }
    return Settings(**(given | changes))  # type: ignore[arg-type]


def made(count: int, masks: graph.Masks, jitter: float = 0.3) -> Particles:
    """Particles with gates, scales and precisions of their own."""
    found = begin(
        network(),
        masks,
        count,
        start="pretrained",
        keep=0.8,
        jitter=jitter,
        seed=3,
        unit_costs=[1.0] * len(masks.names),
    )
    generator = seeded(8)
    for index in range(count):
        for value in found.hyper(index).values():
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    return found


def objective(count: int, granularity: graph.Granularity = "filter", **changes: object) -> Stein:
    masks = masks_of(granularity)
    return Stein(made(count, masks), masks, LABELS, settings(**changes))


def gradients(of: Particles) -> dict[str, Tensor | None]:
    return {name: None if one.grad is None else one.grad.clone() for name, one in of.named_parameters()}


def step(running: Stein, which: Sequence[int]) -> tuple[float, dict[str, Tensor | None]]:
    """What a step reports, and the gradient that it leaves."""
    running.of.zero_grad(set_to_none=True)
    loss = running.loss(which, images()[list(which)])
    torch.autograd.backward(loss)
    return float(loss.detach()), gradients(running.of)


# ---------------------------------------------------------------- Eqs 9 to 15, written out


def mask_by_hand(odds: Sequence[Tensor]) -> list[Tensor]:
    """A mask that is a function of the gates alone, in the place of a sampled one."""
    return [torch.sigmoid(0.5 * one) for one in odds]


def log_normal(values: Tensor, scale: Tensor) -> Tensor:
    """The log density of values that are normal with an inverse standard deviation."""
    density: Tensor = Normal(torch.zeros(()), 1 / scale).log_prob(values)  # type: ignore[no-untyped-call]
    return density.sum()


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(odds: Sequence[Tensor], *others: object) -> list[Tensor]:
        return mask_by_hand(odds)

    monkeypatch.setattr(particles_module, "sampled", sampled)


@dataclass
class ByHand:
    """A particle's parameters, its cross-entropy and log posterior, and their gradients."""

    weights: dict[str, Tensor]
    hyper: dict[str, Tensor]
    error: Tensor = field(init=False)
    task: dict[str, Tensor] = field(init=False)
    score: dict[str, Tensor] = field(init=False)

    def follow(self, which: Sequence[int], model: fx.GraphModule) -> None:
        weights, gates = self.weights, [self.hyper["gates.0"], self.hyper["gates.1"]]
        mask = mask_by_hand(gates)
        logits = self.logits(images()[list(which)], mask, model)
        labels = LABELS[list(which)]
        self.error = F.cross_entropy(logits, labels)
        # Eq. 9 of the batch's probabilities, for all images.
        distance = F.one_hot(labels, CLASSES) - torch.softmax(logits, 1)
        d = self.hyper["log_precision"].exp()
        likelihood = COUNT / len(which) * log_normal(distance, d)
        # Eq. 10, a mixture for each filter; batch-norm follows the first, whose weights are not to move.
        prior = torch.zeros(())
        for number, filters in enumerate((weights["first.weight"].detach(), weights["second.weight"])):
            theta, scale = torch.sigmoid(gates[number]), self.hyper["log_scale"][number].exp()
            for unit in range(len(filters)):
                value = mask[number][unit] * filters[unit]
                slab = theta[unit].log() + log_normal(value, scale)
                spike = (1 - theta[unit]).log() + log_normal(value, torch.tensor(SPIKE))
                prior = prior + torch.logsumexp(torch.stack([slab, spike]), 0)
        wanted = {**weights, **self.hyper}
        self.task, self.score = of(self.error, wanted), of(likelihood + prior, wanted)

    def logits(self, x: Tensor, mask: Sequence[Tensor], model: fx.GraphModule) -> Tensor:
        """The network with its channels multiplied where they are read."""
        own, norm = self.weights, model.get_submodule("norm")
        assert isinstance(norm, nn.BatchNorm2d)
        x = F.conv2d(x, own["first.weight"], padding=1)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, own["norm.weight"], own["norm.bias"])
        x = F.relu(x) * mask[0].view(-1, 1, 1)
        x = F.relu(F.conv2d(x, own["second.weight"], own["second.bias"], padding=1)) * mask[1].view(-1, 1, 1)
        return F.linear(x.mean((2, 3)), own["head.weight"], own["head.bias"])


def of(value: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(wanted.values()), retain_graph=True, allow_unused=True)
    pairs = zip(wanted.items(), cast("Sequence[Tensor | None]", found), strict=True)
    return {name: torch.zeros_like(one) if slope is None else slope for (name, one), slope in pairs}


def by_hand(running: Stein, which: Sequence[int]) -> list[ByHand]:
    found = []
    for index in range(len(running.of.networks)):
        own = copy.deepcopy(running.of)
        one = ByHand(dict(own.network(index).named_parameters()), own.hyper(index))
        one.follow(which, own.network(index))
        found.append(one)
    return found


def wanted_weights(running: Stein, hand: Sequence[ByHand]) -> dict[str, Tensor]:
    """Eq. 15 for the weights of all particles: grad L - beta / N phi."""
    share = running.settings.beta / COUNT
    own = [{name: one.score[name] for name in one.weights} for one in hand]
    places = [{name: value.detach() for name, value in one.weights.items()} for one in hand]
    towards = own if len(hand) == 1 else stein.directions(places, own, running.settings.kernel)
    return {
        f"networks.{index}.{name}": one.task[name] - share * towards[index][name]
        for index, one in enumerate(hand)
        for name in one.weights
    }


def hyper_name(index: int, name: str) -> str:
    return f"gates.{index}.{name.removeprefix('gates.')}" if "gates" in name else f"{name}.{index}"


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_the_gradient_in_every_weight_is_equation_15(count: int, beta: float) -> None:
    running = objective(count, beta=beta)
    hand = by_hand(running, BATCH)
    loss, found = step(running, BATCH)
    assert loss == pytest.approx(sum(float(one.error.detach()) for one in hand) / count, rel=1e-5)
    wanted = wanted_weights(running, hand)
    assert set(wanted) == {name for name in found if name.startswith("networks.")}
    for name, gradient in wanted.items():
        assert found[name] is not None
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("no_noise")
@pytest.mark.parametrize("kernel", ["whole", "each", "paper"])
def test_the_gradient_is_equation_15_for_every_kernel(kernel: stein.Kernel) -> None:
    running = objective(2, kernel=kernel)
    wanted = wanted_weights(running, by_hand(running, BATCH))
    _, found = step(running, BATCH)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("no_noise")
def test_gates_scales_and_precision_move_by_their_gradient_over_its_running_size() -> None:
    running = objective(2)
    share = running.settings.beta / COUNT
    first, second = by_hand(running, BATCH), by_hand(running, OTHER)
    _, found = step(running, BATCH)
    _, then = step(running, OTHER)
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        for name in one.hyper:
            key = hyper_name(index, name)
            before = one.task[name] - share * one.score[name]
            after = other.task[name] - share * other.score[name]
            size = (DECAY * before.square() + (1 - DECAY) * after.square()).sqrt()
            torch.testing.assert_close(found[key], RATE * before.sign(), rtol=1e-4, atol=1e-4, msg=key)
            torch.testing.assert_close(then[key], RATE * after / size, rtol=2e-3, atol=2e-3, msg=key)


@pytest.mark.usefixtures("no_noise")
def test_without_beta_scales_and_precision_rest_and_the_task_alone_moves_gates() -> None:
    running = objective(2, beta=0.0)
    (one, _), (_, found) = by_hand(running, BATCH), step(running, BATCH)
    for index in range(2):
        for name in ("log_scale", "log_precision"):
            gradient = found[f"{name}.{index}"]
            assert gradient is not None and not gradient.any()
    torch.testing.assert_close(found["gates.0.1"], RATE * one.task["gates.1"].sign())


@pytest.mark.usefixtures("no_noise")
def test_the_prior_leaves_weights_alone_that_batch_norm_follows() -> None:
    """Weights are where the likelihood's score and the task are zero: the prior alone could move them."""
    running = objective(1, beta=1e4)
    assert running.masks.blind == (True, False)
    for name, weight in running.of.network(0).named_parameters():
        if name.startswith("head"):
            weight.data.zero_()  # nothing behind the filters reaches the logits
    _, found = step(running, BATCH)
    blind, seen = found["networks.0.first.weight"], found["networks.0.second.weight"]
    assert blind is not None and seen is not None
    assert not blind.any()
    assert float(seen.abs().min()) > 0
    assert all(found[f"gates.0.{number}"] is not None for number in range(2))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("granularity", ["filter", "weight", "2:4"])
def test_masks_are_those_of_their_seed_step_and_particle_whatever_came_before(
    granularity: graph.Granularity,
) -> None:
    one, other = objective(2, granularity), objective(2, granularity)
    step(one, OTHER)  # draws masks, and moves nothing
    other.restore(one.state() | {"step": torch.tensor(1)})
    loss, found = step(one, BATCH)
    again, same = step(other, BATCH)
    assert (one.step, other.step) == (2, 2)
    assert loss == again
    for name, gradient in found.items():
        assert gradient is not None
        assert torch.equal(gradient, cast("Tensor", same[name])), name
    # Another step and another seed draw others.
    assert step(objective(2, granularity), BATCH)[0] != loss
    assert step(objective(2, granularity, seed=6), BATCH)[0] != step(objective(2, granularity), BATCH)[0]


def test_particles_in_one_place_are_masked_differently() -> None:
    running = objective(2, beta=0.0)
    running.of.network(1).load_state_dict(running.of.network(0).state_dict())
    for gate, twin in zip(running.of.gates_of(1), running.of.gates_of(0), strict=True):
        gate.data.copy_(twin.data)
    _, found = step(running, BATCH)
    one, other = found["networks.0.head.weight"], found["networks.1.head.weight"]
    assert one is not None and other is not None and not torch.allclose(one, other)


def test_fixed_masks_leave_gates_and_masked_weights_as_they_are() -> None:
    running = objective(2, beta=0.0)
    kept = [torch.tensor([1, 0, 1, 1]).bool(), torch.tensor([0, 1, 1, 0, 1, 1]).bool()]
    running.fixed = [kept, [~mask for mask in kept]]
    _, found = step(running, BATCH)
    assert all(found[f"gates.{index}.{number}"] is None for index in range(2) for number in range(2))
    for index, masks in enumerate(running.fixed):
        for path, mask in zip(("first", "second"), masks, strict=True):
            gradient = found[f"networks.{index}.{path}.weight"]
            assert gradient is not None
            moving = gradient.flatten(1).abs().sum(1) > 0
            assert torch.equal(moving & ~mask, torch.zeros_like(mask))
            assert bool(moving.any())


def test_a_masked_single_weight_gets_no_gradient_from_the_task() -> None:
    running = objective(1, "weight", beta=0.0)
    kept = [torch.rand(shape, generator=seeded(1)) > 0.4 for shape in running.masks.shapes]
    running.fixed = [kept]
    _, found = step(running, BATCH)
    for path, mask in zip(running.masks.names, kept, strict=True):
        gradient = found[f"networks.0.{path}.weight"]
        assert gradient is not None and not gradient[~mask].any() and bool(gradient[mask].any())


# ---------------------------------------------------------------- the budget's schedule


def test_the_expected_cost_follows_the_schedule_of_the_budget() -> None:
    masks = masks_of()
    total = sum(shape.numel() for shape in masks.shapes)
    running = Stein(made(2, masks), masks, LABELS, settings(aim=0.4, steps=20), Kept(total))

    def expected(index: int) -> float:
        odds = torch.cat([one.detach().flatten() for one in running.of.logits_of(index)])
        return float(torch.sigmoid(odds.double()).sum()) / total

    free = [expected(index) for index in range(2)]
    assert running.of.mu.tolist() == [0, 0]
    found = []
    for number in range(20):
        step(running, BATCH)
        allowed = 1 - min(1, number / (FALL * 20)) * 0.6
        for index in range(2):
            assert expected(index) == pytest.approx(min(allowed, free[index]), abs=1e-4)
        found.append(running.of.mu.tolist())
    for one in zip(*found, strict=True):
        assert list(one) == sorted(one)
    # Gates alone would say the same: what presses is mu, which each particle has of its own.
    assert found[-1][0] != found[-1][1] and min(found[-1]) > 0


def test_units_that_the_evidence_leaves_without_hope_stay_as_far_as_the_budget_allows() -> None:
    masks = masks_of()
    total = sum(shape.numel() for shape in masks.shapes)
    running = Stein(made(1, masks), masks, LABELS, settings(aim=0.6, steps=20), Kept(total), step=19)
    with torch.no_grad():
        for gate in running.of.gates_of(0):
            gate.sub_(20)
    step(running, BATCH)
    assert float(torch.cat(running.of.probabilities(0, "filter")).mean()) == pytest.approx(0.6, abs=1e-4)
    assert float(running.of.mu[0]) < 0


def test_log_odds_sharpen_and_the_expected_cost_stays_what_is_allowed() -> None:
    masks = masks_of()
    total = sum(shape.numel() for shape in masks.shapes)
    running = Stein(made(1, masks), masks, LABELS, settings(aim=0.4, steps=20, sharpen=8.0), Kept(total))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in running.of.gates_of(0):
            gate.add_(torch.randn(gate.shape, generator=generator))
    found = {}
    for number in range(20):
        step(running, BATCH)
        found[number] = torch.cat(running.of.probabilities(0, "filter"))
    before, after = found[15], found[19]
    assert float(running.of.sharpness) == pytest.approx(8.0)
    assert float(after.mean()) == pytest.approx(0.4, abs=1e-4)
    # At one cost, nearer to certain: less is between.
    assert float((after * (1 - after)).sum()) < float((before * (1 - before)).sum())


def test_units_keep_their_order_where_sharpened_theta_is_zero_to_the_last_bit() -> None:
    masks = masks_of()
    of = made(1, masks)
    with torch.no_grad():
        for gate in of.gates_of(0):
            gate.copy_(-30 - torch.arange(gate.numel(), dtype=torch.float32))
    of.sharpness.fill_(8.0)
    assert not any(values.any() for values in of.probabilities(0, "filter"))
    for values, shape in zip(of.ranks(0, "filter"), masks.shapes, strict=True):
        assert values.argsort(descending=True).tolist() == list(range(shape.numel()))


def test_units_that_cost_more_are_pressed_harder() -> None:
    masks = masks_of()
    of = begin(network(), masks, 1, start="pretrained", keep=0.9, jitter=0.0, seed=0, unit_costs=[2.0, 0.0])
    running = Stein(of, masks, LABELS, settings(aim=0.5), Kept(10), step=10)
    step(running, BATCH)
    dear, free = of.probabilities(0, "filter")
    assert torch.allclose(free, torch.full((6,), 0.9))
    # Six at 0.9 leave five of ten no room: the four that can go do.
    assert float(dear.max()) < 1e-6


# ---------------------------------------------------------------- stopped and resumed


@dataclass
class Memory:
    """A checkpoint that is kept in memory, and stops a training when it is first written."""

    stop: bool = False
    every: int = 4
    held: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.held

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.held = {name: value.clone() for name, value in state.items()}
        if self.stop:
            raise KeyboardInterrupt


def pictures() -> ImageSet:
    pixels = torch.randint(0, 256, (COUNT, *SHAPE), generator=seeded(2)).byte()
    return ImageSet(pixels, LABELS, tuple(map(str, range(COUNT))), (0.5,) * 3, (0.25,) * 3, digest="d")


@pytest.mark.parametrize("fixed", [False, True])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(fixed: bool) -> None:
    tuning = Tune(steps=7, batch=5, lr=0.05, schedule="cosine", weight_decay=0.0, augment="none")

    def make() -> Stein:
        masks = masks_of()
        found = Stein(made(2, masks), masks, LABELS, settings(aim=0.6, steps=7), Kept(10))
        if fixed:
            found.fixed = [
                masks.above([torch.rand(4, generator=seeded(1)), torch.rand(6, generator=seeded(1))], 0.5)
            ] * 2
        return found

    def trained(checkpoint: Memory) -> dict[str, Tensor]:
        running = make()
        tune.fit(running.of, running, pictures(), tuning, seed=5, checkpoint=checkpoint)
        return running.of.state_dict()

    whole, memory = trained(Memory()), Memory(stop=True)
    with pytest.raises(KeyboardInterrupt):
        trained(memory)
    assert memory.held is not None and int(memory.held["objective.step"]) == 4
    memory.stop = False
    resumed, start = trained(memory), make().of.state_dict()
    assert set(resumed) == set(whole)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    moved = {name.split(".")[0] for name, value in whole.items() if not torch.equal(start[name], value)}
    assert moved == {"networks", "log_scale", "log_precision"} | (set() if fixed else {"gates", "mu"})
