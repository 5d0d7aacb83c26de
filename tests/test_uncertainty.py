from __future__ import annotations

import math

import numpy as np
import pytest

from optpipe import uncertainty
from optpipe.errors import UsageError

LN2 = math.log(2)


def binary_entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_members_that_agree_know_what_they_do_not_know() -> None:
    found = uncertainty.decompose(np.array([[[0.5, 0.5]], [[0.5, 0.5]]]))
    assert found.total[0] == pytest.approx(LN2)
    assert found.aleatoric[0] == pytest.approx(LN2)
    assert found.epistemic[0] == 0.0


def test_members_that_are_sure_of_different_classes_leave_all_uncertainty_to_the_model() -> None:
    found = uncertainty.decompose(np.array([[[1.0, 0.0]], [[0.0, 1.0]]], np.float32))
    np.testing.assert_allclose(found.mean, [[0.5, 0.5]])
    assert (found.total[0], found.aleatoric[0], found.epistemic[0]) == pytest.approx((LN2, 0.0, LN2))


def test_uncertainty_is_decomposed_image_by_image() -> None:
    members = np.array([[[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.3, 0.7]]])
    found = uncertainty.decompose(members)
    expected = (binary_entropy(0.9) + binary_entropy(0.5)) / 2
    np.testing.assert_allclose(found.total, [binary_entropy(0.7), binary_entropy(0.3)])
    np.testing.assert_allclose(found.aleatoric, [expected, binary_entropy(0.3)])
    np.testing.assert_allclose(found.epistemic, [binary_entropy(0.7) - expected, 0.0], atol=1e-15)


def test_information_is_never_below_zero() -> None:
    """Equal members: the difference of the two entropies is rounding, of either sign."""
    one = uncertainty.probabilities(np.random.default_rng(0).standard_normal((200, 10)))
    found = uncertainty.decompose(np.stack([one, one, one]).astype(np.float32))
    assert found.epistemic.min() >= 0.0
    assert found.epistemic.max() < 1e-6


def test_predictive_variance_is_summed_over_classes() -> None:
    members = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]])
    # Deviations of 0.2 from the mean 0.7, and as many from 0.3.
    np.testing.assert_allclose(uncertainty.predictive_variance(members), [0.08, 0.0], atol=1e-15)


def test_aleatoric_variance_is_the_mean_squared_residual() -> None:
    predicted = np.array([[0.8, 0.2], [0.4, 0.6]])
    found = uncertainty.aleatoric_variance(predicted, np.array([0, 0]))
    assert found == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 4)


def test_aleatoric_variance_maximises_the_likelihood_of_equation_9() -> None:
    rng = np.random.default_rng(1)
    predicted = uncertainty.probabilities(rng.standard_normal((50, 4)))
    labels = rng.integers(0, 4, 50)
    residual = predicted - np.eye(4)[labels]

    def log_likelihood(d: float) -> float:
        return float((math.log(d / math.sqrt(2 * math.pi)) - d**2 * residual**2 / 2).sum())

    best = 1 / math.sqrt(uncertainty.aleatoric_variance(predicted, labels))
    assert log_likelihood(best) > max(log_likelihood(0.999 * best), log_likelihood(1.001 * best))


@pytest.mark.parametrize(
    ("variances", "efficiency"),
    [((2.0, 0.0), 1.0), ((2.0, 1.0), 2 / 3), ((2.0, 0.0, 2.0), 0.5), ((2.0, 1.0, 2.0), 0.4), ((0, 0), 1.0)],
)
def test_efficiency_in_the_cases_of_the_paper(variances: tuple[float, ...], efficiency: float) -> None:
    assert uncertainty.estimation_efficiency(*variances) == pytest.approx(efficiency)


def test_a_variance_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^epistemic = -0.1: a variance is not below 0$"):
        uncertainty.estimation_efficiency(1.0, -0.1)


def test_calibration_of_a_hand_computed_case() -> None:
    predicted = np.array([[0.95, 0.05], [0.15, 0.85], [0.6, 0.4], [0.3, 0.7]])
    found = uncertainty.calibration(predicted, np.array([0, 0, 0, 1]), bins=5)
    assert [row.count for row in found.bins] == [0, 0, 1, 1, 2]
    # 0.6 closes its bin; of the two above 0.8 one is right, and they say 0.9 on average.
    assert [row.accuracy for row in found.bins] == [None, None, 1.0, 1.0, 0.5]
    assert found.bins[4].confidence == pytest.approx(0.9)
    assert found.error == pytest.approx((0.4 + 0.3 + 2 * 0.4) / 4)


