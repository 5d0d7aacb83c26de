"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from optpipe.losses import cross_distillation, distillation, feature_mse, label_errors, mimicking_loss


def test_feature_mse_is_the_mean_square_over_all_elements() -> None:
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[5.0, 1.0]]]])
    # Differences 1, 0, -2, 3: the squares sum to 14 over 4 elements.
    assert feature_mse(student, teacher).item() == pytest.approx(14 / 4)


def test_feature_mse_is_the_papers_squared_norm_divided_by_the_number_of_elements() -> None:
    student, teacher = torch.zeros(2, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
    assert feature_mse(student, teacher).item() == pytest.approx((25 + 1) / 4)


def test_feature_mse_has_the_gradient_of_a_mean() -> None:
    student = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    feature_mse(student, torch.tensor([[[[0.0, 4.0]]]])).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert student.grad.flatten().tolist() == [1.0, -2.0]


def test_feature_mse_of_half_precision_is_computed_in_float32() -> None:
    # 300 squared is beyond float16, and 256 + 1 is no bfloat16.
    wide = feature_mse(torch.full((1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1).half())
    fine = feature_mse(torch.tensor([[[[16.0, 1.0]]]]).bfloat16(), torch.zeros(1, 1, 1, 2).bfloat16())
    assert wide.item() == 90000.0
    assert fine.item() == 128.5


def test_mimicking_loss_adds_the_weighted_errors_of_the_stages_to_that_of_the_features() -> None:
    zero = torch.zeros(1, 1, 1, 1)
    student = [zero + 1, zero + 2, zero + 3]
    assert mimicking_loss(student, [zero, zero, zero], 0.5).item() == pytest.approx(1 + 0.5 * (4 + 9))


def test_mimicking_loss_of_the_features_alone_is_their_mse() -> None:
    student, teacher = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 2.0]]]])
    assert mimicking_loss([student], [teacher], 1.0).item() == pytest.approx(2.0)


def test_mimicking_loss_refuses_networks_observed_at_different_stages() -> None:
    zero = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="longer"):
        mimicking_loss([zero], [zero, zero], 1.0)


def test_label_errors_are_the_cross_entropies_of_each_view_of_each_image() -> None:
    # Odds of 1:3 and 1:1 in the first view, of 3:1 and 1:1 in the second.
    logits = torch.tensor([[0.0, math.log(3)], [2.0, 2.0], [math.log(3), 0.0], [5.0, 5.0]])
    errors = label_errors(logits, torch.tensor([1, 0]), views=2)
    expected = [[-math.log(3 / 4), math.log(2)], [-math.log(1 / 4), math.log(2)]]
    assert errors.tolist() == [pytest.approx(row) for row in expected]


def test_distillation_is_the_divergence_of_the_softened_student_times_the_squared_temperature() -> None:
    # Divided by T = 2 the teacher's odds are 3:1, the student's 1:1.
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.tensor([[1.0, 1.0]])
    divergence = 3 / 4 * math.log((3 / 4) / (1 / 2)) + 1 / 4 * math.log((1 / 4) / (1 / 2))
    assert distillation(student, teacher, 2.0).item() == pytest.approx(4 * divergence)


def test_distillation_is_the_mean_over_images_summed_over_views() -> None:
    teacher = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    flat, same = torch.zeros(2, 2), teacher.clone()
    one = distillation(flat, teacher, 1.0).item()
    assert one == pytest.approx((3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)) / 2)
    assert distillation(torch.cat([flat, flat]), teacher, 1.0).item() == pytest.approx(2 * one)
    assert distillation(torch.cat([flat, same]), teacher, 1.0).item() == pytest.approx(one)


def test_distillation_pulls_about_as_hard_at_any_temperature() -> None:
    pulls = []
    for temperature in (10.0, 100.0):
        student = torch.zeros(1, 3, requires_grad=True)
        distillation(student, torch.tensor([[1.0, 0.0, -1.0]]), temperature).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        pulls.append(student.grad[0, 0].item())
    # For small logits the gradient tends to (student - teacher) / classes.
    assert pulls == pytest.approx([-1 / 3, -1 / 3], rel=0.05)


def test_cross_distillation_is_the_divergence_of_own_and_crossed_answers_from_the_teachers() -> None:
    # Divided by T = 2 the teacher's odds are 3:1, those on its features 1:1, on the student's own 1:3.
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    crossed, own = torch.tensor([[4.0, 4.0]]), torch.tensor([[0.0, 2 * math.log(3)]])
    first = 3 / 4 * math.log((3 / 4) / (1 / 2)) + 1 / 4 * math.log((1 / 4) / (1 / 2))
    second = 3 / 4 * math.log(3) + 1 / 4 * math.log(1 / 3)
    assert cross_distillation(own, crossed, teacher, 2.0).item() == pytest.approx(4 * (first + second))
    assert cross_distillation(own, teacher, teacher, 2.0).item() == pytest.approx(4 * second)
    assert cross_distillation(teacher, crossed, teacher, 2.0).item() == pytest.approx(4 * first)


def test_losses_on_logits_are_computed_in_float32() -> None:
    wide = torch.tensor([[16.0, 1.0]]).bfloat16()
    assert label_errors(wide, torch.tensor([1]), 1).dtype == torch.float32
    assert distillation(wide, wide, 4.0).dtype == torch.float32
    assert distillation(wide, wide, 4.0).item() == pytest.approx(0.0, abs=1e-6)
