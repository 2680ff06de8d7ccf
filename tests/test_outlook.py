"""Every prediction is what the solver does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_erase import EraseError, packs, solve
from diffusers_erase.edits import Edit, Label, Pack
from diffusers_erase.outlook import Surroundings, outlook
from diffusers_erase.sites import sites
from diffusers_erase.targets import readout
from diffusers_erase.text import Encoder
from tests.cases import PACK
from tests.conftest import make_pipe

EXACT = {"rtol": 1e-9, "atol": 1e-9}
ROLES = ("subject", "eot")


def random_pack(d):
    root = torch.randn(d, d, dtype=torch.float64)
    return Pack("p", "p", ridge=0.3, width=d, moment=root @ root.mT / d, hard=torch.randn(2, d, dtype=torch.float64))


def inverse(pack):
    return pack.pull(torch.eye(pack.width, dtype=torch.float64))


def edit_of(C, T, P, pack, hold, residual):
    """The edit that a prediction is about, solved by the library itself."""
    keys = torch.cat([C, P])
    labels = [Label("c", "c", f"name:{i}", ("t",)) for i in range(len(C))]
    labels += [Label(f"p{i}", f"p{i}", "eot", None) for i in range(len(P))]
    strengths = torch.cat([torch.ones(len(C), dtype=torch.float64), hold])
    offsets = torch.cat([T - C, torch.zeros_like(P)])
    edit = Edit(tuple(labels), keys, offsets, strengths, pack.pull(keys), pack.name, pack.digest)
    return edit.calibrated(residual)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    roles=st.integers(1, 3),
    preserved=st.integers(0, 3),
    residual=st.sampled_from([0.02, 0.1, 0.4]),
)
def test_predictions_are_what_the_solver_does(seed, roles, preserved, residual):
    torch.manual_seed(seed)
    d, n = 24, 4
    pack = random_pack(d)
    C, Q = torch.randn(roles, d, dtype=torch.float64), torch.randn(5, d, dtype=torch.float64)
    T, P = (torch.randn(n, k, d, dtype=torch.float64) for k in (roles, preserved))
    hold = solve.holding(P, P @ inverse(pack), 0.1)
    found = outlook(C, T, P, hold, Q, inverse(pack), residual)
    for i in range(n):
        edit = edit_of(C, T[i], P[i], pack, hold[i], residual)
        assert found.strengths[i] == pytest.approx(float(edit.strengths[0]), rel=1e-9)
        torch.testing.assert_close(found.answers[i], Q @ edit.detectors()[edit.moving].mT, **EXACT)
        free = edit_of(C, T[i], P[i][:0], pack, hold[i][:0], residual)
        weak = torch.cat([free.strengths, hold[i]])
        left = solve.residual(edit.keys, edit.offsets, solve.detectors(edit.keys, edit.pulled, weak))
        assert found.residuals[i] == pytest.approx(left, rel=1e-9)


def test_what_is_preserved_cannot_also_be_moved():
    """Methods: a target equal to the concept leaves far more of it in place than one that has nothing to do with it."""
    torch.manual_seed(0)
    pack, C = random_pack(24), torch.randn(1, 24, dtype=torch.float64)
    T = torch.stack([C + 1e-3 * torch.randn_like(C), torch.randn_like(C)])
    hold = solve.holding(T, T @ inverse(pack), 0.1)
    near, far = outlook(C, T, T, hold, C, inverse(pack), 0.02).residuals
    # With h = s·cGcᵀ = 49 and the pull on c cut to a tenth: 1 / (1 + 4.9).
    assert near == pytest.approx(1 / 5.9, rel=1e-2)
    assert far < 0.05


def test_where_no_strength_does_the_prediction_says_so():
    """Two roles with one state cannot be sent to two places, neither by the solver nor by the prediction."""
    torch.manual_seed(0)
    pack, c = random_pack(24), torch.randn(1, 24, dtype=torch.float64)
    T, none = torch.randn(1, 2, 24, dtype=torch.float64), torch.zeros(1, 0, 24, dtype=torch.float64)
    same, apart = torch.cat([c, c]), torch.cat([c, T[0, :1]])
    found = outlook(same, T, none, none[..., 0], c, inverse(pack), 0.02)
    assert found.strengths.isnan().all() and found.answers.isnan().all()
    with pytest.raises(EraseError, match="no strength erases c to residual 0.02"):
        edit_of(same, T[0], none[0], pack, none[0, :, 0], 0.02)
    assert outlook(apart, T, none, none[..., 0], c, inverse(pack), 0.02).answers.isfinite().all()


@pytest.fixture(scope="module")
def still(tokenizer):
    """A pipe that no test changes."""
    return make_pipe(tokenizer)


@pytest.fixture(scope="module")
def scene(still):
    """Rows of a few names, and their surroundings: erasing "cat"."""
    encoder = Encoder(still)
    names = ("cat", "wolf", "dog", "boat")
    rows = dict(zip(names, encoder.table(names, ROLES, ("{}",)), strict=True))
    null, pack = encoder.null_rows(ROLES), packs.pack_on(encoder, PACK)
    view = Surroundings(
        concept=rows["cat"],
        others=rows["cat"][None][:0],
        names=torch.stack([rows["dog"], rows["boat"]]),
        empty=torch.stack([null[role] for role in ROLES]),
        inverse=inverse(pack),
        metric=readout(still),
        residual=0.02,
        preserved=rows["boat"][None][:0],
    )
    return rows, pack, view


def test_damage_is_the_change_of_every_key_and_value(still, scene):
    rows, pack, view = scene
    damage = view.damage(view.outlook(rows["wolf"][None, None]))
    held = solve.holding(rows["wolf"], pack.pull(rows["wolf"]), 0.1)
    edit = edit_of(rows["cat"], rows["wolf"], rows["wolf"], pack, held, 0.02)
    layers = [w.weight.detach().double() / w.weight.detach().double().norm() for w in sites(still.unet).values()]
    for j in range(2):
        shares = []
        for r in range(2):
            change = (view.names[j, r] @ edit.detectors().mT) @ edit.offsets
            moved = sum(float((W @ change).square().sum()) for W in layers)
            away = sum(float((W @ (view.names[j, r] - view.empty[r])).square().sum()) for W in layers)
            shares.append((moved / away) ** 0.5)
        assert float(damage[0, j]) == pytest.approx(sum(shares) / 2, rel=1e-9)
    assert float(damage.min()) > 0


def test_confusion_is_what_a_name_loses_of_its_distance_to_another(scene):
    """To first order: with a small strength it is the change of the distance itself."""
    rows, _, view = scene
    found = view.outlook(rows["wolf"][None, None])
    small = found._replace(answers=1e-6 * found.answers)
    lost = []
    for j in range(2):
        q, o = view.names[j], view.names[1 - j]
        moved = q + small.answers.view(1, 2, 2, 2)[0, j] @ small.offsets[0]
        before, after = (float((((x - o) @ view.metric) * (x - o)).sum()) for x in (q, moved))
        lost.append(max(0.0, 1 - after / before))
    assert max(lost) > 0
    assert float(view.confusion(small)[0]) == pytest.approx(sum(lost) / 2, rel=1e-4)


def test_distance_is_none_to_the_concept_itself(scene):
    rows, _, view = scene
    assert view.distance(rows["cat"][None]) == 0
    assert view.distance(view.empty[None]) == 1
    assert view.distance(view.names).min() > 0.1


def test_preserving_a_name_shields_it(scene):
    rows, _, view = scene
    bare = replace(view, shield=False)
    kept = replace(bare, preserved=rows["dog"][None])
    before, after = (v.damage(v.outlook(rows["wolf"][None, None]))[0, 0] for v in (bare, kept))
    assert float(after) < 0.3 * float(before)
