"""What an erasure would do, computed before it is made: for one concept and thousands of targets at once. Tensors only.

The edit sends the rows C to a target T, preserves rows P (the target's own, or none), and is calibrated to a residual. It is
a closed form, so all of this is exact (docs/targets.md derives it). Rows as in solve.py; r token roles, N targets, m names.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from . import solve

NEAR = 8
"""Nearest other names between which an edited name could be confused."""


class Outlook(NamedTuple):
    """What sending the concept to each of N targets does."""

    strengths: Tensor
    """`[N]`: the strength that leaves the asked residual; NaN where none does."""
    residuals: Tensor
    """`[N]`: what is left at the strength that would do if nothing were preserved: what is preserved cannot also be moved."""
    answers: Tensor
    """`[N, m, r]`: the detectors' answers x = q Aᵀ to m rows q."""
    offsets: Tensor
    """D `[N, r, d]`."""


def outlook(C: Tensor, T: Tensor, P: Tensor, hold: Tensor, Q: Tensor, G: Tensor, residual: float) -> Outlook:
    """The ridge edits that send C to T[i] while they preserve P[i], for every i at once.

    The preserved rows are eliminated (Schur complement), which leaves symmetric r × r systems; along their eigenvectors the
    residual is a sum, so calibrating all of them is one vectorised bisection.

    Args:
        C: keys of the concept `[r, d]`.
        T: targets `[N, r, d]`.
        P, hold: preserved rows `[N, p, d]` and their strengths `[N, p]`; p may be 0.
        Q: rows `[m, d]` whose answers are wanted.
        G: what a key is pulled by `[d, d]` (see solve.py).
        residual: share of the offsets that is left.
    """
    U, V, D = C @ G, P @ G, T - C
    K, B = U @ C.mT, P @ U.mT  # [r, r], [N, p, r]
    shield = torch.linalg.solve(torch.diag_embed(1 / hold) + V @ P.mT, B)  # [N, p, r]
    free, shielded = _spectrum(K.expand(len(T), -1, -1), D), _spectrum(K - B.mT @ shield, D)
    strengths = _strengths(*shielded, residual)
    system = torch.diag_embed(1 / strengths[:, None].expand(-1, len(C))) + K - B.mT @ shield
    solvable = torch.where(strengths.isnan()[:, None, None], torch.eye(len(C), dtype=K.dtype), system)
    answers = torch.linalg.solve(solvable, (Q @ U.mT - (Q @ V.mT) @ shield).mT).mT
    answers[strengths.isnan()] = math.nan
    return Outlook(strengths, _left(*shielded, _strengths(*free, residual)), answers, D)


