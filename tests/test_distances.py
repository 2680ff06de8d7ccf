"""Distances between sets of pictures, against naive formulas and against numpy's matrix functions."""

import math

import numpy as np
import pytest
import torch

from diffusers_erase.bench import distances
from diffusers_erase.bench.distances import Moments
from diffusers_erase.errors import EraseError


def gaussian(n, d, seed, shift=0.0, scale=1.0):
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(0))
    return scale * torch.randn(n, d, generator=made) @ mixing + shift


def naive_frechet(x, y):
    """With the square root of the product itself, by its (unsymmetric) eigenvalues."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross)


def test_frechet_is_its_formula():
    x, y = gaussian(40, 6, 1), gaussian(50, 6, 2, shift=0.7, scale=1.5)
    assert math.isclose(distances.frechet(Moments.of(x), Moments.of(y)), naive_frechet(x, y), rel_tol=1e-9)


def test_frechet_of_a_shifted_set_is_the_shift_squared():
    """By hand: equal covariances leave ‖μ₁ − μ₂‖² = 5 · 0.3²."""
    x = gaussian(30, 5, 1)
    assert math.isclose(distances.frechet(Moments.of(x), Moments.of(x + 0.3)), 0.45, rel_tol=1e-5)
    assert distances.frechet(Moments.of(x), Moments.of(x)) < 1e-9


def test_moments_of_shards_add_up():
    x = gaussian(30, 5, 1)
    x[7] = math.nan
    whole, merged = Moments.of(x), Moments.of(x[:11]) + (Moments.of(x[11:12]) + Moments.of(x[12:]))
    assert (merged.n, merged.unknown) == (whole.n, whole.unknown) == (29, 1)
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.covariance, torch.cov(x[~x.isnan().any(1)].double().mT))


def test_a_frechet_distance_of_too_few_pictures_is_refused():
    few, enough = gaussian(5, 5, 1), gaussian(6, 5, 1)
    assert distances.frechet(Moments.of(enough), Moments.of(enough)) < 1e-9
    with pytest.raises(EraseError, match="more than 5 pictures"):
        distances.frechet(Moments.of(few), Moments.of(enough))
    with pytest.raises(EraseError, match="different networks"):
        distances.frechet(Moments.of(gaussian(9, 4, 1)), Moments.of(enough))


def naive_mmd(x, y, k):
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    terms = (k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs)
    return sum(float(t) for t in terms) / len(pairs)


KERNELS = {
    "kid": lambda a, b: (a.double() @ b.double() / len(a) + 1) ** 3,
    "cmmd": lambda a, b: 1000 * torch.exp(-((a.double() - b.double()) ** 2).sum() / 200),
}


@pytest.mark.parametrize("name", KERNELS)
def test_mmd_is_its_formula(name):
    x, y = gaussian(23, 4, 1), gaussian(23, 4, 2, shift=0.5)
    found = getattr(distances, name)(x, y)
    assert math.isclose(found.value, naive_mmd(x, y, KERNELS[name]), rel_tol=1e-9)
    assert found.low < found.value < found.high and found.n == 23


def test_more_pictures_than_a_block_of_the_kernel():
    n = distances.BLOCK + 52
    x, y = gaussian(n, 2, 1).double(), gaussian(n, 2, 2, shift=0.1).double()
    h = sum(sign * (a @ b.mT / 2 + 1) ** 3 for a, b, sign in ((x, x, 1), (y, y, 1), (x, y, -1), (y, x, -1)))
    expected = (h.sum() - h.trace()) / (n * (n - 1))
    assert math.isclose(distances.kid(x, y).value, float(expected), rel_tol=1e-9)


@pytest.mark.parametrize("name", ["kid", "cmmd", "fid"])
def test_equal_sets_are_at_zero_and_others_are_not(name):
    x, measure = gaussian(60, 4, 1), getattr(distances, name)
    same, other = measure(x, x.clone()), measure(x, x + 1.0)
    assert abs(same.value) < 1e-9 and same.low <= 1e-9 and same.high >= 0
    assert other.low > 0.0


@pytest.mark.parametrize("name", ["kid", "fid"])
def test_leaving_a_group_out_is_computing_without_it(name):
    """The jackknife against its definition, computed from scratch for every concept."""
    x, y, concepts = gaussian(40, 3, 1), gaussian(40, 3, 2, shift=0.4), [f"c{i % 4}" for i in range(40)]
    measure = getattr(distances, name)
    found = measure(x, y, concepts)
    keep = [torch.tensor([c != left for c in concepts]) for left in ("c0", "c1", "c2", "c3")]
    without = [measure(x[k], y[k]).value for k in keep]
    error = math.sqrt(3 / 4 * sum((w - sum(without) / 4) ** 2 for w in without))
    assert math.isclose(found.high - found.value, distances.t_quantile(3) * error, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["kid", "cmmd", "fid"])
def test_unknown_pictures_lower_the_coverage_and_nothing_else(name):
    x, y, measure = gaussian(30, 3, 1), gaussian(30, 3, 2), getattr(distances, name)
    holed = x.clone()
    holed[4], y[9, 1] = math.nan, math.inf
    rest = [i for i in range(30) if i not in (4, 9)]
    found = measure(holed, y)
    assert math.isclose(found.value, measure(x[rest], y[rest]).value, rel_tol=1e-9)
    assert (found.n, found.coverage) == (28, 28 / 30)


def test_nothing_to_compare_is_no_value():
    nothing = distances.kid(torch.full((3, 4), math.nan), torch.zeros(3, 4))
    assert math.isnan(nothing.value) and (nothing.n, nothing.coverage) == (0, 0.0)
    with pytest.raises(EraseError, match="pair by pair"):
        distances.kid(torch.zeros(3, 4), torch.zeros(4, 4))


def test_drift():
    states = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert math.isclose(distances.drift(states, states + torch.tensor([0.0, 1.0])), math.sqrt(2) / 5)
    assert distances.drift(states, states) == 0.0


@pytest.mark.parametrize("name", ["kid", "fid"])
def test_agrees_with_torchmetrics_over_the_same_features(name):
    theirs = pytest.importorskip(f"torchmetrics.image.{name}", reason="torchmetrics is not installed")
    x, y = gaussian(200, 4, 1), gaussian(200, 4, 2, shift=0.5)
    if name == "fid":
        theirs = theirs.FrechetInceptionDistance(feature=torch.nn.Identity(), input_img_size=(4,)).double()
    else:
        theirs = theirs.KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=200).double()
    theirs.update(x.double(), real=True)
    theirs.update(y.double(), real=False)
    found = theirs.compute()
    # Theirs pairs every x with every y, ours all but each with its own twin: they differ by a term of order 1/n.
    tolerance = 1e-6 if name == "fid" else 0.05
    value = float(found[0] if name == "kid" else found)
    assert math.isclose(getattr(distances, name)(x, y).value, value, rel_tol=tolerance)
