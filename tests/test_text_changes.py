"""F13 and F14: the text side changed after attaching, and an erasure that would act twice; noticed at the first denoiser call."""

import copy

import pytest
import torch
from attaching import AGREE, adapter, error, forward, states, style_lora
from conftest import make_pipe, make_tokenizer, sample
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from diffusers_erase import (
    EraseError,
    compose,
    disable_erasure,
    enable_erasure,
    erasure_status,
    get_active_erasures,
    load_erasure,
    unload_erasure,
)


def refused(message, act, *args, **kwargs):
    with pytest.raises(EraseError, match=message) as caught:
        act(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture
def own_tokenizer(tmp_path):
    """A tokenizer that a test may add tokens to."""
    return make_tokenizer(tmp_path)


def encoder_lora(pipe, scale=1.0, seed=5):
    """A LoRA of the text encoder as diffusers saves it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in pipe.text_encoder.named_modules():
        if path.endswith(("q_proj", "v_proj")):
            out, into = module.weight.shape
            state[f"text_encoder.{path}.lora_A.weight"] = torch.randn(2, into, generator=generator) * scale
            state[f"text_encoder.{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * scale
    return state


def other_encoder(pipe, tokenizer):
    pipe.text_encoder = make_pipe(tokenizer, seed=5).text_encoder


def merged_lora(pipe, tokenizer):
    """Nothing of it is left to see: the layers are plain again, only their weights differ."""
    pipe.load_lora_weights(encoder_lora(pipe))
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()


def inverted_token(pipe, tokenizer):
    pipe.load_textual_inversion({"<thing>": torch.randn(32)}, token="<thing>")


CHANGES = {
    "text-encoder LoRA": lambda pipe, tokenizer: pipe.load_lora_weights(encoder_lora(pipe)),
    "merged LoRA": merged_lora,
    "textual inversion": inverted_token,
    "another encoder": other_encoder,
}


@pytest.mark.parametrize("mode", ["map", "fused"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_text_side_raises_at_the_first_denoiser_call(own_tokenizer, change, mode):
    pipe = make_pipe(own_tokenizer)
    load_erasure(pipe, adapter(pipe, "cat"), mode=mode)
    before = sample(pipe)  # control: unchanged, it draws
    CHANGES[change](pipe, own_tokenizer)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    refused("text side .* has changed", sample, pipe)
    refused("allow_text_changes=True", forward, pipe)  # by hand, from no pipeline
    assert not calls  # not one step was drawn
    with disable_erasure(pipe):
        plain = sample(pipe)  # without an erasure it is the host's own affair
    enable_erasure(pipe, allow_text_changes=True)
    assert "text side are allowed" in str(erasure_status(pipe))
    allowed = sample(pipe)
    assert not torch.equal(allowed, plain)
    assert torch.equal(allowed, before) == (change == "textual inversion")  # these prompts do not use the new token


def test_undone_it_draws_again(own_tokenizer):
    pipe = make_pipe(own_tokenizer)
    load_erasure(pipe, adapter(pipe, "cat"))
    before = sample(pipe)
    pipe.load_lora_weights(encoder_lora(pipe))
    refused("text encoder answers differently", sample, pipe)
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), before)
    inverted_token(pipe, own_tokenizer)
    refused("textual inversion", sample, pipe)
    pipe.unload_textual_inversion()
    assert torch.equal(sample(pipe), before)


def test_allowed_from_the_start(own_tokenizer):
    pipe = make_pipe(own_tokenizer)
    load_erasure(pipe, adapter(pipe, "cat"), allow_text_changes=True)
    pipe.load_lora_weights(encoder_lora(pipe))
    erased = sample(pipe)
    with disable_erasure(pipe):
        assert not torch.equal(sample(pipe), erased)


def test_what_does_not_change_the_text_side_is_let_through(own_tokenizer):
    """Controls: a LoRA of the UNet alone, an equal encoder, half precision, an encoder that is gone."""
    pipe = make_pipe(own_tokenizer)
    load_erasure(pipe, adapter(pipe, "cat"))
    before = sample(pipe)
    embeds, negative = pipe.encode_prompt("a photo of a cat", "cpu", 1, True)
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    assert torch.equal(sample(pipe), before)
    pipe.load_lora_weights(style_lora(pipe.unet))
    sample(pipe)
    pipe.unload_lora_weights()
    pipe.to(torch.bfloat16)
    sample(pipe)
    pipe.to(torch.float32)
    pipe.text_encoder = None  # to save memory, as one does when all prompts are encoded
    sample(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)


def test_a_pipeline_that_shares_the_unet_but_not_the_encoder_is_noticed(sd1, tokenizer):
    """The UNet is not told who calls it; whose encoder it is that counts."""
    load_erasure(sd1, adapter(sd1, "cat"))
    before = sample(sd1)
    same = StableDiffusionPipeline.from_pipe(sd1)
    other = StableDiffusionPipeline.from_pipe(sd1, text_encoder=make_pipe(tokenizer, seed=5).text_encoder)
    for each in (same, other):
        each.set_progress_bar_config(disable=True)
    assert torch.equal(sample(same), before)  # control
    refused("text side .* has changed", sample, other)
    refused("text side .* has changed", enable_erasure, other)
    assert torch.equal(sample(sd1), before)  # and the first pipeline is none the worse


def test_clip_skip_is_another_text_state(sd1):
    load_erasure(sd1, adapter(sd1, "cat"))
    sd1._clip_skip = 1  # as its call sets it; with newer hosts the call itself fails
    with pytest.raises((EraseError, AttributeError)) as caught:
        sample(sd1, clip_skip=1)
    if isinstance(caught.value, EraseError):
        assert "clip_skip" in str(caught.value)
    assert sample(sd1).isfinite().all()  # control: the next call sets it back


def test_compiled_it_is_noticed_as_well(sd1):
    torch._dynamo.reset()
    pipe = sd1
    load_erasure(pipe, adapter(pipe, "cat"))
    text = states(pipe)
    pipe.unet.compile(backend="eager", fullgraph=True)
    erased = forward(pipe, text)
    pipe.load_lora_weights(encoder_lora(pipe))
    refused("text side .* has changed", forward, pipe, text.clone())
    pipe.unload_lora_weights()
    assert error(forward(pipe, text.clone()), erased) < AGREE
    torch._dynamo.reset()


# --- F14: a map and its own twin ---

TWINS = {
    "twin": lambda pipe, made: pipe.load_lora_weights(made.to_lora(pipe), adapter_name="twin"),
    "kohya's copy": lambda pipe, made: pipe.load_lora_weights(made.to_kohya(pipe), adapter_name="twin"),
    "merged twin": lambda pipe, made: (
        pipe.load_lora_weights(made.to_lora(pipe), adapter_name="twin"),
        pipe.fuse_lora(),
    ),
    "in half precision": lambda pipe, made: pipe.load_lora_weights(
        {name: tensor.half() for name, tensor in made.to_lora(pipe).items()}, adapter_name="twin"
    ),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_map_and_its_own_twin_are_refused(sd1, twin):
    made = adapter(sd1, "gogh")
    load_erasure(sd1, [made, adapter(sd1, "cat")])
    alone = sample(sd1)
    TWINS[twin](sd1, made)
    refused("'twin' is the twin of van-gogh", sample, sd1)
    if twin == "merged twin":
        sd1.unfuse_lora()
    sd1.disable_lora()  # switched off, it acts no more
    assert error(sample(sd1), alone) < 1e-4
    sd1.enable_lora()
    refused("twin", sample, sd1)
    sd1.delete_adapters("twin")
    assert error(sample(sd1), alone) < 1e-4


def test_a_twin_that_is_there_already_is_refused_at_load(sd1):
    made = adapter(sd1, "gogh")
    sd1.load_lora_weights(made.to_lora(sd1), adapter_name="twin")
    for mode in ("map", "fused"):
        refused("twin", load_erasure, sd1, made, mode=mode)
    assert get_active_erasures(sd1) == []
    load_erasure(sd1, adapter(sd1, "cat"))  # control: another concept's twin may stay
    sample(sd1)


def test_the_twin_of_the_whole_set_is_known_too(sd1):
    made = [adapter(sd1, "gogh"), adapter(sd1, "cat")]
    load_erasure(sd1, made)
    sd1.load_lora_weights(compose(*made).to_lora(sd1), adapter_name="both")
    refused("'both' is the twin of the set", sample, sd1)


def test_other_loras_are_no_twins(sd1):
    load_erasure(sd1, adapter(sd1, "gogh"))
    sd1.load_lora_weights(style_lora(sd1.unet), adapter_name="style")
    sample(sd1)
    sd1.load_lora_weights(adapter(sd1, "ship").to_lora(sd1), adapter_name="ship")
    sample(sd1)
    unload_erasure(sd1)


def test_sharing_pipelines_notice_a_twin(sd1):
    made = adapter(sd1, "gogh")
    load_erasure(sd1, made)
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd1)
    other.load_lora_weights(made.to_lora(sd1), adapter_name="twin")
    refused("twin", sample, sd1)