def test_bins_are_closed_above() -> None:
    predicted = np.array([[1.0, 0.0], [0.5, 0.5]])
    found = uncertainty.calibration(predicted, np.array([0, 0]), bins=2)
    assert [(row.low, row.high, row.count) for row in found.bins] == [(0.0, 0.5, 1), (0.5, 1.0, 1)]
    assert found.error == pytest.approx(0.25)


def test_probabilities_that_say_how_often_they_are_right_have_no_error() -> None:
    predicted = np.tile([0.75, 0.25], (4, 1))
    assert uncertainty.calibration(predicted, np.array([0, 0, 0, 1])).error == pytest.approx(0.0)


def test_rejecting_the_least_sure_leaves_the_others() -> None:
    doubt = np.array([0.1, 0.9, 0.3, 0.8, 0.2, 0.0, 0.4, 0.5, 0.6, 0.7])
    correct = np.array([True, False, True, False, True, True, True, True, False, True])
    found = uncertainty.selective_accuracy(doubt, correct, (0.0, 0.1, 0.2, 0.25))
    assert [one.kept for one in found] == [10, 9, 8, 8]
    assert [one.accuracy for one in found] == pytest.approx([7 / 10, 7 / 9, 7 / 8, 7 / 8])


def test_among_equally_sure_images_none_is_preferred() -> None:
    """Two of three are kept, and one of the two doubtful ones is right: 1.5 of 2 on average."""
    for correct in ([True, True, False], [True, False, True]):
        (found,) = uncertainty.selective_accuracy(np.array([0.1, 0.5, 0.5]), np.array(correct), (1 / 3,))
        assert (found.kept, found.accuracy) == pytest.approx((2, 0.75))


def test_reliability_doubts_the_least_probable_unless_told_otherwise() -> None:
    predicted = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3], [0.95, 0.05]])
    labels = np.array([0, 1, 0, 0, 0])
    own = uncertainty.reliability(predicted, labels)
    told = uncertainty.reliability(predicted, labels, np.array([1.0, 0.0, 0.0, 0.0, 0.0]))
    assert [one.rejected for one in own.selective] == [0.0, 0.05, 0.1, 0.2]
    assert [one.accuracy for one in own.selective] == pytest.approx([0.8, 0.8, 0.8, 1.0])
    assert told.selective[-1].accuracy == pytest.approx(0.75)
    assert own.calibration == told.calibration


def test_probabilities_of_large_logits_are_finite() -> None:
    found = uncertainty.probabilities(np.array([[1000.0, 0.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(found, [[1.0, 0.0], [0.5, 0.5]])


def test_logits_are_no_probabilities() -> None:
    with pytest.raises(UsageError) as error:
        uncertainty.calibration(np.array([[2.0, 1.0]]), np.array([0]))
    assert str(error.value) == (
        "probabilities from 1 to 2 with sums from 3 to 3: must be at least 0 with sums of 1; give the "
        "softmax of logits"
    )


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^probabilities from nan to nan"):
        uncertainty.decompose(np.full((1, 1, 2), np.nan))


def test_wrong_shapes_labels_and_shares_are_refused() -> None:
    predicted = np.array([[0.5, 0.5]])
    with pytest.raises(UsageError, match=r"shape \(1, 2\): must be \(members, images, classes\)"):
        uncertainty.decompose(predicted)
    with pytest.raises(UsageError, match=r"labels of shape \(2,\): must be one for each of 1 images"):
        uncertainty.calibration(predicted, np.array([0, 1]))
    with pytest.raises(UsageError, match=r"labels from 2 to 2: must be classes from 0 to 1"):
        uncertainty.aleatoric_variance(predicted, np.array([2]))
    with pytest.raises(UsageError, match=r"bins = 0: there must be at least one"):
        uncertainty.calibration(predicted, np.array([0]), bins=0)
    with pytest.raises(UsageError, match=r"rejected = 1: must be at least 0 and below 1"):
        uncertainty.selective_accuracy(np.zeros(3), np.ones(3, bool), (1,))
    with pytest.raises(UsageError, match="must be one number for each image"):
        uncertainty.selective_accuracy(np.zeros(3), np.ones(2, bool))
