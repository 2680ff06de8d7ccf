"""The denoiser's answer to pure noise: what it is compared with, whose weights answer, and who cannot be asked."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_erase import EraseError, erase, load_erasure
from diffusers_erase.guess import NOISES, FirstGuess
from diffusers_erase.sites import latent_shape, working_copy
from diffusers_erase.text import Encoder
from tests.cases import PACK
from tests.conftest import bits, make_pipe, make_unet, same_bits

CONTEXTS = ("a photo of a {}", "{}")
NAMES = [("dog",), ("tree", "boat"), ("cat",), ()]


def guess(pipe):
    return FirstGuess(Encoder(pipe), CONTEXTS)


def test_the_way_to_the_empty_prompt_is_one(sd1):
    before = bits(sd1.unet)
    found = guess(sd1).distances("cat", NAMES)
    assert found.shape == (4,) and found[2] == 0 and found[3] == pytest.approx(1)
    assert found[0] > 0.01 and found[1] > 0.01 and found[0] != found[1]
    assert same_bits(sd1.unet, before) and torch.equal(found, guess(sd1).distances("cat", NAMES))
    torch.testing.assert_close(found[:1], guess(sd1).distances("cat", NAMES[:1]))  # whatever else is asked


def test_it_is_the_pipeline_s_own_denoiser_that_answers(sd1):
    noise = torch.randn(NOISES, *latent_shape(sd1.unet), generator=torch.Generator().manual_seed(0))

    def answer(name):
        texts = [context.replace("{}", name) if name else "" for context in CONTEXTS]
        states = torch.cat([sd1.encode_prompt(text, "cpu", 1, False)[0] for text in texts])
        with torch.no_grad():
            return sd1.unet(noise, 999, states).sample

    far, whole = ((answer(name) - answer("cat")).norm() for name in ("dog", ""))
    assert float(guess(sd1).distances("cat", [("dog",)])) == pytest.approx(float(far / whole), rel=1e-4)


def test_what_is_attached_does_not_answer(tokenizer):
    """The search looks at the model, not at what an erasure has left of it."""
    pipe = make_pipe(tokenizer)
    plain = guess(pipe).distances("cat", NAMES)
    load_erasure(pipe, erase(pipe, "cat", target="dog", pack=PACK))
    assert torch.equal(guess(pipe).distances("cat", NAMES), plain)
    with torch.no_grad():  # the control: another denoiser answers otherwise
        pipe.unet.conv_in.weight.mul_(1.1)
    assert not torch.equal(guess(pipe).distances("cat", NAMES), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_answers_alike(tokenizer, dtype):
    plain = guess(make_pipe(tokenizer)).distances("cat", NAMES)
    torch.testing.assert_close(guess(make_pipe(tokenizer).to(dtype)).distances("cat", NAMES), plain, atol=0.1, rtol=0)


def test_a_family_with_pooled_states(sdxl):
    found = guess(sdxl).distances("cat", NAMES)
    assert found[2] == 0 and found[3] == pytest.approx(1) and found[0] > 0.01


def test_a_denoiser_that_does_not_draw_from_noise_alone_is_not_asked(tokenizer):
    pipe = make_pipe(tokenizer)
    pipe.unet = make_unet(32, in_channels=9)
    with pytest.raises(
        EraseError, match="with 9 input channels does not draw from noise and text alone.*target named"
    ):
        guess(pipe).distances("cat", NAMES)
    assert erase(pipe, "cat", target="dog", pack=PACK).concepts == ("cat",)  # the way out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_no_answer(tokenizer, value):
    """A comparison with NaN would let every synonym pass."""
    pipe = make_pipe(tokenizer)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(value)
    for ask in (lambda: guess(pipe).distances("cat", NAMES), lambda: erase(pipe, "cat", pack=PACK)):
        with pytest.raises(EraseError, match="the denoiser answers 'cat' as the empty prompt, or not by numbers"):
            ask()


def test_a_denoiser_that_does_not_hear_the_name_is_not_asked(tokenizer):
    pipe = make_pipe(tokenizer)
    with torch.no_grad():
        for path, weight in pipe.unet.named_parameters():
            if "attn2.to_v" in path:
                weight.zero_()
    with pytest.raises(EraseError, match="the denoiser answers 'cat' as the empty prompt"):
        guess(pipe).distances("cat", NAMES)


def test_times_of_another_kind_are_not_guessed(tokenizer):
    pipe = make_pipe(tokenizer)
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(EraseError, match="last of DDPM's times, which a EDMEulerScheduler does not count"):
        guess(pipe).distances("cat", NAMES)


def test_threads_that_search_do_not_reach_into_other_threads(sd1):
    """Modules that others build meanwhile have weights."""
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(working_copy, sd1.unet) for _ in range(12)]
        while not all(each.done() for each in found):
            assert not torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert same_bits(found[0].result(), bits(sd1.unet))
