"""The mathematics of docs/maths.md: each theorem on random problems, beside a case where it would not hold."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffusers_erase import solve


class Problem(NamedTuple):
    """C, D, s, H, K0 of solve.py; the states share a large common part, as text states do."""

    keys: Tensor
    offsets: Tensor
    strengths: Tensor
    gram: Tensor
    hard: Tensor

    @property
    def pulled(self):
        return solve.pull(self.keys, self.gram, self.hard)

    @property
    def detectors(self):
        return solve.detectors(self.keys, self.pulled, self.strengths)


def problem(k=4, d=12, hard=0, seed=0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(d, generator=generator, dtype=torch.float64)

    def states(n):
        return common + torch.randn(n, d, generator=generator, dtype=torch.float64)

    keys, targets, background, hard_rows = states(k), states(k), states(3 * d), states(hard)
    gram = 0.1 * torch.eye(d, dtype=torch.float64) + background.mT @ background / len(background)
    strengths = torch.rand(k, generator=generator, dtype=torch.float64) + 0.5
    return Problem(keys, targets - keys, strengths, gram, hard_rows)


PROBLEMS = [problem(), problem(k=1), problem(hard=3), problem(k=30), problem(k=30, hard=3)]
each_problem = pytest.mark.parametrize("p", PROBLEMS, ids=lambda p: f"k{len(p.keys)}-hard{len(p.hard)}")


def exact(*tensors: Tensor, atol: float):
    assert_close(*tensors, atol=atol, rtol=0)


@each_problem
def test_solution_is_stationary(p):
    def slope(X):
        X = X.detach().requires_grad_()
        loss = (p.strengths[:, None] * (p.keys @ X - p.offsets) ** 2).sum() + (X * (p.gram @ X)).sum()
        loss.backward()
        inside = torch.linalg.lstsq(p.hard.mT, X.grad).solution if len(p.hard) else torch.zeros(0, X.shape[1]).double()
        return X.grad - p.hard.mT @ inside  # directions along K0 are not free

    X = p.detectors.mT @ p.offsets
    exact(slope(X), torch.zeros_like(X), atol=1e-9)
    assert slope(1.01 * X).abs().max() > 1e-3  # control: it is this X, not its surroundings


@each_problem
def test_solution_equals_the_textbook_form(p):
    """X = (H + CᵀSC)⁻¹CᵀSD, by an inverse, with the hard rows as equality constraints of the KKT system."""
    h, d = p.hard.shape[0], p.gram.shape[0]
    S = torch.diag(p.strengths)
    system = torch.zeros(d + h, d + h, dtype=torch.float64)
    system[:d, :d] = p.gram + p.keys.mT @ S @ p.keys
    system[:d, d:], system[d:, :d] = p.hard.mT, p.hard
    right = torch.cat([p.keys.mT @ S @ p.offsets, torch.zeros(h, d, dtype=torch.float64)])
    exact(p.detectors.mT @ p.offsets, (torch.linalg.inv(system) @ right)[:d], atol=1e-10)


@pytest.mark.parametrize("k", [4, 30])
def test_hard_rows_do_not_move(k):
    p = problem(k=k, hard=3)
    X = p.detectors.mT @ p.offsets
    assert (p.hard @ X).abs().max() < 1e-12
    free = p._replace(hard=p.hard[:0])
    assert (p.hard @ free.detectors.mT @ free.offsets).abs().max() > 0.1  # control: they would


@pytest.mark.parametrize("k", [11, 12, 13, 40])
def test_both_branches_of_detectors_are_one_matrix(k):
    """Up to k = d the k×k system is solved, beyond it the d×d one."""
    p = problem(k=k, d=12, hard=2)
    C, U, s = p.keys, p.pulled, p.strengths
    small = torch.linalg.inv(torch.diag(1 / s) + C @ U.mT) @ U
    large = (torch.linalg.inv(torch.eye(12, dtype=torch.float64) + U.mT @ torch.diag(s) @ C) @ U.mT @ torch.diag(s)).mT
    exact(solve.detectors(C, U, s), small, atol=1e-11)
    exact(solve.detectors(C, U, s), large, atol=1e-11)


def test_hard_rows_are_the_limit_of_big_weights():
    p = problem(hard=3)

    def distance(weight):
        return (p.pulled - solve.pull(p.keys, p.gram + weight * p.hard.mT @ p.hard, p.hard[:0])).abs().max()

    assert distance(1e0) > 1e-2
    assert distance(1e7) < 1e-6
    assert distance(1e5) < 1.1e-2 * distance(1e3)  # it vanishes like 1/weight, until rounding


def test_a_key_among_the_hard_rows_has_no_detector():
    p = problem(k=2, hard=3)
    among = torch.stack([p.hard[0], p.hard.mean(0)])
    assert not solve.pull(among, p.gram, p.hard).any()
    assert solve.pull(among, p.gram, p.hard[1:]).abs().max() > 1e-3


def test_rows_with_offset_zero_equal_a_preserve_term_in_the_gram():
    p, kept = problem(k=3, hard=2), problem(k=5, seed=1)
    P, q = kept.keys, 10 * kept.strengths
    rows = solve.detectors(
        torch.cat([p.keys, P]), solve.pull(torch.cat([p.keys, P]), p.gram, p.hard), torch.cat([p.strengths, q])
    )
    in_gram = p._replace(gram=p.gram + P.mT @ torch.diag(q) @ P)
    exact(rows[:3], in_gram.detectors, atol=1e-12)
    assert (rows[:3] - p.detectors).abs().max() > 1e-3  # control: preserving changes the edit
    assert (P @ rows[:3].mT).norm() < 0.5 * (P @ p.detectors.mT).norm()


def test_any_subset_is_one_small_solve_of_the_same_pulled_rows():
    """Woodbury: U of all concepts, computed once, serves every subset as if the others had never been there."""
    p = problem(k=6, hard=2)
    for rows in ([0], [1, 4], [5, 2, 3]):
        alone = Problem(p.keys[rows], p.offsets[rows], p.strengths[rows], p.gram, p.hard)
        exact(solve.detectors(p.keys[rows], p.pulled[rows], p.strengths[rows]), alone.detectors, atol=1e-12)


def test_rank_is_the_number_of_rows():
    for k in (1, 4):
        p = problem(k=k)
        assert torch.linalg.matrix_rank(p.detectors.mT @ p.offsets) == k


def test_residual_is_what_is_left_of_the_way():
    p = problem(hard=1)
    landed = p.keys + (p.keys @ p.detectors.mT) @ p.offsets
    exact(solve.unmoved(p.keys, p.offsets, p.detectors), p.keys + p.offsets - landed, atol=1e-12)
    share = (p.keys + p.offsets - landed).norm() / p.offsets.norm()
    assert solve.residual(p.keys, p.offsets, p.detectors) == pytest.approx(float(share), abs=1e-12)
    assert solve.residual(p.keys, p.offsets, torch.zeros_like(p.detectors)) == 1.0


@pytest.mark.parametrize("goal", [0.9, 0.3, 0.02, 1e-4])
@each_problem
def test_strength_hits_the_residual(p, goal):
    k, d = p.keys.shape
    if k > d:
        p = p._replace(keys=p.keys[:8], offsets=p.offsets[:8], strengths=p.strengths[:8])
    ones = torch.ones(len(p.keys), dtype=torch.float64)
    s = solve.strength_for(p.keys, p.offsets, p.pulled, ones, goal)
    assert solve.residual(p.keys, p.offsets, solve.detectors(p.keys, p.pulled, s * ones)) == pytest.approx(
        goal, abs=1e-9
    )


def test_strength_hits_the_residual_beside_preserved_rows():
    """Their strength stays as given, and they have no part in the residual."""
    p, kept = problem(k=3, hard=2), problem(k=2, seed=1)
    keys, offsets = torch.cat([p.keys, kept.keys]), torch.cat([p.offsets, torch.zeros_like(kept.offsets)])
    pulled, weights = solve.pull(keys, p.gram, p.hard), torch.tensor([1.0, 1.0, 1.0, 7.0, 9.0]).double()
    s = solve.strength_for(keys, offsets, pulled, weights, 0.05)
    A = solve.detectors(keys, pulled, torch.tensor([s, s, s, 7.0, 9.0], dtype=torch.float64))
    assert solve.residual(keys, offsets, A) == pytest.approx(0.05, abs=1e-9)
    assert s != pytest.approx(solve.strength_for(p.keys, p.offsets, p.pulled, weights[:3], 0.05), rel=1e-3)


def test_residual_falls_with_strength():
    p = problem(hard=3)
    residuals = [
        solve.residual(p.keys, p.offsets, solve.detectors(p.keys, p.pulled, torch.full((4,), 10.0**e).double()))
        for e in range(-6, 7)
    ]
    assert all(more > less for more, less in pairwise(residuals))
    assert residuals[0] > 0.999 and residuals[-1] < 1e-4


def test_where_no_strength_reaches_the_residual_there_is_none():
    p = problem(k=1)
    keys, offsets = p.keys[[0, 0]], torch.stack([p.offsets[0], -p.offsets[0]])  # one key, two opposite ways
    pulled, ones = solve.pull(keys, p.gram, p.hard), torch.ones(2, dtype=torch.float64)
    assert solve.strength_for(keys, offsets, pulled, ones, 0.5) is None
    assert solve.strength_for(keys[:1], offsets[:1], pulled[:1], ones[:1], 0.5) is not None
    held = solve.pull(p.keys, p.gram, p.keys)  # the key itself is a hard row
    assert solve.strength_for(p.keys, p.offsets, held, ones[:1], 0.5) is None


def test_edited_weight_is_the_layer_behind_the_map():
    p = problem(hard=2)
    weight, states = torch.randn(5, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    mapped = states + (states @ p.detectors.mT) @ p.offsets
    edited = solve.edited_weight(weight, p.offsets, p.detectors)
    exact(states @ edited.mT, mapped @ weight.mT, atol=1e-11)
    assert (edited - weight).abs().max() > 1e-2


def test_adding_separately_solved_edits_is_wrong():
    """Five siblings to one target: solved together each lands; the sum of five good edits is no erasure at all."""
    generator = torch.Generator().manual_seed(0)
    d = 64
    family, target = torch.randn(2, d, generator=generator, dtype=torch.float64)
    keys = family + 0.4 * torch.randn(5, d, generator=generator, dtype=torch.float64)
    offsets, gram = target - keys, 0.01 * torch.eye(d, dtype=torch.float64)
    pulled, one = solve.pull(keys, gram, keys[:0]), torch.ones(1, dtype=torch.float64)
    s = [solve.strength_for(keys[[i]], offsets[[i]], pulled[[i]], one, 0.02) for i in range(5)]
    alone = torch.cat([solve.detectors(keys[[i]], pulled[[i]], one * s[i]) for i in range(5)])
    joint = solve.detectors(keys, pulled, torch.tensor(s, dtype=torch.float64))
    for i in range(5):  # control: each of the added edits is a good one
        assert solve.residual(keys[[i]], offsets[[i]], alone[[i]]) == pytest.approx(0.02, abs=1e-9)
    assert solve.residual(keys, offsets, joint) < 0.05
    assert solve.residual(keys, offsets, alone) > 0.5


def test_rows_of_any_precision_are_solved_in_float64():
    p = problem()
    A = solve.detectors(p.keys.float(), p.pulled.float(), p.strengths.float())
    assert A.dtype == torch.float64
    assert torch.equal(
        A, solve.detectors(p.keys.float().double(), p.pulled.float().double(), p.strengths.float().double())
    )


@each_problem
def test_the_dense_form_is_the_same_edit(p):
    X = p.detectors.mT @ p.offsets
    exact(solve.dense(p.keys, p.offsets, p.pulled, p.strengths).edit, X, atol=1e-10)
    exact(solve.left_over(p.keys, p.offsets, X), solve.unmoved(p.keys, p.offsets, p.detectors), atol=1e-12)


def test_blocks_of_rows_add_up():
    p = problem(k=30)
    rows = (p.keys, p.offsets, p.pulled, p.strengths)
    exact(solve.dense(*rows, block=7).edit, solve.dense(*rows).edit, atol=1e-12)


@pytest.mark.parametrize("gone", [[0], [3, 11, 29], list(range(20))], ids=len)
def test_taking_rows_out_is_solving_without_them(gone):
    p = problem(k=30, hard=2)
    rows = (p.keys, p.offsets, p.pulled, p.strengths)
    kept = [i for i in range(30) if i not in gone]
    whole = solve.dense(*rows)
    change = solve.without(whole, *(t[gone] for t in rows))
    expected = solve.dense(*(t[kept] for t in rows)).edit
    exact(whole.edit - change.P @ change.Q, expected, atol=1e-10)
    assert (whole.edit - expected).abs().max() > 1e-3  # control: those rows did something
