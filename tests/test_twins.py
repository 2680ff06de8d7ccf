"""LoRA twins in other programs: stock diffusers, PEFT, kohya's names, and the names that ComfyUI looks for."""

import pytest
import torch
from attaching import AGREE, adapter, error, forward
from conftest import make_unet
from safetensors import safe_open
from test_factors_attached import made

from diffusers_erase import compose, erase, load_erasure, unload_erasure
from diffusers_erase.sites import layer_names

COMFYUI = {
    "down_blocks_0_attentions_0": "input_blocks_1_1",
    "down_blocks_0_attentions_1": "input_blocks_2_1",
    "down_blocks_1_attentions_0": "input_blocks_4_1",
    "down_blocks_1_attentions_1": "input_blocks_5_1",
    "down_blocks_2_attentions_0": "input_blocks_7_1",
    "down_blocks_2_attentions_1": "input_blocks_8_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_1_attentions_0": "output_blocks_3_1",
    "up_blocks_1_attentions_1": "output_blocks_4_1",
    "up_blocks_1_attentions_2": "output_blocks_5_1",
    "up_blocks_2_attentions_0": "output_blocks_6_1",
    "up_blocks_2_attentions_1": "output_blocks_7_1",
    "up_blocks_2_attentions_2": "output_blocks_8_1",
    "up_blocks_3_attentions_0": "output_blocks_9_1",
    "up_blocks_3_attentions_1": "output_blocks_10_1",
    "up_blocks_3_attentions_2": "output_blocks_11_1",
}
"""SD 1.x's attentions: diffusers' name and CompVis' name of each. For a UNet ComfyUI looks for `lora_unet_` and either of the
two with `_` for `.`, and under it for `.lora_down.weight`, `.lora_up.weight` and `.alpha`."""


@pytest.fixture(scope="module")
def sd1_layout():
    """A UNet of SD 1.x's layout, narrow."""
    cross, plain = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    return make_unet(
        32, block_out_channels=(8,) * 4, layers_per_block=2, attention_head_dim=2,
        down_block_types=(cross, cross, cross, "DownBlock2D"), up_block_types=("UpBlock2D", plain, plain, plain),
    )  # fmt: skip


def test_comfyui_finds_every_layer_of_the_kohya_twin(sd1, sd1_layout):
    kohya = adapter(sd1, "cat").to_kohya(sd1_layout)
    stems = {f"lora_unet_{ours}_transformer_blocks_0_attn2_to_{part}" for ours in COMFYUI for part in "kv"}
    assert len(stems) == 32
    assert kohya.keys() == {
        f"{stem}.{end}" for stem in stems for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_compvis_names_lead_to_the_same_layers(sd1_layout):
    names = layer_names(sd1_layout)
    for ours, theirs in COMFYUI.items():
        for rest in ("proj_in", "transformer_blocks_0_attn2_to_k", "transformer_blocks_0_ff_net_2"):
            assert names[f"{theirs}_{rest}"] == names[f"{ours}_{rest}"]
    paths = set(names.values())
    assert all(names[path] == path for path in paths) and "conv_in" in paths
    assert not any("input_blocks" in name and "attentions" in name for name in names)


@pytest.mark.parametrize("kind", ["rows", "factors"])
def test_the_kohya_twin_is_what_diffusers_own_converter_makes(pipe, kind):
    from diffusers.utils import convert_state_dict_to_kohya

    one = adapter(pipe, "gogh") if kind == "rows" else made(pipe)
    twin, kohya = one.to_lora(pipe), one.to_kohya(pipe)
    converted = convert_state_dict_to_kohya(dict(twin))
    assert converted.keys() == kohya.keys()
    assert all(torch.equal(converted[key].float(), kohya[key]) for key in kohya)
    before = forward(pipe)
    pipe.load_lora_weights(dict(twin))
    native = forward(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(dict(kohya))
    assert error(forward(pipe), native) < AGREE < error(native, before)


@pytest.mark.parametrize("kind", ["rows", "factors"])
def test_peft_reads_the_twin(pipe, kind):
    peft = pytest.importorskip("peft")
    one = adapter(pipe, "gogh") if kind == "rows" else made(pipe)
    before = forward(pipe)
    load_erasure(pipe, one, mode="fused")
    expected = forward(pipe)
    unload_erasure(pipe)
    state = {key.removeprefix("unet."): tensor for key, tensor in one.to_lora(pipe).items()}
    rank = len(next(iter(state.values())))
    paths = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=paths)
    peft.inject_adapter_in_model(config, pipe.unet, adapter_name="erase")
    assert error(forward(pipe), before) < AGREE  # control: PEFT's own start changes nothing
    peft.set_peft_model_state_dict(pipe.unet, state, adapter_name="erase")
    assert error(forward(pipe), expected) < AGREE < error(expected, before)


def test_twins_add_up_and_compositions_do_not(sd1):
    """Why the card sends people to this package for several erasures at once."""
    a, b = (erase(sd1, name, target="tree") for name in ("cat", "old cat"))
    load_erasure(sd1, compose(a, b))
    exact = forward(sd1)
    unload_erasure(sd1)
    sd1.load_lora_weights(a.to_lora(sd1), adapter_name="a")
    sd1.load_lora_weights(b.to_lora(sd1), adapter_name="b")
    sd1.set_adapters(["a", "b"])
    assert error(forward(sd1), exact) > 0.01
    assert "only add up" in a.card()


def test_twins_are_recognised_by_their_adapters_digest(sd1, tmp_path):
    one = adapter(sd1, "cat")
    folder = one.save_pretrained(tmp_path, model=sd1)
    twins = [file for file in folder.glob("*.safetensors") if file.name != "erasure.safetensors"]
    assert "pytorch_lora_weights.safetensors" in {file.name for file in twins}
    for file in twins:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"erasure_twin": one.digest}
    before = forward(sd1)
    sd1.load_lora_weights(folder)  # the host does not mind
    assert error(forward(sd1), before) > 0.01
