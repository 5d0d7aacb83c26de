"""The likelihood and the spike-and-slab prior of DLLP, in log space (Eqs 9 to 11).

A unit g is what is kept or cut whole: a channel group with its n_g weights w_g, or one weight (n_g = 1, the
paper's form). With theta_g = sigmoid(phi_g) the probability that it belongs to the slab,

    p(Y | X, Theta, d) = prod over images i, outputs c of  d / sqrt(2 pi) exp(-d^2 (Y_ic - f_ic)^2 / 2)  (9)
    p(Theta | lambda, epsilon, Phi) = prod over units g of
        theta_g N(w_g; 0, lambda^-2 I) + (1 - theta_g) N(w_g; 0, epsilon^-2 I)                          (10)
    p(Theta | Y, X) = p(Y | X, Theta, d) p(Theta | lambda, epsilon, Phi) / constant                     (11)

With s_g = ||w_g||^2 the logarithm of a term of Eq. 10 is that of a sum of two,

    log slab_g  = log sigmoid(+phi_g) + n_g (log lambda  - log(2 pi) / 2) - lambda^2  s_g / 2
    log spike_g = log sigmoid(-phi_g) + n_g (log epsilon - log(2 pi) / 2) - epsilon^2 s_g / 2

and with r_g = slab_g / (slab_g + spike_g), the posterior probability of the slab given the weights,

    d log p / d s_g   = -(r_g lambda^2 + (1 - r_g) epsilon^2) / 2        a pull of w_g to 0, soft or hard
    d log p / d phi_g = r_g - theta_g                                    theta follows the weights
    d log p / d log lambda = sum over units of r_g (n_g - lambda^2 s_g)  zero where lambda^-2 is the mean
                                                                         square of the slab's weights

Readings and deviations. The text calls d, lambda and epsilon inverse variances, N(0, 1/lambda). Eqs 9 and 10
are normalised densities only if they are inverse standard deviations, N(0, 1/lambda^2), and so they are
here; lambda and d are learned as their logarithms, which keeps them positive. Eq. 10 has one mixture for each
weight; a unit of many weights has one for all of them jointly, since they are kept or cut together: one
theta, one r. The second form of Eq. 11 would raise the prior to the power of the number of images; the first
is taken. Eq. 9 is written for one output; a classifier has one for each class, the softmax of its logits
against the one-hot label. Eq. 12 says to maximise over p: d, lambda and phi have no particles' posterior of
their own but follow the gradients of the same log p.

What Eq. 10 alone does not do. At epsilon = 1e6 the spike holds a weight only within some 1e-5 of zero:
elsewhere r = 1, the weight feels nothing of the spike and d log p / d phi = 1 - theta draws every theta to
one. Two things make it choose. The likelihood is taken under sampled masks (concrete.py), where a unit that
is not needed costs nothing to leave out, and theta has a prior of its own, such as :func:`log_beta`. Then the
spike must be one that a unit can enter: either its deviation falls in the course of training, from as wide as
the weights of units that are not needed to what a step of the optimiser resolves, with the cut, a mask of
zero, as the limit; or Eq. 10 is taken at the masked weights z w, which a closing mask brings to zero.

Measured (tests/test_dllp_stein.py) on sparse regressions with 5 of 50 true coefficients, one kernel over all:
a spike narrowing from 0.1 to 0.01 found 20 of 20 supports, and 90% intervals held 91 of 100 true values; one
of 1e-6 throughout found 0 of 4 at the weights and 4 of 4 at the masked weights, whose particles were too
close, as those that no prior holds then take up the kernel.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def log_normal(squares: Tensor, counts: Tensor | int, log_scale: Tensor) -> Tensor:
    """The log density of ``counts`` numbers of N(0, 1/s^2) whose squares sum to ``squares``; s = exp(scale).

    All broadcast. Both factors of Eq. 10 and, with residuals, Eq. 9.
    """
    return counts * (log_scale - HALF_LOG_2PI) - 0.5 * torch.exp(2 * log_scale) * squares


def log_mixture(
    squares: Tensor, counts: Tensor, gate_logits: Tensor, log_scale: Tensor, spike: float
) -> Tensor:
    """The log prior of each unit's weights (units,), log of a factor of Eq. 10; sum them for all.

    ``squares`` (units,) are the sums of squared weights, ``counts`` (units,) how many weights that is,
    ``gate_logits`` (units,) phi, ``log_scale`` log lambda, one number or (units,), ``spike`` epsilon. No
    theta is formed: log theta and log(1 - theta) are finite for every finite phi, in float32 too, and so is
    every gradient.
    """
    slab, spiked = _terms(squares, counts, gate_logits, log_scale, spike)
    return torch.logaddexp(slab, spiked)


def responsibility(
    squares: Tensor, counts: Tensor, gate_logits: Tensor, log_scale: Tensor, spike: float
) -> Tensor:
    """The posterior probability (units,) that a unit belongs to the slab, given its weights: r in Eq. 10.

    Arguments as for :func:`log_mixture`.
    """
    slab, spiked = _terms(squares, counts, gate_logits, log_scale, spike)
    return torch.sigmoid(slab - spiked)


def _terms(
    squares: Tensor, counts: Tensor, gate_logits: Tensor, log_scale: Tensor, spike: float
) -> tuple[Tensor, Tensor]:
    """The logarithms of both terms of each unit's sum in Eq. 10, in float32 at least."""
    squares, gate_logits, log_scale = _wide(squares), _wide(gate_logits), _wide(log_scale)
    slab = F.logsigmoid(gate_logits) + log_normal(squares, counts, log_scale)
    log_spike = torch.full_like(log_scale, math.log(spike))
    spiked = F.logsigmoid(-gate_logits) + log_normal(squares, counts, log_spike)
    return slab, spiked


