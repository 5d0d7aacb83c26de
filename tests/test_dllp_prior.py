"""The spike-and-slab prior and the likelihood of DLLP against explicit densities, and their extremes."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta, multivariate_normal, norm
from torch import Tensor

from optpipe.methods.dllp.prior import (
    fitted_precision,
    log_beta,
    log_likelihood,
    log_mixture,
    log_normal,
    responsibility,
)

LOGITS = torch.tensor([-3.0, -0.5, 0.0, 2.0, 7.0], dtype=torch.float64)


def explicit(weights: Tensor, logit: float, slab: float, spike: float) -> tuple[float, float]:
    """log p of one unit (Eq. 10) and its r, by scipy's densities and without logarithms of sums."""
    theta, zero = 1 / (1 + math.exp(-logit)), [0.0] * len(weights)
    kept = theta * multivariate_normal(zero, slab**-2).pdf(weights.numpy())
    cut = (1 - theta) * multivariate_normal(zero, spike**-2).pdf(weights.numpy())
    return math.log(kept + cut), kept / (kept + cut)


@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("spike", [2.0, 20.0])
def test_the_mixture_is_the_explicit_one(count: int, spike: float) -> None:
    weights = torch.randn(5, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) / 5
    squares, counts = weights.square().sum(1), torch.full((5,), count)
    slab = torch.tensor(math.log(1.5), dtype=torch.float64)
    found = log_mixture(squares, counts, LOGITS, slab, spike)
    shares = responsibility(squares, counts, LOGITS, slab, spike)
    wanted = [explicit(w, float(phi), 1.5, spike) for w, phi in zip(weights, LOGITS, strict=True)]
    assert found.tolist() == pytest.approx([value for value, _ in wanted], rel=1e-10)
    assert shares.tolist() == pytest.approx([share for _, share in wanted], rel=1e-9)


def test_a_mixture_of_inverse_deviations_is_a_normalised_density() -> None:
    def density(weight: float) -> float:
        square = torch.tensor([weight**2], dtype=torch.float64)
        scale = torch.tensor(math.log(0.7), dtype=torch.float64)
        return float(log_mixture(square, torch.ones(1), LOGITS[3:4], scale, 5.0).exp())

    assert quad(density, -20, 20, points=[-0.2, 0.0, 0.2], limit=200)[0] == pytest.approx(1, abs=1e-7)


