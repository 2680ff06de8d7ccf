"""The training loop and its methods: pipes untouched, losses as the papers write them, runs that go on as if never interrupted."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attaching import AGREE, adapter, all_bits, error, forward, style_lora
from conftest import make_pipe, same_bits, sample
from torch.nn.functional import mse_loss
from torch.testing import assert_close

from diffusers_erase import (
    METHODS,
    EraseError,
    ErasureAdapter,
    compose,
    erase,
    erasure_status,
    load_erasure,
    unload_erasure,
)
from diffusers_erase.methods.age import Game
from diffusers_erase.task import Task
from diffusers_erase.text import Encoder
from diffusers_erase.train import Choice, Lesson, Noisy, Player, Training
from tests.cases import SHORT, TRAINED
from tests.test_methods import marks

each_case = pytest.mark.parametrize("case", TRAINED, ids=range(len(TRAINED)))

CONTEXTS = SHORT["templates"]
NAMES = ("dog", "wolf", "tree")


def lesson(pipe, concept="cat", targets=(), preserve=(), **training):
    task = Task(
        Encoder(pipe), concept, (), targets, preserve, "", CONTEXTS, None, None, lambda: pytest.fail("no pack")
    )
    return Lesson(pipe, task, Training(**({"batch": 2, "steps": 4, "rank": 2} | training)), {})


def short(pipe, method="esd", **options):
    return erase(pipe, options.pop("concept", "cat"), method=method, **(SHORT | options))


def noisy(one, seed=5, step=1):
    """Some latents in the middle of the way."""
    size = (2, one.unet.config.in_channels, 8, 8)
    return Noisy(torch.randn(size, generator=torch.Generator().manual_seed(seed)), int(one.scheduler.timesteps[step]))


# --- what every method that trains promises ---------------------------------------------------------------------------


def test_the_table_has_every_method_that_trains():
    assert {case.method for case in TRAINED} == {
        name for name, method in METHODS.items() if method.training is not None
    }


@each_case
def test_a_trained_erasure_is_an_adapter_like_every_other(sd1, case, tmp_path):
    """The pipe is untouched, the adapter acts, travels, and is taken off to the bit; its LoRA twin does the same in stock diffusers."""
    plain = sample(sd1)
    before, looks = all_bits(sd1), marks(sd1)
    made = case.erase(sd1)
    assert marks(sd1) == looks
    loaded = ErasureAdapter.from_pretrained(made.save_pretrained(tmp_path, model=sd1))
    assert (loaded.digest, loaded.recipes) == (made.digest, made.recipes) and loaded.kind == "factors"
    load_erasure(sd1, loaded)
    assert marks(sd1) != looks and not torch.equal(sample(sd1), plain)
    fused = forward(sd1)
    unload_erasure(sd1)
    assert torch.equal(sample(sd1), plain) and all(
        same_bits(getattr(sd1, name), bits) for name, bits in before.items()
    )
    change = error(fused, forward(sd1))
    sd1.load_lora_weights(loaded.to_lora(sd1))
    assert error(forward(sd1), fused) < min(AGREE, 0.05 * change)


@each_case
def test_a_seed_gives_the_same_bits(sd1, case, tokenizer):
    made = case.erase(sd1)
    torch.randn(3)  # whatever the global random state
    assert case.erase(make_pipe(tokenizer)).digest == made.digest
    assert case.erase(sd1, seed=1).factors.digest != made.factors.digest


def test_the_recipe_says_how(sd1):
    recipe = short(sd1, "age", candidates=NAMES, checkpoint=None).recipes[0]
    assert set(recipe.targets) <= set(NAMES) and list(recipe.targets) == list(recipe.options["targets"])
    assert recipe.options["candidates"] == list(NAMES) and recipe.options["updates"] == 2
    assert "checkpoint" not in recipe.options and recipe.residual is recipe.effect is None
    assert set(recipe.options["loss"]) == {"weights", "target"}
    erase(sd1, "cat", target=recipe.targets)  # what was learned can be fed to the closed form


def test_what_is_attached_to_the_pipe_is_not_trained_on(tokenizer):
    """A fused erasure, a LoRA, a map: the base model is what is trained, whatever is on it."""
    plain = make_pipe(tokenizer)
    expected = short(plain).factors.digest
    pipe = make_pipe(tokenizer)
    load_erasure(pipe, adapter(pipe, "ship"), mode="fused")
    assert short(pipe).factors.digest == expected
    unload_erasure(pipe)
    pipe.load_lora_weights(style_lora(pipe.unet))
    load_erasure(pipe, adapter(pipe, "ship"))
    assert short(pipe).factors.digest == expected
    assert short(make_pipe(tokenizer, seed=1)).factors.digest != expected  # control


def test_beside_rows_and_beside_each_other(sd1):
    first, second, rows = short(sd1, rate=0.1), short(sd1, rate=0.1, concept="castle"), adapter(sd1, "ship")
    plain = forward(sd1)
    load_erasure(sd1, [first, rows])
    both = forward(sd1)
    assert erasure_status(sd1).mode == "fused" and set(erasure_status(sd1).residuals) == {"ship"}
    unload_erasure(sd1)
    for each in (first, rows):
        load_erasure(sd1, each)
        assert error(forward(sd1), plain) > 1e-3 < error(forward(sd1), both)
        unload_erasure(sd1)
    assert compose(first, second).digest == compose(second, first).digest
    assert set(short(sd1, concept=["cat", "castle"]).concepts) == {"cat", "castle"}


def test_pooled_states_are_trained_with(sdxl):
    made = short(sdxl, "age", candidates=NAMES, rate=0.1)
    plain = sample(sdxl)
    load_erasure(sdxl, made)
    assert not torch.equal(sample(sdxl), plain)
    unload_erasure(sdxl)
    assert torch.equal(sample(sdxl), plain)


# --- the model that is trained, and the frozen one --------------------------------------------------------------------


@torch.no_grad()
def test_the_frozen_model_is_the_pipes_after_training_too(pipe):
    one = lesson(pipe, rate=0.05, updates=2)
    at, states = noisy(one), one.pick(one.concept, one.draw(0, "weights"))
    rows = states.unflatten(1, (77, -1))
    plain = pipe.unet(at.latents, at.time, encoder_hidden_states=rows).sample
    assert torch.equal(one.trained(at, states), plain)  # a fresh LoRA changes nothing
    with torch.enable_grad():
        one.train(Player("weights", lambda draw: one.trained(at, states).square().mean()))
    assert torch.equal(one.frozen(at, states), plain)
    assert error(one.trained(at, states), plain) > 0.01
    assert torch.equal(pipe.unet(at.latents, at.time, encoder_hidden_states=rows).sample, plain)


def test_the_factors_are_what_was_trained(sd1):
    one = lesson(sd1, rate=0.05, updates=2)
    at, states = noisy(one), one.pick(one.concept, one.draw(0, "weights"))
    factors = one.train(Player("weights", lambda draw: one.trained(at, states).square().mean()))
    with torch.no_grad():
        trained, frozen = one.trained(at, states), one.frozen(at, states)
        load_erasure(sd1, ErasureAdapter({}, Encoder(sd1).fingerprint(), short(sd1).recipes, factors=factors))
        found = sd1.unet(at.latents, at.time, encoder_hidden_states=states.unflatten(1, (77, -1))).sample
    assert error(found, trained) < AGREE < error(found, frozen)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_true_answer_means_the_true_picture(sd1, kind):
    from diffusers import DDIMScheduler

    zero = kind == "v_prediction"  # with pure noise at the start
    sd1.scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero, timestep_spacing="trailing")
    one = lesson(sd1)
    x, noise = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for time in one.scheduler.timesteps:
        at = Noisy(one.scheduler.add_noise(x, noise, time[None]), int(time))
        level = one.scheduler.alphas_cumprod[time]
        v = level.sqrt() * noise - (1 - level).sqrt() * x
        truth = {"epsilon": noise, "v_prediction": v, "sample": x}[kind]
        assert_close(one.clean(at, truth), x, atol=2e-4, rtol=0)
    levels = one.scheduler.alphas_cumprod[one.scheduler.timesteps]
    assert (float(levels.min()) < 1e-6) == zero


def test_sampling_is_the_hosts_own(sd1):
    """The same first latents, steps and guidance, and the pipeline draws what the lesson samples."""
    one = lesson(sd1, steps=4, guidance=3.0)
    draw = one.draw(0, "weights")
    draw.step, draw.context = 3, [0, 0]
    found = one.sample(one.pick(one.concept, draw), draw)
    assert found.time == int(one.scheduler.timesteps[3])
    sd1.scheduler = copy.deepcopy(one.scheduler)
    kept = {}

    def keep(pipe, step, time, tensors):
        kept[step] = tensors["latents"].clone()
        return {}

    told = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "callback_on_step_end": keep}
    sd1(["cat", "cat"], latents=draw.noise, **told)
    assert_close(found.latents, kept[2], atol=1e-5, rtol=1e-5)
    draw.step = 0
    assert torch.equal(one.sample(one.pick(one.concept, draw), draw).latents, draw.noise)


# --- the papers' losses -----------------------------------------------------------------------------------------------


def test_esd_is_the_published_loss(sd1):
    """‖ε_θ(z, c) − (ε₀(z, c) − (η + 1) (ε₀(z, c) − ε₀(z, ∅)))‖², as the release of 2025 writes it."""
    one, eta = lesson(sd1), 1.5
    draw = one.draw(0, "weights")
    concept, empty = one.pick(one.concept, draw), one.pick(one.target, draw)
    at = one.sample(concept, draw)
    with torch.no_grad():
        c, nothing = (
            sd1.unet(at.latents, at.time, encoder_hidden_states=s.unflatten(1, (77, -1))).sample
            for s in (concept, empty)
        )
    assert_close(one.led(at, concept, empty, eta), c - (eta + 1) * (c - nothing), atol=1e-6, rtol=1e-5)
    assert error(c, nothing) > 0.01
    assert torch.equal(empty.unflatten(1, (77, -1))[0], Encoder(sd1).encode([""]).rows[0])


def game(pipe, released, hard=False):
    """AGE after its weights have moved: before, nothing is damaged yet."""
    one = lesson(pipe, rate=0.05, updates=1, seed=3)
    made = Game(one, Choice(one, NAMES, 2.0, hard, top=3), 1.0, 1.0, released)
    one.train(Player("weights", made.weights_loss))
    return made


def test_the_targets_step_has_the_gradients_that_the_switch_says(sd1):
    """The paper's: all of them, checked by differences. Released: none by the first term, by the second through one side only."""
    for released in (False, True):
        one = game(sd1, released)
        draw = one.lesson.draw(1, "target")
        away = one.away(draw, one.lesson.pick(one.lesson.concept, draw), one.target(draw))
        assert away.requires_grad is not released and float(away.detach()) > 0
        (found,) = torch.autograd.grad(one.target_loss(one.lesson.draw(1, "target")), one.target.logits)
        slope = _slope(one)
        assert float(found.abs().max()) > 0 < float(slope.abs().max())
        agree = torch.allclose(found, slope, rtol=0.05, atol=0.05 * float(slope.abs().max()))
        assert agree is not released


