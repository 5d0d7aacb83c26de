"""Stein's direction on problems whose posterior is known, its kernels and their push."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from optpipe.errors import RunError
from optpipe.methods.dllp.concrete import sample, temperature
from optpipe.methods.dllp.prior import log_beta, log_mixture, log_normal
from optpipe.methods.dllp.stein import Kernel, directions, field, gram, repulsions

Score = Callable[[Tensor], Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(x: Tensor, scores: Tensor, kernel: Kernel, bandwidth: float | None = None) -> Tensor:
    """The directions (N, D) of particles (N, D), by the public function on one block."""
    found = directions([{"x": row} for row in x], [{"x": row} for row in scores], kernel, bandwidth=bandwidth)
    return torch.stack([one["x"] for one in found])


def settled(score: Score, start: Tensor, kernel: Kernel, steps: int = 400, rate: float = 0.15) -> Tensor:
    """Where particles (N, D) come to rest; :func:`field` is one kernel over all, without the blocks' cost."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        at, scores = x.detach(), score(x.detach())
        x.grad = -(field(at, scores) if kernel == "whole" else moved(at, scores, kernel))
        optimizer.step()
    return x.detach()


def by_hand(x: Tensor, scores: Tensor, h: float) -> Tensor:
    """Eq. 14 term by term."""
    found = torch.zeros_like(x)
    for i in range(len(x)):
        for j in range(len(x)):
            k = torch.exp(-(x[j] - x[i]).square().sum() / h)
            found[i] += (k * scores[j] + 2 / h * k * (x[i] - x[j])) / len(x)
    return found


def distances(x: Tensor) -> Tensor:
    return torch.pdist(x)


# ---------------------------------------------------------------- the equation


@pytest.mark.parametrize("count", [2, 5])
def test_the_direction_is_the_sum_over_particles(count: int) -> None:
    x = torch.randn(count, 3, dtype=torch.float64, generator=seeded(1))
    scores = torch.randn(count, 3, dtype=torch.float64, generator=seeded(2))
    median = float(distances(x).median())
    for kernel, h in (("whole", median**2 / math.log(count)), ("paper", math.log(2))):
        assert torch.allclose(moved(x, scores, kernel), by_hand(x, scores, h))  # type: ignore[arg-type]
    assert torch.allclose(moved(x, scores, "whole", 0.7), by_hand(x, scores, 0.7))


def test_the_push_is_the_gradient_of_the_kernel() -> None:
    """Against finite differences of k in its first argument, summed over the particles."""
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded(3))
    step, h = 1e-6, 1.3

    def k(a: Tensor, b: Tensor) -> float:
        return float(gram(torch.stack([a, b]), h)[0][0, 1])

    pushes = repulsions([{"x": row} for row in x], "whole", bandwidth=h)
    for i in range(4):
        for d in range(3):
            away = torch.zeros(3, dtype=torch.float64)
            away[d] = step
            slope = sum((k(row + away, x[i]) - k(row - away, x[i])) / (2 * step) for row in x) / 4
            assert float(pushes[i]["x"][d]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def blocks(count: int, seed: int) -> list[dict[str, Tensor]]:
    g = seeded(seed)
    return [
        {"conv": torch.randn(4, 3, 3, 3, generator=g), "bias": 9 * torch.randn(4, generator=g)}
        for _ in range(count)
    ]


def test_kernels_span_a_block_all_blocks_or_one_number() -> None:
    particles, scores = blocks(3, 1), blocks(3, 2)
    flat = [[torch.cat([p["conv"].flatten(), p["bias"]]) for p in each] for each in (particles, scores)]
    x, s = torch.stack(flat[0]), torch.stack(flat[1])
    wanted = {
        "median": torch.cat([field(x[:, :108], s[:, :108]), field(x[:, 108:], s[:, 108:])], dim=1),
        "whole": field(x, s),
        "each": torch.cat([field(x[:, d : d + 1], s[:, d : d + 1]) for d in range(112)], dim=1),
        "paper": field(x, s, math.log(2)),
    }
    for kernel in get_args(Kernel):
        found = directions(particles, scores, kernel)
        assert [one["conv"].shape for one in found] == [(4, 3, 3, 3)] * 3
        rows = torch.stack([torch.cat([one["conv"].flatten(), one["bias"]]) for one in found])
        assert torch.allclose(rows, wanted[kernel], atol=1e-6), kernel
    assert not torch.allclose(wanted["median"], wanted["whole"], atol=1e-3)


def test_many_sets_of_particles_at_once_are_each_alone() -> None:
    x, s = (torch.randn(5, 7, 2, generator=seeded(seed)) for seed in (1, 2))
    together = field(x, s)
    assert all(torch.allclose(together[i], field(x[i], s[i]), atol=1e-6) for i in range(5))


def test_pull_and_push_together_are_the_direction() -> None:
    particles, scores = blocks(2, 1), blocks(2, 2)
    none = [{name: torch.zeros_like(block) for name, block in one.items()} for one in scores]
    for kernel in get_args(Kernel):
        pushes, unpulled = repulsions(particles, kernel), directions(particles, none, kernel)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(pushes, unpulled, strict=True) for name in a)


