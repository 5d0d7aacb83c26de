"""Several processes that train one network, by Lightning Fabric; for the processes that do so alone.

Fabric chooses the device, joins the processes and takes the means of the gradients while they are computed
(its DistributedDataParallel). Small sums go to torch.distributed directly: Fabric lets all processes wait for
each other before each, and a step has two for every batch-norm.
"""

from __future__ import annotations

import inspect
import os
import threading
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import distributed, nn
from torch.overrides import TorchFunctionMode

_TAKES = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_KEEPS: dict[str, Any] = {
    # The second is the name before torch 2.14.
    "forward_sync_buffers" if "forward_sync_buffers" in _TAKES else "broadcast_buffers": False
}
"""Statistics are of all processes' images already, and are not handed out again at each step."""
PATIENCE = timedelta(days=1)
"""How long one waits for another: who died is seen by the process that began them, and ends the others."""


class Together:
    """This process among others on one machine, each with its own device; :class:`~optpipe.tune.peers.Peers`.

    The environment's LOCAL_RANK says which one it is: the processes are begun by somebody else.
    """

    def __init__(self, size: int, device: str, meeting: Path, asked: threading.Event) -> None:
        """Join the others by a file ``meeting``, which none has made before; ``size`` are all of them.

        When this one is ``asked``, all stop after the step that they are at.
        """
        self.rank = int(os.environ["LOCAL_RANK"])
        self.size = size
        self._device = device
        self._asked = asked
        backend = "nccl" if device == "cuda" else "gloo"
        if device == "cuda":
            torch.cuda.set_device(self.rank)
        # A file, where Fabric would open a port that anybody can connect to.
        distributed.init_process_group(
            backend,
            init_method=meeting.absolute().as_uri(),
            rank=self.rank,
            world_size=size,
            timeout=PATIENCE,
        )
        strategy = DDPStrategy(process_group_backend=backend, **_KEEPS)
        self._fabric = Fabric(
            accelerator=device, devices=size, strategy=strategy, plugins=[LightningEnvironment()]
        )
        self._fabric.launch()

    def joined(self, module: nn.Module) -> nn.Module:
        """As :class:`~optpipe.tune.peers.Peers` says."""
        joined: nn.Module = self._fabric.setup_module(module, move_to_device=False)
        return joined

    def apart(self, module: nn.Module) -> AbstractContextManager[object]:
        """As :class:`~optpipe.tune.peers.Peers` says."""
        return self._fabric.no_backward_sync(module)  # type: ignore[arg-type]

    def backward(self, loss: torch.Tensor) -> None:
        """As :class:`~optpipe.tune.peers.Peers` says."""
        self._fabric.backward(loss)

    def normalised(self) -> AbstractContextManager[object]:
        """As :class:`~optpipe.tune.peers.Peers` says."""
        return Normalised()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """As :class:`~optpipe.tune.peers.Peers` says."""
        summed = values.detach().to(self._device, copy=True)
        distributed.all_reduce(summed)
        return summed.to(values.device)

    def agreed(self, stop: bool) -> bool:
        """As :class:`~optpipe.tune.peers.Peers` says."""
        return bool(self.total(torch.tensor(float(stop or self._asked.is_set()))))

    def leave(self) -> None:
        """Part from the others, when all have come so far."""
        self.total(torch.zeros(1))
        distributed.destroy_process_group()


class Normalised(TorchFunctionMode):
    """Within it each call of ``F.batch_norm`` in training takes its statistics of all processes' images.

    torch's own SyncBatchNorm is for GPUs alone, and takes the place of a network's modules.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any call of torch within the mode."""
        if func is F.batch_norm:
            return batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.batch_norm`` of x (N, C, ...), N being the images of this process, over those of all processes.

    Differentiable through the statistics, in every process. The processes may have different numbers of
    images, but each at least one.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    values = x if x.dtype == torch.float64 else x.float()
    own_var, own_mean = torch.var_mean(values, [0, *range(2, x.dim())], correction=0)
    # One exchange for all, and in float64: the difference below costs no digits then, however large the mean.
    count, means = x.numel() // x.shape[1], own_mean.double()
    squares = own_var.double() + means.square()
    sums = torch.cat([means.new_full((1,), count), count * means, count * squares])
    sums = _Total.apply(sums)
    number, (first, second) = sums[0], sums[1:].view(2, -1)
    mean = first / number
    variance = (second / number - mean.square()).clamp(min=0)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * number / (number - 1)).to(running_var), momentum)
    scale = torch.rsqrt(variance + eps).to(values.dtype)
    scale = scale if weight is None else scale * weight
    shift = -mean.to(values.dtype) * scale
    shift = shift if bias is None else shift + bias
    shape = (1, -1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(shape), values, scale.view(shape)).to(x.dtype)


class _Total(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(values: torch.Tensor) -> torch.Tensor:
    summed = values.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(summed)
    return summed
