"""Pure functions from judged labels and scores to estimates with intervals. Knows no model, no picture and no file.

A metric is computed in two steps. *Partial sums* (`Share`, `Mean`) count what one shard saw and are merged by `+`, exactly,
in any order; `.estimate()` turns them into an `Estimate`. An unknown answer (None, NaN) never counts for or against: it
lowers the coverage, and `bounds` say what the value could have been.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import EraseError

Z = NormalDist().inv_cdf(0.975)
"""Every interval is a 95 % interval."""

DRAWS = 1000
"""Resamples of a bootstrap. The Monte Carlo error of an interval's end is then about a twentieth of its half width."""


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

    def to_json(self) -> dict[str, Any]:
        """Its fields; what is not a finite number is null, which JSON can hold."""
        bounds = None if self.bounds is None else [_finite(end) for end in self.bounds]
        numbers = {name: _finite(getattr(self, name)) for name in ("value", "low", "high")}
        return numbers | {"n": self.n, "coverage": self.coverage, "bounds": bounds}

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

    @classmethod
    def merged(cls, parts: Sequence["Share"]) -> "Share":
        """The sum of many."""
        return cls(*(sum(column) for column in zip(*map(_counts, parts), strict=True)))

    def __add__(self, other: "Share") -> "Share":
        return Share.merged([self, other])

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


@dataclass(frozen=True)
class Mean:
    """Partial sums of a mean, mergeable by `+`. The sums are fractions, so shards add up to the same bits in any order."""

    n: int = 0
    total: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    unknown: int = 0

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Mean":
        """Sums over the finite `values`; None, NaN and infinities are unknown.

        >>> print(Mean.of([0.31, 0.29, 0.33, None]).estimate())
        0.310 [0.260, 0.360], n = 3, coverage 75%
        """
        listed = list(values)
        known = [Fraction(v) for v in listed if v is not None and math.isfinite(v)]
        return cls(
            len(known), sum(known, Fraction(0)), sum((v * v for v in known), Fraction(0)), len(listed) - len(known)
        )

    @classmethod
    def merged(cls, parts: Sequence["Mean"]) -> "Mean":
        """The sum of many."""
        total, squares = (
            sum(column, Fraction(0)) for column in ([p.total for p in parts], [p.squares for p in parts])
        )
        return cls(sum(p.n for p in parts), total, squares, sum(p.unknown for p in parts))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean.merged([self, other])

    def estimate(self, limits: tuple[float, float] | None = None) -> "Score":
        """The mean of the known with Student's t interval; one picture has no interval (infinite).

        Args:
            limits: least and greatest value that a picture can have; needed for `bounds` where some are unknown.
        """
        coverage = self.n / (self.n + self.unknown) if self.n + self.unknown else 1.0
        if not self.n:
            return Score(math.nan, -math.inf, math.inf, 0, coverage, limits if self.unknown else None)
        mean, half = float(self.total / self.n), math.inf
        if self.n > 1:
            variance = (self.squares - self.total**2 / self.n) / (self.n - 1)
            half = t_quantile(self.n - 1) * math.sqrt(float(variance / self.n))
        bounds = None
        if self.unknown and limits:
            worst, best = (
                float((self.total + self.unknown * Fraction(end)) / (self.n + self.unknown)) for end in limits
            )
            bounds = (worst, best)
        return Score(mean, mean - half, mean + half, self.n, coverage, bounds)


class Score(Estimate):
    """An estimate on a scale of its own, rather than a share."""

    def __str__(self) -> str:
        if not self.n:
            return super().__str__()
        text = f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"
        return text if self.coverage == 1 else f"{text}, coverage {self.coverage:.0%}"