# ---------------------------------------------------------------- known posteriors

MEAN = torch.tensor([1.0, -2.0])
COVARIANCE = torch.tensor([[2.0, 0.9], [0.9, 1.0]])


@pytest.mark.parametrize("start", [(0.0, 0.0), (-6.0, 5.0)])
def test_particles_take_the_mean_and_covariance_of_a_gaussian(start: tuple[float, float]) -> None:
    """100 particles: the mean within 0.02; the covariance within 12%, from below, as is known of so few."""
    precision = torch.linalg.inv(COVARIANCE)
    x = settled(
        lambda x: -(x - MEAN) @ precision,
        torch.tensor(start) + 0.3 * torch.randn(100, 2, generator=seeded()),
        "whole",
    )
    assert x.mean(0).tolist() == pytest.approx(MEAN.tolist(), abs=0.02)
    assert torch.cov(x.T, correction=0).flatten().tolist() == pytest.approx(
        COVARIANCE.flatten().tolist(), rel=0.12
    )


CENTRES = torch.tensor([[-1.5, 0.0], [1.5, 1.0]])
SHARES = torch.tensor([1 / 3, 2 / 3])
DEVIATION = 0.8


def mixture_score(x: Tensor) -> Tensor:
    away = CENTRES - x[:, None]
    shares = torch.softmax(SHARES.log() - away.square().sum(-1) / (2 * DEVIATION**2), dim=-1)
    return (shares[..., None] * away).sum(1) / DEVIATION**2


@pytest.mark.parametrize("start", [(-4.0, 0.0), (4.0, 0.0)])
def test_particles_take_the_mean_and_covariance_of_a_mixture(start: tuple[float, float]) -> None:
    """Beside one mode at first, they end in both, a third and two thirds of them."""
    x = settled(
        mixture_score, torch.tensor(start) + torch.randn(100, 2, generator=seeded()), "whole", 700, 0.2
    )
    mean = (SHARES[:, None] * CENTRES).sum(0)
    spread = CENTRES - mean
    covariance = DEVIATION**2 * torch.eye(2) + (SHARES[:, None] * spread).T @ spread
    assert x.mean(0).tolist() == pytest.approx(mean.tolist(), abs=0.1)
    assert torch.cov(x.T, correction=0).flatten().tolist() == pytest.approx(
        covariance.flatten().tolist(), rel=0.08
    )
    nearest = torch.cdist(x, CENTRES).argmin(1)
    assert float((nearest == 0).float().mean()) == pytest.approx(1 / 3, abs=0.05)


def test_the_scores_of_a_maximiser_alone_end_in_one_point() -> None:
    """What the push is for: without it the particles are so many maximisers."""
    start = torch.randn(20, 2, generator=seeded())
    precision = torch.linalg.inv(COVARIANCE)
    x = start.clone()
    for _ in range(400):
        x = x - 0.1 * (x - MEAN) @ precision
    assert float(torch.cov(x.T).diagonal().max()) < 1e-3
    kept = settled(lambda x: -(x - MEAN) @ precision, start, "whole")
    assert float(torch.cov(kept.T).diagonal().min()) > 0.5


