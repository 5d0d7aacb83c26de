"""Filter scores: EKG's own (Eq. 9) and those that it is compared with.

Every scorer gives one number for each channel of each group, low where the channel may go. Those that look
at the weights alone are in :mod:`optpipe.methods._norms`.
"""

from __future__ import annotations

from typing import Literal, TypeGuard

from optpipe.methods._norms import Norm

Score = Literal["taylor", "gbn", "l1", "l2", "fpgm", "random"]


def of_weights_alone(score: Score) -> TypeGuard[Norm]:
    """Whether a score looks at no image: then the scores of two layers cannot be compared.

    The others estimate the change of the reward.
    """
    return score not in {"taylor", "gbn"}
