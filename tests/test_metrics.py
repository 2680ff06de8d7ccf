"""Metrics against their definitions, worked examples and scipy; partial sums merge exactly; intervals hold what they should."""

import itertools
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_erase.bench import metrics
from diffusers_erase.bench.metrics import Estimate, Mean, Share, kept, mcnemar, paired_bootstrap, share_kept
from diffusers_erase.errors import EraseError

ANSWERS = st.lists(st.sampled_from([True, False, None]), max_size=30)
SHARES = ANSWERS.map(Share.of)
SCORES = st.lists(st.one_of(st.none(), st.just(math.nan), st.floats(-1e3, 1e3)), max_size=20)
LABELS = st.sampled_from(["cat", "dog", None])
PAIRS = st.lists(st.tuples(st.sampled_from(["cat", "dog", ""]), LABELS, LABELS), max_size=8)


def same(a, b):
    return repr(a) == repr(b)  # NaN is not equal to itself


class TestShare:
    def test_worked_example(self):
        """8 of 10 (Wilson's interval as in Agresti & Coull 1998: 0.490 to 0.943)."""
        e = Estimate.of_share([True] * 8 + [False] * 2)
        assert (e.value, round(e.low, 3), round(e.high, 3), e.n, e.coverage, e.bounds) == (
            0.8,
            0.49,
            0.943,
            10,
            1.0,
            None,
        )
        assert str(e) == "80% [49%, 94%], n = 10"

    def test_agrees_with_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        for hits, n in ((0, 1), (0, 20), (20, 20), (37, 90), (1, 1000)):
            expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
            e = Share(hits, n).estimate()
            assert math.isclose(e.low, expected.low, abs_tol=1e-12) and math.isclose(
                e.high, expected.high, abs_tol=1e-12
            )

    def test_unknown_answers_lower_the_coverage_and_bound_the_value(self):
        e = Estimate.of_share([True, True, False, None])
        assert (e.value, e.n, e.coverage, e.bounds) == (2 / 3, 3, 0.75, (0.5, 0.75))
        assert str(e).endswith("n = 3, coverage 75%")

    def test_only_unknown_answers_are_no_value(self):
        e = Estimate.of_share([None, None])
        assert math.isnan(e.value) and (e.low, e.high, e.n, e.coverage, e.bounds) == (0.0, 1.0, 0, 0.0, (0.0, 1.0))
        assert str(e) == "no answers" and str(Estimate.of_share([])) == "no pictures"
        assert e.to_json()["value"] is None and json.dumps(e.to_json(), allow_nan=False)

    @given(ANSWERS, ANSWERS, ANSWERS)
    def test_shards_add_up_to_the_whole(self, a, b, c):
        assert (
            Share.of(a + b + c) == Share.of(a) + (Share.of(b) + Share.of(c)) == Share.of(c) + Share.of(b) + Share.of(a)
        )

    @given(SHARES)
    def test_interval_and_bounds_hold_the_value(self, share):
        e = share.estimate()
        assert 0 <= e.low <= e.high <= 1 and 0 <= e.coverage <= 1
        assert not e.n or e.low <= e.value <= e.high
        assert not e.n or not e.bounds or e.bounds[0] <= e.value <= e.bounds[1]

    @given(ANSWERS)
    def test_bounds_are_reached_and_never_passed(self, answers):
        e, unknown = Estimate.of_share(answers), answers.count(None)
        if not e.n or not unknown:
            return
        filled = [Estimate.of_share([v if a is None else a for a in answers]).value for v in (False, True)]
        assert e.bounds == tuple(filled)

    @given(SHARES)
    def test_what_is_gone_is_the_complement_of_what_is_left(self, share):
        e = share.estimate()
        gone = e.complement
        assert (gone.low, gone.high, gone.n, gone.coverage) == (1 - e.high, 1 - e.low, e.n, e.coverage)
        assert not e.n or gone.value == 1 - e.value

    @given(st.integers(1, 60), st.integers(0, 60))
    def test_one_more_hit_moves_everything_up(self, n, hits):
        hits = min(hits, n - 1)
        less, more = Share(hits, n).estimate(), Share(hits + 1, n).estimate()
        assert less.value < more.value and less.low < more.low and less.high <= more.high


