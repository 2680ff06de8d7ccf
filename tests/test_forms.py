"""Forms and halves: as a LoRA beside the user's, never in weights that cannot hold it, on both halves of a batch or on one."""

import pytest
import torch
from attaching import AGREE, adapter, all_bits, by_hand, error, forward, look, states, style_lora
from conftest import same_bits, sample
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline
from test_hosts import make_controlnet, refused, with_controlnet

from diffusers_erase import (
    delete_erasures,
    disable_erasure,
    enable_erasure,
    erasing,
    erasure_status,
    fuse_erasure,
    get_active_erasures,
    load_erasure,
    set_erasures,
    unfuse_erasure,
    unload_erasure,
)

CLOSE = 1e-4
"""Two guided steps add to the rounding of one pass."""


# --- as a LoRA ---


def test_the_lora_form_is_the_same_edit(pipe):
    made, base, bits = [adapter(pipe, "gogh"), adapter(pipe, "cat")], forward(pipe), all_bits(pipe)["unet"]
    expected = forward(pipe, by_hand(states(pipe), *(a.edit for a in made)))
    load_erasure(pipe, made, mode="lora")
    assert erasure_status(pipe).mode == "lora" and "in LoRA form" in str(erasure_status(pipe))
    assert error(forward(pipe), expected) < AGREE < 0.05 < error(expected, base)
    fuse_erasure(pipe)
    assert erasure_status(pipe).mode == "fused" and error(forward(pipe), expected) < AGREE
    assert not getattr(pipe.unet, "peft_config", None)
    load_erasure(pipe, adapter(pipe, "ship"), mode="lora", residual_max=None)
    delete_erasures(pipe, "ship")
    assert erasure_status(pipe).mode == "lora" and error(forward(pipe), expected) < AGREE
    unfuse_erasure(pipe)
    assert erasure_status(pipe).mode == "map" and error(forward(pipe), expected) < AGREE
    unload_erasure(pipe)
    assert torch.equal(forward(pipe), base) and same_bits(pipe.unet, bits)


def test_the_lora_form_leaves_the_users_loras_as_they_are(sd1):
    sd1.load_lora_weights(style_lora(sd1.unet), adapter_name="style")
    sd1.load_lora_weights(style_lora(sd1.unet, seed=4), adapter_name="second")
    sd1.set_adapters(["style", "second"], [0.5, 0.25])
    styled = forward(sd1)
    expected = forward(sd1, by_hand(states(sd1), adapter(sd1, "cat").edit))
    load_erasure(sd1, adapter(sd1, "cat"), mode="lora")
    assert sorted(sd1.get_active_adapters()) == ["erasure", "second", "style"]
    assert error(forward(sd1), styled) > 0.05  # control
    with disable_erasure(sd1):
        assert torch.equal(forward(sd1), styled) and sorted(sd1.get_active_adapters()) == ["second", "style"]
    unload_erasure(sd1)
    assert torch.equal(forward(sd1), styled)
    assert error(expected, styled) > 0.05


LORA_CALLS = {
    "load another": lambda pipe: pipe.load_lora_weights(style_lora(pipe.unet), adapter_name="style"),
    "disable_lora": lambda pipe: pipe.disable_lora(),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "delete_adapters": lambda pipe: pipe.delete_adapters(["erasure"]),
    "set_adapters": lambda pipe: pipe.set_adapters(["erasure"], [0.5]),
    "fuse_qkv_projections": lambda pipe: pipe.fuse_qkv_projections(),
}


@pytest.mark.parametrize("call", LORA_CALLS)
def test_a_lora_call_that_switches_it_off_makes_the_next_picture_raise(sd1, call):
    load_erasure(sd1, adapter(sd1, "cat"), mode="lora")
    sample(sd1)  # control
    refused("a LoRA call has since", sample, sd1, cross_attention_kwargs={"scale": 0.5})
    LORA_CALLS[call](sd1)
    refused("a LoRA call has since", sample, sd1)
    if call != "fuse_qkv_projections":
        load_erasure(sd1, adapter(sd1, "gogh"), mode="map")  # the way out
        sample(sd1)


def test_a_lora_form_is_not_saved_as_the_model(sd1, tmp_path):
    """F8: it would come back as noise."""
    load_erasure(sd1, adapter(sd1, "cat"), mode="lora")
    refused("fuse_erasure", sd1.save_pretrained, tmp_path)


def test_a_gate_says_that_it_is_lost(sd1):
    gated = adapter(sd1, "gated")
    load_erasure(sd1, gated)
    with_gate = forward(sd1)
    assert "has a gate" not in str(erasure_status(sd1))
    unload_erasure(sd1)
    linear = forward(sd1, by_hand(states(sd1), gated.edit))
    for mode in ("lora", "fused"):
        load_erasure(sd1, gated, mode=mode)
        assert f"its {mode} form is the linear part" in str(erasure_status(sd1))
        assert error(forward(sd1), linear) < AGREE < 0.01 < error(linear, with_gate)
        with erasing(sd1) as receipt:
            assert any("linear part" in note for note in receipt.notes)
        unload_erasure(sd1)


# --- in weights that cannot hold it ---


