"""What training minimises. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def feature_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of two feature maps (N, C, H, W), in float32 (PRACTISE, Eqs 31 and 34).

    The paper writes a squared Frobenius norm, which is this times N*C*H*W: a constant that moves into the
    learning rate, and the mean keeps one rate fit for all networks.
    """
    return F.mse_loss(student.float(), teacher.float())


def mimicking_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], stage_weight: float
) -> torch.Tensor:
    """:func:`feature_mse` of the features, which come first, plus ``stage_weight`` times each stage's.

    The features alone are MiR's loss, by which PRACTISE recovers (Eq. 34); the stages are ours.
    """
    loss = feature_mse(student[0], teacher[0])
    for own, other in zip(student[1:], teacher[1:], strict=True):
        loss = loss + stage_weight * feature_mse(own, other)
    return loss


def label_errors(logits: torch.Tensor, labels: torch.Tensor, views: int) -> torch.Tensor:
    """The cross-entropy of each view of each image to its label, float32 (views, N) (EKG, Eq. 12).

    ``logits`` (views * N, classes) are those of one view of all images after the other, ``labels`` (N,).
    """
    return F.cross_entropy(logits.float(), labels.repeat(views), reduction="none").view(views, -1)


def distillation(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² times the divergence of the student's softened answers from the teacher's (EKG, Eq. 12).

    ``logits`` (views * N, classes) are those of one view of all images after the other, ``teacher``
    (N, classes); the mean over images, summed over views. EKG's equation has no T²: its gradient would
    shrink with the square of the temperature, and the factor (Hinton et al., 2015) keeps the weight of the
    teacher against the labels whatever the temperature.
    """
    views = len(logits) // len(teacher)
    wanted = F.log_softmax(teacher.float() / temperature, dim=1).repeat(views, 1)
    own = F.log_softmax(logits.float() / temperature, dim=1)
    divergence = F.kl_div(own, wanted, reduction="sum", log_target=True)
    return temperature**2 * divergence / len(teacher)


def cross_distillation(
    corrected: torch.Tensor, imitated: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The two divergences of networks whose features go through each other's classifier, at a temperature.

    With f the features before the classifier h, S the student, T the teacher, p(z) = softmax(z / t)::

        t² KL(p(h_T(f_T)) || p(h_S(f_T)))  +  t² KL(p(h_T(f_T)) || p(h_T(f_S)))
              teacher        corrected               teacher        imitated

    each the mean over images. All are logits (N, classes). The first term is what PRACTISE calls cross
    distillation (Eq. 17 in the manner of its Fig. 7b): the student's classifier learns from features without
    error. It says nothing of the student's features, and is zero where the classifier is the teacher's. The
    second is ours, for the features: an error in them costs what it changes in the teacher's answer, so that
    the loss teaches a backbone whose classifier is fixed. CD (Bai et al., 2020) crosses the networks in both
    directions too, layer by layer and by squared errors; here they cross once, where the features end.
    """
    return distillation(corrected, teacher, temperature) + distillation(imitated, teacher, temperature)