class TestKept:
    def test_what_was_wrong_before_or_has_nothing_to_check_does_not_count(self):
        e = share_kept(["cat", "cat", "cat", ""], ["cat", "dog", "cat", "cat"], ["cat", "cat", "dog", "cat"])
        assert (e.value, e.n, e.coverage) == (0.5, 2, 1.0)

    def test_an_unknown_after_is_no_erasure(self):
        """A broken judge on an erased concept: half of the answers are missing, and the bounds say that all may be left."""
        e = share_kept(["cat"] * 4, ["cat"] * 4, ["dog", "dog", None, None])
        assert (e.value, e.coverage, e.bounds) == (0.0, 0.5, (0.0, 0.5))

    @given(PAIRS)
    def test_bounds_are_the_extremes_over_all_answers(self, pairs):
        """Every way to fill the unknown answers gives a share within the bounds, and the bounds are reached (or n was 0)."""
        expected, before, after = ([p[i] for p in pairs] for i in range(3))
        holes = [
            (i, j)
            for j, side in enumerate((before, after))
            for i, label in enumerate(side)
            if label is None and expected[i]
        ]
        if len(holes) > 8:
            return
        found = []
        for filling in itertools.product(("cat", "dog"), repeat=len(holes)):
            sides = [list(before), list(after)]
            for (i, j), label in zip(holes, filling, strict=True):
                sides[j][i] = label
            e = share_kept(expected, *sides)
            found += [e.value] if e.n else []
        e = share_kept(expected, before, after)
        if e.bounds and found:
            assert e.bounds[0] <= min(found) and max(found) <= e.bounds[1]
            assert not e.n or e.bounds == (min(found), max(found))

    @given(PAIRS, st.integers(0, 8))
    def test_shards_add_up_to_the_whole(self, pairs, cut):
        def sums(part):
            return kept(*([p[i] for p in part] for i in range(3)))

        assert sums(pairs) == sums(pairs[:cut]) + sums(pairs[cut:])

    def test_accuracy_blames_the_erasure_for_what_the_model_cannot_draw(self):
        expected, before, after = ["cat"] * 4, ["cat", "cat", "dog", "dog"], ["cat", "dog", "dog", None]
        assert share_kept(expected, before, after).value == 0.5
        e = metrics.accuracy(expected, after).estimate()
        assert (e.value, e.n, e.coverage) == (1 / 3, 3, 0.75)


class TestMean:
    def test_agrees_with_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        chance = random.Random(0)
        for n in (2, 3, 4, 12, 200):
            values = [chance.gauss(0.3, 0.1) for _ in range(n)]
            e = Mean.of(values).estimate()
            low, high = stats.t.interval(0.95, n - 1, loc=e.value, scale=stats.sem(values))
            assert math.isclose(e.value, math.fsum(values) / n, rel_tol=1e-12)
            assert math.isclose(e.high - e.low, high - low, rel_tol=2e-3)

    def test_by_hand(self):
        """1, 2, 3: mean 2, standard error 1/√3, t with two degrees of freedom 4.3027."""
        e = Mean.of([1.0, 2.0, 3.0]).estimate()
        assert e.value == 2.0 and math.isclose(e.high, 2 + 4.302652729749462 / math.sqrt(3))

    def test_unknown_scores(self):
        e = Mean.of([0.2, 0.4, None, math.nan]).estimate(limits=(0, 1))
        assert math.isclose(e.value, 0.3) and (e.n, e.coverage) == (2, 0.5)
        assert e.bounds and math.isclose(e.bounds[0], 0.15) and math.isclose(e.bounds[1], 0.65)
        assert Mean.of([0.2, None]).estimate().bounds is None
        nothing = Mean.of([None]).estimate()
        assert math.isnan(nothing.value) and (nothing.n, nothing.coverage) == (0, 0.0)

    def test_one_picture_has_no_interval(self):
        e = Mean.of([0.3]).estimate()
        assert (e.value, e.low, e.high) == (0.3, -math.inf, math.inf)

    @given(SCORES, SCORES, SCORES)
    def test_shards_add_up_to_the_same_bits_in_any_order(self, a, b, c):
        assert Mean.of(a + b + c) == Mean.of(a) + (Mean.of(b) + Mean.of(c)) == Mean.of(c) + Mean.of(a) + Mean.of(b)
        assert same(Mean.of(a + b + c).estimate(), (Mean.of(b) + Mean.of(c + a)).estimate())