def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 0.2 % (Abramowitz & Stegun 26.7.5)."""
    if df < 3:
        p = 0.975
        return math.tan(math.pi * (p - 0.5)) if df == 1 else (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z = Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / df**i for i, term in enumerate(terms))


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


def esr(expected: Sequence[str], tops: Sequence[Sequence[str] | None], k: int = 1) -> Estimate:
    """ESR-k of AGE (2501.18950): share of the erased class's pictures whose class is *not* among the judge's k likeliest."""
    return ranked_right(expected, tops, k).estimate().complement


def psr(expected: Sequence[str], tops: Sequence[Sequence[str] | None], k: int = 1) -> Estimate:
    """PSR-k of AGE (2501.18950): share of the other classes' pictures whose class is among the judge's k likeliest."""
    return ranked_right(expected, tops, k).estimate()


def ranked_right(expected: Sequence[str], tops: Sequence[Sequence[str] | None], k: int) -> Share:
    """Partial sums of the top-k accuracy; a ranking of None, or one too short to hold a k-th label, is unknown.

    Args:
        tops: of each picture, labels with the likeliest first (`Verdict.top`).
    """
    pairs = [(e, top) for e, top in zip(expected, tops, strict=True) if e]
    return Share.of(None if not top or (len(top) < k and e not in top) else e in top[:k] for e, top in pairs)


def ua_ira_cra(target: Share, in_domain: Share, cross_domain: Share) -> dict[str, Estimate]:
    """UnlearnCanvas (2402.11846): unlearning accuracy, in-domain and cross-domain retain accuracy.

    Args:
        target: `accuracy` on pictures of the erased concept; UA is its complement.
        in_domain: on pictures of other concepts of its kind (other styles for a style, other objects for an object).
        cross_domain: of the other kind (objects for a style, styles for an object).
    """
    return {"UA": target.estimate().complement, "IRA": in_domain.estimate(), "CRA": cross_domain.estimate()}


def harmonic(*parts: Estimate) -> Estimate:
    """Harmonic mean of shares: as low as the worst of them asks.

    Its interval takes all parts at their low ends, then all at their high ends; that is wider than 95 % needs, never narrower.
    n is the least of the parts'.
    """
    if not parts:
        raise EraseError("a harmonic mean is taken of at least one estimate")
    value, low, high = (_harmonic([getattr(p, name) for p in parts]) for name in ("value", "low", "high"))
    bounds = None
    if any(p.bounds for p in parts):
        worst, best = zip(*(p.bounds or (p.value, p.value) for p in parts), strict=True)
        bounds = (_harmonic(worst), _harmonic(best))
    return Estimate(value, low, high, min(p.n for p in parts), min(p.coverage for p in parts), bounds)


def h_o(erased: Estimate, retained: Estimate) -> Estimate:
    """MACE's overall score for celebrities (2403.06135), 2 / (1/(1 − Acc_e) + 1/Acc_r), of Acc_e and Acc_r."""
    return harmonic(erased.complement, retained)


def h_general(erased: Estimate, specific: Estimate, general: Estimate) -> Estimate:
    """MACE's score for objects (2403.06135), 3 / (1/(1 − Acc_e) + 1/Acc_s + 1/(1 − Acc_g)).

    Args:
        erased: Acc_e, accuracy on the erased concept.
        specific: Acc_s, on the concepts that should stay.
        general: Acc_g, on synonyms of the erased concept.
    """
    return harmonic(erased.complement, specific, general.complement)


def erb(erased: Estimate, adjacent: Estimate) -> Estimate:
    """FADE's erasing-retention balance (2503.19783): harmonic mean of what is gone and of what adjacent concepts kept.

    Args:
        erased: accuracy on the erased concept.
        adjacent: accuracy on its neighbours.
    """
    return harmonic(erased.complement, adjacent)


def clustered(
    concepts: Mapping[str, Sequence[Any]], of: Callable[..., Estimate], *, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """An estimate over several concepts, whose interval knows that pictures of one concept stand and fall together.

    Concepts are drawn with replacement (cluster bootstrap: Davison & Hinkley 1997, §3.8), their partial sums added up. The
    interval holds the bootstrap's percentiles and the interval of `of` itself, which takes over where a bootstrap says
    nothing: one concept, or a share of exactly 0 or 1.

    Args:
        concepts: concept -> its partial sums, in the order of the parameters of `of`.
        of: the estimate that sums over concepts give.

    Example:
        >>> sums = {"cat": (Share(1, 20), Share(18, 20)), "sun": (Share(0, 20), Share(20, 20))}     # left, neighbours kept
        >>> clustered(sums, lambda left, kept: h_o(left.estimate(), kept.estimate()))
    """
    if not concepts:
        raise EraseError("an estimate over concepts needs at least one concept")
    rows = [concepts[name] for name in sorted(concepts)]
    whole = of(*_columns(rows))
    values = [of(*_columns([rows[i] for i in drawn])).value for drawn in _resampled(len(rows), seed, draws).tolist()]
    low, high = _middle(values) or (whole.low, whole.high)
    return replace(whole, low=min(whole.low, low), high=max(whole.high, high))


@dataclass(frozen=True)
class Comparison:
    """Two adapters on the same pictures: second minus first."""

    difference: Estimate
    p: float
    """Probability of a difference at least this large if there were none, two-sided."""
    test: str

    def __str__(self) -> str:
        d = self.difference
        return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], n = {d.n}, p = {self.p:.2g} ({self.test})"