# ---------------------------------------------------------------- two particles, many dimensions


@pytest.mark.parametrize(("kernel", "per_number"), [("whole", False), ("each", True)])
def test_two_particles_settle_at_the_distance_derived(kernel: Kernel, per_number: bool) -> None:
    """sqrt(log 2) from the mean: under one kernel in all, under one for each number in every number."""
    x = settled(lambda x: -x, torch.randn(2, 64, generator=seeded(4)), kernel, 600, 0.05)
    half = (x[0] - x[1]) / 2
    wanted = math.sqrt(math.log(2))
    assert x.mean(0).abs().max() < 0.01
    if per_number:
        assert half.abs().tolist() == pytest.approx([wanted] * 64, rel=0.01)
    else:
        assert float(half.norm()) == pytest.approx(wanted, rel=0.01)


def test_the_push_is_alive_in_many_dimensions_where_the_papers_is_zero() -> None:
    g = seeded(5)
    particles = [{"w": 0.05 * torch.randn(100_000, generator=g)} for _ in range(2)]
    gap = particles[0]["w"] - particles[1]["w"]
    assert float(gap.square().sum()) > 100 * math.log(2)
    assert all(bool((one["w"] == 0).all()) for one in repulsions(particles, "paper"))
    for kernel in ("median", "whole"):
        first, second = repulsions(particles, kernel)
        assert float(first["w"].norm()) == pytest.approx(math.log(2) / (2 * float(gap.norm())), rel=1e-3)
        assert torch.allclose(first["w"], -second["w"])
        assert float(torch.cosine_similarity(first["w"], gap, dim=0)) == pytest.approx(1, abs=1e-4)


def test_the_push_grows_with_beta() -> None:
    """Eq. 15 on a loss with one optimum: the larger beta, the farther apart two particles end."""
    ends = []
    for strength in (0.0, 0.1, 1.0):
        x = torch.randn(2, 50, generator=seeded(6))
        for _ in range(600):
            pushes = repulsions([{"x": row} for row in x])
            x = x - 0.05 * (x - strength * torch.stack([one["x"] for one in pushes]))
        ends.append(float((x[0] - x[1]).norm()))
    assert ends[0] < 1e-6
    assert ends[1] > 0.1
    assert ends[2] > 2 * ends[1]


@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_particles_that_coincide_share_their_scores_and_nothing_is_nan(kernel: Kernel) -> None:
    one = blocks(1, 1)[0]
    scores = blocks(2, 2)
    for name, found in directions([one, dict(one)], scores, kernel)[0].items():
        assert torch.allclose(found, (scores[0][name] + scores[1][name]) / 2)
    three = [one, dict(one), blocks(1, 3)[0]]
    for each in (*directions(three, blocks(3, 4), kernel), *repulsions([one, one], kernel)):
        assert all(bool(block.isfinite().all()) for block in each.values())


@pytest.mark.parametrize("apart", [1e-30, 1e-12, 1e-6, 1e-4])
def test_the_push_of_particles_that_nearly_coincide_is_bounded(apart: float) -> None:
    particles = [{"x": torch.zeros(10)}, {"x": torch.full((10,), apart)}]
    for kernel in ("median", "whole", "each"):
        pushes = repulsions(particles, kernel, nearest=1e-2)
        assert float(pushes[1]["x"].max()) < 1 / 1e-2
        assert bool((pushes[1]["x"] >= 0).all())


def test_the_push_keeps_its_digits_far_from_zero() -> None:
    near = 1e-2 * torch.randn(2, 1000, dtype=torch.float64, generator=seeded(7))
    x = (100 + near).float()
    wanted = repulsions([{"x": row} for row in x.double()])
    found = repulsions([{"x": row} for row in x])
    assert torch.allclose(found[0]["x"].double(), wanted[0]["x"], rtol=1e-3, atol=1e-6)


def test_half_precision_comes_back_as_it_went_in() -> None:
    particles = [{"x": torch.tensor([1.0, 2.0]).half()}, {"x": torch.tensor([1.5, 2.0]).half()}]
    found = directions(particles, particles)
    assert found[0]["x"].dtype == torch.float16
    assert bool(found[0]["x"].isfinite().all())