class TestPublished:
    """The papers' own composites, by hand."""

    ERASED, OTHERS, SYNONYMS = Share(5, 100).estimate(), Share(80, 100).estimate(), Share(10, 100).estimate()

    def test_harmonic_means(self):
        assert math.isclose(metrics.h_o(self.ERASED, self.OTHERS).value, 2 / (1 / 0.95 + 1 / 0.8))
        assert math.isclose(metrics.erb(self.ERASED, self.OTHERS).value, 2 * 0.95 * 0.8 / 1.75)
        found = metrics.h_general(self.ERASED, self.OTHERS, self.SYNONYMS)
        assert math.isclose(found.value, 3 / (1 / 0.95 + 1 / 0.8 + 1 / 0.9)) and found.n == 100

    def test_h_o_of_a_published_row(self):
        """SPEED (2503.07392): Acc_e 3.46, Acc_r 88.48 at 50 celebrities is H_o 92.34."""
        found = metrics.h_o(Share(346, 10_000).estimate(), Share(8848, 10_000).estimate())
        assert abs(100 * found.value - 92.34) < 0.01

    def test_a_harmonic_mean_hides_no_failure(self):
        assert metrics.harmonic(Share(0, 10).estimate(), Share(10, 10).estimate()).value == 0.0
        assert math.isnan(metrics.harmonic(Share().estimate(), Share(10, 10).estimate()).value)
        with pytest.raises(EraseError):
            metrics.harmonic()

    @given(st.lists(SHARES, min_size=1, max_size=3))
    def test_harmonic_mean_lies_in_its_interval_and_among_its_parts(self, shares):
        parts = [s.estimate() for s in shares]
        e = metrics.harmonic(*parts)
        assert 0 <= e.low <= e.high <= 1
        if all(p.n for p in parts):
            values = [p.value for p in parts]
            assert e.low <= e.value <= e.high and min(values) - 1e-12 <= e.value <= max(values) + 1e-12
            assert e.bounds is None or e.bounds[0] <= e.value <= e.bounds[1]

    def test_unlearn_canvas(self):
        found = metrics.ua_ira_cra(Share(1, 20), Share(18, 20), Share(19, 20))
        assert {name: e.value for name, e in found.items()} == {"UA": 0.95, "IRA": 0.9, "CRA": 0.95}

    def test_ranks(self):
        expected = ["tench", "church", "church", "horn", ""]
        tops = [("tench", "church", "horn"), ("horn", "church", "tench"), ("horn", "tench", "church"), None, ("horn",)]
        assert [metrics.psr(expected, tops, k).value for k in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]
        assert [metrics.esr(expected, tops, k).value for k in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 3, 0.0])
        assert metrics.psr(expected, tops).coverage == 0.75

    def test_a_ranking_that_ends_early_is_unknown(self):
        found = metrics.esr(["tench", "church"], [("tench",), ("horn",)], k=5)
        assert (found.value, found.n, found.coverage) == (0.0, 1, 0.5)

    @given(st.lists(st.permutations(["a", "b", "c", "d"]), min_size=1))
    def test_asking_for_more_ranks_never_loses_a_picture(self, tops):
        values = [metrics.psr(["a"] * len(tops), tops, k).value for k in (1, 2, 3, 4)]
        assert values == sorted(values) and values[-1] == 1.0
        assert [metrics.esr(["a"] * len(tops), tops, k).value for k in (1, 2, 3, 4)] == [1 - v for v in values]


