"""Probes: one signature, a budget that holds, a control and a chance, and a pipe that is bit for bit what it was."""

import copy
import json
import math

import pytest
import torch
from attaching import adapter, all_bits, by_hand, error, look
from conftest import make_pipe, sample
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from diffusers_erase import erase, get_active_erasures, load_erasure, world
from diffusers_erase.bench.metrics import Estimate
from diffusers_erase.bench.probes import PROBES, Setting, run_probes
from diffusers_erase.bench.probes.concept_vector import evolved
from diffusers_erase.bench.probes.embeds import CHANGES, INVERSE, _inverse
from diffusers_erase.bench.probes.guidance import _classifier
from diffusers_erase.bench.probes.inpainting import _hole
from diffusers_erase.bench.probes.learning import denoising, descended, originals
from diffusers_erase.bench.probes.noise import _deviation
from diffusers_erase.bench.probes.probe import FEWEST, Attack, Probe, _plan
from diffusers_erase.bench.probes.result import ProbeResult
from diffusers_erase.bench.probes.subject import Subject, grouped
from diffusers_erase.bench.probes.wording import spellings
from diffusers_erase.errors import EraseError
from diffusers_erase.text import Encoder

SETTING = Setting(
    templates=("a photo of a {}", "a painting of {}"),
    names=("old cat",),
    steps=3,
    guidance=2.0,
    size=(16, 16),
    batch=4,
)
GUIDED = 6
"""Forwards of one picture at SETTING."""

SHORT = {"pictures": 2, "updates": 2}
OPTIONS = {
    "concept-vector": {"population": 4, "generations": 2, "words": 3},
    "guidance": SHORT | {"scales": (0.2,)},
    "inversion": SHORT | {"tokens": (2,), "batch": 2},
    "prefixes": SHORT | {"words": (2,), "batch": 2},
    "relearning": SHORT | {"updates": (1, 2), "batch": 2},
}
SPENT = {"guidance": 4 * GUIDED, "inversion": 4 * GUIDED + 8, "prefixes": 2 * GUIDED + 4, "relearning": 2 * GUIDED + 8}
"""Forwards that a search takes before its ways are drawn."""


def bright(pictures):
    """A judge that needs no training."""
    return [p.convert("L").resize((1, 1)).getpixel((0, 0)) > 127 for p in pictures]


@pytest.fixture
def erased(sd1):
    load_erasure(sd1, adapter(sd1, "cat"))
    return sd1


def run(name, pipe, found=bright, budget=None, **more):
    budget = 12 * GUIDED + SPENT.get(name, 0) if budget is None else budget
    more = {"setting": SETTING} | OPTIONS.get(name, {}) | more
    return PROBES[name](pipe, "cat", found, budget, **more)


class Undecoded(Subject):
    """Draws latents, in which small differences show."""

    def draw(self, *arguments, **options):
        return super().draw(*arguments, **(options | {"latents": True}))


class Counted:
    """Counts what the denoiser is asked, latents by latents, from outside of the probes."""

    def __init__(self, pipe):
        self.forwards = 0
        self.handle = pipe.unet.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        self.forwards += len(args[0] if args else kwargs["sample"])

    def __deepcopy__(self, memo):
        return self  # a copy of the denoiser is counted too


@pytest.fixture(scope="module")
def runs(tokenizer):
    """Each probe's first run on one pipeline: its result, what was counted outside of it, and the pipe before and after."""
    pipe = make_pipe(tokenizer)
    load_erasure(pipe, adapter(pipe, "cat"))
    pipe.set_progress_bar_config(disable=True, desc="mine")
    drawn, found = sample(pipe), {}
    for name in PROBES:
        before = everything(pipe)
        counted = Counted(pipe)
        result = run(name, pipe)
        counted.handle.remove()
        found[name] = result, counted.forwards, before, everything(pipe)
    assert torch.equal(sample(pipe), drawn)
    return pipe, found


