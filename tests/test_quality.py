from __future__ import annotations

import numpy as np
import pytest

from optpipe.quality import agreement, score, wilson_ci95


def test_wilson_interval_is_that_of_the_textbook() -> None:
    # 8 of 10: centre (0.8 + z²/20) / (1 + z²/10) = 0.716740, half-width 0.226723.
    assert wilson_ci95(8, 10) == pytest.approx((0.490163, 0.943318), abs=1e-6)
    # 90 of 100: centre 0.91920730 / 1.03841459 = 0.885203, half-width 0.059568.
    assert wilson_ci95(90, 100) == pytest.approx((0.825634, 0.944771), abs=1e-6)


@pytest.mark.parametrize(("successes", "count"), [(0, 1), (1, 3), (387, 423), (10_000, 10_000)])
def test_wilson_interval_is_that_of_scipy(successes: int, count: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert wilson_ci95(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_stays_within_0_and_1_at_the_ends() -> None:
    low, high = wilson_ci95(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.277533, abs=1e-6)
    low, high = wilson_ci95(10, 10)
    assert low == pytest.approx(1 - 0.277533, abs=1e-6)
    assert 1 - 1e-9 < high <= 1.0


def test_more_images_narrow_the_interval() -> None:
    narrow, wide = wilson_ci95(900, 1000), wilson_ci95(90, 100)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_labels_give_top1_and_from_six_classes_on_top5() -> None:
    logits = np.array([[9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], dtype=np.float32)
    # The first is right, the second is right only among five, the third is the least likely class.
    found = score(logits, np.array([0, 1, 5]), logits, "evaluation")
    assert (found.metric, found.count, found.split) == ("top1", 3, "evaluation")
    assert found.value == pytest.approx(1 / 3)
    assert found.top5 == pytest.approx(2 / 3)
    assert found.ci95 == wilson_ci95(1, 3)


def test_five_classes_have_no_top5() -> None:
    logits = np.eye(5, dtype=np.float32)
    found = score(logits, np.arange(5), logits, "evaluation")
    assert (found.value, found.top5) == (1.0, None)


def test_without_labels_the_score_is_agreement_with_the_reference() -> None:
    logits = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    reference = np.array([[2, 0], [0, 3], [0, 1], [5, 1]], dtype=np.float32)
    found = score(logits, None, reference, "calibration")
    assert found == agreement(logits, reference, "calibration")
    assert (found.metric, found.value, found.count) == ("agreement", 0.75, 4)
    assert found.ci95 == wilson_ci95(3, 4)
