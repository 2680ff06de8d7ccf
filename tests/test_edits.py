"""Edits as values: what they refuse to be, their algebra, and how sets of them are decided."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_erase import ConflictError, EraseError, edits, solve
from diffusers_erase.edits import Edit, Gate, Label, Pack, Pool, compose, overruled, same_name

D = 16
NAMES = ("cat", "dog", "wolf", "boat", "church", "tree")


def _states(seed, n):
    generator = torch.Generator().manual_seed(seed)
    common = torch.ones(D, dtype=torch.float64)
    return common + torch.randn(n, D, generator=generator, dtype=torch.float64)


STATES = {
    (name, role): row
    for i, name in enumerate((*NAMES, "", "kitten"))
    for role, row in zip(("subject", "eot"), _states(i, 2), strict=True)
}
PACK = Pack("test", "digest-of-test", ridge=0.05, width=D, moment=0.2 * torch.eye(D).double(), hard=_states(99, 2))


def row(name, target=None, *, role="subject", concept=None, pack=PACK, strength=40.0, templates=0.0, gate=None):
    """The edit of one row; target None preserves, "" is the empty prompt. `templates` moves the states as other contexts would."""
    key = STATES[name, role] + templates
    goal = key if target is None else STATES[target, role] + templates
    targets = None if target is None else (target,) if target else ()
    return Edit(
        labels=(Label(concept or name, name, role, targets, gate),),
        keys=key[None],
        offsets=(goal - key)[None],
        strengths=torch.tensor([strength], dtype=torch.float64),
        pulled=pack.pull(key[None]),
        pack=pack.name,
        pack_digest=pack.digest,
    )


def union(*edits, **options):
    return compose(*edits, **{"residual_max": None} | options)


def landing(edit, name, role="subject", templates=0.0):
    """Where the state of `name` goes under `edit`."""
    key = STATES[name, role] + templates
    return key + (key @ edit.detectors().mT) @ edit.offsets.double()


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) > 30
    return message


# --- What an edit refuses to be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"keys": torch.zeros(2, D)}, r"1 labels .*\(2, 16\)"),
        ({"keys": torch.zeros(D)}, "pairs each"),
        ({"offsets": torch.ones(1, D - 1)}, r"\(1, 15\)"),
        ({"pulled": torch.ones(1, D + 1)}, r"\(1, 17\)"),
        ({"strengths": torch.ones(1, 1)}, r"strengths \(1, 1\)"),
        ({"labels": ()}, "0 labels"),
        ({"keys": torch.full((1, D), torch.nan)}, "found NaN or infinity; erase the concept again"),
        ({"offsets": torch.full((1, D), torch.inf)}, "found NaN or infinity"),
        ({"pulled": torch.full((1, D), -torch.inf)}, "found NaN or infinity"),
        ({"strengths": torch.tensor([torch.nan])}, "found NaN or infinity"),
        ({"strengths": torch.tensor([0.0])}, "positive strength; leave a row out"),
        ({"strengths": torch.tensor([-1.0])}, "positive strength"),
        ({"offsets": torch.zeros(1, D)}, "labels and offsets disagree"),
        ({"labels": (Label("cat", "cat", "subject", None),)}, "labels and offsets disagree"),
    ],
)
def test_an_edit_checks_itself(change, told):
    good = row("cat", "dog")
    with pytest.raises(EraseError, match=told) as error:
        replace(good, **change)
    one_line(error)


def test_names_are_compared_without_case_and_spaces():
    assert same_name(" Van  GOGH ") == same_name("van gogh") == same_name("Van\tGogh")
    assert same_name("STRASSE") == same_name("straße")
    assert same_name("vangogh") != same_name("van gogh")


def test_a_label_survives_json():
    for label in (
        Label("cat", "cat", "eot", ("dog", "wolf"), Gate(0.7)),
        Label("a", "b", "name:0", ()),
        Label("a", "a", "eot", None),
    ):
        as_lists = [
            label.concept,
            label.name,
            label.role,
            None if label.targets is None else list(label.targets),
            label.gate and list(label.gate),
        ]
        assert Label.from_json(as_lists) == label
        assert Label.from_json(as_lists).gate is None or isinstance(Label.from_json(as_lists).gate, Gate)


# --- Algebra ----------------------------------------------------------------------------------------------------------


@st.composite
def sets(draw):
    """Edits of one or two erased names, and perhaps of a preserved one: names draw from one list, so that they overlap."""
    erased = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    kept = draw(st.lists(st.sampled_from([n for n in NAMES if n not in erased]), max_size=1))
    strength = draw(st.sampled_from([10.0, 40.0]))
    parts = [row(n, "", role=role, strength=strength) for n in erased for role in ("subject", "eot")] + [
        row(n) for n in kept
    ]
    return union(*parts)


@settings(max_examples=30, deadline=None)
@given(sets(), sets(), sets())
def test_composition_is_a_semilattice(a, b, c):
    assert union(a, b).digest == union(b, a).digest
    assert union(a, a).digest == a.digest
    assert union(union(a, b), c).digest == union(a, union(b, c)).digest == union(c, a, b).digest
    assert union(union(a, b), a).digest == union(a, b).digest
    assert torch.equal(union(a, b, c).detectors(), union(c, b, a).detectors())


@settings(max_examples=20, deadline=None)
@given(sets(), st.randoms())
def test_digest_does_not_know_the_order_of_rows(edit, random):
    rows = list(range(len(edit.labels)))
    random.shuffle(rows)
    assert edit.take(rows).digest == edit.digest


@pytest.mark.parametrize("field", ["keys", "offsets", "strengths", "pulled"])
def test_one_changed_bit_is_another_digest(field):
    edit = union(row("cat", "dog"), row("boat"))
    moved = getattr(edit, field).clone()
    at = (int(edit.moving.nonzero()[0]),) + (3,) * (moved.ndim - 1)
    moved[at] = torch.nextafter(moved[at], torch.tensor(torch.inf, dtype=torch.float64))
    assert replace(edit, **{field: moved}).digest != edit.digest
    assert replace(edit, **{field: getattr(edit, field).clone()}).digest == edit.digest


def test_everything_that_acts_is_in_the_digest():
    edit = row("cat", "dog")
    others = [
        row("cat", "dog", gate=Gate(0.5)),
        row("cat", "dog", concept="kitten"),
        replace(edit, labels=(edit.labels[0]._replace(role="eot"),)),
        replace(edit, labels=(edit.labels[0]._replace(targets=("wolf",)),)),
        replace(edit, pack_digest="another"),
        edit.to(torch.float32),
    ]
    assert len({edit.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_removing_a_concept_is_never_having_had_it():
    cat, dog, boat = row("cat", ""), row("dog", ""), row("boat", "")
    everything = union(cat, dog, boat)
    without = everything.take(i for i, label in enumerate(everything.labels) if label.concept != "dog")
    assert without.digest == union(boat, cat).digest
    assert torch.equal(without.detectors(), union(cat, boat).detectors())
    assert not torch.equal(
        everything.detectors()[[0]], without.detectors()[[0]]
    )  # control: the dog's row had mattered


def test_composing_is_solving_together():
    """Two adapters on one pack, against a direct solve that never saw them apart."""
    both = union(row("cat", "tree"), row("dog", "tree"), row("boat"))
    keys, offsets, s = both.keys, both.offsets, both.strengths
    A = solve.detectors(keys, PACK.pull(keys), s)
    torch.testing.assert_close(both.detectors(), A, atol=1e-12, rtol=0)
    assert max(both.residuals().values()) < 0.1
    alone = row("cat", "tree"), row("dog", "tree")
    added = sum((e.detectors().mT @ e.offsets for e in alone), torch.zeros(D, D).double())
    left = (keys + offsets - keys - keys @ added)[both.moving]
    assert left.norm() / offsets.norm() > 0.2  # control: adding the two is not it


def test_concepts_preserved_and_alone():
    edit = union(row("cat", "dog"), row("kitten", "dog", concept="cat"), row("boat", ""), row("church"))
    assert edit.concepts == ("boat", "cat")
    assert edit.preserved == ("church",)
    assert {label.name for label in edit.alone("cat").labels} == {"cat", "kitten", "church"}
    assert edit.moving.tolist() == [label.targets is not None for label in edit.labels]


def test_nothing_cannot_be_composed():
    with pytest.raises(EraseError, match="at least one"):
        compose()


# --- Conflicts --------------------------------------------------------------------------------------------------------


def test_an_erasure_wins_over_a_preserved_name():
    keeps, erases = union(row("cat", ""), row("dog"), row("tree")), row("dog", "", concept="dog")
    both = union(keeps, erases)
    assert both.preserved == ("tree",)
    assert overruled([keeps, erases]) == ("dog",)
    assert both.digest == union(row("cat", ""), row("tree"), row("dog", "")).digest
    assert both.residuals()["dog"] < 0.1
    assert overruled([keeps]) == ()
    assert keeps.preserved == ("dog", "tree")  # control: alone it does preserve


def test_it_also_wins_where_names_differ_in_case_only():
    dog = row("dog")
    shouted = replace(dog, labels=(dog.labels[0]._replace(concept="DOG", name="DOG"),))
    assert union(row("dog", ""), shouted).preserved == ()


def test_a_target_that_is_erased_is_an_error():
    with pytest.raises(ConflictError, match="'cat' is sent to 'dog', which is erased too.*chains='follow'") as error:
        compose(row("cat", "dog"), row("dog", "wolf"))
    one_line(error)
    compose(row("cat", "dog"), row("boat", "wolf"), residual_max=None)  # control: no chain, no error


@pytest.mark.parametrize("templates", [0.0, 0.25])
def test_a_followed_chain_lands_where_the_target_goes(templates):
    """cat → dog with dog → wolf is cat → wolf; also where the second was made with other templates."""
    followed = union(row("cat", "dog"), row("dog", "wolf", templates=templates), chains="follow")
    direct = union(row("cat", "wolf"), row("dog", "wolf", templates=templates))
    (i,) = (i for i, label in enumerate(followed.labels) if label.concept == "cat")
    goal = STATES["wolf", "subject"] + templates
    torch.testing.assert_close(followed.keys[i] + followed.offsets[i], goal, atol=1e-14, rtol=0)
    assert followed.labels[i].targets == ("wolf",)
    if not templates:
        torch.testing.assert_close(followed.offsets, direct.offsets, atol=1e-14, rtol=0)
        assert followed.labels == direct.labels
        at_wolf, at_dog = ((landing(followed, "cat") - STATES[name, "subject"]).norm() for name in ("wolf", "dog"))
        assert at_wolf < 0.1 * at_dog


def test_chains_are_followed_to_their_end():
    followed = union(row("cat", "dog"), row("dog", "wolf"), row("wolf", ""), chains="follow")
    assert {label.targets for label in followed.labels} == {()}
    end = followed.keys + followed.offsets
    torch.testing.assert_close(end, STATES["", "subject"].expand(3, D), atol=1e-14, rtol=0)


def test_inner_tokens_follow_the_chain_of_the_last_token():
    """A longer name's inner tokens are sent to the target's last token, so that is where their chain goes on."""
    inner = row("cat", "dog")
    inner = replace(inner, labels=(inner.labels[0]._replace(role="name:0"),))
    dog = row("dog", "wolf")
    other = row("boat", "wolf", concept="dog")  # the inner token of a target of several tokens: not on the way
    other = replace(other, labels=(other.labels[0]._replace(name="dog", role="name:0"),))
    followed = union(inner, dog, other, chains="follow")
    (i,) = (i for i, label in enumerate(followed.labels) if label.concept == "cat")
    torch.testing.assert_close(followed.keys[i] + followed.offsets[i], STATES["wolf", "subject"], atol=1e-14, rtol=0)


@pytest.mark.parametrize("chains", ["error", "follow"])
def test_a_circle_is_an_error(chains):
    with pytest.raises(ConflictError) as error:
        union(row("cat", "dog"), row("dog", "cat"), chains=chains)
    one_line(error)
    with pytest.raises(ConflictError):
        union(row("cat", "dog"), row("dog", "wolf"), row("wolf", "cat"), chains=chains)


def test_a_chain_through_a_mixture_or_a_missing_role_is_an_error():
    mixed = row("cat", "dog")
    mixed = replace(mixed, labels=(mixed.labels[0]._replace(targets=("dog", "tree")),))
    with pytest.raises(ConflictError, match="a mixture"):
        union(mixed, row("dog", "wolf"), chains="follow")
    with pytest.raises(ConflictError, match="no row for the role 'eot'"):
        union(row("cat", "dog", role="eot"), row("dog", "wolf"), chains="follow")


def test_one_key_has_one_target():
    with pytest.raises(
        ConflictError, match="one key with two targets: 'cat' .*'dog' and to 'wolf'; keep one"
    ) as error:
        union(row("cat", "dog"), row("cat", "wolf"))
    one_line(error)
    with pytest.raises(ConflictError, match="two targets"):
        union(row("cat", "dog"), row("cat", ""))
    cat = row("cat", "wolf")
    spelt = replace(cat, labels=(Label("kitty", "kitty", "subject", ("wolf",)),))  # another name of the same state
    with pytest.raises(ConflictError, match="two targets"):
        union(row("cat", "dog"), spelt)


def test_one_target_spelt_in_two_ways_is_one_target():
    cat = row("cat", "dog")
    shouted = replace(cat, labels=(cat.labels[0]._replace(targets=("DOG",)),), strengths=2 * cat.strengths)
    assert len(union(cat, shouted).labels) == 2


def test_edits_on_different_packs_do_not_compose():
    other = Pack("other", "digest-of-other", ridge=1.0, width=D)
    with pytest.raises(ConflictError, match="cat with dog: they stand on different base packs.*test.*other") as error:
        compose(row("cat", ""), row("dog", "", pack=other))
    one_line(error)


def test_a_crowded_set_is_an_error():
    """Rows nearly alike that go to opposite places: each alone is erased, together none is."""
    cat = row("cat", "dog")
    twin = replace(row("kitten", "dog"), keys=cat.keys + 1e-3, offsets=-cat.offsets, pulled=PACK.pull(cat.keys + 1e-3))
    with pytest.raises(ConflictError, match="in this set .* of '(cat|kitten)' would be left .*allowed: 20%") as error:
        compose(cat, twin)
    one_line(error)
    compose(cat, twin, residual_max=1.5)
    compose(cat, twin, residual_max=None)
    compose(cat)
    compose(twin)


def test_a_mild_edit_is_not_called_crowded():
    mild = row("cat", "dog").calibrated(0.6)
    assert compose(mild, row("boat", "")).residuals()["cat"] > 0.5


# --- Strength ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [0.9, 0.3, 0.02])
def test_calibrated_reaches_the_residual(goal):
    edit = union(row("cat", "dog"), row("cat", "dog", role="eot"), row("tree", strength=5.0))
    found = edit.calibrated(goal)
    assert found.residuals()["cat"] == pytest.approx(goal, abs=1e-9)
    assert found.strengths[~found.moving].tolist() == [5.0]
    assert found.calibrated(goal).residuals()["cat"] == pytest.approx(goal, abs=1e-9)


def test_what_cannot_be_erased_is_an_error():
    hard = replace(PACK, hard=STATES["cat", "subject"][None])
    with pytest.raises(EraseError, match="no strength erases cat to residual 0.02.*preserve fewer") as error:
        row("cat", "dog", pack=hard).calibrated(0.02)
    one_line(error)


@pytest.mark.parametrize("w", [0.9, 0.5, 0.1])
def test_softened_keeps_that_share_of_the_effect(w):
    strong = union(row("cat", "dog"), row("cat", "dog", role="eot"), row("tree")).calibrated(0.02)
    expected = 1 - w * (1 - 0.02)
    assert strong.softened(w).residuals()["cat"] == pytest.approx(expected, abs=1e-9)
    asked = strong.calibrated(expected)
    torch.testing.assert_close(strong.softened(w).strengths, asked.strengths, rtol=1e-6, atol=0)


def test_softened_is_calibrated_once():
    """A pool knows its edits by identity: the same strength again must not be another edit."""
    strong = row("cat", "dog").calibrated(0.02)
    half = strong.softened(0.5)
    assert strong.softened(0.5) is half and strong.softened(0.9) is not half  # control
    assert torch.equal(strong.softened(0.5).strengths, half.strengths)


def test_softened_treats_every_concept_alone():
    cat, boat = row("cat", "dog").calibrated(0.02), row("boat", "").calibrated(0.3)
    both = union(cat, boat)
    assert both.softened(1.0) is both
    assert both.softened(0.5).digest == union(cat.softened(0.5), boat.softened(0.5)).digest


# --- Packs ------------------------------------------------------------------------------------------------------------


def test_a_pack_without_moment_and_hard_rows_is_a_ridge():
    plain = Pack("identity", "identity", ridge=0.5, width=D)
    C = _states(3, 4)
    torch.testing.assert_close(plain.pull(C), 2 * C, atol=0, rtol=0)
    spelt = Pack("identity", "identity", 0.5, D, torch.zeros(D, D).double(), torch.zeros(0, D).double())
    torch.testing.assert_close(spelt.pull(C), plain.pull(C), atol=1e-14, rtol=1e-14)
    assert not PACK.pull(C).allclose(plain.pull(C))


# --- Many edits, and choices among them -------------------------------------------------------------------------------


def crowd(n, seed=0):
    """Edits of one concept each, of random states."""
    keys, goals = _states(1000 + seed, n), _states(2000 + seed, n)
    return [
        Edit((Label(f"c{i}", f"c{i}", "subject", ()),), keys[[i]], (goals - keys)[[i]], torch.ones(1).double(),
             PACK.pull(keys[[i]]), PACK.name, PACK.digest)
        for i in range(n)
    ]  # fmt: skip


def test_a_choice_from_a_pool_is_the_composition_of_what_was_chosen():
    many = crowd(edits.MANY + 20)
    pool = Pool(many)
    assert pool.holds(many[3:7]) and not pool.holds([*many, row("cat", "dog")])
    some = many[:7] + many[8:]
    found, expected = pool.compose(some, residual_max=None), compose(*some, residual_max=None)
    assert found.labels == expected.labels and all(map(torch.equal, found.rows, expected.rows))
    alone = solve.dense(*expected.rows).edit
    torch.testing.assert_close(found.matrix, alone, atol=1e-10, rtol=0)
    assert (pool.compose(many, residual_max=None).matrix - alone).abs().max() > 1e-6  # control
    fresh = replace(expected)  # knows nothing yet
    assert found.residuals() == pytest.approx(fresh.residuals(), abs=1e-10)
    assert found.saturation == pytest.approx(fresh.saturation, abs=1e-10)


def test_what_was_chosen_before_leaves_no_trace():
    many = crowd(edits.MANY + 20)
    pool = Pool(many)
    first = pool.compose(many[5:], residual_max=None)
    for gone in (range(10), (3,), range(400)):
        pool.compose([e for i, e in enumerate(many) if i not in gone], residual_max=None)
    again = pool.compose(many[5:], residual_max=None)
    assert torch.equal(first.matrix, again.matrix) and first.digest == again.digest


def test_a_pool_decides_conflicts_by_what_is_chosen():
    cat, keeps, chained = row("cat", "dog"), row("cat"), row("dog", "wolf")
    pool = Pool([cat, keeps, chained])
    assert pool.compose([keeps], residual_max=None).preserved == ("cat",)
    assert pool.compose([cat, keeps], residual_max=None).preserved == ()
    assert pool.compose([cat], residual_max=None).digest == compose(cat, residual_max=None).digest
    with pytest.raises(ConflictError, match="erased too"):
        pool.compose([cat, chained])
    with pytest.raises(ConflictError, match="two targets"):
        compose(cat, row("cat", "boat"))


@pytest.mark.parametrize("n", [1, 3, 40])
def test_saturation_is_how_far_the_background_moves(n):
    """√(tr(XᵀHX) / mean‖d‖²), written out; also with hard rows, which are in PACK, and beyond the width in rows."""
    edit = compose(*crowd(n), row("boat"), residual_max=None)
    X, H = edit.detectors().mT @ edit.offsets, PACK.ridge * torch.eye(D).double() + PACK.moment
    moved = float((X * (H @ X)).sum())
    asked = float((edit.offsets[edit.moving] ** 2).sum(dim=1).mean())
    assert edit.saturation == pytest.approx((moved / asked) ** 0.5, rel=1e-9)
    assert compose(row("boat")).saturation == 0.0


def test_saturation_grows_and_is_unknown_without_a_background():
    many = crowd(12)
    grown = [compose(*many[:n], residual_max=None).saturation for n in (1, 4, 12)]
    assert grown == sorted(grown) and grown[2] > 1.5 * grown[0]
    assert replace(many[0], pack_digest="identity-0.5").saturation is None


def test_a_set_that_may_hurt_is_said():
    assert "erase fewer" in edits.too_full(edits.SATURATED + 0.1)
    assert edits.too_full(edits.SATURATED) == edits.too_full(None) == ""
    one, more = compose(*crowd(1)), compose(*crowd(9), residual_max=None)
    assert edits.saturation({"text": one, "pooled": more}) == more.saturation > one.saturation
    assert edits.saturation({}) is None


def test_marks_tell_which_concepts_keep_their_rows():
    cat, cruel = row("cat", "dog"), row("cat", "boat")
    both = {"text": compose(cat, row("church", "tree"), residual_max=None)}
    assert edits.marks({"text": cat})["cat"] == edits.marks(both)["cat"] != edits.marks({"text": cruel})["cat"]
    assert edits.marks({"text": cat, "pooled": cat})["cat"] != edits.marks(both)["cat"]
