"""Eigenvalues against known Hessians, and the loss around a network's weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpipe import landscape
from optpipe.errors import RunError, UsageError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_and_labels(count: int = 12, classes: int = 3, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = seeded(7)
    images = torch.randn(count, 2, size, size, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def small_network(seed: int = 0, classes: int = 3) -> nn.Sequential:
    """Convolution, batch-norm with stored statistics of its own, a bend, and a classifier."""
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, classes),
    )
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        norm = network[1]
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean = torch.randn(4, generator=generator)
        norm.running_var = torch.rand(4, generator=generator) + 0.5
    return network.train()


class Linear(nn.Module):
    """Softmax regression without bias, in double precision."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self.weight)


def entropy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(network(images), labels))


def softmax_hessian(weight: Tensor, x: Tensor) -> Tensor:
    """The mean over images of (diag(p) - p p^T) kron (x x^T), in the order of the rows of ``weight``."""
    shares = (x @ weight.T).softmax(1)
    terms = [
        torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(v, v))
        for p, v in zip(shares, x, strict=True)
    ]
    return torch.stack(terms).mean(0)


def softmax_regression() -> tuple[Linear, Tensor, Tensor]:
    generator = seeded(3)
    network = Linear(4, 3)
    with torch.no_grad():
        network.weight.copy_(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    images = torch.randn(9, 1, 2, 2, generator=generator, dtype=torch.float64)
    return network, images, torch.randint(3, (9,), generator=generator)


# ---------------------------------------------------------------- eigenvalues


def test_lanczos_finds_both_ends_of_a_known_spectrum() -> None:
    generator = seeded()
    values = torch.cat([torch.tensor([-3.0, 40.0]), torch.linspace(-1, 5, 58)]).double()
    turn, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    matrix = turn @ torch.diag(values) @ turn.T
    start = torch.randn(60, generator=generator, dtype=torch.float64)
    found = landscape.extreme_eigenvalues(lambda v: matrix @ v, start, iterations=40, tolerance=1e-9)
    assert found.smallest == pytest.approx(-3.0, abs=1e-6)
    assert found.largest == pytest.approx(40.0, abs=1e-6)
    assert found.condition_number == pytest.approx(3 / 40, abs=1e-6)
    assert found.iterations < 40
    assert max(found.smallest_residual, found.largest_residual) <= 40e-9


def test_a_residual_bounds_the_error_when_iterations_run_out() -> None:
    generator = seeded(1)
    values = torch.linspace(-1, 1, 50, dtype=torch.float64)
    start = torch.randn(50, generator=generator, dtype=torch.float64)
    found = landscape.extreme_eigenvalues(lambda v: values * v, start, iterations=6, tolerance=1e-9)
    assert found.iterations == 6
    assert found.largest_residual > 1e-9
    for value, residual in (
        (found.smallest, found.smallest_residual),
        (found.largest, found.largest_residual),
    ):
        assert float((values - value).abs().min()) <= residual


def test_lanczos_is_exact_after_as_many_iterations_as_there_are_parameters() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, -1.0]])
    found = landscape.extreme_eigenvalues(lambda v: matrix @ v, torch.tensor([1.0, 0.3]), iterations=50)
    assert found.iterations == 2
    assert found.smallest == pytest.approx((1 - math.sqrt(13)) / 2, abs=1e-5)
    assert found.largest == pytest.approx((1 + math.sqrt(13)) / 2, abs=1e-5)


def test_repeated_eigenvalues_end_the_iteration_early() -> None:
    values = torch.tensor([-1.0] * 10 + [4.0] * 10)
    found = landscape.extreme_eigenvalues(lambda v: values * v, torch.randn(20, generator=seeded()))
    assert found.smallest == pytest.approx(-1, abs=1e-4)
    assert found.largest == pytest.approx(4, abs=1e-4)
    assert found.iterations == 2


def test_what_cannot_have_eigenvalues_is_an_error() -> None:
    start = torch.ones(3)
    with pytest.raises(UsageError, match="iterations = 0"):
        landscape.extreme_eigenvalues(lambda v: v, start, iterations=0)
    with pytest.raises(RunError, match="not finite"):
        landscape.extreme_eigenvalues(lambda v: v * math.nan, start)
    flat = landscape.extreme_eigenvalues(lambda v: v * 0, start)
    with pytest.raises(RunError, match="without curvature"):
        _ = flat.condition_number


# ---------------------------------------------------------------- the loss to second order


def test_products_are_those_of_the_written_out_hessian_of_softmax_regression() -> None:
    network, images, labels = softmax_regression()
    loss = landscape.objective(network, images, labels)
    here = loss.expand(loss.origin())
    hessian = softmax_hessian(network.weight.detach(), images.flatten(1))
    columns = torch.stack([here.hessian_vector(unit) for unit in torch.eye(12, dtype=torch.float64)])
    assert torch.allclose(columns, hessian, atol=1e-12)
    assert here.loss == pytest.approx(entropy(network, images, labels))


