"""Short names of plans."""

from __future__ import annotations

from optpipe.types import Plan


def plan_name(plan: Plan) -> str:
    """A short name for a plan, for progress bars and tables."""
    parts: list[str] = []
    if plan.drop_blocks:
        names = " ".join(plan.drop_blocks)
        parts.append(
            f"without {names}" if len(plan.drop_blocks) <= 3 else f"without {len(plan.drop_blocks)} blocks"
        )
    if plan.keep_channels:
        parts.append(f"{len(plan.keep_channels)} groups narrowed")
    if plan.input_hw:
        parts.append(f"at {plan.input_hw[0]}x{plan.input_hw[1]}")
    return ", ".join(parts) or "original"