def test_real_quantised_weights_take_a_map_and_refuse_fusing(sd1):
    """int8 weights of a real quantiser: torch's own, or a package that diffusers knows."""
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(sd1.unet, weights=quanto.qint8)
    quanto.freeze(sd1.unet)
    layer = sd1.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    assert type(layer.weight).__name__ != "Parameter"  # control: it is quantised
    base, made = forward(sd1), adapter(sd1, "cat")
    expected = forward(sd1, by_hand(states(sd1), made.edit))
    for loaded in ("fused",):
        refused("an erasure is fused only into plain floating weights", load_erasure, sd1, made, mode=loaded)
    assert get_active_erasures(sd1) == [] and torch.equal(forward(sd1), base)
    load_erasure(sd1, made)
    assert erasure_status(sd1).mode == "map" and error(forward(sd1), expected) < AGREE < error(expected, base)
    refused("kept as a map", fuse_erasure, sd1)
    unload_erasure(sd1)
    assert torch.equal(forward(sd1), base)


# --- halves of a guided batch ---


def given(pipe, edit, negative="a photo of a cat", prompt="a photo of a cat", halves="both"):
    """Prompt embeddings with one half mapped by hand, or both."""
    embeds, other = pipe.encode_prompt(prompt, "cpu", 1, True, negative)
    return {
        "prompt_embeds": by_hand(embeds, edit),
        "negative_prompt_embeds": by_hand(other, edit) if halves == "both" else other,
    }


@pytest.mark.parametrize("kind", ["plain", "PAG"])
def test_the_conditional_half_alone(sd1, kind):
    """F12: another operation than erasing both."""
    pipe, kwargs, made = sd1, {}, adapter(sd1, "cat")
    if kind == "PAG":
        pipe, kwargs = StableDiffusionPAGPipeline.from_pipe(sd1, pag_applied_layers=["mid"]), {"pag_scale": 3.0}
        pipe.set_progress_bar_config(disable=True)
    both, cond = (sample(pipe, None, **given(pipe, made.edit, halves=h), **kwargs) for h in ("both", "cond"))
    assert error(both, cond) > 100 * CLOSE  # control: they differ
    asked = {"negative_prompt": "a photo of a cat"} | kwargs
    load_erasure(pipe, made, branch="cond")
    assert erasure_status(pipe).branch == "cond" and "conditional half" in str(erasure_status(pipe))
    assert error(sample(pipe, **asked), cond) < CLOSE
    without = sample(pipe, guidance_scale=1.0, **kwargs)  # nothing but the conditional half
    unload_erasure(pipe)
    load_erasure(pipe, made)
    assert erasure_status(pipe).branch == "both" and error(sample(pipe, **asked), both) < CLOSE
    assert error(sample(pipe, guidance_scale=1.0, **kwargs), without) < CLOSE


def test_halves_and_rows_together(sd1):
    load_erasure(sd1, [adapter(sd1, "cat"), adapter(sd1, "gogh")], branch="cond")
    set_erasures(sd1, "cat")
    prompts = ["a photo of a cat", "a photo of a cat"]

    def draw():
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        return sd1(prompts, negative_prompt=["a cat", "a cat"], num_inference_steps=2, generator=generators, output_type="latent", height=16, width=16).images  # noqa: E501 # fmt: skip

    one = draw()
    with erasing(sd1, rows=[["cat"], []]):
        found = draw()
    with disable_erasure(sd1):
        plain = draw()
    assert error(found[0], one[0]) < CLOSE and error(found[1], plain[1]) < CLOSE < error(one[1], plain[1])


def test_halves_that_cannot_be_told_are_refused(sd1):
    made = adapter(sd1, "cat")
    load_erasure(sd1, made, branch="cond")
    refused("comes from no pipeline|on another pipeline", forward, sd1)
    other = StableDiffusionImg2ImgPipeline.from_pipe(sd1)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    refused("branch='cond' was asked for on another pipeline", other, "a cat", image=image, num_inference_steps=2)
    sample(sd1)  # control
    for mode in ("fused", "lora"):
        refused("exists only as a map", load_erasure, sd1, adapter(sd1, "gogh"), mode=mode)
    refused("exists only as a map", fuse_erasure, sd1)
    refused("one for all", load_erasure, sd1, adapter(sd1, "gogh"), branch="both")
    load_erasure(sd1, adapter(sd1, "gogh"))
    assert erasure_status(sd1).branch == "cond"
    unload_erasure(sd1)
    for mode in ("fused", "lora"):
        refused("exists only as a map", load_erasure, sd1, made, mode=mode, branch="cond")
    pipe = with_controlnet(sd1, make_controlnet(sd1))
    load_erasure(pipe, made, branch="cond")
    refused("cannot be told from", sample, pipe, image=image)
    unload_erasure(pipe)
    load_erasure(pipe, made)
    sample(pipe, image=image)


# --- repeated blocks ---


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_repeated_blocks_compiled(sd1, order):
    """The blocks are compiled one by one; the hook lies outside of all of them, so that toggling compiles nothing."""
    if not hasattr(sd1.unet, "compile_repeated_blocks"):
        pytest.skip("this diffusers cannot compile repeated blocks")
    torch._dynamo.reset()
    graphs, text, made = [], states(sd1), adapter(sd1, "cat")

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    base, clean = forward(sd1, text), look(sd1.unet)
    expected = forward(sd1, by_hand(text, made.edit))
    if order == "before":
        load_erasure(sd1, made)
    sd1.unet.compile_repeated_blocks(backend=counting)
    first = forward(sd1, text)
    compiled = len(graphs)
    if order == "after":
        load_erasure(sd1, made)
    for _ in range(2):
        assert error(forward(sd1, text), expected) < AGREE
        with disable_erasure(sd1):
            assert error(forward(sd1, text), base) < AGREE
    assert compiled and len(graphs) == compiled and error(first, expected if order == "before" else base) < AGREE
    enable_erasure(sd1)
    unload_erasure(sd1)
    assert look(sd1.unet)[1:4] == clean[1:4]
    torch._dynamo.reset()
