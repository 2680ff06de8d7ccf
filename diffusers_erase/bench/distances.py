"""How far apart two sets of pictures lie, from features of a network that is named; and how far a text state moved.

A distance says whose features it stands on: numbers from different networks cannot be compared, and none here is the FID of
a paper, which needs the weights of one particular Inception network. Compared to are the pictures of the unedited model, with
the same prompts and seeds: an erasure that touches nothing else is at distance 0 on what it should keep.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EraseError
from .metrics import Score, t_quantile

GROUPS = 20
"""Groups that a jackknife leaves out in turn, at most."""

BLOCK = 2048
"""Rows of a kernel matrix that are in memory at once."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Partial sums of a set's mean and covariance, in float64; merged by `+`. All that a Fréchet distance needs of it."""

    n: int
    total: Tensor
    """Σx `[d]`."""
    outer: Tensor
    """Σxxᵀ `[d, d]`."""
    unknown: int = 0

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Sums over the rows of `features` `[n, d]`; a row that is not finite is unknown."""
        rows = _finite(features)
        return cls(len(rows), rows.sum(0), rows.mT @ rows, len(features) - len(rows))

    def __add__(self, other: "Moments") -> "Moments":
        if self.total.shape != other.total.shape:
            raise EraseError(f"features of widths {len(self.total)} and {len(other.total)} are of different networks")
        return Moments(
            self.n + other.n, self.total + other.total, self.outer + other.outer, self.unknown + other.unknown
        )

    @property
    def mean(self) -> Tensor:
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


def frechet(first: Moments, second: Moments) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the Fréchet distance of two Gaussians (Dowson & Landau 1982; FID, 1706.08500).

    Raises:
        EraseError: a set has no more pictures than features have dimensions. Its covariance is then singular and the number
            depends on n more than on the pictures; `kid` has no such limit.
    """
    width = len(first.total)
    if len(second.total) != width:
        raise EraseError(f"features of widths {width} and {len(second.total)} are of different networks")
    if min(first.n, second.n) <= width:
        raise EraseError(
            f"a Fréchet distance over {width} features needs more than {width} pictures in each set, got {first.n} and "
            f"{second.n}: draw more, or use KID"
        )
    root = _root(first.covariance)
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp_min(0).sqrt().sum()
    gap = (first.mean - second.mean).square().sum()
    return max(0.0, float(gap + first.covariance.trace() + second.covariance.trace() - 2 * cross))


def fid(first: Tensor, second: Tensor, concepts: Sequence[str] | None = None) -> Score:
    """The Fréchet distance of two sets of features, with a jackknife interval. Arguments as for `kid`, errors as for `frechet`.

    Biased upwards by about the same amount for all sets of one size: compare numbers of equal n only.
    """
    x, y, coverage, groups = _paired(first, second, concepts)
    a, b = ([Moments.of(rows[groups == g]) for g in range(int(groups.max()) + 1)] for rows in (x, y))
    value = frechet(_sum(a), _sum(b))
    without = (
        [frechet(_sum(a[:g] + a[g + 1 :]), _sum(b[:g] + b[g + 1 :])) for g in range(len(a))] if len(a) > 1 else []
    )
    return _jackknife(value, without, len(x), coverage)


def kid(first: Tensor, second: Tensor, concepts: Sequence[str] | None = None) -> Score:
    """KID (1801.01401): unbiased MMD² under the kernel (x·y/d + 1)³, for sets of any size; may be slightly below 0.

    Args:
        first, second: features `[n, d]` of the same prompts and seeds, row by row; a pair with a row that is not finite is
            left out.
        concepts: of each pair, the concept that it belongs to: what the interval leaves out in turn. None takes runs of pairs.
    """
    width = first.shape[1]
    return _mmd(first, second, lambda x, y: (x @ y.mT / width + 1) ** 3, concepts)