def test_a_convex_loss_has_condition_number_nought() -> None:
    network, images, labels = softmax_regression()
    found = landscape.condition(network, images, labels, generator=seeded(), iterations=12, tolerance=1e-9)
    exact = torch.linalg.eigvalsh(softmax_hessian(network.weight.detach(), images.flatten(1)))
    assert found.largest == pytest.approx(float(exact[-1]), rel=1e-6)
    assert found.condition_number == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_the_extremes_are_those_of_the_whole_hessian_of_a_network(batch_norm: landscape.BatchNorm) -> None:
    network, (images, labels) = small_network().double(), images_and_labels()
    loss = landscape.objective(network, images, labels, batch_norm)
    origin = loss.origin()
    here = loss.expand(origin)
    matrix = torch.stack([here.hessian_vector(unit) for unit in torch.eye(len(origin), dtype=torch.float64)])
    assert torch.allclose(matrix, matrix.T, atol=1e-12)
    exact = torch.linalg.eigvalsh(matrix)
    assert float(exact[0]) < 0
    found = landscape.condition(
        network, images, labels, generator=seeded(), batch_norm=batch_norm, iterations=80, tolerance=1e-9
    )
    assert found.smallest == pytest.approx(float(exact[0]), rel=1e-6)
    assert found.largest == pytest.approx(float(exact[-1]), rel=1e-6)


def test_each_mode_normalises_by_its_own_statistics_and_drops_nothing() -> None:
    network, (images, labels) = small_network(), images_and_labels()
    running = landscape.objective(network, images, labels, "running")
    batch = landscape.objective(network, images, labels, "batch")
    assert running.loss(running.origin()) == pytest.approx(entropy(network.eval(), images, labels))
    network[1].train()
    assert batch.loss(batch.origin()) == pytest.approx(entropy(network, images, labels))
    assert batch.loss(batch.origin()) != pytest.approx(running.loss(running.origin()))


def test_the_network_is_left_as_it_was() -> None:
    network, (images, labels) = small_network(), images_and_labels()
    network[0].weight.requires_grad_(False)
    last = network[5]
    assert isinstance(last, nn.Linear)
    last.weight.grad = torch.ones_like(last.weight)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    landscape.gradient_direction_condition(
        network, images, labels, generator=seeded(), points=3, iterations=4
    )
    landscape.surface(network, images, labels, generator=seeded(), points=3)
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert after.keys() == before.keys()
    assert network.training and network[1].training
    assert not network[0].weight.requires_grad
    assert torch.equal(last.weight.grad, torch.ones_like(last.weight))
    assert network[1].weight.grad is None


def test_images_without_a_label_each_are_refused() -> None:
    images, labels = images_and_labels()
    with pytest.raises(UsageError, match="one label an image"):
        landscape.objective(small_network(), images, labels[:-1])
    with pytest.raises(UsageError, match="no parameters"):
        landscape.objective(nn.Flatten(), images, labels)


def test_too_far_from_the_weights_to_be_finite_is_an_error() -> None:
    network, (images, labels) = small_network(), images_and_labels()
    with pytest.raises(RunError, match="reach"):
        landscape.gradient_direction_condition(network, images, labels, generator=seeded(), reach=1e38)


# ---------------------------------------------------------------- along the gradient


def test_the_line_has_its_points_evenly_on_both_sides_and_their_mean() -> None:
    network, (images, labels) = small_network().double(), images_and_labels()
    line = landscape.gradient_direction_condition(
        network, images, labels, generator=seeded(), points=5, iterations=80, tolerance=1e-9
    )
    assert line.steps == pytest.approx((-0.1, -0.05, 0.0, 0.05, 0.1))
    here = landscape.condition(network, images, labels, generator=seeded(2), iterations=80, tolerance=1e-9)
    assert line.condition_numbers[2] == pytest.approx(here.condition_number, rel=1e-6)
    assert line.mean == pytest.approx(sum(line.condition_numbers) / 5)
    assert line.losses[0] < line.losses[2] < line.losses[4]
    loss = landscape.objective(network, images, labels)
    slope = loss.expand(loss.origin()).gradient
    assert line.gradient_norm == pytest.approx(float(slope.norm()))
    assert line.losses[4] == pytest.approx(loss.loss(loss.origin() + 0.1 * slope))