@torch.no_grad()
def _slope(one, step=5e-2):  # smaller ones drown in the rounding of float32
    """Central differences of the target's loss by π, the latents held where they are: none goes through sampling."""
    lesson, logits = one.lesson, one.target.logits
    draw = lesson.draw(1, "target")
    kept = lesson.sample(one.target(draw), draw)
    at = lesson.sample(lesson.pick(lesson.concept, draw), draw)
    became = lesson.clean(at, lesson.trained(at, lesson.pick(lesson.concept, draw)))

    def loss(i, by):
        logits[i] += by
        target = one.target(lesson.draw(1, "target"))  # the same noise as before
        logits[i] -= by
        return float(mse_loss(lesson.clean(at, lesson.frozen(at, target)), became) + lesson.drift(kept, target))

    return torch.tensor([(loss(i, step) - loss(i, -step)) / (2 * step) for i in range(len(logits))])


def test_a_hard_choice_is_one_name_and_follows_its_odds(sd1):
    one = lesson(sd1)
    choice = Choice(one, NAMES, 0.1, hard=True)
    states = choice(one.draw(0, "target"))
    context = one.draw(0, "target").context
    for item, row in zip(states, context, strict=True):
        assert sum(torch.equal(item, own) for own in choice.states[:, row]) == 1
    odds = torch.tensor([0.6, 0.3, 0.1])
    choice.logits.data = odds.log()
    noise = torch.cat([one.draw(update, "target").gumbel(3) for update in range(1000)])
    share = (choice.logits + noise).argmax(-1).bincount() / 2000
    assert_close(share.float(), odds, atol=0.04, rtol=0)  # 3.6 standard errors
    assert choice.weights() == {"dog": 1.0}