class TestClustered:
    @staticmethod
    def left(*shares):
        return metrics.clustered({str(i): (s,) for i, s in enumerate(shares)}, Share.estimate)

    def test_concepts_that_differ_widen_the_interval(self):
        """The same 40 pictures, half of them left: all in two concepts of four, or evenly spread."""
        apart = self.left(Share(10, 10), Share(10, 10), Share(0, 10), Share(0, 10))
        alike = self.left(*[Share(5, 10)] * 4)
        pooled = Share(20, 40).estimate()
        assert apart.value == alike.value == pooled.value
        assert (alike.low, alike.high) == (pooled.low, pooled.high)
        assert (apart.low, apart.high) == (0.0, 1.0)

    def test_a_bootstrap_that_says_nothing_does_not_pretend(self):
        """At exactly 0 every resample is 0: Wilson's interval of the pooled pictures takes over; so with one concept."""
        assert same(self.left(Share(0, 20), Share(0, 20)), Share(0, 40).estimate())
        assert same(self.left(Share(3, 20)), Share(3, 20).estimate())

    def test_order_of_concepts_does_not_matter_and_the_seed_is_fixed(self):
        chance = random.Random(1)
        sums = {f"c{i}": (Share(chance.randint(0, 9), 10), Share(chance.randint(5, 10), 10)) for i in range(12)}

        def of(erased, others):
            return metrics.h_o(erased.estimate(), others.estimate())

        first = metrics.clustered(sums, of)
        assert same(first, metrics.clustered(dict(reversed(sums.items())), of))
        assert not same(first, metrics.clustered(sums, of, seed=1))
        assert first.low < first.value < first.high and first.n == 120

    def test_means_too(self):
        sums = {"a": (Mean.of([1.0, 1.1]),), "b": (Mean.of([2.0, 2.1]),), "c": (Mean.of([3.0, 3.1]),)}
        found = metrics.clustered(sums, Mean.estimate)
        assert math.isclose(found.value, 2.05) and found.low <= 1.06 and found.high >= 3.04

    def test_nothing_is_refused(self):
        with pytest.raises(EraseError, match="at least one concept"):
            metrics.clustered({}, Share.estimate)

    @pytest.mark.slow
    def test_coverage_of_the_interval(self):
        """Of 95 % intervals over 20 concepts that differ, about that many hold the truth; ignoring the concepts, far fewer do."""
        chance, held, naive = random.Random(0), 0, 0
        for _ in range(200):
            shares = []
            for _ in range(20):
                p = chance.betavariate(1, 1)
                shares.append(Share(sum(chance.random() < p for _ in range(20)), 20))
            pooled = Share.merged(shares).estimate()
            e = metrics.clustered({str(i): (s,) for i, s in enumerate(shares)}, Share.estimate, draws=400)
            held += e.low <= 0.5 <= e.high
            naive += pooled.low <= 0.5 <= pooled.high
        assert (held, naive) == (187, 109)  # seeded; docs/bench.md quotes both