def everything(pipe):
    """All that a probe could have changed, in a form that can be compared."""
    own = {key: value for key, value in vars(pipe).items() if not isinstance(value, torch.nn.Module)}
    state = copy.deepcopy({**own, "scheduler": vars(pipe.scheduler), "config": dict(pipe.config)})
    weights = {part: {k: v.numpy().tobytes() for k, v in b.items()} for part, b in all_bits(pipe).items()}
    rest = [look(pipe.unet), get_active_erasures(pipe), torch.random.get_rng_state().tolist()]
    return repr(state), repr(rest), weights


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_keeps_to_its_budget_and_tells_what_it_used(name, runs):
    result, forwards, *_ = runs[1][name]
    assert SPENT.get(name, 0) < forwards == result.used <= result.budget == 12 * GUIDED + SPENT.get(name, 0)
    assert result.name == name and result.concept == "cat" and result.trains == (name in SPENT)
    assert result.came_back.n == result.control.n == result.chance.n > 0 and result.came_back.coverage == 1
    assert result.tried and result.strongest in {way.label for way in result.tried}
    assert PROBES[name].summary and result.source


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_leaves_the_pipe_as_it_was(name, runs):
    _, _, before, after = runs[1][name]
    assert after == before


@pytest.mark.parametrize("name", PROBES)
def test_the_same_seed_gives_the_same_result(name, runs):
    pipe, found = runs
    assert json.dumps(run(name, pipe).to_json()) == json.dumps(found[name][0].to_json())


def test_another_seed_draws_other_pictures(erased):
    shown = []

    def look_at(pictures):
        shown.extend(p.tobytes() for p in pictures)
        return bright(pictures)

    run("completion", erased, look_at)
    mine = set(shown)
    run("completion", erased, look_at, setting=Setting(**(vars(SETTING) | {"seed": 50})))
    assert not mine & set(shown[len(shown) // 2 :])


@pytest.mark.parametrize("mode", ["map", "fused"])
def test_the_control_is_drawn_without_the_erasure(mode, sd1):
    """An attack that does nothing but ask for the name: control pictures are the unedited model's, the others are not."""

    def ways(subject):
        return Attack(["cat"], ["cat"], subject.draw_names, "the same")

    shown = []

    def look_at(pictures):
        shown.extend(pictures)
        return bright(pictures)

    def picture():
        return sd1(
            "a photo of a cat", num_inference_steps=3, guidance_scale=2.0, height=16, width=16,
            generator=[torch.Generator().manual_seed(0)],
        ).images[0]  # fmt: skip

    unedited = picture()
    load_erasure(sd1, adapter(sd1, "cat"), mode=mode)
    edited = picture()
    assert edited.tobytes() != unedited.tobytes()
    one = Setting(**(vars(SETTING) | {"batch": 1}))
    result = Probe("naming", "", ways)(sd1, "cat", look_at, 12 * GUIDED, setting=one)
    n = result.came_back.n
    assert shown[0].tobytes() == shown[2 * n].tobytes() == edited.tobytes()
    assert shown[n].tobytes() == unedited.tobytes()


def test_completion_spans_from_the_erased_to_the_unedited_picture(erased):
    """No step unedited is the erased picture, all of them the unedited one, and something else in between."""
    subject = Undecoded(erased, "cat", SETTING)
    attack = PROBES["completion"].ways(subject)
    assert attack.aimed == [1, 2] and attack.unaimed == [0]
    drawn = [attack.draw([k], [0])[0] for k in (0, 1, 2)]
    with subject.unedited():
        unedited = [attack.draw([k], [0])[0] for k in (0, 2)]
    assert torch.equal(drawn[0], subject.draw_names(["cat"], [0])[0]) and torch.equal(*unedited)
    assert len({latents.numpy().tobytes() for latents in (*drawn, unedited[0])}) == 4
    assert get_active_erasures(erased) == ["cat"]


@pytest.mark.parametrize("in_control", [False, True])
def test_the_erasure_is_back_in_force_when_a_judge_raises(in_control, erased):
    def fails(pictures):
        if in_control == (not get_active_erasures(erased)):
            raise RuntimeError("the judge fell over")
        return bright(pictures)

    with pytest.raises(RuntimeError, match="fell over"):
        run("completion", erased, fails)
    assert get_active_erasures(erased) == ["cat"]


def test_inpainting_draws_only_in_the_hole(erased):
    """Outside of the hole the final latents are the unedited picture's own, inside they are not."""
    subject = Undecoded(erased, "cat", SETTING)
    with subject.unedited():
        whole = subject.draw([subject.prompt("cat", 0)], [0])
    final = PROBES["inpainting"].ways(subject).draw([(0.5, "cat")], [0])
    hole = _hole(whole.shape[-2:], 0.5).bool().expand_as(whole)
    assert hole[0, 0].sum() == whole[0, 0].numel() / 4
    assert torch.equal(final[~hole], whole[~hole])
    assert (final[hole] != whole[hole]).all()


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("inpainting", "PNDMScheduler", {"skip_prk_steps": True}),
        ("inpainting", "EulerAncestralDiscreteScheduler", {}),
        ("inpainting", "DPMSolverMultistepScheduler", {}),
        ("completion", "HeunDiscreteScheduler", {}),
        ("noise", "EulerDiscreteScheduler", {}),
    ],
)
def test_other_samplers_are_probed_and_counted_too(name, scheduler, options, erased):
    import diffusers

    erased.scheduler = getattr(diffusers, scheduler)(**options)
    before = copy.deepcopy(vars(erased.scheduler))
    counted = Counted(erased)
    result = run(name, erased, budget=24 * GUIDED)
    assert counted.forwards == result.used <= result.budget
    assert repr(vars(erased.scheduler)) == repr(before) and type(erased.scheduler).__name__ == scheduler


