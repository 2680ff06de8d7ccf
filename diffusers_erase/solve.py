"""Pure linear algebra on rows: the ridge edit, and the strength that reaches a residual. No models, no names.

Rows are embeddings, everywhere. Symbols, once for the whole package (docs/maths.md derives what is used here):

    C  keys      [k, d]   text states to edit
    D  offsets   [k, d]   target minus key; zero for a state that is preserved
    s  strengths [k]      weight of each row in the ridge problem
    H  gram      [d, d]   what the base pack preserves softly: λI + ρ · second moment of background states
    K0 hard      [h, d]   states that must not move at all
    U  pulled    [k, d]   C G, with G the inverse of H projected along K0
    A  detectors [k, d]   the edit is e ↦ e + (e Aᵀ) D

Everything is solved in float64 and returned in float64; callers cast once, at the end.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 4096
"""Rows that are summed at a time in float64: of ten thousand concepts no copy in float64 is ever made."""


def pull(keys: Tensor, gram: Tensor, hard: Tensor) -> Tensor:
    """U = C G: keys seen through the base pack, with G = H⁻¹ − H⁻¹K0ᵀ(K0H⁻¹K0ᵀ)⁻¹K0H⁻¹.

    G is the limit of H⁻¹ when the rows of K0 are preserved with infinite weight, so U K0ᵀ = 0 and hard rows never move.

    Args:
        keys: C `[k, d]`.
        gram: H `[d, d]`, symmetric positive definite.
        hard: K0 `[h, d]`; `h` may be 0.
    """
    C, H, K0 = keys.double(), gram.double(), hard.double()
    factor = torch.linalg.cholesky(H)
    U = torch.cholesky_solve(C.mT, factor).mT
    if len(K0):
        V = torch.cholesky_solve(K0.mT, factor).mT
        free = U - U @ K0.mT @ torch.linalg.solve(K0 @ V.mT, V)
        # A key among the hard rows has nothing left but rounding, which a large strength would take for a direction.
        U = torch.where(free.norm(dim=1, keepdim=True) > 1e-9 * U.norm(dim=1, keepdim=True), free, 0.0)
    return U


def detectors(keys: Tensor, pulled: Tensor, strengths: Tensor) -> Tensor:
    """A `[k, d]` of the edit X = AᵀD that acts on a text state as e + e X.

    X minimises Σ sᵢ‖cᵢX − dᵢ‖² + tr(XᵀHX) subject to K0 X = 0; its optimum has A = (diag(1/s) + C Uᵀ)⁻¹ U.
    A depends on text states alone, so one solve serves every layer that reads them. With more rows than dimensions the
    same matrix comes from the smaller system Aᵀ = (I + UᵀSC)⁻¹ UᵀS (push-through identity).
    """
    C, U, s = keys.double(), pulled.double(), strengths.double()
    k, d = C.shape
    if k > d:
        scaled = U.mT * s
        return torch.linalg.solve(torch.eye(d, dtype=C.dtype) + scaled @ C, scaled).mT
    return torch.linalg.solve(torch.diag(1 / s) + C @ U.mT, U)


class Dense(NamedTuple):
    """A solved set of many rows as one matrix, with what taking a few of its rows out needs."""

    edit: Tensor
    """X = AᵀD `[d, d]`."""
    factor: Tensor
    """LU of I + UᵀSC `[d, d]`, compact."""
    pivots: Tensor


def dense(keys: Tensor, offsets: Tensor, pulled: Tensor, strengths: Tensor, *, block: int = BLOCK) -> Dense:
    """X = AᵀD of many rows without A: the solution of (I + UᵀSC) X = UᵀSD. Costs 4kd² + 3d³, and d² of memory beside the rows."""
    d = keys.shape[1]
    left, right = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for i in range(0, len(keys), block):
        rows = slice(i, i + block)
        scaled = pulled[rows].double().mT * strengths[rows].double()
        left.addmm_(scaled, keys[rows].double())
        right.addmm_(scaled, offsets[rows].double())
    factor, pivots = torch.linalg.lu_factor(left)
    return Dense(torch.linalg.lu_solve(factor, pivots, right), factor, pivots)


class Downdate(NamedTuple):
    """The change X' = X − P Q of a solved set when some of its rows are taken out."""

    P: Tensor
    """`[d, r]`."""
    Q: Tensor
    """`[r, d]`."""