def cmmd(first: Tensor, second: Tensor, concepts: Sequence[str] | None = None) -> Score:
    """CMMD (2401.09603): 1000 times the unbiased MMD² of CLIP rows under the kernel exp(−‖x − y‖²/(2·10²)).

    The authors' own numbers stand on ViT-L/14 at 336 pixels and unit rows (`measures.clip_features`).
    """
    return _mmd(first, second, lambda x, y: 1000 * torch.exp(-torch.cdist(x, y).square() / 200), concepts)


def drift(before: Tensor, after: Tensor) -> float:
    """‖after − before‖_F / ‖before‖_F of text states: of the empty prompt, the *null-prompt drift* ‖(T − I)e_∅‖ / ‖e_∅‖."""
    if before.shape != after.shape:
        raise EraseError(
            f"states of shapes {tuple(before.shape)} and {tuple(after.shape)} are not of the same prompts"
        )
    return float((after.double() - before.double()).norm() / before.double().norm())


def _mmd(
    first: Tensor, second: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], concepts: Sequence[str] | None
) -> Score:
    """MMD² as the U-statistic of pairs, mean of k(x,x') + k(y,y') − k(x,y') − k(x',y) (Gretton et al. 2012, eq. 4).

    Exactly 0 for equal sets. The sum is split by groups once; leaving a group out then subtracts its rows and columns.
    """
    x, y, coverage, groups = _paired(first, second, concepts)
    n = len(x)
    if n < 2:
        return Score(math.nan, -math.inf, math.inf, n, coverage)
    count = int(groups.max()) + 1
    sums = torch.zeros(count, count, dtype=torch.float64)
    for rows in torch.arange(n).split(BLOCK):
        a, b = x[rows], y[rows]
        h = kernel(a, x) + kernel(b, y) - kernel(a, y) - kernel(b, x)
        h[torch.arange(len(rows)), rows] = 0
        by_column = torch.zeros(len(rows), count, dtype=torch.float64).index_add_(1, groups, h)
        sums.index_add_(0, groups[rows], by_column)
    sizes = groups.bincount(minlength=count)
    left = sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal()
    without = [(float(s), n - int(m)) for s, m in zip(left, sizes, strict=True)]
    return _jackknife(float(sums.sum()) / (n * (n - 1)), [s / (m * (m - 1)) for s, m in without if m > 1], n, coverage)


def _paired(first: Tensor, second: Tensor, concepts: Sequence[str] | None) -> tuple[Tensor, Tensor, float, Tensor]:
    """The known pairs of two sets in float64, their coverage, and the group of each (by concept, else by runs of pairs)."""
    if first.ndim != 2 or first.shape != second.shape:
        raise EraseError(
            f"sets are compared pair by pair: got features {tuple(first.shape)} and {tuple(second.shape)}"
        )
    known = first.isfinite().all(dim=1) & second.isfinite().all(dim=1)
    at = known.nonzero().flatten()
    names: list[Any] = at.tolist() if concepts is None else [concepts[i] for i in at.tolist()]
    places = {name: i for i, name in enumerate(sorted(set(names)))}
    count = min(len(places), GROUPS)
    groups = torch.tensor([places[name] * count // len(places) for name in names], dtype=torch.long)
    coverage = len(at) / len(first) if len(first) else 1.0
    return first[known].double(), second[known].double(), coverage, groups


def _jackknife(value: float, without: Sequence[float], n: int, coverage: float) -> Score:
    """Interval from the values without each group (Efron & Tibshirani 1993, §11.5); one group has none (infinite)."""
    half, g = math.inf, len(without)
    if g > 1:
        mean = math.fsum(without) / g
        half = t_quantile(g - 1) * math.sqrt((g - 1) / g * math.fsum((w - mean) ** 2 for w in without))
    return Score(value, value - half, value + half, n, coverage)


def _sum(parts: Sequence[Moments]) -> Moments:
    return functools.reduce(operator.add, parts)


def _finite(features: Tensor) -> Tensor:
    return features[features.isfinite().all(dim=1)].double()


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.mT