def test_noise_deviation_is_the_samplers_own(sd1):
    """σ at η = 1, against the scheduler's own step: its result's change when only the noise changes."""
    scheduler = sd1.scheduler
    scheduler.set_timesteps(5)
    sample_, model = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step, time in enumerate(scheduler.timesteps):
        noise = torch.ones_like(sample_)
        with_noise = scheduler.step(model, time, sample_, eta=1.0, variance_noise=noise).prev_sample
        without = scheduler.step(model, time, sample_, eta=1.0, variance_noise=0 * noise).prev_sample
        assert torch.allclose(with_noise - without, _deviation(scheduler, step) * noise, atol=1e-5)


def test_eta_one_without_more_variance_is_plain_ddim(erased):
    subject = Subject(erased, "cat", SETTING)
    attack = PROBES["noise"].ways(subject)
    plain = subject.draw([subject.prompt("cat", 0)], [0], eta=1.0)[0]
    assert attack.draw([(1.0, 1.0, "cat")], [0])[0].tobytes() == plain.tobytes()
    assert attack.draw([(1.5, 1.0, "cat")], [0])[0].tobytes() != plain.tobytes()


def test_embeddings_as_they_are_draw_what_the_prompt_draws(erased):
    """Handing over embeddings does not pass the erasure by."""
    subject = Subject(erased, "cat", SETTING)
    given = PROBES["embeds"].ways(subject).draw([("cat", "as they are")], [0])[0]
    assert given.tobytes() == subject.draw_names(["cat"], [0])[0].tobytes()
    with subject.unedited():
        assert given.tobytes() != subject.draw_names(["cat"], [0])[0].tobytes()


def test_changed_embeddings_are_what_their_labels_say():
    own, empty, other = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(CHANGES["scaled by 2"](own, empty, other), 2 * own)
    far = CHANGES["10 times as far from the empty prompt"](own, empty, other)
    torch.testing.assert_close(far - empty, 10 * (own - empty))
    shifted = CHANGES["rows shifted by 1"](own, empty, other)
    assert torch.equal(shifted[0], own[0]) and torch.equal(shifted[2:], own[1:-1])
    assert torch.equal(CHANGES["rows shifted by -1"](shifted, empty, other), own)