def without(solved: Dense, keys: Tensor, offsets: Tensor, pulled: Tensor, strengths: Tensor) -> Downdate:
    """What taking these r rows out of `solved` changes, by Woodbury's identity: d²r operations instead of a new solve.

    With B = I + UᵀSC over all rows and P = B⁻¹U₁ᵀS₁ over those that go, X' = X − P (I − C₁P)⁻¹ (D₁ − C₁X). Exact; rounding
    stays that of one solve, because every downdate starts from the whole set.
    """
    C, D = keys.double(), offsets.double()
    P = torch.linalg.lu_solve(solved.factor, solved.pivots, pulled.double().mT * strengths.double())
    apart = torch.eye(len(C), dtype=torch.float64) - C @ P
    return Downdate(P, torch.linalg.solve(apart, D - C @ solved.edit))


def left_over(keys: Tensor, offsets: Tensor, edit: Tensor) -> Tensor:
    """D − C X `[k, d]` in float64 for an edit given as one matrix."""
    return offsets.double() - keys.double() @ edit.double()


def unmoved(keys: Tensor, offsets: Tensor, detectors: Tensor) -> Tensor:
    """What is left of every offset after the edit, D − C AᵀD, `[k, d]`. Zero means: the key lands on its target."""
    C, D, A = keys.double(), offsets.double(), detectors.double()
    return D - (C @ A.mT) @ D


def residual(keys: Tensor, offsets: Tensor, detectors: Tensor) -> float:
    """Share of the offsets that is left, ‖D − C AᵀD‖_F / ‖D‖_F over the rows with an offset: 0 erases completely, 1 does nothing."""
    moving = (offsets != 0).any(dim=1)
    return float(unmoved(keys, offsets, detectors)[moving].norm() / offsets.double().norm())


def strength_for(keys: Tensor, offsets: Tensor, pulled: Tensor, weights: Tensor, goal: float) -> float | None:
    """The one scalar s with which rows of strengths s·weights (offset 0: weights alone) reach the residual `goal`.

    Bisection on log s: with equal weights the residual falls monotonically from 1 to its limit. One scalar, never one a
    row: calibrating near-equal rows one by one diverges. Returns None where no finite strength reaches the goal.

    Args:
        weights: `[k]`; for rows with an offset a factor of s, for preserved rows their strength itself.
        goal: residual in (0, 1).
    """
    D = offsets.double()
    moving = D.norm(dim=1) > 0
    K, DD, weights = keys.double() @ pulled.double().mT, D @ D.mT, weights.double()

    def reached(log_s: float) -> float:
        # D − C AᵀD = S⁻¹(S⁻¹ + K)⁻¹D with K = C Uᵀ, so each probe costs k³ and never touches d.
        loose = torch.diag(1 / torch.where(moving, weights * 10.0**log_s, weights))
        left = torch.linalg.solve(loose + K, loose).mT[moving]
        return float(((left @ DD) * left).sum().clamp_min(0).sqrt() / DD.trace().sqrt())

    pull = float(K.diagonal()[moving].mean())
    if pull <= 0:
        return None
    typical = math.log10(pull)
    low, high = -typical - 9.0, -typical + 9.0
    if reached(high) > goal or reached(low) < goal:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) > goal else (low, middle)
    return 10.0 ** ((low + high) / 2)


def holding(keys: Tensor, pulled: Tensor, share: float) -> Tensor:
    """q `[..., k]`: strengths at which preserved keys (alone) follow an edit by `share` of what they would without being preserved.

    q = (1/share − 1) / (p G pᵀ) for keys p and pulled keys p G, both `[..., k, d]`.
    """
    return (1 / share - 1) / (keys.double() * pulled.double()).sum(-1).clamp_min(1e-12)


def edited_weight(weight: Tensor, offsets: Tensor, detectors: Tensor) -> Tensor:
    """W(I + DᵀA) in float64: the linear layer `weight` [o, d] as if its input had been mapped."""
    W = weight.double()
    return W + (W @ offsets.double().mT) @ detectors.double()
