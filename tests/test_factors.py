"""Factors: checks, identity, addition, truncation, and which model they belong to."""

from dataclasses import replace

import pytest
import torch
from conftest import make_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from diffusers_erase import EraseError
from diffusers_erase.errors import ConflictError, MismatchError
from diffusers_erase.factors import Factors, Pair, add, probe, truncated

PATHS = {"mid_block.a.to_k": (6, 4), "up.0.to_v": (3, 5), "up.0.proj": (4, 4)}


def made(seed, paths=tuple(PATHS), rank=2):
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        p: Pair(
            torch.randn(rank, PATHS[p][1], generator=generator), torch.randn(PATHS[p][0], rank, generator=generator)
        )
        for p in paths
    }
    return Factors(pairs, tuple(float(PATHS[p][0]) for p in sorted(paths)))


@st.composite
def factors(draw):
    paths = draw(st.sets(st.sampled_from(sorted(PATHS)), min_size=1))
    return made(draw(st.integers(0, 2**20)), tuple(paths), draw(st.integers(1, 3)))


@settings(deadline=None, max_examples=25)
@given(factors(), factors(), factors())
def test_adding_is_a_semilattice(a, b, c):
    assert add(a, b).digest == add(b, a).digest
    assert add(a, a).digest == add(a).digest == a.digest
    assert add(add(a, b), c).digest == add(a, add(b, c)).digest
    assert add(add(a, b), a).digest == add(a, b).digest


@settings(deadline=None, max_examples=25)
@given(factors(), factors())
def test_the_sum_changes_each_layer_by_both(a, b):
    b = b.softened(0.5)  # no term of one is a term of the other
    both = add(a, b)
    assert set(both.paths) == set(a.paths) | set(b.paths)
    for path in both.paths:
        expected = sum(one.pairs[path].change for one in (a, b) if path in one.pairs)
        assert_close(both.pairs[path].change, expected, rtol=0, atol=1e-12)


def test_strength_scales_the_change():
    one = made(0)
    for path in one.paths:
        assert_close(one.softened(0.25).pairs[path].change, one.pairs[path].change / 4)
    assert one.softened(0.25).digest != one.digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: replace(f, pairs={}, base=()), "at least one layer"),
        (lambda f: replace(f, base=f.base[:-1]), "one probe for each"),
        (lambda f: replace(f, base=(float("nan"), *f.base[1:])), "finite"),
        (lambda f: replace(f, pairs={**f.pairs, "../x": next(iter(f.pairs.values()))}, base=(*f.base, 1.0)), "module path"),
        (lambda f: with_pair(f, lambda p: Pair(p.down[:1], p.up)), r"A \[r, in\]"),
        (lambda f: with_pair(f, lambda p: Pair(p.down[:0], p.up[:, :0])), r"A \[r, in\]"),
        (lambda f: with_pair(f, lambda p: Pair(p.down[0], p.up)), r"A \[r, in\]"),
        (lambda f: with_pair(f, lambda p: Pair(p.down * float("inf"), p.up)), "NaN or infinity"),
    ],
)  # fmt: skip
def test_factors_check_themselves(change, told):
    one = made(0)
    with pytest.raises(EraseError, match=told):
        change(one)
    assert with_pair(one, lambda p: p).digest == one.digest  # control: the same without the fault


def with_pair(f, change):
    path = f.paths[0]
    return replace(f, pairs={**f.pairs, path: change(f.pairs[path])})


def test_the_digest_covers_every_part():
    one = made(0)
    others = [
        with_pair(one, lambda p: Pair(p.down * (1 + 1e-6), p.up)),
        with_pair(one, lambda p: Pair(p.down, p.up * (1 + 1e-6))),
        replace(one, base=(one.base[0] * 1.01, *one.base[1:])),
        made(0, tuple(PATHS)[:2]),
        made(1),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)
    flipped = Factors({p: Pair(d.flip(0), u.flip(1)) for p, (d, u) in one.pairs.items()}, one.base)
    assert flipped.digest == one.digest  # the order of terms is not part of what they do


def test_factors_for_other_weights_do_not_add():
    one = made(0)
    for other in (replace(made(1), base=tuple(-v for v in one.base)), with_other_shape(one)):
        with pytest.raises(ConflictError, match="different base models"):
            add(one, other)
    near = replace(made(1), base=tuple(v * 1.001 for v in one.base))  # control: the same model in another dtype
    assert add(one, near).digest == add(near, one).digest


def with_other_shape(f):
    path = f.paths[0]
    down, up = f.pairs[path]
    return replace(f, pairs={**f.pairs, path: Pair(torch.ones(1, down.shape[1] + 1), up[:, :1])})


def test_truncation_is_the_best_of_its_rank_and_tells_its_error():
    change = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singular = torch.linalg.svdvals(change)
    for rank in (1, 3, 7, 20):
        pair, error = truncated(change, rank=rank, tolerance=0)
        assert pair.down.shape == (min(rank, 7), 7) and pair.up.shape == (9, min(rank, 7))
        assert_close(error, float((change - pair.change).norm() / change.norm()), atol=1e-6, rtol=0)
        assert_close(error, float(singular[rank:].norm() / singular.norm()), atol=1e-12, rtol=0)  # Eckart–Young
    for tolerance in (0.5, 0.1, 1e-9):
        pair, error = truncated(change, rank=None, tolerance=tolerance)
        assert error <= tolerance
        smaller = len(pair.down) - 1
        assert smaller == 0 or truncated(change, rank=smaller, tolerance=0)[1] > tolerance
    assert len(truncated(torch.outer(change[:, 0], change[0]), rank=None, tolerance=0.05)[0].down) == 1


def test_factors_know_their_model():
    unet = make_unet(32)
    weights = {n: m.weight for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn1.to_q"))}
    paths = sorted(weights)
    pairs = {p: Pair(torch.ones(1, weights[p].shape[1]), torch.ones(weights[p].shape[0], 1)) for p in paths}
    one = Factors(pairs, tuple(probe(weights[p]) for p in paths))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one.check({p: w.to(dtype) for p, w in weights.items()})
    other = {n: m.weight for n, m in make_unet(32, seed=1).named_modules() if n in weights}
    with pytest.raises(MismatchError, match="not those that the factors were made for"):
        one.check(other)
    wide = {n: m.weight for n, m in make_unet(64).named_modules() if n in weights}
    with pytest.raises(MismatchError, match="shape"):
        one.check(wide)
    with pytest.raises(MismatchError, match="no such layer"):
        one.check({p: weights[p] for p in paths[1:]})