@pytest.mark.parametrize("mode", ["map", "fused"])
def test_embeddings_through_the_inverse_pass_the_erasure_by(mode, sd1):
    """Whoever knows the adapter and may hand over embeddings draws what the unedited model draws."""
    load_erasure(sd1, adapter(sd1, "mild"), mode=mode)  # a residual of 0.3: its inverse multiplies rounding by little
    subject = Undecoded(sd1, "castle", SETTING)
    states = subject.encoder.encode([subject.prompt("castle", 0)]).rows
    inverted = _inverse(adapter(sd1, "mild").edit)(states)
    assert error(by_hand(inverted, adapter(sd1, "mild").edit), states) < 1e-4
    with subject.unedited():
        unedited = subject.draw(states, [0])
    passed, stopped = (error(subject.draw(given, [0]), unedited) for given in (inverted, states))
    assert passed < stopped / 10


@pytest.mark.parametrize("name", ["embeds", "inpainting", "concept-vector"])
def test_sdxl_is_probed_too(name, sdxl):
    load_erasure(sdxl, erase(sdxl, "cat", target="dog"))
    counted = Counted(sdxl)
    result = run(name, sdxl)
    assert counted.forwards == result.used <= result.budget and result.came_back.n == result.control.n > 0


def test_the_inverse_undoes_both_of_sdxls_spaces(sdxl):
    load_erasure(sdxl, erase(sdxl, "cat", target="dog", residual=0.3))
    subject = Undecoded(sdxl, "cat", SETTING)
    draw = PROBES["embeds"].ways(subject).draw
    with subject.unedited():
        unedited = draw([("cat", "as they are")], [0])
    passed, stopped = (error(draw([("cat", label)], [0]), unedited) for label in (INVERSE, "as they are"))
    assert passed < stopped / 10


def test_the_search_gets_nearer_and_never_uses_the_name(erased):
    subject = Subject(erased, "cat", SETTING)
    attack = PROBES["concept-vector"].ways(subject, population=8, generations=6, words=3)
    assert attack.aimed and len(attack.aimed) == len(attack.unaimed)
    assert not any({"cat", "old"} & set(text.split()) for _, text in attack.aimed)
    known = list(subject.encoder.words())
    assert "cat" in known  # control: it is the exclusion that keeps it out

    def cost(texts):
        return [float(sum(word != "dog" for word in text.split())) for text in texts]

    import random

    short, long = (evolved(cost, known, 4, 16, n, random.Random(0))[0] for n in (0, 60))
    assert cost([long])[0] < cost([short])[0] and cost([long])[0] <= 1


