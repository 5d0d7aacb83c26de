"""What plans, requests and candidates are called in progress lines and tables."""

from __future__ import annotations

from optpipe.types import Candidate, Fit, Plan, Quality, Request, Step, Train, Trial


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


def request_name(request: Request) -> str:
    """What a request is called in progress lines."""
    if isinstance(request, Step | Fit):
        return request.name
    return f"trained {plan_name(request.plan)}" if isinstance(request, Train) else plan_name(request.plan)


def candidate_of(plan: Plan, trial: Trial, measured: Quality | None, *, chosen: bool) -> Candidate:
    """A trial with a latency as the report shows it."""
    latency = trial.latency
    # Candidates are never timed but beside the original.
    assert latency is not None and latency.ratio_to_original is not None and latency.ratio_ci95 is not None
    return Candidate(
        name=plan_name(plan),
        parameters=trial.parameters,
        macs=trial.macs,
        median_ms=latency.median_ms,
        ratio=latency.ratio_to_original,
        ratio_ci95=latency.ratio_ci95,
        quality=measured,
        chosen=chosen,
    )
