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
    own: torch.Tensor, crossed: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """What the student's classifier gets wrong on its own features and on the teacher's, at a temperature.

    With f the features before the classifier h, S the student, T the teacher, p(z) = softmax(z / t)::

        t² KL(p(h_T(f_T)) || p(h_S(f_T)))  +  t² KL(p(h_T(f_T)) || p(h_S(f_S)))
              teacher        crossed                teacher        own

    each the mean over images; all are logits (N, classes). The first term is the cross distillation of
    PRACTISE (the classification in Eq. 17, as its Fig. 7b draws it): features without error teach the
    classifier. It says nothing of the student's features and is zero while the classifier is the teacher's,
    so that alone it would never move one that was inherited. The second (Fig. 7a) is added by us: it teaches
    the backbone under a fixed classifier, and moves a free one to the features that it will see, from which
    the first holds it back. CD (Bai et al., 2020) crosses the networks at each layer and by squared errors;
    here they cross once, where the features end.
    """
    return distillation(crossed, teacher, temperature) + distillation(own, teacher, temperature)