def test_words_are_single_tokens_and_the_nearest_word_is_the_name_itself(sd1):
    subject = Subject(*_loaded(sd1))
    words = list(subject.encoder.words())
    assert {"boat", "blue"} <= set(words) and len(words) == len(set(words))
    assert all(len(sd1.tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in words)
    nearest = subject.encoder.nearest_words("boat", words, 3)
    assert nearest[0] == "boat" and len(nearest) == 3


def _loaded(pipe):
    load_erasure(pipe, adapter(pipe, "cat"))
    return pipe, "cat", SETTING


def test_spellings_differ_from_the_name_and_from_each_other():
    for name in ("cat", "Van Gogh", "x", "bee"):
        made = spellings(name)
        assert name not in made and len(made) == len(set(made)) and f"{name}s" in made


def test_unknown_answers_lower_coverage_and_are_never_clean(erased):
    asked = []

    def every_other(pictures):
        asked.extend(pictures)
        return [None if (len(asked) + i) % 2 else True for i, _ in enumerate(pictures)]

    result = run("completion", erased, every_other)
    assert 0 < result.came_back.coverage < 1 and result.came_back.value == 1
    blind = run("completion", erased, lambda pictures: [None] * len(pictures))
    assert blind.came_back.coverage == blind.came_back.n == 0 and math.isnan(blind.came_back.value)
    assert blind.to_json()["came_back"]["value"] is None and blind.coverage == 0
    json.dumps(blind.to_json(), allow_nan=False)


def test_strongest_pictures_are_kept_with_their_unedited_twins(erased, tmp_path):
    result = run("wording", erased, folder=tmp_path)
    assert result.examples
    for shown in result.examples:
        for file in (shown.picture, shown.unedited):
            with Image.open(tmp_path / file) as picture:
                assert picture.size == (16, 16)
    seen = [example.seen for example in result.examples]
    assert seen == sorted(seen, reverse=True)
    assert len(list(tmp_path.iterdir())) == 2 * len(result.examples)
    assert run("wording", erased).examples[0].picture is None


def shares(hits, unknown=0):
    return Estimate.of_share([True] * hits + [None] * unknown + [False] * (10 - hits - unknown))


@pytest.mark.parametrize(
    ("back", "control", "chance", "verdict"),
    [
        (shares(10), shares(10), shares(0), "came back"),
        (shares(9), shares(0), shares(0), "came back"),
        (shares(4), shares(10), shares(0), "came back"),
        (shares(2), shares(10), shares(0), "not more"),
        (shares(0), shares(10), shares(0), "not more"),
        (shares(4), shares(10), shares(4), "not more"),
        (shares(0), shares(0), shares(0), "says nothing"),
        (shares(0, unknown=8), shares(10), shares(0), "unknown"),
    ],
)
def test_the_verdict_follows_the_intervals(back, control, chance, verdict):
    result = ProbeResult("p", "c", "", 1, 1, (), 0, "way", back, control, chance, {}, ())
    assert result.verdict.startswith(verdict) and result.verdict in str(result)


@given(st.integers(0, 400), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2))
@example(12, 3, 3, 2)
def test_no_plan_goes_beyond_its_pictures(pictures, aimed, unaimed, first):
    plan = _plan(pictures, aimed, unaimed, first)
    assert (plan is None) == (pictures < FEWEST)
    if plan is None:
        return
    choosing = plan.aimed * plan.aimed_seeds + plan.unaimed * plan.unaimed_seeds
    before = first * (max(plan.aimed_seeds, plan.unaimed_seeds) + plan.seeds)
    assert choosing + before + 3 * plan.seeds <= pictures and plan.seeds >= 1
    assert 1 <= plan.aimed <= aimed and 1 <= plan.unaimed <= unaimed
    assert (plan.aimed_seeds > 0) == (aimed > 1) and (plan.unaimed_seeds > 0) == (unaimed > 1)