class TestComparisons:
    def test_mcnemar_by_hand(self):
        """9 pictures kept by the first only, 1 by the second only: p = 2 (C(10,0) + C(10,1)) / 2^10 = 22/1024."""
        both = [True] * 80 + [False] * 10
        found = mcnemar(both + [True] * 9 + [False], both + [False] * 9 + [True])
        assert found.p == 22 / 1024 and found.difference.value == -0.08 and found.difference.n == 100
        assert found.difference.high < 0

    def test_mcnemar_agrees_with_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        for lost, gained in ((0, 0), (1, 0), (5, 5), (3, 14), (200, 150)):
            found = mcnemar([True] * lost + [False] * gained, [False] * lost + [True] * gained)
            expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
            assert math.isclose(found.p, expected, rel_tol=1e-9)

    @given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
    def test_mcnemar_turned_round(self, pairs):
        a, b = zip(*pairs, strict=True)
        there, back = mcnemar(a, b), mcnemar(b, a)
        assert there.p == back.p and 0 < there.p <= 1
        assert there.difference.value == -back.difference.value
        assert -1 <= there.difference.low <= there.difference.value <= there.difference.high <= 1
        assert math.isclose(there.difference.low, -back.difference.high, abs_tol=1e-12)

    @given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.sampled_from([True, False, None])), max_size=7))
    def test_mcnemar_bounds_are_the_extremes(self, pairs):
        a, b = [p[0] for p in pairs], [p[1] for p in pairs]
        holes = [(side, i) for side in (a, b) for i, v in enumerate(side) if v is None]
        found = mcnemar(a, b).difference
        if not holes or len(holes) > 8:
            assert found.bounds is None or len(holes) > 8
            return
        values = []
        for filling in itertools.product((False, True), repeat=len(holes)):
            for (side, i), value in zip(holes, filling, strict=True):
                side[i] = value
            values.append(mcnemar(a, b).difference.value)
        assert found.bounds == pytest.approx((min(values), max(values))) and found.coverage < 1

    def test_paired_bootstrap_sees_a_shift_that_unpaired_scores_hide(self):
        chance = random.Random(0)
        first = [chance.gauss(30, 5) for _ in range(200)]
        second = [v - 0.3 + chance.gauss(0, 0.5) for v in first]
        found = paired_bootstrap(first, second)
        assert found.p < 0.01 and found.difference.high < 0 and abs(found.difference.value + 0.3) < 0.15
        none = paired_bootstrap(first, first)
        assert (none.p, none.difference.value, none.difference.low, none.difference.high) == (1.0, 0.0, 0.0, 0.0)

    def test_paired_bootstrap_agrees_with_the_t_test_on_many_pairs(self):
        stats = pytest.importorskip("scipy.stats")
        chance = random.Random(2)
        first = [chance.gauss(0, 1) for _ in range(400)]
        second = [v + chance.gauss(0.05, 0.4) for v in first]
        found, expected = paired_bootstrap(first, second, draws=4000), stats.ttest_rel(second, first)
        assert abs(found.p - expected.pvalue) < 0.02
        interval = expected.confidence_interval(0.95)
        assert abs(found.difference.low - interval.low) < 0.005 and abs(found.difference.high - interval.high) < 0.005

    def test_pairs_of_one_concept_stand_together(self):
        """Twenty pairs a concept, all shifted alike: as pairs they are certain, as four concepts they are not."""
        shifts = {"a": 1.0, "b": 1.0, "c": -0.5, "d": 0.2}
        concepts = [c for c in shifts for _ in range(20)]
        first, second = [0.0] * 80, [shifts[c] for c in concepts]
        as_pairs, as_concepts = paired_bootstrap(first, second), paired_bootstrap(first, second, concepts)
        assert as_pairs.p < 0.01 < 0.05 < as_concepts.p
        assert as_concepts.difference.low < 0 < as_pairs.difference.low
        one = paired_bootstrap(first, second, ["all"] * 80)
        assert one.p == 1.0

    def test_unknown_scores_are_left_out_and_counted(self):
        found = paired_bootstrap([1.0, None, 2.0, math.nan], [2.0, 1.0, 3.0, 1.0]).difference
        assert (found.value, found.n, found.coverage) == (1.0, 2, 0.5)
        nothing = paired_bootstrap([None], [1.0])
        assert math.isnan(nothing.difference.value) and nothing.p == 1.0

    def test_pairs_of_unequal_length_are_refused(self):
        for compare in (mcnemar, paired_bootstrap):
            with pytest.raises(ValueError):
                compare([True], [True, False])