def log_beta(gate_logits: Tensor, kept: float, dropped: float) -> Tensor:
    """The log density (units,) of each phi when theta = sigmoid(phi) is Beta(kept, dropped).

    It is a density over phi (d theta / d phi = theta (1 - theta) is in it), highest at theta = kept / (kept +
    dropped): evidence of so many units kept and dropped. Its gradient is kept (1 - theta) - dropped theta.
    The paper gives theta no prior; without one nothing favours dropping (see the top of this file).
    """
    constant = math.lgamma(kept + dropped) - math.lgamma(kept) - math.lgamma(dropped)
    phi = _wide(gate_logits)
    return kept * F.logsigmoid(phi) + dropped * F.logsigmoid(-phi) + constant


def log_likelihood(logits: Tensor, labels: Tensor, log_precision: Tensor) -> Tensor:
    """The log likelihood of the labels of a batch, summed over it (Eq. 9), a scalar.

    ``logits`` (N, C) are the network's, ``labels`` (N,) class numbers, ``log_precision`` log d, d being the
    inverse standard deviation of each of the C outputs about the one-hot label. The score of a whole set is
    this times its size over N.
    """
    probabilities = torch.softmax(_wide(logits), dim=1)
    squares = (_one_hot(probabilities, labels) - probabilities).square().sum()
    return log_normal(squares, probabilities.numel(), _wide(log_precision))


def fitted_precision(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The d, a float64 scalar, that maximises Eq. 9 of predictions (N, C): 1/d^2 is their aleatoric variance.

    Setting the derivative by log d to zero, N C - d^2 (sum of squared residuals) = 0: 1/d^2 is the mean
    squared residual over images and classes. It is one number for a data set, infinite d where nothing
    differs from its label.
    """
    wide = probabilities.double()
    return (_one_hot(wide, labels) - wide).square().mean().rsqrt()


def _one_hot(probabilities: Tensor, labels: Tensor) -> Tensor:
    return F.one_hot(labels, probabilities.shape[1]).to(probabilities.dtype)


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: epsilon^2 overflows half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