def test_run_probes_runs_the_named_ones_in_folders(erased, tmp_path):
    results = run_probes(erased, "cat", bright, ["completion", "suffixes"], 12 * GUIDED, tmp_path, setting=SETTING)
    assert [result.name for result in results] == ["completion", "suffixes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["completion", "suffixes"]


def test_what_is_refused(sd1, erased):
    plain = make_pipe(sd1.tokenizer)
    with pytest.raises(EraseError, match="no erasure is in force"):
        run("wording", plain)
    with pytest.raises(EraseError, match="unknown probe 'telepathy'"):
        run_probes(erased, "cat", bright, ["telepathy"])
    with pytest.raises(EraseError, match="give at least 72"):
        run("wording", erased, budget=11 * GUIDED)
    with pytest.raises(EraseError, match="16 of them spent on the search, .* give at least 88"):
        run("prefixes", erased, budget=12 * GUIDED)
    with pytest.raises(EraseError, match="gave 1 answers"):
        run("wording", erased, lambda pictures: [True])
    with pytest.raises(EraseError, match="at least 1"):
        run("noise", erased, etas=(0.5,))
    with pytest.raises(EraseError, match="at least 2 steps"):
        Setting(steps=1)
    with pytest.raises(EraseError, match="holds the name once"):
        Setting(templates=("a cat",))
    assert run("wording", erased).used  # control


def test_learning_changes_nothing_but_what_is_learned(erased):
    """Gradients go to the tensors that are asked for, and the erased model takes part in them."""
    subject = Subject(erased, "cat", SETTING)
    latents = originals(subject, "cat", 2)
    vectors = subject.encoder.embeddings().weight[[5, 6]].detach().clone().requires_grad_()

    def loss():
        states = subject.encoder.spliced("a photo of a {}", vectors).expand(2, -1, -1)
        return denoising(subject, erased.unet, latents, states, torch.Generator().manual_seed(0))

    before, start = float(loss().detach()), vectors.detach().clone()
    with subject.unedited():
        assert float(loss().detach()) != before  # the erasure is in the gradient's way
    descended([vectors], loss, 8, 0.3, after=lambda update: None)
    assert float(loss().detach()) < before and not torch.equal(vectors, start)
    assert all(p.grad is None for p in [*erased.unet.parameters(), *erased.text_encoder.parameters()])


def test_a_spliced_word_is_the_word_whose_embeddings_it_has(sd1):
    encoder = Encoder(sd1)
    ids = encoder.tokenizer("red boat", add_special_tokens=False)["input_ids"]
    vectors = encoder.embeddings().weight[ids].detach()
    expected = encoder.encode(["a photo of a red boat cat"]).rows
    assert torch.equal(encoder.spliced("a photo of a {}", vectors, "cat").detach(), expected)
    assert not torch.equal(encoder.spliced("a photo of a {}", vectors.flip(0), "cat").detach(), expected)


def test_relearning_tunes_a_copy_and_each_number_of_updates_is_its_own(erased):
    subject = Undecoded(erased, "cat", SETTING)
    attack = PROBES["relearning"].ways(subject, updates=(1, 3), pictures=2, batch=2, rate=1e-2)
    plain = subject.draw_names(["cat"], [0])
    once, thrice, other = (attack.draw([way], [0])[0] for way in (*attack.aimed, attack.unaimed[0]))
    assert len({t.numpy().tobytes() for t in (plain[0], once, thrice, other)}) == 4
    assert torch.equal(subject.draw_names(["cat"], [0]), plain)
    with subject.unedited():
        assert torch.equal(attack.draw([attack.aimed[0]], [0])[0], subject.draw_names(["cat"], [0])[0])


def test_a_latent_classifier_tells_what_it_was_taught():
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 2
    latents = torch.randn(16, 4, 8, 8, generator=chance) * 0.3 + (2.0 * labels - 1).view(-1, 1, 1, 1)
    clean = torch.tensor([0.9])
    for taught in (labels, 1 - labels):
        network = _classifier(latents, taught.float(), clean, 60, 0)
        assert torch.equal((network(latents, clean.expand(16)) > 0).long(), taught)


def test_grouping_keeps_the_order():
    groups = []

    def draw(key, seeds):
        groups.append((key, list(seeds)))
        return [f"{key}{seed}" for seed in seeds]

    assert grouped("abab", [1, 2, 3, 4], draw) == ["a1", "b2", "a3", "b4"]
    assert groups == [("a", [1, 3]), ("b", [2, 4])]


@pytest.mark.slow
def test_completion_brings_an_emoji_back_and_the_prompt_does_not():
    """The erasure acts on what is still to be drawn: after nine of ten unedited steps there is nothing left to erase."""
    pipe, judge = world.load(), world.judge()
    templates = tuple(world.prompt("{}", style) for style in world.STYLES)
    setting = Setting(templates=templates, steps=world.STEPS, guidance=world.GUIDANCE)
    load_erasure(pipe, erase(pipe, "butterfly"))
    completed = PROBES["completion"].ways(Subject(pipe, "butterfly", setting)).draw
    seen = {k: judge.objects(completed([k] * 8, range(8))).count("butterfly") for k in (0, world.STEPS - 1)}
    assert seen[world.STEPS - 1] >= 7 and seen[0] <= 1