def test_gradients_of_the_mixture_are_those_derived() -> None:
    squares = torch.tensor([0.001, 0.02, 0.05, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    phi = LOGITS.clone().requires_grad_()
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    counts, spike = torch.tensor([1, 2, 3, 4, 9]), 12.0
    r = responsibility(squares, counts, phi, scale, spike).detach()
    total = log_mixture(squares, counts, phi, scale, spike).sum()
    by_square, by_phi, by_scale = torch.autograd.grad(total, (squares, phi, scale))
    slab = math.exp(0.4)
    assert by_square.tolist() == pytest.approx((-(r * slab**2 + (1 - r) * spike**2) / 2).tolist())
    assert by_phi.tolist() == pytest.approx((r - torch.sigmoid(phi)).tolist(), abs=1e-12)
    assert float(by_scale) == pytest.approx(float((r * (counts - slab**2 * squares.detach())).sum()))


@pytest.mark.parametrize("count", [1, 4608])
@pytest.mark.parametrize("spike", [1e3, 1e6])
@pytest.mark.parametrize("phi", [-1e4, -100.0, -17.0, 0.0, 17.0, 100.0, 1e4])
def test_a_narrow_spike_is_finite_in_float32(count: int, spike: float, phi: float) -> None:
    """Weights from exactly 0 through where the spike ends to 10; theta from exactly 0 to exactly 1."""
    sizes = torch.tensor([0.0, 1e-30, 1e-10, 1e-7, 1e-6, 4e-6, 1e-5, 1e-3, 0.1, 1.0, 10.0])
    weights = sizes.unsqueeze(1).expand(-1, count).clone().requires_grad_()
    gates = torch.full_like(sizes, phi).requires_grad_()
    scale = torch.tensor(3.0, requires_grad=True)
    counts = torch.full_like(sizes, count)
    value = log_mixture(weights.square().sum(1), counts, gates, scale, spike)
    shares = responsibility(weights.square().sum(1), counts, gates, scale, spike)
    gradients = torch.autograd.grad(value.sum() + shares.sum(), (weights, gates, scale))
    assert value.dtype == torch.float32
    assert all(bool(t.isfinite().all()) for t in (value, shares, *gradients))


def test_float32_agrees_with_float64_around_the_end_of_the_spike() -> None:
    sizes = torch.cat([torch.zeros(1), torch.logspace(-8, 1, 50)])
    gates, counts = torch.zeros(51), torch.ones(51)
    narrow = log_mixture(sizes.square(), counts, gates, torch.tensor(2.0), 1e6)
    wide = log_mixture(
        sizes.double().square(), counts, gates.double(), torch.tensor(2.0, dtype=torch.float64), 1e6
    )
    assert narrow.tolist() == pytest.approx(wide.tolist(), rel=2e-6, abs=2e-5)


def test_a_unit_of_zeros_is_the_spikes_and_a_large_one_the_slabs() -> None:
    squares = torch.tensor([0.0, 1e-14, 1e-8, 1.0])
    shares = responsibility(squares, torch.ones(4), torch.zeros(4), torch.tensor(0.0), 1e6)
    assert shares[:2].max() < 1e-5
    assert shares[2:].tolist() == [1.0, 1.0]


def test_half_precision_is_computed_in_single() -> None:
    squares = torch.tensor([0.0, 2.0], dtype=torch.float16)
    value = log_mixture(squares, torch.ones(2), torch.zeros(2).half(), torch.tensor(0.0).half(), 1e6)
    assert value.dtype == torch.float32
    assert bool(value.isfinite().all())


def test_the_sparsity_prior_is_a_beta_density_over_the_logit() -> None:
    theta = torch.sigmoid(LOGITS)
    wanted = beta(2.0, 5.0).logpdf(theta.numpy()) + (theta * (1 - theta)).log().numpy()
    assert log_beta(LOGITS, 2.0, 5.0).tolist() == pytest.approx(wanted.tolist())
    phi = torch.tensor([math.log(2 / 5)], dtype=torch.float64, requires_grad=True)
    assert float(torch.autograd.grad(log_beta(phi, 2.0, 5.0).sum(), phi)[0]) == pytest.approx(0, abs=1e-12)


def test_the_likelihood_is_of_one_gaussian_for_each_image_and_class() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2, 1, 1])
    wanted = 0.0
    for row, label in zip(torch.softmax(logits, dim=1).tolist(), labels.tolist(), strict=True):
        wanted += sum(norm(mean, 1 / 2.5).logpdf(float(c == label)) for c, mean in enumerate(row))
    log_d = torch.tensor(math.log(2.5), dtype=torch.float64)
    assert float(log_likelihood(logits, labels, log_d)) == pytest.approx(wanted)


def test_the_fitted_precision_maximises_the_likelihood() -> None:
    logits = 2 * torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(5, (40,), generator=torch.Generator().manual_seed(2))
    d = fitted_precision(torch.softmax(logits, dim=1), labels)
    best = log_likelihood(logits, labels, d.log())
    assert all(log_likelihood(logits, labels, (d * f).log()) < best for f in (0.5, 0.99, 1.01, 2.0))
    log_d = d.log().requires_grad_()
    (slope,) = torch.autograd.grad(log_likelihood(logits, labels, log_d), log_d)
    assert float(slope) == pytest.approx(0, abs=1e-9)


def test_the_aleatoric_variance_is_the_mean_squared_residual() -> None:
    probabilities = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    d = fitted_precision(probabilities, torch.tensor([0, 0]))
    assert float(1 / d**2) == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 4)
    assert float(1 / fitted_precision(torch.eye(2), torch.tensor([0, 1])) ** 2) == 0


def test_the_slabs_scale_is_learnt_as_the_deviation_of_the_weights() -> None:
    weights = 0.3 * torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scale = torch.tensor(-math.log(float(weights.square().mean().sqrt())), dtype=torch.float64)
    scale.requires_grad_()
    squares, counts = weights.square(), torch.ones(2000)
    total = log_mixture(squares, counts, torch.full_like(squares, 40.0), scale, 1e6).sum()
    assert float(torch.autograd.grad(total, scale)[0]) == pytest.approx(0, abs=1e-6)
    assert float(log_normal(squares, counts, scale.detach()).sum()) == pytest.approx(
        norm(0, float((-scale.detach()).exp())).logpdf(weights.numpy()).sum()
    )
