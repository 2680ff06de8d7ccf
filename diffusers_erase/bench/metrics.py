"""Pure functions from judged labels and scores to estimates with intervals. Knows no model, no picture and no file.

A metric is computed in two steps. *Partial sums* (`Share`, `Mean`) count what one shard saw and are merged by `+`, exactly,
in any order; `.estimate()` turns them into an `Estimate`. An unknown answer (None, NaN) never counts for or against: it
lowers the coverage, and `bounds` say what the value could have been.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
"""Every interval is a 95 % interval."""

DRAWS = 2000
"""Resamples of a bootstrap: their 2.5 % ends have a Monte Carlo error of about a tenth of the interval's half width."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, how many pictures it rests on, and what could not be told."""

    value: float
    """NaN where there was nothing to count."""
    low: float
    high: float
    n: int
    """Pictures (or pairs) with an answer."""
    coverage: float = 1.0
    """Share of the pictures that should have counted for which there is an answer."""
    bounds: tuple[float, float] | None = None
    """The least and the greatest value that other answers to the unknown pictures could have given; None without unknown ones."""

    @classmethod
    def of_share(cls, hits: Iterable[bool | None]) -> "Estimate":
        """The share of True in `hits`, with Wilson's interval; None is unknown.

        >>> print(Estimate.of_share([True, True, False, True]))
        75% [30%, 95%], n = 4
        """
        return Share.of(hits).estimate()

    @property
    def complement(self) -> "Estimate":
        """1 − value: what is gone, from what is left."""
        bounds = None if self.bounds is None else (1 - self.bounds[1], 1 - self.bounds[0])
        return replace(self, value=1 - self.value, low=1 - self.high, high=1 - self.low, bounds=bounds)

    def __str__(self) -> str:
        if not self.n:
            return "no pictures" if self.coverage == 1 else "no answers"
        text = f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}], n = {self.n}"
        return text if self.coverage == 1 else f"{text}, coverage {self.coverage:.0%}"


@dataclass(frozen=True)
class Share:
    """Partial sums of a share, exact and mergeable: `Share.of(first) + Share.of(second)` is the share of both.

    Unknown pictures are counted by what they could have been: a hit, a miss, or (if it is not even known whether they
    count) neither.
    """

    hits: int = 0
    n: int = 0
    """Pictures with an answer."""
    unknown: int = 0
    """Pictures without, that may count."""
    may_hit: int = 0
    """Of the unknown, those that could be a hit."""
    may_miss: int = 0
    """Of the unknown, those that could be a miss."""

    @classmethod
    def of(cls, hits: Iterable[bool | None]) -> "Share":
        """Counts of True among True, False and None (unknown)."""
        known = (listed := list(hits)).count(True), listed.count(False)
        unknown = len(listed) - sum(known)
        return cls(known[0], sum(known), unknown, unknown, unknown)

    def __add__(self, other: "Share") -> "Share":
        return Share(
            self.hits + other.hits,
            self.n + other.n,
            self.unknown + other.unknown,
            self.may_hit + other.may_hit,
            self.may_miss + other.may_miss,
        )

    def estimate(self) -> Estimate:
        """The share among the known, with Wilson's score interval (Wilson 1927, JASA 22): sound at 0 % and 100 % too."""
        coverage = self.n / (self.n + self.unknown) if self.n + self.unknown else 1.0
        if not self.n:
            return Estimate(math.nan, 0.0, 1.0, 0, coverage, (0.0, 1.0) if self.unknown else None)
        p, n = self.hits / self.n, self.n
        centre, spread = (p + Z * Z / (2 * n)) / (1 + Z * Z / n), math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        half = Z * spread / (1 + Z * Z / n)
        low, high = max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
        worst, best = self.hits / (n + self.may_miss), (self.hits + self.may_hit) / (n + self.may_hit)
        return Estimate(p, low, high, n, coverage, (worst, best) if self.unknown else None)


def right(expected: Sequence[str], seen: Sequence[str | None]) -> list[bool | None]:
    """Picture by picture, whether the judge saw what was expected; None where it could not tell."""
    return [None if s is None else s == e for e, s in zip(expected, seen, strict=True)]


def accuracy(expected: Sequence[str], seen: Sequence[str | None]) -> Share:
    """Share of the pictures that a judge sees as expected, whatever the unedited model drew; an expected "" is left out.

    The Acc of most papers (MACE, 2403.06135; UnlearnCanvas, 2402.11846). `kept` is the paired form, which does not blame an
    erasure for what the unedited model could not draw.
    """
    return Share.of(hit for e, hit in zip(expected, right(expected, seen), strict=True) if e)


def kept(expected: Sequence[str], before: Sequence[str | None], after: Sequence[str | None]) -> Share:
    """Partial sums of `share_kept`."""
    counted = Share()
    for e, was, is_ in zip(expected, right(expected, before), right(expected, after), strict=True):
        if not e or was is False:
            continue
        if was and is_ is not None:
            counted += Share(int(is_), 1)
        else:  # unknown before, after, or both
            counted += Share(unknown=1, may_hit=int(is_ is not False), may_miss=int(is_ is not True))
    return counted


def share_kept(expected: Sequence[str], before: Sequence[str | None], after: Sequence[str | None]) -> Estimate:
    """Of the pictures that were right before (judged as expected), the share that still are.

    Pairs share prompt and seed. What the unedited model got wrong says nothing about an erasure and is left out, and so is
    an expected "". For an erased concept the same number is called the share left.
    """
    return kept(expected, before, after).estimate()
