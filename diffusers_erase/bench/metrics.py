"""Pure functions from judged labels to estimates with intervals. Knows no model, no picture and no file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A share with its 95 % interval (Wilson) and the number of pictures that it rests on; no pictures, no value."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of_share(cls, hits: Sequence[bool]) -> "Estimate":
        """The share of True in `hits`.

        >>> Estimate.of_share([True, True, False, True])
        Estimate(value=0.75, low=0.30064184258240396, high=0.9544127391902995, n=4)
        """
        n = len(hits)
        if n == 0:
            return cls(math.nan, 0.0, 1.0, 0)
        z, p = 1.959963984540054, sum(hits) / n
        centre, spread = (p + z * z / (2 * n)) / (1 + z * z / n), math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        half = z * spread / (1 + z * z / n)
        return cls(p, max(0.0, centre - half), min(1.0, centre + half), n)

    def __str__(self) -> str:
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}], n = {self.n}" if self.n else "no pictures"


def share_kept(expected: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Estimate:
    """Of the pictures that were right before (judged as expected), the share that still are.

    Pairs share prompt and seed. What the unedited model got wrong says nothing about an erasure and is left out. For an
    erased concept the same number is called the share left.
    """
    return Estimate.of_share([a == e for e, b, a in zip(expected, before, after, strict=True) if b == e])
