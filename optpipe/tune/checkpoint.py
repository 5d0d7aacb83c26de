"""A training's whole state as one flat dictionary of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from optpipe.types import Objective


class Checkpoint(Protocol):
    """Where training leaves its state; ``save`` is called after every ``every`` steps."""

    @property
    def every(self) -> int:
        """Steps between two checkpoints."""

    def load(self) -> dict[str, torch.Tensor] | None:
        """The last state saved, or None."""

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the state."""


def snapshot(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
    step: int,
    loss_first: float,
) -> dict[str, torch.Tensor]:
    """Everything that training needs to go on."""
    state = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    for name, parameter in parameters.items():
        for kind, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                state[f"optimizer.{kind}.{name}"] = value
    state |= {f"objective.{name}": tensor for name, tensor in objective.state().items()}
    state["step"] = torch.tensor(step)
    state["loss_first"] = torch.tensor(loss_first, dtype=torch.float64)
    return {name: tensor.cpu() for name, tensor in state.items()}


def restore(
    saved: Mapping[str, torch.Tensor],
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    objective: Objective,
) -> int:
    """Put a saved state back; returns the steps that were done."""
    student.load_state_dict(_part(saved, "model."))
    objective.restore(_part(saved, "objective."))
    for key, value in _part(saved, "optimizer.").items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        like = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][kind] = like.copy_(value)
    return int(saved["step"])


def _part(saved: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
