"""How much more images would help a recovery, in words. Pure."""

from __future__ import annotations

from optpipe.report.schema import HalvesReport, Interval, LeakageReport

WORTH = 0.05
"""From which share of the unseen images' error on a saving counts as help.

A choice: in a look at the shipped digits network a saving of this size left top-1 where it was.
"""
APART = 1.5
"""From which ratio before recovery the two sets of images are called different in kind; a choice."""


def advice(found: LeakageReport) -> str:
    """One sentence: whether to gather more images, judged by what twice as many would save.

    Rests on the measured halves where there are any, else on the gap between seen and unseen images.
    """
    low, high = found.control.ci95
    if found.halves is None and (low > APART or high < 1 / APART):
        return (
            "Calibration and evaluation images differ in kind: the pruned network's error on the latter was "
            f"{_times(found.control)} that on the former before anything was trained. Images like those "
            "that the network is for would help before more of the same do."
        )
    saving = found.doubling if found.halves is None else _doubling(found.halves)
    low, high = saving.ci95
    if low >= WORTH:
        return (
            "More images would help: twice as many should cut the error on unseen images by "
            f"{_share(saving)}."
        )
    if high < WORTH:
        return (
            "More images would help little: twice as many should cut the error on unseen images by "
            f"{_share(saving)}. What is left is the structure's doing, or the recovery's: drop less, or "
            "train for longer."
        )
    return (
        f"More images may help: twice as many should cut the error on unseen images by {_share(saving)}, "
        f"which may or may not be the {WORTH:.0%} from which on it is worth the effort."
    )


def section(found: LeakageReport | None) -> str:
    """The report's paragraph; nothing where recovery was not by mimicking."""
    if found is None:
        return ""
    lines = [
        f"**Would more images help?** {found.advice}",
        f"After recovery the feature error (PRACTISE, Eq. 34) is {found.seen:.4g} on {found.seen_images} "
        f"calibration images and {found.unseen:.4g} on {found.unseen_images} evaluation images, which no "
        f"training saw: {_times(found.ratio)}; before recovery it was {_times(found.control)}. By the "
        "scatter of fitted weights (Claim 3), which holds near the end of a training, half of what recovery "
        "added to the gap is due to the number of images, so that by this alone twice as many would cut the "
        f"unseen error by {_share(found.doubling)}.",
    ]
    if found.halves is not None:
        lines.append(_halves(found.halves))
    return " ".join(lines)


def _halves(halves: HalvesReport) -> str:
    return (
        f"**Loss leakage (Eq. 11).** Between networks recovered on two halves of {halves.images} calibration "
        f"images the error on unseen images lies {halves.leakage.value:.3g} ({halves.leakage.ci95[0]:.3g} to "
        f"{halves.leakage.ci95[1]:.3g}) below the chord, {_share(halves.relative)} of the "
        f"{halves.whole:.4g} of the network recovered on all. From a half to all images the error really "
        f"fell by {_share(halves.union)} (Eq. 12)."
    )


def _doubling(halves: HalvesReport) -> Interval:
    """What twice as many images would save: half of what the last doubling did, as the excess falls by 1 / n.

    Eq. 11 estimates the same from the line alone; what the union really took away is the direct measure.
    """
    low, high = halves.union.ci95
    return Interval(halves.union.value / 2, (low / 2, high / 2))


def _share(found: Interval) -> str:
    """A share in percent; one below 0 is no saving."""
    low, high = found.ci95
    return f"{max(found.value, 0):.1%} ({max(low, 0):.1%} to {max(high, 0):.1%})"


def _times(found: Interval) -> str:
    return f"{found.value:.2f} times ({found.ci95[0]:.2f} to {found.ci95[1]:.2f})"