def test_particles_and_scores_that_do_not_belong_together_are_named() -> None:
    pair = blocks(2, 1)
    with pytest.raises(RunError, match=r"at least two, not 1"):
        directions(pair[:1], pair[:1])
    with pytest.raises(RunError, match=r"2 particles have 1 scores"):
        directions(pair, pair[:1])
    with pytest.raises(RunError, match=r"score 1 differs from particle 0 in its blocks \['bias'\]"):
        directions(pair, [pair[0], {"conv": pair[1]["conv"]}])
    with pytest.raises(RunError, match=r"particle 1 differs from particle 0 in its blocks \['conv'\]"):
        directions([pair[0], {**pair[1], "conv": torch.zeros(2)}], pair)


# ---------------------------------------------------------------- spike-and-slab regression


IMAGES, COEFFICIENTS, TRUE, NOISE = 100, 50, 5, 0.5


@dataclass(frozen=True, slots=True)
class Posterior:
    """What was found of problems that share nothing but the code: (problems, coefficients) each."""

    truth: Tensor
    theta: Tensor
    low: Tensor
    high: Tensor
    slab_deviation: Tensor
    """Over particles, of the coefficients' slab part."""
    exact_deviation: Tensor
    """Of the true coefficients, were the support and the noise known; zero elsewhere."""

    def supports_found(self) -> int:
        """Problems where theta > 0.5 on the true coefficients and on no other."""
        return int(((self.theta > 0.5) == (self.truth != 0)).all(dim=1).sum())

    def covered(self) -> int:
        """True coefficients, of all problems, within their intervals."""
        return int(((self.low <= self.truth) & (self.truth <= self.high))[self.truth != 0].sum())

    def spread(self) -> float:
        """The particles' deviation over the exact one, on the true coefficients."""
        true = self.truth != 0
        return float(self.slab_deviation[true].mean() / self.exact_deviation[true].mean())


def regressions(seeds: range) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (P, 100, 50), outputs (P, 100), coefficients (P, 50): 5 of size 0.5 to 2, the others zero."""
    xs, ys, truths = [], [], []
    for seed in seeds:
        g = seeded(seed)
        x, truth = torch.randn(IMAGES, COEFFICIENTS, generator=g), torch.zeros(COEFFICIENTS)
        signs = torch.randint(2, (TRUE,), generator=g) * 2.0 - 1
        chosen = torch.randperm(COEFFICIENTS, generator=g)[:TRUE]
        truth[chosen] = signs * (0.5 + 1.5 * torch.rand(TRUE, generator=g))
        xs.append(x)
        ys.append(x @ truth + NOISE * torch.randn(IMAGES, generator=g))
        truths.append(truth)
    return torch.stack(xs), torch.stack(ys), torch.stack(truths)


def stein(weights: Tensor, scores: Tensor, span: Literal["whole", "each", "none"]) -> Tensor:
    """Directions (P, particles, 50): one kernel over a problem's coefficients, one for each, or no kernel."""
    if span == "whole":
        return field(weights, scores)
    if span == "each":
        # All problems' coefficients side by side: no kernel is shared.
        rows, pulls = (values.transpose(0, 1).flatten(1) for values in (weights, scores))
        return moved(rows, pulls, "each").view(-1, len(weights), COEFFICIENTS).transpose(0, 1)
    return scores