def test_a_soft_choice_mixes_the_largest(sd1):
    one = lesson(sd1)
    choice = Choice(one, NAMES, 1.0, hard=False, top=2)
    choice.logits.data = torch.tensor([0.0, 1.0, 2.0])
    assert choice.weights() == pytest.approx({"tree": 0.7311, "wolf": 0.2689}, abs=1e-4)
    mixed = choice(one.draw(0, "target"))
    assert not any(torch.equal(mixed[0], own) for own in choice.states.flatten(0, 1))
    one_of = Choice(one, NAMES, 1.0, hard=False, top=1)
    assert list(one_of.weights().values()) == [1.0]


def test_candidates_by_default_are_near_and_do_not_name_the_concept(sd1):
    one = lesson(sd1, "cat")
    found = one.candidates("neighbours", 5)
    assert len(found) == 5 and "cat" not in found and set(found) <= set(Encoder(sd1).words())
    one.task = replace(one.task, erased=("dog", found[0]))
    assert not {"dog", found[0]} & set(one.candidates("neighbours", 5))


def test_of_several_concepts_none_is_sent_to_another(sd1):
    both = short(sd1, "age", concept=["cat", "dog"], count=40, updates=1)
    assert not {"cat", "dog"} & {name for recipe in both.recipes for name in recipe.options["candidates"]}


