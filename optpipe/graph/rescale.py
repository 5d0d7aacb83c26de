"""Kernels that lost inputs, brought back to the norms they had.

EKG's fine-tuning starts from there: with fewer inputs a kernel is shorter, and in front of a batch-norm the
same learning rate then turns it further.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import fx, nn

from optpipe.graph.trace import module_of, trace
from optpipe.graph.widths import removals
from optpipe.types import Plan


@torch.no_grad()
def rescale(
    source: nn.Module, plan: Plan, input_shape: tuple[int, int, int], candidate: fx.GraphModule
) -> fx.GraphModule:
    """A copy of ``candidate`` in which each kernel that lost inputs has the L2 norm it has in ``source``.

    ``plan`` is what made the candidate of ``source``; a kernel is one output's filter. Only convolutions
    that a batch-norm alone reads are rescaled, with their biases: the batch-norm takes the factor s out
    again. Its running mean becomes s times, its running variance so much larger that the network computes
    what it did exactly; with statistics of the batch it does so but for the batch-norm's eps.
    Raises UsageError for a plan that does not fit the source.
    """
    original = trace(source, input_shape)
    removed = removals(original, plan.keep_channels, input_shape)
    result = copy.deepcopy(candidate)
    for path, norm in _normed(result).items():
        cut = removed.get(path)
        if cut is None or not cut.inputs:
            continue
        before, after = original.get_submodule(path), result.get_submodule(path)
        if isinstance(before, nn.Conv2d) and isinstance(after, nn.Conv2d):
            kept = [index for index in range(before.out_channels) if index not in cut.outputs]
            _scale(after, norm, _norms(before)[kept].to(after.weight) / _norms(after))
    return result


def _normed(network: fx.GraphModule) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Each convolution that one batch-norm, and nothing else, reads, by path; both are called once."""
    calls = Counter(id(module_of(network, node)) for node in network.graph.nodes if node.op == "call_module")
    found = {}
    for node in network.graph.nodes:
        if not isinstance(module_of(network, node), nn.Conv2d) or len(node.users) != 1:
            continue
        norm = module_of(network, next(iter(node.users)))
        alone = calls[id(module_of(network, node))] == calls[id(norm)] == 1
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and alone:
            found[str(node.target)] = norm
    return found


def _norms(layer: nn.Conv2d) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(layer.weight.flatten(1), dim=1)
    return norms


def _scale(layer: nn.Conv2d, norm: nn.modules.batchnorm._BatchNorm, factors: torch.Tensor) -> None:
    """Multiply a convolution's outputs, and let the batch-norm behind it take the factors out again."""
    factors = torch.where(factors.isfinite(), factors, 1)  # a kernel of zeros has no direction
    layer.weight *= factors[:, None, None, None]
    if layer.bias is not None:
        layer.bias *= factors
    if norm.running_mean is not None and norm.running_var is not None:
        norm.running_mean *= factors
        # s² (v + eps) - eps, which is not negative: a kernel that lost inputs only grows, s >= 1.
        norm.running_var.add_(norm.eps).mul_(factors.square()).sub_(norm.eps).clamp_(min=0)
