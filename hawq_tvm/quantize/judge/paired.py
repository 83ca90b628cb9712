"""Whether two models differ on the same images by more than chance: McNemar's exact test, and an interval of the
difference.

Both look at the images alone that one model has right and the other wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CONFIDENCE = 0.95
# The interval does not touch 1 or -1 where the score is without meaning.
EDGE = 1e-12


@dataclass(frozen=True)
class Paired:
    """How two shares of right answers on the same images differ.

    difference: gained less lost, of all images.  low, high: its CONFIDENCE interval.  p: the chance of a split of the
    images that changed sides at least as uneven as this one, were both sides equally likely.
    """

    difference: float
    low: float
    high: float
    p: float


def paired(lost: int, gained: int, images: int) -> Paired:
    """McNemar's exact test (two-sided binomial) and Tango's score interval of the paired difference.

    lost, gained: images that only the other, and only this model has right, together at most `images`, at least 1.
    Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    1998; its interval keeps its word for few images, too, where the difference's standard error says 0.
    """
    from scipy.stats import binomtest, norm

    found, changed = (gained - lost) / images, lost + gained
    wide = float(norm.ppf((1 + CONFIDENCE) / 2))
    low = _root(gained, lost, images, wide, -1 + EDGE, found)
    high = _root(gained, lost, images, -wide, found, 1 - EDGE)
    return Paired(found, low, high, float(binomtest(lost, changed).pvalue) if changed else 1.0)


def _root(gained: int, lost: int, images: int, wanted: float, low: float, high: float) -> float:
    """The difference between two bounds whose score is the wanted one; the outer bound where none has."""

    from scipy.optimize import brentq

    def apart(difference: float) -> float:
        return _score(gained, lost, images, difference) - wanted

    ends = apart(low), apart(high)
    if ends[0] * ends[1] > 0:
        return -1.0 if wanted > 0 else 1.0
    return float(brentq(apart, low, high, xtol=1e-12))


def _score(gained: int, lost: int, images: int, difference: float) -> float:
    """How many standard errors what was counted is above a difference, with the likeliest shares of which that is the
    difference.
    """
    linear = -gained - lost + (2 * images - gained + lost) * difference
    constant = -lost * difference * (1 - difference)
    only_lost = (math.sqrt(max(linear**2 - 8 * images * constant, 0)) - linear) / (4 * images)
    variance = images * (2 * only_lost + difference * (1 - difference))
    above = gained - lost - images * difference
    return above / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, above) if above else 0.0