def test_a_point_of_the_line_has_the_extremes_of_the_network_moved_there() -> None:
    network, (images, labels) = small_network().double(), images_and_labels()
    line = landscape.gradient_direction_condition(
        network, images, labels, generator=seeded(), points=3, iterations=80, tolerance=1e-9
    )
    loss = landscape.objective(network, images, labels)
    moved = loss.origin() + 0.1 * loss.expand(loss.origin()).gradient
    nn.utils.vector_to_parameters(moved, network.parameters())
    there = landscape.condition(network, images, labels, generator=seeded(5), iterations=80, tolerance=1e-9)
    assert line.extremes[2].smallest == pytest.approx(there.smallest, rel=1e-6)
    assert line.extremes[2].largest == pytest.approx(there.largest, rel=1e-6)


def test_one_point_is_the_network_itself() -> None:
    network, (images, labels) = small_network(), images_and_labels()
    line = landscape.gradient_direction_condition(network, images, labels, generator=seeded(), points=1)
    assert line.steps == (0.0,)
    with pytest.raises(UsageError, match="points = 0"):
        landscape.gradient_direction_condition(network, images, labels, generator=seeded(), points=0)


def test_the_same_generator_gives_the_same_line_and_surface() -> None:
    network, (images, labels) = small_network(), images_and_labels()
    lines = [
        landscape.gradient_direction_condition(network, images, labels, generator=seeded(4), points=3)
        for _ in range(2)
    ]
    assert lines[0] == lines[1]
    surfaces = [
        landscape.surface(network, images, labels, generator=seeded(seed), points=3) for seed in (4, 4, 5)
    ]
    assert surfaces[0] == surfaces[1] != surfaces[2]


# ---------------------------------------------------------------- surface


@pytest.mark.parametrize("scale", ["gradient", "filter"])
def test_directions_are_orthogonal_and_scaled_alike(scale: landscape.Scale) -> None:
    network, (images, labels) = small_network(), images_and_labels()
    loss = landscape.objective(network, images, labels)
    along, across = landscape.directions(loss, seeded(), scale)
    assert abs(float(along @ across)) < 1e-5 * float(along.norm() * across.norm())
    assert float(across.norm()) == pytest.approx(float(along.norm()), rel=1e-4)
    gradient = loss.expand(loss.origin()).gradient
    assert float(along @ gradient) > 0
    if scale == "gradient":
        assert torch.equal(along, gradient)


def test_filters_of_a_direction_have_the_norms_of_the_networks() -> None:
    network, (images, labels) = small_network(), images_and_labels()
    loss = landscape.objective(network, images, labels)
    sizes = [parameter.numel() for parameter in network.parameters()]
    for direction in landscape.directions(loss, seeded(), "filter"):
        kernel, norm_weight, norm_bias, linear, bias = torch.split(direction, sizes)
        for part, weight in ((kernel, network[0].weight), (linear, network[5].weight)):
            assert isinstance(weight, Tensor)
            rows = part.view(len(weight), -1).norm(dim=1)
            assert torch.allclose(rows, weight.flatten(1).norm(dim=1), rtol=1e-5)
        assert not any(bool(part.any()) for part in (norm_weight, norm_bias, bias))


def test_the_surface_has_the_line_along_the_gradient_in_its_middle() -> None:
    network, (images, labels) = small_network(), images_and_labels()
    found = landscape.surface(network, images, labels, generator=seeded(), points=5, reach=0.1)
    line = landscape.gradient_direction_condition(
        network, images, labels, generator=seeded(), points=5, iterations=1
    )
    assert found.x == found.y == line.steps
    assert found.values[2] == pytest.approx(line.losses, rel=1e-5)
    assert len(found.values) == len(found.values[0]) == 5
    loss = landscape.objective(network, images, labels)
    along, across = landscape.directions(loss, seeded(), "gradient")
    corner = loss.origin() - 0.1 * along + 0.1 * across
    assert found.values[4][0] == pytest.approx(loss.loss(corner), rel=1e-5)


def test_without_a_gradient_there_is_no_surface() -> None:
    network = Linear(4, 2)
    images = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2, dtype=torch.float64).view(2, 1, 2, 2)
    with pytest.raises(RunError, match="gradient is 0"):
        landscape.surface(network, images, torch.tensor([0, 1]), generator=seeded())


def test_only_what_is_no_quadratic_fluctuates() -> None:
    axis = tuple(index / 4 - 1 for index in range(9))

    def bowl(bump: float) -> landscape.Surface:
        values = tuple(
            tuple(
                2 + x - 3 * y + x * x + 5 * x * y + y * y + bump * (-1) ** (i + j) for i, x in enumerate(axis)
            )
            for j, y in enumerate(axis)
        )
        return landscape.Surface(axis, axis, values, "gradient")

    assert bowl(0).fluctuation == pytest.approx(0, abs=1e-9)
    assert bowl(0.5).fluctuation == pytest.approx(0.5, rel=0.01)
    broken = landscape.Surface((0.0,), (0.0,), ((math.nan,),), "gradient")
    assert broken.fluctuation == math.inf
