"""How far a prediction can be trusted. Pure: arrays of probabilities in, figures out, in nats and fractions.

Two kinds of not knowing (Kendall and Gal 2017): aleatoric is the noise of the images, which no further
training takes away; epistemic is what the training left open, seen where the members of an ensemble
disagree. The members here are networks drawn from one posterior: sampled masks and particles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optpipe.errors import UsageError
from optpipe.types import Calibration, CalibrationBin, Reliability, Selective

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Doubles = NDArray[np.float64]

BINS = 15
REJECTED = (0.0, 0.05, 0.1, 0.2)


@dataclass(frozen=True, slots=True)
class Decomposition:
    """An ensemble's prediction for N images, and what of its uncertainty is of which kind. Not JSON-able.

    ``mean`` (N, C) are the members' mean probabilities. In nats, each (N,): ``total`` is the entropy of the
    mean, ``aleatoric`` the members' mean entropy, ``epistemic`` their difference, which is the mutual
    information of the class and the member.
    """

    mean: Doubles
    total: Doubles
    aleatoric: Doubles
    epistemic: Doubles


def probabilities(logits: Floats) -> Doubles:
    """Softmax over the last axis."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def decompose(members: Floats) -> Decomposition:
    """The mean prediction and the two kinds of uncertainty, from probabilities (S, N, C) of S members.

    H[mean_s p_s] = mean_s H[p_s] + I(class; member), the information being at least 0, as it is here too
    where rounding would bring it below.

    Raises:
        UsageError: these are no probabilities (S, N, C).
    """
    _check(members, 3, "(members, images, classes)")
    mean = members.mean(axis=0, dtype=np.float64)
    total, aleatoric = _entropy(mean), _entropy(members.astype(np.float64)).mean(axis=0)
    return Decomposition(mean, total, aleatoric, np.maximum(total - aleatoric, 0.0))


def predictive_variance(members: Floats) -> Doubles:
    """How much S members disagree on each image, (N,): the variance of each class's probability, summed.

    It is the DLLP paper's measure of epistemic uncertainty (Sec. 4.2.2), here over sampled masks and
    particles, and the variance of these S members: not an estimate of that of others.

    Raises:
        UsageError: these are no probabilities (S, N, C).
    """
    _check(members, 3, "(members, images, classes)")
    return np.asarray(members.var(axis=0, dtype=np.float64).sum(axis=-1))


def aleatoric_variance(predicted: Floats, labels: NDArray[np.int64]) -> float:
    """The variance 1/d^2 of the DLLP paper's likelihood (Eq. 9), of a whole data set.

    d^2 is the precision of a Gaussian around the prediction, one number for all images and classes; its
    likelihood is greatest where 1/d^2 is the mean squared residual of the probabilities (N, C) to the
    one-hot labels (N,). The paper calls d the inverse of the variance; by Eq. 9 it is d^2.

    Raises:
        UsageError: these are no probabilities (N, C) with a label each.
    """
    _check_labels(predicted, labels)
    residual = predicted.astype(np.float64)
    residual[np.arange(len(labels)), labels] -= 1.0
    return float((residual**2).mean())


def estimation_efficiency(aleatoric: float, epistemic: float, data_noise: float = 0.0) -> float:
    """The share of an estimate's variance that no estimator can avoid (Sec. 3.3 of the DLLP paper).

    e = CRLB / Var = eps^2 / (eps^2 + alpha^2 + beta^2), with ``aleatoric`` eps^2 the variance of the
    observations, which is the Cramer-Rao bound; ``epistemic`` alpha^2 that of the model; ``data_noise``
    beta^2 what noise in the images adds. The paper's four cases are those of either being 0: both, where
    e = 1; alpha^2 alone counting; beta^2 alone; both counting. Without any variance e is 1.

    Raises:
        UsageError: a variance is below 0.
    """
    for name, value in (("aleatoric", aleatoric), ("epistemic", epistemic), ("data_noise", data_noise)):
        if not value >= 0:
            raise UsageError(f"{name} = {value}: a variance is not below 0")
    variance = aleatoric + epistemic + data_noise
    return aleatoric / variance if variance else 1.0


