"""Hosts that bring parts of their own: image prompts, motion modules, perturbed attention, phrases, offloading, other processors.

With tests/test_hosts.py the table of docs/in-force.md, row by row: the erased output stays the erased output, or it raises.
"""

import inspect

import accelerate
import pytest
import torch
from attaching import AGREE, adapter, all_bits, by_hand, error, forward, look, states
from conftest import make_unet, same_bits, sample
from diffusers import (
    AnimateDiffPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from test_hosts import make_controlnet, refused, with_controlnet

from diffusers_erase import (
    disable_erasure,
    enable_erasure,
    erase,
    erasing,
    erasure_status,
    fuse_erasure,
    get_active_erasures,
    get_list_erasures,
    load_erasure,
    unload_erasure,
)
from tests.cases import PACK

CLOSE = 1e-4
"""Two guided steps add to the rounding of one pass."""


def embedded(pipe, *edits, prompt="a photo of a cat", negative=None):
    """Prompt embeddings mapped by hand, as arguments of a call."""
    embeds, empty = pipe.encode_prompt(prompt, "cpu", 1, True, negative)
    return {"prompt_embeds": by_hand(embeds, *edits), "negative_prompt_embeds": by_hand(empty, *edits)}


# --- image prompts ---


def ip_adapter(unet, seed=9):
    """An IP-Adapter's weights for `unet`, as its files hold them: projection of the image, and K and V for its tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim

    def noise(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    layers = [p for p in unet.attn_processors if p.endswith("attn2.processor")]
    weights = {}
    for i, path in enumerate(layers):
        out = unet.get_submodule(path.removesuffix(".processor")).to_k.weight.shape[0]
        weights |= {f"{2 * i + 1}.to_{part}_ip.weight": noise(out, width) for part in "kv"}
    projection = {"proj.weight": noise(4 * width, 16), "proj.bias": noise(4 * width)}
    return {
        "image_proj": projection | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": weights,
    }


def with_image(pipe, prompt="a photo of a cat", **kwargs):
    """A picture with an image prompt; the image is the same for both halves."""
    image = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(4))
    return sample(pipe, prompt, ip_adapter_image_embeds=[image], **kwargs)


@pytest.mark.parametrize("mode", ["map", "fused"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_an_ip_adapter_loaded_and_unloaded(sd1, mode, order):
    """It replaces every attention processor, at loading and at unloading."""
    made, plain = adapter(sd1, "cat"), sample(sd1)
    weights = ip_adapter(sd1.unet)
    load_ip = {"subfolder": None, "weight_name": None, "image_encoder_folder": None}
    sd1.load_ip_adapter(weights, **load_ip)
    expected, base = with_image(sd1, None, **embedded(sd1, made.edit)), with_image(sd1)
    assert error(expected, base) > 20 * CLOSE and error(base, plain) > 20 * CLOSE  # controls
    if order == "before":
        sd1.unload_ip_adapter()
    load_erasure(sd1, made, mode=mode)
    erased = sample(sd1) if order == "before" else None
    if order == "before":
        assert "IP-Adapter" not in str(erasure_status(sd1))
        sd1.load_ip_adapter(weights, **load_ip)
    assert error(with_image(sd1), expected) < CLOSE
    assert "an IP-Adapter is loaded" in str(erasure_status(sd1))
    refused(
        "as of an IP-Adapter", erase, sd1, "cat", pack=PACK
    )  # a search asks the denoiser, which has no picture now
    sd1.unload_ip_adapter()
    assert "IP-Adapter" not in str(erasure_status(sd1))
    if erased is not None:
        assert torch.equal(sample(sd1), erased)
    unload_erasure(sd1)
    assert torch.equal(sample(sd1), plain)


def test_a_face_adapters_lora_does_not_switch_an_erasure_off(sd1):
    """Its loading calls set_adapters itself."""
    weights, made = ip_adapter(sd1.unet), adapter(sd1, "cat")
    width = sd1.unet.config.cross_attention_dim
    weights["image_proj"] = {"proj.0.weight": torch.randn(32, 16), "proj.0.bias": torch.zeros(32),
                             "proj.2.weight": torch.randn(4 * width, 32), "proj.2.bias": torch.zeros(4 * width),
                             "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}  # fmt: skip
    for i, path in enumerate(sd1.unet.attn_processors):
        layer = sd1.unet.get_submodule(path.removesuffix(".processor"))
        for part in ("q", "k", "v", "out"):
            linear = layer.to_out[0] if part == "out" else getattr(layer, f"to_{part}")
            weights["ip_adapter"] |= {
                f"{i}.to_{part}_lora.down.weight": torch.randn(2, linear.in_features) * 0.1,
                f"{i}.to_{part}_lora.up.weight": torch.randn(linear.out_features, 2) * 0.1,
            }
    load_erasure(sd1, made)
    sd1.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    assert sd1.get_active_adapters() == ["faceid_0"]  # control: it did
    found, expected = with_image(sd1), None
    with disable_erasure(sd1):
        expected, base = with_image(sd1, None, **embedded(sd1, made.edit)), with_image(sd1)
    assert error(found, expected) < CLOSE < 20 * CLOSE < error(found, base)


def test_phrases_are_said_by_the_status(sd1):
    """GLIGEN reads phrases beside the prompt, through layers of its own."""
    sd1.unet = make_unet(32, attention_type="gated")
    load_erasure(sd1, adapter(sd1, "cat"))
    assert "GLIGEN phrases" in str(erasure_status(sd1))
    found = forward(sd1)
    with disable_erasure(sd1):
        assert error(found, forward(sd1, by_hand(states(sd1), adapter(sd1, "cat").edit))) < AGREE


# --- other pipelines ---


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_perturbed_attention_guidance_is_erased(sd1, guidance):
    """It puts a third part into the batch."""
    made = adapter(sd1, "cat")
    pipe = StableDiffusionPAGPipeline.from_pipe(sd1, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"pag_scale": 3.0, "guidance_scale": guidance}
    base = sample(pipe, **kwargs)
    expected = sample(pipe, None, **embedded(pipe, made.edit), **kwargs)
    assert error(base, sample(pipe, guidance_scale=guidance, pag_scale=0.0)) > CLOSE  # control: it is guided so
    load_erasure(pipe, made)
    assert error(sample(pipe, **kwargs), expected) < CLOSE < 20 * CLOSE < error(expected, base)
    load_erasure(pipe, adapter(pipe, "gogh"), mode="fused")
    assert erasure_status(pipe).mode == "fused" and not torch.equal(sample(pipe, **kwargs), base)


def frames(pipe, prompt="a photo of a cat", **kwargs):
    generator = torch.Generator().manual_seed(0)
    fixed = {"num_frames": 2, "num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
    return pipe(prompt, generator=generator, **fixed, **kwargs).frames


def animated(pipe):
    """An AnimateDiff pipeline of `pipe`; it makes a motion UNet of its own with the same weights."""
    torch.manual_seed(0)
    motion = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=2,
                           motion_norm_num_groups=2, use_motion_mid_block=False)  # fmt: skip
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    made = AnimateDiffPipeline(**parts, motion_adapter=motion)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("mode", ["map", "fused"])
def test_a_motion_unet_is_erased(sd1, mode):
    made = adapter(sd1, "cat")
    pipe = animated(sd1)
    assert type(pipe.unet).__name__ == "UNetMotionModel"
    before, base = all_bits(pipe), frames(pipe)
    expected = frames(pipe, None, **embedded(pipe, made.edit))
    load_erasure(pipe, made, mode=mode)
    assert error(frames(pipe), expected) < CLOSE < 20 * CLOSE < error(expected, base)
    assert get_list_erasures(sd1) == {}  # the UNet that it was made from is another module
    refused("UNetMotionModel holds more than noise and text ask for", erase, pipe, "cat", pack=PACK)
    unload_erasure(pipe)
    assert torch.equal(frames(pipe), base) and all(same_bits(getattr(pipe, n), b) for n, b in before.items())


def test_a_motion_unet_made_later_takes_fused_weights_along_and_no_map(sd1):
    """A copy of the weights, not of the module: attach to the pipeline that draws."""
    base = frames(animated(sd1))
    load_erasure(sd1, adapter(sd1, "cat"))
    assert get_list_erasures(animated(sd1)) == {} and torch.equal(frames(animated(sd1)), base)
    fuse_erasure(sd1)
    erased = frames(animated(sd1))
    pipe = animated(sd1)
    unload_erasure(sd1)
    assert torch.equal(frames(pipe), erased) and not torch.equal(erased, base)


def with_sketch(pipe):
    """A T2I-Adapter, which feeds the UNet and reads no text."""
    torch.manual_seed(2)
    net = T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2).eval()
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    made = StableDiffusionAdapterPipeline(
        **parts, adapter=net, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    return made, {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def distilled(pipe):
    """A latent consistency model: guidance is an embedding, the batch is never doubled."""
    parts = {name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    made = LatentConsistencyModelPipeline(
        **parts, unet=make_unet(32, time_cond_proj_dim=8), scheduler=LCMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return made, {}


@pytest.mark.parametrize("kind", [with_sketch, distilled], ids=lambda kind: kind.__name__)
def test_other_pipelines_around_a_unet_are_erased(sd1, kind):
    (pipe, extra), made = kind(sd1), adapter(sd1, "cat")
    pipe.set_progress_bar_config(disable=True)
    given = embedded(pipe, made.edit)
    if kind is distilled:
        del given["negative_prompt_embeds"]
    base, expected = sample(pipe, **extra), sample(pipe, None, **given, **extra)
    load_erasure(pipe, made)
    found = sample(pipe, **extra)
    assert error(found, expected) < CLOSE < 1e-3 < error(found, base)
    refused("not known to lay out", sample_with_rows, pipe, extra)
    unload_erasure(pipe)
    assert torch.equal(sample(pipe, **extra), base)


def sample_with_rows(pipe, extra):
    with erasing(pipe, rows=[["cat"]]):
        sample(pipe, **extra)


def test_a_second_controlnet_that_is_not_attached_raises(sd1):
    """One ControlNet being attached says nothing about another."""
    first, second = make_controlnet(sd1, 1), make_controlnet(sd1, 2)
    pipe, other = with_controlnet(sd1, first), with_controlnet(sd1, second)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    load_erasure(pipe, adapter(sd1, "cat"))
    sample(pipe, image=image)  # control
    refused("controlnet of this pipeline reads the prompt without the erasure", sample, other, image=image)
    both = with_controlnet(sd1, [first, second])
    refused("controlnet.1 of this pipeline", sample, both, image=[image] * 2)
    assert "not attached to controlnet.1" in str(erasure_status(both))
    enable_erasure(both)
    sample(other, image=image)
    sample(both, image=[image] * 2)
    assert isinstance(other, StableDiffusionControlNetPipeline)


@pytest.mark.parametrize("processor", [AttnProcessor, lambda: SlicedAttnProcessor(1)], ids=["plain", "sliced"])
@pytest.mark.parametrize("mode", ["map", "fused"])
def test_other_attention_processors(sd1, mode, processor):
    made = adapter(sd1, "cat")
    expected = forward(sd1, by_hand(states(sd1), made.edit))
    load_erasure(sd1, made, mode=mode)
    sd1.unet.set_attn_processor(processor())
    assert error(forward(sd1), expected) < AGREE
    sd1.unet.set_default_attn_processor()
    assert error(forward(sd1), expected) < AGREE
    with disable_erasure(sd1):
        assert error(forward(sd1), expected) > 0.05


# --- where the weights are ---


def whole(pipe):
    pass


def sequential(pipe):
    """Every weight on the meta device until its layer is called."""
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def model(pipe):
    """A whole model at a time, the text encoder's hook before the UNet's."""
    _, hook = accelerate.cpu_offload_with_hook(pipe.text_encoder, torch.device("cpu"))
    accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"), prev_module_hook=hook)


def groups(kind):
    def offload(pipe):
        options = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "offload_type": kind}
        pipe.unet.enable_group_offload(**options, **({"num_blocks_per_group": 1} if kind == "block_level" else {}))

    return offload


OFFLOADS = {
    "whole": whole,
    "accelerate": sequential,
    "model": model,
    "leaf groups": groups("leaf_level"),
    "block groups": groups("block_level"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_map_holds_under_offloading(sd1, offload, order):
    made, base = adapter(sd1, "gated"), sample(sd1, "a painting by monet")
    load_erasure(sd1, made)
    expected = sample(sd1, "a painting by monet")
    assert not torch.equal(expected, base)
    if order == "after":
        unload_erasure(sd1)
    OFFLOADS[offload](sd1)
    if order == "after":
        load_erasure(sd1, made)
    for _ in range(2):
        assert torch.equal(sample(sd1, "a painting by monet"), expected)
    unload_erasure(sd1)
    assert torch.equal(sample(sd1, "a painting by monet"), base)


@pytest.mark.parametrize("offload", ["model", "leaf groups", "block groups"])
def test_weights_are_fused_and_given_back_under_offloading(sd1, offload):
    base, made = sample(sd1), adapter(sd1, "cat")
    load_erasure(sd1, made, mode="fused")
    expected = sample(sd1)
    unload_erasure(sd1)
    OFFLOADS[offload](sd1)
    load_erasure(sd1, made, mode="fused")
    assert torch.equal(sample(sd1), expected) and not torch.equal(expected, base)
    unload_erasure(sd1)
    assert torch.equal(sample(sd1), base)


def test_weights_on_the_meta_device_are_never_fused(sd1):
    """F10: writing to them would be lost without a word."""
    sequential(sd1)
    refused("on meta: an erasure is fused only", load_erasure, sd1, adapter(sd1, "cat"), mode="fused")
    assert get_active_erasures(sd1) == []
    accelerate.hooks.remove_hook_from_submodules(sd1.unet)
    load_erasure(sd1, adapter(sd1, "cat"), mode="fused")  # control: back in memory, they are
    sequential(sd1)
    refused("offloaded to the meta device", unload_erasure, sd1)
    assert get_active_erasures(sd1) == ["cat"]


def test_weights_offloaded_to_disk_are_never_fused(sd1, tmp_path):
    """The next onload would read the old ones from the file."""
    if "offload_to_disk_path" not in inspect.signature(sd1.unet.enable_group_offload).parameters:
        pytest.skip("this diffusers does not offload groups to disk")
    groups_on_disk = {"offload_to_disk_path": str(tmp_path), "offload_type": "leaf_level"}
    sd1.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **groups_on_disk)
    base = sample(sd1)
    refused("offloaded to disk", load_erasure, sd1, adapter(sd1, "cat"), mode="fused")
    refused("offloaded to disk, and can neither be read nor changed.*name the target", erase, sd1, "cat", pack=PACK)
    load_erasure(sd1, adapter(sd1, "cat"))
    assert not torch.equal(sample(sd1), base)


def test_a_pipeline_moved_to_another_dtype_keeps_its_map_in_float32(sd1):
    made = adapter(sd1, "cat")
    load_erasure(sd1, made)
    seen = []
    sd1.unet.register_forward_pre_hook(lambda m, a, k: seen.append(k["encoder_hidden_states"]), with_kwargs=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        sd1.to(dtype)
        text = states(sd1)
        with torch.no_grad():
            sd1.unet(torch.zeros(4, 4, 8, 8, dtype=dtype), 500, encoder_hidden_states=text)
        exact = by_hand(text.float(), made.edit)
        assert seen[-1].dtype == dtype and error(seen[-1].float(), exact) < max(4 * torch.finfo(dtype).eps, 1e-6)


def test_a_map_is_copied_to_a_device_once(sd1):
    """The meta device stands in for an accelerator: what is there has a place, and the next call copies nothing."""
    load_erasure(sd1, adapter(sd1, "cat"))
    mapping = sd1.unet.__dict__["_diffusers_erase"].registry.maps["text"]
    assert list(mapping.tensors) == [torch.device("cpu")]
    there = torch.device("meta")
    assert mapping(states(sd1).to(there)).device == there
    first = mapping.tensors[there]["left"]
    mapping(states(sd1).to(there))
    assert mapping.tensors[there]["left"] is first and list(mapping.tensors) == [torch.device("cpu"), there]


def test_components_of_one_pipeline_in_another(sd1):
    """`pipe.components` into a new pipeline: the erasure is on the module, so it is there as well."""
    load_erasure(sd1, adapter(sd1, "cat"))
    other = StableDiffusionPipeline(**sd1.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert get_active_erasures(other) == ["cat"] and look(other.unet) == look(sd1.unet)
    assert torch.equal(sample(other), sample(sd1))