def mcnemar(first: Sequence[bool | None], second: Sequence[bool | None]) -> Comparison:
    """Do two adapters differ in a share, on the same pictures? McNemar's exact test on the pairs that disagree.

    The interval of the difference is Bonett and Price's (2012, J. Educ. Behav. Stat. 37:479), which is sound for few pairs.
    Pairs with an unknown answer are left out; coverage and bounds say so.

    Example:
        >>> both = [True] * 80 + [False] * 10
        >>> print(mcnemar(both + [True] * 9 + [False], both + [False] * 9 + [True]))
        -0.080 [-0.143, -0.014], n = 100, p = 0.021 (McNemar, exact)
    """
    pairs = list(zip(first, second, strict=True))
    known = [(bool(a), bool(b)) for a, b in pairs if a is not None and b is not None]
    n, gained, lost = len(known), known.count((False, True)), known.count((True, False))
    coverage = n / len(pairs) if pairs else 1.0
    if not n:
        nothing = Score(math.nan, -1.0, 1.0, 0, coverage, _difference_bounds(pairs))
        return Comparison(nothing, 1.0, "McNemar, exact")
    tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1))
    value, shifted = (gained - lost) / n, (gained - lost) / (n + 2)
    half = Z * math.sqrt(((gained + 1 + lost + 1) / (n + 2) - shifted**2) / (n + 2))
    low, high = max(-1.0, min(value, shifted - half)), min(1.0, max(value, shifted + half))
    difference = Score(value, low, high, n, coverage, _difference_bounds(pairs))
    return Comparison(difference, min(1.0, float(Fraction(2 * tail, 2 ** (gained + lost)))), "McNemar, exact")


def paired_bootstrap(
    first: Sequence[float | None],
    second: Sequence[float | None],
    concepts: Sequence[str] | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Comparison:
    """Do two adapters differ in a mean score, on the same pictures? Differences, resampled by concept.

    p is twice the share of resamples on the other side of 0 (Davison & Hinkley 1997, §4.4); it is never below 1/draws, and 1
    where there is only one concept to resample. Pairs with an unknown score are left out.

    Args:
        concepts: of each pair, the concept it belongs to; None takes every pair for itself.
    """
    names = range(len(first)) if concepts is None else concepts
    gaps = [
        None if a is None or b is None or not math.isfinite(b - a) else b - a
        for a, b in zip(first, second, strict=True)
    ]
    sums: dict[Any, list[float]] = {}
    for name, gap in zip(names, gaps, strict=True):
        if gap is not None:
            sums.setdefault(name, []).append(gap)
    totals, sizes = (np.array([f(sums[name]) for name in sorted(sums)]) for f in (math.fsum, len))
    drawn = _resampled(len(sums), seed, draws)
    means = (totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)).tolist() if len(drawn) else []
    whole = Mean.of(gaps).estimate()
    low, high = _middle(means) or (whole.low, whole.high)
    difference = replace(whole, low=min(low, whole.value), high=max(high, whole.value))
    sides = [sum(m <= 0 for m in means), sum(m >= 0 for m in means)]
    p = min(1.0, max(2 * min(sides), 1) / len(means)) if means else 1.0
    return Comparison(difference, p, f"bootstrap over {len(sums)} {'pairs' if concepts is None else 'concepts'}")


def _counts(share: Share) -> tuple[int, ...]:
    return share.hits, share.n, share.unknown, share.may_hit, share.may_miss


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _harmonic(values: Sequence[float]) -> float:
    if any(math.isnan(v) for v in values):
        return math.nan
    return 0.0 if min(values) <= 0 else len(values) / math.fsum(1 / v for v in values)


def _columns(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Sums over concepts, column by column."""
    return [type(column[0]).merged(column) for column in zip(*rows, strict=True)]


def _resampled(rows: int, seed: int, draws: int) -> np.ndarray:
    """Indices `[draws, rows]` of rows drawn with replacement; no draws where one row is all there is."""
    return np.random.default_rng(seed).integers(rows, size=(draws if rows > 1 else 0, max(rows, 1)))


def _middle(values: Iterable[float]) -> tuple[float, float] | None:
    """The ends of the middle 95 % of `values`; NaN (a resample without pictures) says nothing."""
    ordered = sorted(v for v in values if not math.isnan(v))
    if not ordered:
        return None
    outside = int(0.025 * len(ordered))
    return ordered[outside], ordered[-1 - outside]


def _difference_bounds(pairs: Sequence[tuple[bool | None, bool | None]]) -> tuple[float, float] | None:
    """Least and greatest difference of shares that answers to the unknown pictures could give."""
    if all(a is not None and b is not None for a, b in pairs):
        return None
    least = sum((b or False) - (True if a is None else a) for a, b in pairs)
    greatest = sum((True if b is None else b) - (a or False) for a, b in pairs)
    return least / len(pairs), greatest / len(pairs)