def calibration(predicted: Floats, labels: NDArray[np.int64], bins: int = BINS) -> Calibration:
    """How far the probability of the likeliest class is from how often it is right (Guo et al. 2017, Eq. 5).

    The images fall by that probability into ``bins`` of equal width, each open below and closed above. The
    error is the mean over images of |accuracy - mean probability| of their bin.

    Raises:
        UsageError: these are no probabilities (N, C) with a label each, or there is no bin.
    """
    _check_labels(predicted, labels)
    if bins < 1:
        raise UsageError(f"bins = {bins}: there must be at least one")
    confidence = predicted.max(axis=1).astype(np.float64)
    correct = predicted.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, bins + 1)
    # Rounding may bring a probability beyond 1.
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows: list[CalibrationBin] = []
    for index in range(bins):
        held = place == index
        count = int(held.sum())
        rows.append(
            CalibrationBin(
                low=float(edges[index]),
                high=float(edges[index + 1]),
                count=count,
                confidence=float(confidence[held].mean()) if count else None,
                accuracy=float(correct[held].mean()) if count else None,
            )
        )
    gaps = [
        row.count * abs(row.accuracy - row.confidence)
        for row in rows
        if row.accuracy is not None and row.confidence is not None
    ]
    return Calibration(sum(gaps) / len(labels), tuple(rows))


def selective_accuracy(
    uncertainty: Floats, correct: NDArray[np.bool_], rejected: Sequence[float] = REJECTED
) -> tuple[Selective, ...]:
    """The accuracy on what is left when a share of the images, those of greatest uncertainty, is rejected.

    ``uncertainty`` and ``correct`` are (N,). Rejected are as many whole images as the share holds. Among
    equally uncertain images it does not matter which comes first: the accuracy is the mean over all ways
    to choose among them.

    Raises:
        UsageError: there are no images, not as many of one as of the other, or a share is not in [0, 1).
    """
    if uncertainty.shape != correct.shape or uncertainty.ndim != 1 or not len(correct):
        raise UsageError(
            f"uncertainty {uncertainty.shape} and correct {correct.shape}: must be one number for each image"
        )
    found: list[Selective] = []
    for share in rejected:
        if not 0 <= share < 1:
            raise UsageError(f"rejected = {share}: must be at least 0 and below 1")
        # A tenth of 30 images is 3, whatever 0.1 is in floating point.
        kept = len(correct) - int(share * len(correct) + 1e-9)
        limit = np.sort(uncertainty)[kept - 1]
        below, level = uncertainty < limit, uncertainty == limit
        hits = correct[below].sum() + (kept - below.sum()) * correct[level].mean()
        found.append(Selective(share, kept, float(hits / kept)))
    return tuple(found)


def reliability(
    predicted: Floats, labels: NDArray[np.int64], uncertainty: Floats | None = None
) -> Reliability:
    """Calibration and selective accuracy of probabilities (N, C) against labels (N,).

    The least sure images are those of greatest ``uncertainty`` (N,), by default those whose likeliest class
    has the lowest probability.

    Raises:
        UsageError: these are no probabilities (N, C) with a label each.
    """
    found = calibration(predicted, labels)
    doubt = 1.0 - predicted.max(axis=1) if uncertainty is None else uncertainty
    return Reliability(found, selective_accuracy(doubt, predicted.argmax(axis=1) == labels))


def _entropy(predicted: Doubles) -> Doubles:
    """-sum p log p over the last axis, 0 log 0 being 0."""
    logs = np.log(predicted, out=np.zeros_like(predicted), where=predicted > 0)
    return np.asarray(-(predicted * logs).sum(axis=-1))


def _check(predicted: Floats, dimensions: int, axes: str) -> None:
    if predicted.ndim != dimensions or 0 in predicted.shape:
        raise UsageError(f"probabilities of shape {predicted.shape}: must be {axes}, none of them 0")
    sums = predicted.sum(axis=-1, dtype=np.float64)
    # Written so that nan fails too.
    if not (predicted.min() >= 0 and np.abs(sums - 1.0).max() <= 1e-3):
        raise UsageError(
            f"probabilities from {predicted.min():.3g} to {predicted.max():.3g} with sums from "
            f"{sums.min():.3g} to {sums.max():.3g}: must be at least 0 with sums of 1; give the softmax of "
            "logits"
        )


def _check_labels(predicted: Floats, labels: NDArray[np.int64]) -> None:
    _check(predicted, 2, "(images, classes)")
    if labels.shape != predicted.shape[:1]:
        raise UsageError(f"labels of shape {labels.shape}: must be one for each of {len(predicted)} images")
    if labels.min() < 0 or labels.max() >= predicted.shape[1]:
        raise UsageError(
            f"labels from {labels.min()} to {labels.max()}: must be classes from 0 to "
            f"{predicted.shape[1] - 1}"
        )
