"""The loss as a function of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optpipe.errors import RunError, UsageError

BatchNorm = Literal["batch", "running"]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Expansion:
    """The loss, its gradient (P,) and its Hessian's product with a vector (P,), at one point.

    ``hessian_vector`` differentiates twice and keeps the graph of the first time for all its calls: about
    the memory of a training step, thrice. Not JSON-able.
    """

    loss: float
    gradient: Tensor
    hessian_vector: Product


@dataclass(frozen=True, slots=True)
class Objective:
    """The mean cross-entropy on fixed images as a function of all P parameters, as one vector (P,).

    Make it with :func:`objective`. Not JSON-able.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor

    def origin(self) -> Tensor:
        """The network's own parameters, in the order of ``named_parameters``."""
        return nn.utils.parameters_to_vector(self.network.parameters()).detach()

    def loss(self, at: Tensor) -> float:
        """The loss where the parameters are ``at``."""
        with torch.no_grad():
            return float(self._loss(at))

    def expand(self, at: Tensor) -> Expansion:
        """The loss to second order where the parameters are ``at``.

        Raises RunError where the loss or its gradient is no finite number.
        """
        point = at.detach().clone().requires_grad_()
        loss = self._loss(point)
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        if not bool(loss.isfinite()) or not bool(slope.isfinite().all()):
            raise RunError(
                f"the loss is {float(loss.detach()):g} at this point of the landscape and has no finite "
                "gradient; look less far around the weights (reach)"
            )

        def hessian_vector(vector: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(slope, point, vector, retain_graph=True, materialize_grads=True)
            return product

        return Expansion(float(loss.detach()), slope.detach(), hessian_vector)

    def _loss(self, at: Tensor) -> Tensor:
        parameters = dict(self.network.named_parameters())
        parts = torch.split(at, [parameter.numel() for parameter in parameters.values()])
        values = {
            name: part.view_as(parameter)
            for (name, parameter), part in zip(parameters.items(), parts, strict=True)
        }
        logits = torch.func.functional_call(self.network, values, (self.images,))
        return F.cross_entropy(logits, self.labels)


def objective(
    network: nn.Module, images: Tensor, labels: Tensor, batch_norm: BatchNorm = "batch"
) -> Objective:
    """The loss of a copy of ``network`` on ``images`` (N, C, H, W) with classes ``labels`` (N,).

    ``batch_norm``: "batch" normalises by the mean and variance of these N images together, as EKG's search
    does; "running" by the stored ones, as the network deploys. All else is in eval mode.
    Raises UsageError where images and labels are not equally many or the network has no parameters.
    """
    if labels.shape != images.shape[:1] or not len(images):
        raise UsageError(
            f"{len(images)} images and labels of shape {tuple(labels.shape)}: one label an image"
        )
    own = copy.deepcopy(network).eval().requires_grad_(True)
    first = next(own.parameters(), None)
    if first is None:
        raise UsageError(f"{type(network).__name__} has no parameters, so its loss has no landscape")
    if batch_norm == "batch":
        for module in own.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # Without stored statistics a layer uses the batch's, also in eval mode.
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    return Objective(own, images.to(first.device, first.dtype), labels.to(first.device))