def test_training_lowers_the_loss(sd1):
    """On draws that it has not seen; without a step it is what it was."""
    one = lesson(sd1, rate=0.01, updates=15, guidance=1.0)

    def loss(draw):
        concept, target = one.pick(one.concept, draw), one.pick(one.target, draw)
        at = one.sample(concept, draw)
        return mse_loss(one.trained(at, concept), one.led(at, concept, target, 1.0))

    def unseen():
        with torch.no_grad():
            return sum(float(loss(one.draw(update, "unseen"))) for update in range(6))

    before = unseen()
    assert unseen() == before
    one.train(Player("weights", loss))
    assert unseen() < 0.6 * before
    assert len(one.losses["weights"]) == 15


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["esd", "age"])
def test_an_interrupted_run_gives_the_same_tensors(sd1, method, tmp_path):
    options = {"candidates": NAMES} if method == "age" else {}
    whole = short(sd1, method, updates=4, **options)
    half = short(sd1, method, updates=2, every=1, checkpoint=str(tmp_path), **options)
    resumed = short(sd1, method, updates=4, checkpoint=str(tmp_path), **options)
    assert resumed.digest == whole.digest != half.digest
    assert (
        short(sd1, method, updates=4, checkpoint=str(tmp_path), **options).digest == whole.digest
    )  # nothing is left to do
    with pytest.raises(EraseError, match="another run"):
        short(sd1, method, updates=5, seed=1, checkpoint=str(tmp_path), **options)


