"""An exported folder is plain diffusers, answers as the pipeline with its erasures does, and leaves that pipeline alone."""

import json

import pytest
import torch
from attaching import AGREE, adapter, all_bits, error, forward, look, style_lora
from cases import PACK
from conftest import make_sdxl, same_bits, sample
from safetensors.torch import load_file
from test_factors_attached import made

from diffusers_erase import (
    EraseError,
    ErasureLoaderMixin,
    disable_erasure,
    erase,
    erasure_status,
    export_erased,
    fuse_erasure,
    load_erasure,
    unload_erasure,
)


@pytest.mark.parametrize("form", ["map", "fused"])
def test_the_folder_is_plain_and_draws_the_same(pipe, tmp_path, form):
    from diffusers import StableDiffusionPipeline

    before = sample(pipe)
    load_erasure(pipe, [adapter(pipe, "cat"), adapter(pipe, "gogh")], mode=form)
    bits, looks, drawn = all_bits(pipe), look(pipe.unet), sample(pipe)
    fuse_erasure(pipe)
    expected, after = forward(pipe), sample(pipe)
    if form == "map":
        from diffusers_erase import unfuse_erasure

        unfuse_erasure(pipe)
    folder = export_erased(pipe, tmp_path / "plain", unet_file=True)
    assert erasure_status(pipe).mode == form and look(pipe.unet) == looks and error(sample(pipe), drawn) < 10 * AGREE
    assert all(same_bits(getattr(pipe, name), was) for name, was in bits.items())
    plain = StableDiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    assert error(forward(plain), expected) < AGREE and error(sample(plain), after) < 10 * AGREE < error(after, before)
    state = load_file(folder / "unet_erased.safetensors")
    assert state.keys() == plain.unet.state_dict().keys() and same_bits(plain.unet, state)
    told = json.loads((folder / "erasures.json").read_text("utf-8"))
    assert {name: e["digest"] for name, e in told["erasures"].items()} == {
        "cat": adapter(pipe, "cat").digest,
        "van-gogh": adapter(pipe, "gogh").digest,
    }
    assert (
        told["probe_error"] < AGREE and told["erasures"]["cat"]["strength"] == 1.0 and str(tmp_path) not in str(told)
    )


def test_factors_are_exported_too(sd1, tmp_path):
    load_erasure(sd1, [made(sd1), adapter(sd1, "cat")])
    expected = forward(sd1)
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(export_erased(sd1, tmp_path / "plain"))
    assert error(forward(plain), expected) < AGREE and torch.equal(forward(sd1), expected)
    assert not (tmp_path / "plain" / "unet_erased.safetensors").exists()
    kinds = {
        e["kind"] for e in json.loads((tmp_path / "plain" / "erasures.json").read_text("utf-8"))["erasures"].values()
    }
    assert kinds == {"rows", "factors"}


def test_a_gate_is_left_out_only_on_request(sd1, tmp_path):
    load_erasure(sd1, adapter(sd1, "gated"))
    before = forward(sd1)
    with pytest.raises(EraseError, match="linear=True"):
        export_erased(sd1, tmp_path / "plain")
    assert not (tmp_path / "plain").exists() and torch.equal(forward(sd1), before)
    folder = export_erased(sd1, tmp_path / "plain", linear=True)
    assert "linear part" in (folder / "erasures.json").read_text("utf-8") and torch.equal(forward(sd1), before)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(sd1, tmp_path):
    with pytest.raises(EraseError, match="no erasures are loaded"):
        export_erased(sd1, tmp_path / "plain")
    load_erasure(sd1, adapter(sd1, "cat"))
    with disable_erasure(sd1), pytest.raises(EraseError, match="no erasure is in force"):
        export_erased(sd1, tmp_path / "plain")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "full" / "x"):
        with pytest.raises(EraseError, match="new or empty folder"):
            export_erased(sd1, place)
    assert (tmp_path / "full" / "x").read_text() == "mine"
    sd1.load_lora_weights(style_lora(sd1.unet))
    with pytest.raises(EraseError, match="unload_lora_weights"):
        export_erased(sd1, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    sd1.unload_lora_weights()
    assert export_erased(sd1, tmp_path / "plain").is_dir()  # control


def test_a_folder_that_answers_otherwise_is_not_kept(sd1, tmp_path):
    """What save_pretrained does not write (here a hook on a layer) shows in the probe."""
    load_erasure(sd1, adapter(sd1, "cat"))
    before = forward(sd1)
    handle = sd1.unet.conv_out.register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(EraseError, match="answers otherwise"):
        export_erased(sd1, tmp_path / "plain")
    handle.remove()
    assert not (tmp_path / "plain").exists() and error(forward(sd1), before) == 0
    assert erasure_status(sd1).mode == "map"


def test_a_pipeline_of_ones_own_class_is_exported_as_diffusers(sd1, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    class Mine(ErasureLoaderMixin, StableDiffusionPipeline):
        pass

    mine = Mine(**sd1.components, requires_safety_checker=False)
    mine.load_erasure(adapter(sd1, "cat"))
    plain = DiffusionPipeline.from_pretrained(export_erased(mine, tmp_path / "plain"))
    assert type(plain) is StableDiffusionPipeline


def test_sdxl(tokenizer, tokenizer_2, tmp_path):
    from diffusers import DiffusionPipeline

    sdxl = make_sdxl(tokenizer, tokenizer_2)
    load_erasure(sdxl, erase(sdxl, "cat", target="dog", pack=PACK), residual_max=None)
    with pytest.raises(
        EraseError, match="answers otherwise"
    ):  # a pad token that was set in memory reads otherwise from disk
        export_erased(sdxl, tmp_path / "plain")
    unload_erasure(sdxl)
    sdxl = make_sdxl(tokenizer, tokenizer)
    load_erasure(sdxl, erase(sdxl, "cat", target="dog", pack=PACK), residual_max=None, mode="fused")
    drawn = sample(sdxl)
    plain = DiffusionPipeline.from_pretrained(export_erased(sdxl, tmp_path / "plain"))
    plain.set_progress_bar_config(disable=True)
    assert error(sample(plain), drawn) < 10 * AGREE


def test_bf16(sd1, tmp_path):
    from diffusers import DiffusionPipeline

    sd1.to(torch.bfloat16)
    load_erasure(sd1, adapter(sd1, "cat"), mode="fused")
    folder = export_erased(sd1, tmp_path / "plain")
    plain = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert same_bits(plain.unet, all_bits(sd1)["unet"])
