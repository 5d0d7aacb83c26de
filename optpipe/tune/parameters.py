"""Which parameters are trained, and by which optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from optpipe import graph
from optpipe.errors import RunError
from optpipe.types import Tune


def trainable(student: fx.GraphModule, tune: Tune) -> dict[str, nn.Parameter]:
    """The parameters to train by name, with modes and gradients set accordingly.

    Raises:
        RunError: there are none.
    """
    student.eval().requires_grad_(False)
    part = student if tune.trainable == "all" else graph.observe(student)
    if tune.trainable == "adaptors":
        found = {
            f"{path}.{name}": parameter
            for path, adaptor in graph.adaptors(student).items()
            for name, parameter in adaptor.named_parameters()
        }
    else:
        found = dict(part.named_parameters())
    if not found:
        raise RunError(f"nothing to train: the candidate has no {tune.trainable}")
    for parameter in found.values():
        parameter.requires_grad_(True)
    if tune.batch_norm == "train":
        for module in part.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
    return found


def optimizer_of(parameters: Sequence[nn.Parameter], tune: Tune) -> torch.optim.Optimizer:
    """The optimizer that ``tune`` names."""
    if tune.optimizer == "adamw":
        return torch.optim.AdamW(parameters, tune.lr, weight_decay=tune.weight_decay)
    return torch.optim.SGD(
        parameters,
        tune.lr,
        momentum=tune.momentum,
        nesterov=tune.nesterov,
        weight_decay=tune.weight_decay,
    )