def test_each_concept_of_a_call_has_its_own_checkpoint(sd1, tmp_path):
    both = short(sd1, concept=["cat", "van gogh"], checkpoint=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.pt", "van-gogh.pt"]
    assert short(sd1, concept=["cat", "van gogh"], checkpoint=str(tmp_path)).digest == both.digest


def test_parts_of_a_batch_are_the_same_update(sd1):
    """One step of plain descent would be the same to rounding; Adam's first is ±rate, so gradients are compared."""

    def gradients(**training):
        one = lesson(sd1, batch=4, updates=1, **training)
        at_concept = lambda draw: one.pick(one.concept, draw)  # noqa: E731
        one.train(
            Player("weights", lambda d: one.trained(one.sample(at_concept(d), d), at_concept(d)).square().mean())
        )
        return torch.cat([p.grad.flatten() for p in one.lora])

    whole = gradients()
    assert_close(gradients(accumulation=2), whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-3)
    assert not torch.allclose(gradients(seed=1), whole, rtol=0.1)


RUN = """
import sys, torch
sys.path[:0] = ["tests", "."]
from pathlib import Path
from conftest import make_pipe, make_tokenizer
from accelerate import PartialState
torch.set_num_threads(1)
place = Path(sys.argv[1]) / str(PartialState().process_index)
place.mkdir()
pipe = make_pipe(make_tokenizer(place))
from tests.test_train import short
made = short(pipe, "age", candidates=("dog", "wolf"), batch=4, checkpoint=str(Path(sys.argv[1]) / "run"), **eval(sys.argv[2]))
if PartialState().is_main_process:
    made.save_pretrained(Path(sys.argv[1]) / "made")
"""


def ran(folder, processes, options="{}"):
    """An adapter of a run under accelerate's own launcher."""
    script = folder / "run.py"
    script.write_text(RUN)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch = [sys.executable] if processes == 1 else launch
    subprocess.run([*launch, str(script), str(folder), options], check=True, capture_output=True)
    return ErasureAdapter.from_pretrained(folder / "made")


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    both, alone = (tmp_path / name for name in ("both", "alone"))
    both.mkdir(), alone.mkdir()
    found, expected = ran(both, 2), ran(alone, 1)
    for path, pair in expected.factors.pairs.items():
        assert_close(found.factors.pairs[path].change, pair.change, atol=1e-6, rtol=1e-2)
    assert found.recipes[0].options["targets"] == expected.recipes[0].options["targets"]


@pytest.mark.slow
def test_bfloat16_by_mixed_precision(tmp_path):
    mixed, plain = (tmp_path / name for name in ("mixed", "plain"))
    mixed.mkdir(), plain.mkdir()
    found, expected = ran(mixed, 1, "{'precision': 'bf16'}"), ran(plain, 1)
    assert found.factors.digest != expected.factors.digest
    terms = [(found.factors.pairs[path].down, pair.down) for path, pair in expected.factors.pairs.items()]
    assert all(float((a - b).norm() / b.norm()) < 0.05 for a, b in terms)


def test_half_precision_models_train_a_float32_lora(sd1):
    sd1.to(torch.bfloat16)
    one = lesson(sd1)
    assert {p.dtype for p in one.lora} == {torch.float32} and one.unet.dtype == torch.bfloat16
    made = short(sd1)
    load_erasure(sd1, made)
    assert erasure_status(sd1).in_force


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "method 'esd' has no option 'etta'": {"etta": 1},
    "method 'esd' decides residual itself": {"residual": 0.1},
    "method 'esd' decides tokens itself": {"tokens": "last"},
    "method 'esd' decides gate itself": {"gate": 0.7},
    "updates is a whole number of at least 1: got 0": {"updates": 0},
    "batch is a whole number": {"batch": 2.5},
    "rate is positive": {"rate": -1.0},
    "layers are 'attn2' or 'kv'": {"layers": "attn1"},
    "make it a multiple of 3": {"batch": 4, "accumulation": 3},
    "precision": {"precision": "int8"},
    "'age' finds its target itself": {"method": "age", "target": "dog"},
    "'cat' is to be erased": {"method": "age", "candidates": ("dog", "cat")},
    "'old cats' is to be erased": {"method": "age", "candidates": ("dog", "old cats")},
    "count is how many neighbours": {"method": "age", "count": -1},
    "top a whole number of at least 1": {"method": "age", "candidates": NAMES, "top": 1.5},
    "learning rates are positive: got 0.001, 0": {"method": "age", "candidates": NAMES, "choice_rate": 0},
    "a list of names, or 'neighbours': got 'everyday'": {"method": "age", "candidates": "everyday"},
    "a list of names, or 'neighbours': got 'wordnet'": {"method": "age", "candidates": Path("wordnet")},
    "'cat' would be sent to 'dog', which is erased too": {"concept": ["cat", "dog"], "target": ["dog", "boat"]},
    "at least two candidates: got dog": {"method": "ap", "candidates": ["dog"]},
    "temperature is positive": {"method": "age", "candidates": NAMES, "temperature": 0.0},
}


@pytest.mark.parametrize("said", REFUSED)
def test_requests_that_are_refused_in_one_line(sd1, said):
    with pytest.raises(EraseError, match=said) as caught:
        short(sd1, **REFUSED[said])
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run(sd1):
    with pytest.raises(EraseError, match="the loss of the weights is (nan|inf) at update"):
        short(sd1, rate=1e20, updates=4)


def test_weights_that_cannot_be_trained_on(sd1):
    sd1.unet.conv_in.to(torch.float8_e4m3fn)
    with pytest.raises(
        EraseError,
        match="conv_in.weight holds Tensor torch.float8_e4m3fn on cpu: training and target search need plain",
    ):
        short(sd1)
    sd1.unet.conv_in.to(torch.float32)
    assert short(sd1).kind == "factors"  # control


def test_schedulers_that_cannot_be_trained_with(sd1):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    own = sd1.scheduler
    sd1.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(EraseError, match="zero SNR"):
        short(sd1)
    sd1.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(EraseError, match="a FlowMatchEulerDiscreteScheduler does not have"):
        short(sd1)
    sd1.scheduler = own
    assert short(sd1).kind == "factors"  # control


def test_an_inpainting_unet_is_not_trained(sd1):
    from conftest import make_unet

    sd1.unet = make_unet(32, in_channels=9)
    with pytest.raises(EraseError, match="9 input channels does not draw from noise and text alone"):
        short(sd1)
