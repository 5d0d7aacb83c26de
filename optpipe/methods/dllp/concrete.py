"""Masks sampled from the gates' Bernoulli distributions, differentiable in the gates (Eqs 13 and 15).

E over Phi in Eq. 13 is taken by sampling: a unit's weights are multiplied by a mask z ~ Bernoulli(theta),
theta = sigmoid(phi). The Gumbel-softmax of two classes with logits (phi, 0) depends on the difference of two
Gumbel variables alone, which is logistic. With u uniform in (0, 1) and temperature T

    z = sigmoid((phi + log u - log(1 - u)) / T)                                                 relaxed
    z > 1/2  if and only if  log(u / (1 - u)) > -phi,  which has probability sigmoid(phi) = theta

at every temperature, so that the hard mask is an exact Bernoulli sample; as T falls the relaxed one tends to
it, and dz/dphi = z (1 - z) / T is the gradient that the hard one borrows (straight-through).

2:4 has no Bernoulli form: of each four weights exactly two stay. Gumbel variables g are added to the logits
once, a = phi + g, and the two largest stay: a choice of two in turn without putting back, with probability
p_i = softmax(phi)_i at first and p_i / (1 - p_j) after j. The relaxation takes two softmaxes in turn, the
mass of the first removed from the logits of the second (Xie and Ermon, 2019; Ploetz and Roth, 2018):

    b = softmax(a / T),   c = softmax((a + log(1 - b)) / T),   mask = b + c

which sums to two, and tends to the hard choice as T falls, for T < 1. An entry can pass one a little.

The paper names the trick and gives neither temperatures nor the form for groups; both are chosen here. All
noise is drawn in float32 on the CPU, so that a run draws the same masks on every device and in every type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optpipe.errors import RunError


def sample(gate_logits: Tensor, temperature: float, generator: torch.Generator, hard: bool = False) -> Tensor:
    """Masks like ``gate_logits`` (float32 at least), relaxed within [0, 1] or, hard, of 0 and 1.

    Both are differentiable in ``gate_logits``, the hard ones by the relaxed ones' gradient. ``generator`` is
    on the CPU. Raises RunError where the temperature is not above zero.
    """
    _check(temperature)
    uniform = _uniform(gate_logits, generator)
    noise = torch.log(uniform) - torch.log1p(-uniform)
    soft = torch.sigmoid((gate_logits + noise) / temperature)
    return _straight_through((soft > 0.5).to(soft.dtype), soft) if hard else soft


def two_of_four(
    gate_logits: Tensor, temperature: float, generator: torch.Generator, hard: bool = False
) -> Tensor:
    """Masks (..., 4) that keep two of each four, relaxed (sums of two) or, hard, of exactly two ones.

    ``gate_logits`` (..., 4); the rest as for :func:`sample`. Raises RunError where the last dimension is not
    four or the temperature is not above zero.
    """
    _check(temperature)
    _check_fours(gate_logits)
    keys = gate_logits - torch.log(-torch.log(_uniform(gate_logits, generator)))
    first = torch.softmax(keys / temperature, dim=-1)
    second = torch.softmax((keys + _log_rest(keys / temperature)) / temperature, dim=-1)
    soft = first + second
    if not hard:
        return soft
    chosen = torch.zeros_like(soft).scatter(-1, keys.topk(2, dim=-1).indices, 1.0)
    return _straight_through(chosen, soft)


def inclusion(gate_logits: Tensor) -> Tensor:
    """The probability (..., 4) that :func:`two_of_four` keeps each of four: the theta of 2:4; sums to two.

    p_i + sum over j != i of p_j p_i / (1 - p_j), with p = softmax(phi). Raises RunError where the last
    dimension is not four.
    """
    _check_fours(gate_logits)
    first = torch.softmax(gate_logits, dim=-1)
    after = torch.softmax(_without_each(gate_logits), dim=-1)
    return first + (first.unsqueeze(-1) * after).sum(dim=-2)


def temperature(step: int, steps: int, first: float, last: float) -> float:
    """The temperature at ``step`` of ``steps``, falling from ``first`` to ``last`` by equal factors.

    Raises RunError where one of the two is not above zero.
    """
    _check(first)
    _check(last)
    share = min(1.0, step / max(1, steps - 1))
    return float(first * (last / first) ** share)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise in the open interval (0, 1), drawn on the CPU; torch.rand may return zero."""
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float32)
    return drawn.clamp(min=2.0**-25, max=1 - 2.0**-24).to(dtype=_noise_dtype(like), device=like.device)


def _noise_dtype(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard`` to the last bit (the difference is exactly zero), with the gradient of ``soft``."""
    return hard + (soft - soft.detach())


def _without_each(logits: Tensor) -> Tensor:
    """Logits (..., 4, 4) whose row j is ``logits`` without its entry j."""
    own = torch.eye(4, dtype=torch.bool, device=logits.device)
    return logits.unsqueeze(-2).masked_fill(own, -torch.inf)


def _log_rest(logits: Tensor) -> Tensor:
    """log(1 - softmax) as the log of the others' sum: exact where the softmax rounds to one."""
    return torch.logsumexp(_without_each(logits), dim=-1) - torch.logsumexp(logits, dim=-1, keepdim=True)


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise RunError(
            f"a mask's temperature must be above zero, not {temperature}: near zero is nearly hard"
        )


def _check_fours(gate_logits: Tensor) -> None:
    if gate_logits.ndim == 0 or gate_logits.shape[-1] != 4:
        raise RunError(f"2:4 chooses among four: the gates' last dimension is of {tuple(gate_logits.shape)}")