def fitted(
    seeds: range,
    span: Literal["whole", "each", "none"] = "whole",
    widths: tuple[float, float] = (0.1, 0.01),
    particles: int = 64,
    masked: bool = False,
    steps: int = 600,
) -> Posterior:
    """DLLP on each problem: weights by Stein's direction, theta, d and lambda by the gradient of log p.

    Every particle has its own theta; d and lambda are one for a problem. The spike's deviation goes from the
    first of ``widths`` to the last; the cut, z = 0, is the limit of none. The prior is at the weights, or at
    ``masked`` ones.
    """
    x, y, truth = regressions(seeds)
    g, shape = seeded(99), (len(seeds), particles, COEFFICIENTS)
    weights = (0.1 * torch.randn(shape, generator=g)).requires_grad_()
    phi = torch.zeros(shape, requires_grad=True)
    log_d = torch.zeros(len(seeds), 1, requires_grad=True)
    log_slab = torch.zeros(len(seeds), 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([weights, phi, log_d, log_slab], lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1, 2 * (1 - step / steps)) + 1e-4
        masks = sample(phi, temperature(step, steps, 1.0, 0.1), g)
        residuals = y[:, None] - torch.einsum("pkd,pnd->pkn", masks * weights, x)
        held = masks * weights if masked else weights
        prior = log_mixture(
            held.square(), torch.ones(()), phi, log_slab, 1 / temperature(step, steps, *widths)
        )
        log_p = log_normal(residuals.square().sum(-1), IMAGES, log_d).sum() + prior.sum()
        optimizer.zero_grad()
        (-log_p - log_beta(phi, 1.0, 2.0).sum()).backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        weights.grad = -stein(weights.detach(), -weights.grad, span)
        optimizer.step()
    phi, weights = phi.detach(), weights.detach()
    drawn = torch.cat([sample(phi, 0.1, g, hard=True) * weights for _ in range(20)], dim=1)
    low, high = torch.quantile(drawn, torch.tensor([0.05, 0.95]), dim=1)
    exact = torch.zeros_like(truth)
    for i, support in enumerate(truth != 0):
        own = x[i][:, support]
        exact[i, support] = NOISE * torch.linalg.inv(own.T @ own).diagonal().sqrt()
    return Posterior(truth, torch.sigmoid(phi).mean(1), low, high, weights.std(1), exact)


def test_sparse_regression_finds_the_support_and_how_sure_it_is() -> None:
    """Four problems: every support; particles as wide apart as the exact posterior, within 30%."""
    found = fitted(range(100, 104))
    false = found.truth == 0
    assert found.supports_found() == 4
    assert found.covered() >= 15
    assert float(found.low[false].abs().max()) < 0.1
    assert float(found.high[false].abs().max()) < 0.1
    assert found.spread() == pytest.approx(1, abs=0.3)


@pytest.mark.slow
def test_credible_intervals_of_sparse_regression_cover_the_truth() -> None:
    """90% intervals over 20 problems: of 100 true coefficients at least 85, without the push at most 50.

    The level is not exact: few particles are somewhat too close, the noise that is learnt has the masks' own
    in it, and the count of 100 has an error of 3. The settings were found on other problems than these.
    """
    found = fitted(range(100, 120))
    print(f"{found.supports_found()} of 20 supports, {found.covered()} of 100, spread {found.spread():.2f}")
    assert found.supports_found() == 20
    assert found.covered() >= 85
    alone = fitted(range(100, 120), "none")
    print(f"without the push {alone.covered()} of 100, spread {alone.spread():.2f}")
    assert alone.covered() <= 50
    assert alone.spread() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("last", [0.1, 0.01])
def test_a_kernel_for_each_coefficient_is_sure_enough_whatever_the_spikes_width(last: float) -> None:
    """One kernel over all 50 must share its push with those in the spike, unless the spike is narrow."""
    found = fitted(range(100, 104), "each", (0.1, last), particles=32)
    whole = fitted(range(100, 104), "whole", (0.1, last))
    print(f"spread of each {found.spread():.2f}, of the whole {whole.spread():.2f}")
    assert found.supports_found() == 4
    assert found.covered() >= 17
    assert 0.9 < found.spread() < 1.4
    assert (whole.spread() < 0.5) == (last == 0.1)


@pytest.mark.slow
def test_a_spike_of_the_last_width_from_the_start_holds_masked_weights_alone() -> None:
    """At 1e-6 no gradient leads a weight into the spike, a mask that closes does (prior.py)."""
    found = fitted(range(100, 104), widths=(1e-6, 1e-6))
    masked = fitted(range(100, 104), widths=(1e-6, 1e-6), masked=True)
    print(f"{masked.supports_found()} of 4, {masked.covered()} of 20, spread {masked.spread():.2f}")
    assert found.supports_found() == 0
    assert masked.supports_found() == 4