def _spectrum(K: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of K `[N, r]`, and the squared length of the offsets along each eigenvector, as shares."""
    values, vectors = torch.linalg.eigh((K + K.mT) / 2)
    along = (vectors.mT @ D).square().sum(2)
    return values.clamp_min(0), along / along.sum(1, keepdim=True)


def _left(values: Tensor, along: Tensor, strengths: Tensor) -> Tensor:
    """Residual `[N]` at `strengths`: along an eigenvector of value λ the share 1/(1 + sλ) of the offset is left."""
    return ((1 / (1 + strengths[:, None] * values)).square() * along).sum(1).sqrt()


def _strengths(values: Tensor, along: Tensor, residual: float) -> Tensor:
    """The strengths `[N]` that leave `residual`; NaN where none within nine orders of magnitude does (as `solve.strength_for`)."""
    typical = -torch.log10(values.mean(1).clamp_min(1e-300))
    low, high = typical - 9, typical + 9
    possible = _left(values, along, 10**high) <= residual
    for _ in range(60):
        middle = (low + high) / 2
        above = _left(values, along, 10**middle) > residual
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(possible, 10 ** ((low + high) / 2), math.nan)


def squared(changes: Tensor, metric: Tensor) -> Tensor:
    """‖e‖²_M = e M eᵀ of each e in `[..., d]`."""
    return ((changes @ metric) * changes).sum(-1)


@dataclass(frozen=True, eq=False)
class Surroundings:
    """A concept among the names whose damage counts, all as float64 rows of the same r token roles."""

    concept: Tensor
    """`[r, d]`"""
    others: Tensor
    """`[c, r, d]`, other names of the concept, which are sent to the same target; c may be 0."""
    names: Tensor
    """`[m, r, d]`"""
    empty: Tensor
    """`[r, d]`, the empty prompt: the measure of damage is the way there."""
    inverse: Tensor
    """G `[d, d]` of the base pack."""
    metric: Tensor
    """M `[d, d]`: ‖e‖²_M = e M eᵀ is what a change e does to all keys and values."""
    residual: float
    preserved: Tensor
    """`[p, r, d]`, names that are preserved whatever the target is; p may be 0."""
    hold: float = 0.1
    """How far what is preserved may still follow the edit (`solve.holding`)."""
    shield: bool = True
    """Whether the target is preserved too."""

    def outlook(self, T: Tensor) -> Outlook:
        """What sending the concept to each mean of n names does; T `[N, n, r, d]`."""
        fixed = self.preserved.flatten(0, 1).expand(len(T), -1, -1)
        P = torch.cat([T.flatten(1, 2), fixed], dim=1) if self.shield else fixed
        hold = solve.holding(P, P @ self.inverse, self.hold)
        own = torch.cat([self.concept, self.others.flatten(0, 1)])
        goals = T.mean(1).repeat(1, 1 + len(self.others), 1)
        return outlook(own, goals, P, hold, self.names.flatten(0, 1), self.inverse, self.residual)

    def damage(self, found: Outlook) -> Tensor:
        """`[N, m]`: how far each name's keys and values move, as a share of the way to the empty prompt, mean over roles."""
        cross = found.offsets @ self.metric @ found.offsets.mT
        moved = torch.einsum("nmi,nij,nmj->nm", found.answers, cross, found.answers).clamp_min(0).sqrt()
        whole = squared(self.names - self.empty, self.metric).clamp_min(1e-300).sqrt()
        return (moved.view(len(moved), *whole.shape) / whole).mean(2)

    def following(self, T: Tensor) -> Tensor:
        """`[N]`: |c G tᵀ| / (c G cᵀ), mean over roles: how much of each T `[N, r, d]` an edit of the concept alone would move."""
        U = self.concept @ self.inverse
        return ((T * U).sum(-1).abs() / (self.concept * U).sum(-1)).mean(-1)

    def distance(self, T: Tensor) -> Tensor:
        """`[N]`: ‖t − c‖_M as a share of the concept's way to the empty prompt: 0 is the same to all keys and values."""
        gaps = [rows - self.concept for rows in (T, self.empty)]
        far, whole = (squared(gap, self.metric).sum(-1).sqrt() for gap in gaps)
        return far / whole

    def confusion(self, found: Outlook) -> Tensor:
        """`[N]`: the mean share of its margin to the nearest other name that a name loses: damage that changes what it is read as.

        With the displacement δ = x D of a name q, its distance² to another name o changes from ‖q − o‖²_M by 2 δ M (q − o)ᵀ, to
        first order.
        """
        Q = self.names
        if len(Q) < 2:  # with nothing to be taken for
            return Q.new_zeros(len(found.offsets))
        apart = self._apart
        near = apart.argsort(dim=1)[:, : min(NEAR, len(Q) - 1)]
        ways = (Q[:, None] - Q[near]) @ self.metric  # [m, NEAR, r, d]
        answers = found.answers.view(len(found.offsets), *Q.shape[:2], -1)
        shift = torch.einsum("nmri,nid,mord->nmo", answers, found.offsets, ways)
        return (-2 * shift / apart.gather(1, near)).amax(2).clamp_min(0).mean(1)

    @cached_property
    def _apart(self) -> Tensor:
        inner = (self.names @ self.metric).flatten(1) @ self.names.flatten(1).mT
        apart = inner.diagonal()[:, None] + inner.diagonal() - 2 * inner
        return apart.fill_diagonal_(math.inf)
