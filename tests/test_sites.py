"""Where text enters: found by what a layer reads, not by its name; what a map cannot see is refused."""

import pytest
import torch
from attaching import AGREE, adapter, by_hand, error, forward, states
from conftest import make_pipe, make_unet
from diffusers import ControlNetModel, MultiControlNetModel, UNet2DModel

from diffusers_erase import EraseError, fuse_erasure, load_erasure, unload_erasure
from diffusers_erase.sites import (
    check_fusable,
    family_of,
    fused_pairs,
    sites,
    text_readers,
    unwrapped,
    widths,
    with_text,
)


class Parts:
    """A pipeline as far as this file looks at one."""

    def __init__(self, **parts):
        vars(self).update(parts)


def test_sites_are_the_layers_that_read_text(pipe):
    found = sites(pipe.unet)
    assert len(found) == 8 and all(path.split(".")[-2:] in (["attn2", "to_k"], ["attn2", "to_v"]) for path in found)
    seen = set()
    text = states(pipe)
    hooks = [
        module.register_forward_pre_hook(lambda m, a, path=path: seen.add(path) if a and a[0] is text else None)
        for path, module in pipe.unet.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    forward(pipe, text)
    for hook in hooks:
        hook.remove()
    assert seen == set(found)  # every linear layer that was given the text itself, and no other


def test_the_pictures_own_attention_reads_text_in_some_models(tokenizer):
    """As in the x4 upscaler: blocks with only_cross_attention give the text to attn1 too, so a fused erasure must reach it."""
    pipe = make_pipe(tokenizer)
    pipe.register_modules(unet=make_unet(32, only_cross_attention=True))
    assert len([path for path in sites(pipe.unet) if ".attn1." in path]) == 6  # the middle block has none
    made = adapter(pipe, "cat")
    base, expected = forward(pipe), forward(pipe, by_hand(states(pipe), made.edit))
    assert error(expected, base) > 0.1
    load_erasure(pipe, made)
    assert error(forward(pipe), expected) < AGREE
    fuse_erasure(pipe)
    assert error(forward(pipe), expected) < AGREE
    unload_erasure(pipe)
    assert torch.equal(forward(pipe), base)
    pipe.load_lora_weights(made.to_lora(pipe))
    assert error(forward(pipe), expected) < AGREE


def test_wrappers_are_seen_through(pipe):
    plain = sites(pipe.unet)
    assert sites(torch.compile(pipe.unet, backend="eager")) == plain and unwrapped(pipe.unet) is pipe.unet
    pipe.load_lora_weights(adapter(pipe, "cat").to_lora(pipe))
    assert (
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        is not plain["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"]
    )
    assert sites(pipe.unet) == plain
    check_fusable(pipe.unet)
    pipe.fuse_qkv_projections()
    assert set(sites(pipe.unet)) == {
        *plain,
        *(path.replace("to_k", "to_kv") for path in plain if path.endswith("to_k")),
    }
    pairs = fused_pairs(pipe.unet)
    assert len(pairs) == 4 and all(k in plain.values() and v in plain.values() for _, k, v in pairs)
    pipe.fuse_lora()
    with pytest.raises(EraseError, match="unfuse_lora"):
        check_fusable(pipe.unet)


def test_a_lora_merged_elsewhere_does_not_hinder(pipe):
    from attaching import style_lora

    pipe.load_lora_weights(style_lora(pipe.unet, only="attn1"))
    pipe.fuse_lora()
    check_fusable(pipe.unet)


def test_readers_and_widths(tokenizer):
    unet = make_unet(32)
    nets = [ControlNetModel.from_unet(unet) for _ in range(2)]
    assert list(text_readers(Parts(unet=unet))) == ["unet"] and widths(unet) == {"text": 32}
    assert text_readers(Parts(unet=unet, controlnet=None)) == {"unet": unet}
    assert text_readers(Parts(unet=unet, controlnet=nets[0])) == {"unet": unet, "controlnet": nets[0]}
    several = text_readers(Parts(unet=unet, controlnet=MultiControlNetModel(nets)))
    assert several == {"unet": unet, "controlnet.0": nets[0], "controlnet.1": nets[1]}
    assert widths(make_unet((64, 64))) == {"text": 64}


def of(width=32, **changes):
    return Parts(unet=make_unet(width, **changes))


BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
UNREADABLE = {
    "no UNet": (lambda: Parts(prior=1), "has no UNet"),
    "no text": (
        lambda: Parts(unet=UNet2DModel(block_out_channels=(32, 32), norm_num_groups=8, **BLOCKS)),
        "does not read prompt",
    ),
    "two widths": (lambda: of((32, 64)), "several widths"),
    "another transformer": (lambda: Parts(transformer=torch.nn.Linear(1, 1)), "does not read prompt"),
    "additional text": (lambda: of(addition_embed_type="text", addition_embed_type_num_heads=4), "additional text"),
    "projected text": (lambda: of(encoder_hid_dim=16, encoder_hid_dim_type="text_proj"), "projects text"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_a_map_cannot_see_is_refused(case):
    make, message = UNREADABLE[case]
    with pytest.raises(EraseError, match=message) as caught:
        text_readers(make())
    assert "\n" not in str(caught.value)


def test_a_controlnet_of_another_family_is_refused(sd1):
    net = ControlNetModel.from_unet(make_unet(32))
    net.register_to_config(addition_embed_type="text_time")
    with pytest.raises(EraseError, match="controlnet takes text as SDXL does, unet as Stable Diffusion"):
        text_readers(Parts(unet=sd1.unet, controlnet=net))


def test_arguments_of_the_caller_are_not_changed():
    text, given = torch.ones(1, 2, 3), {"encoder_hidden_states": torch.ones(1, 2, 3), "other": 1}
    spaces, twice = family_of(make_unet(32)).spaces, {"text": lambda e: e * 2}
    args, kwargs = with_text(spaces, (0, 1), given, twice)
    assert args == (0, 1) and torch.equal(kwargs["encoder_hidden_states"], 2 * text) and kwargs["other"] == 1
    assert torch.equal(given["encoder_hidden_states"], text)
    args, kwargs = with_text(spaces, (0, 1, text, 3), {}, twice)
    assert torch.equal(args[2], 2 * text) and args[3] == 3 and kwargs == {} and torch.equal(text, torch.ones(1, 2, 3))
    for empty in (((0, 1), {}), ((0, 1, None), {}), ((0, 1), {"encoder_hidden_states": [text]})):
        with pytest.raises(EraseError, match="no tensor"):
            with_text(spaces, *empty, twice)


def test_fusing_needs_plain_floating_weights(sd1):
    check_fusable(sd1.unet)
    attention = sd1.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    weight = attention.to_v.weight

    class Packed(torch.nn.Parameter):
        pass

    for odd in (weight.detach().to(torch.float8_e4m3fn), weight.detach().to("meta")):
        attention.to_v.weight = torch.nn.Parameter(odd, requires_grad=False)
        with pytest.raises(EraseError, match="mid_block.*attn2.to_v"):
            check_fusable(sd1.unet)
    attention.to_v.weight = Packed(weight.detach())
    with pytest.raises(EraseError, match="Packed"):
        check_fusable(sd1.unet)
    attention.to_v.weight = weight
    check_fusable(sd1.unet)
