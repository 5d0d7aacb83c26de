"""What no search can be made of, said before anything is measured."""

from __future__ import annotations

import math

from optpipe.errors import UsageError
from optpipe.methods._meter import refuse_blocks, refuse_sparsity
from optpipe.methods.dllp.config import Config
from optpipe.types import Budget, Images, ModelGraph, Tune


def check(
    shown: ModelGraph,
    calibration: Images,
    budget: Budget,
    config: Config,
    recover: Tune,
    validation: Images | None = None,
) -> None:
    """UsageError for settings, a budget, a network or a recovery that no search can be made of."""
    _check_settings(config)
    _check_budget(budget, config)
    if config.granularity == "filter" and not any(group.prunable for group in shown.groups):
        reason = next((group.why_not for group in shown.groups), "it has no layer")
        raise UsageError(
            f"[method] dllp: the network has no channel group that can be narrowed ({reason}); `optpipe "
            'inspect` says why not for each; granularity = "weight" needs none'
        )
    if config.granularity != "filter" and (recover.steps or recover.epochs):
        raise UsageError(
            f"[recover] steps = {recover.steps}: a recovery would fill the zeros of granularity = "
            f'"{config.granularity}" again; leave [recover] out, and raise [method] epochs or settle'
        )


def _check_settings(config: Config) -> None:
    positive = "must be above 0 and finite"
    least, share = "must be at least 1", "must be between 0 and 1"
    first, last = config.temperature
    checks: list[tuple[str, bool, str]] = [
        ("epochs", 0 < config.epochs < math.inf, positive),
        ("settle", 0 <= config.settle < 1, "must be a share of the epochs, at least 0 and below 1"),
        ("batch", config.batch >= 1, least),
        ("lr", 0 < config.lr < math.inf, positive),
        ("momentum", 0 <= config.momentum < 1, "must be at least 0 and below 1"),
        ("particles", config.particles >= 1, least),
        ("beta", 0 <= config.beta < math.inf, "must not be below 0"),
        ("spike", 1 < config.spike <= 1e9, "must be above 1, the slab's order, and at most 1e9"),
        (
            "temperature",
            0 < last <= first < math.inf,
            "must fall, and be above 0",
        ),
        ("keep", 0 < config.keep < 1, share),
        ("travel", 0 < config.travel < math.inf, positive),
        ("sharpen", 1 <= config.sharpen < math.inf, "must be at least 1"),
        ("jitter", 0 <= config.jitter < math.inf, "must not be below 0"),
        ("builds", config.builds >= 1, least),
        ("histograms", config.histograms >= 0, "must be a number of layers, or 0 for all"),
    ]
    for key, good, message in checks:
        if not good:
            value = getattr(config, key)
            text = list(value) if isinstance(value, tuple) else value
            raise UsageError(f"[method] {key} = {text}: {message}")
    if config.start == "scratch" and config.score == "magnitude":
        raise UsageError(
            '[method] start = "scratch": new weights have no magnitude to go by; set score = "posterior"'
        )


def _check_budget(budget: Budget, config: Config) -> None:
    refuse_blocks(budget, "dllp")
    if config.granularity == "filter":
        refuse_sparsity(budget, 'granularity = "filter"')
    if config.granularity != "filter" and budget.sparsity is None:
        raise UsageError(
            f'[budget]: granularity = "{config.granularity}" leaves the structure as it is, most engines as '
            "slow: give sparsity, the share of the weights that becomes zero"
        )
