"""FLUX.1 and SD3, experimental: given embeddings and pooled states are mapped where they enter; their text is not read."""

import pytest
import torch
from attaching import AGREE, by_hand, error, look
from conftest import bits, same_bits

from diffusers_erase import (
    EraseError,
    ErasureAdapter,
    MismatchError,
    erase,
    erasure_status,
    fuse_erasure,
    load_erasure,
    unfuse_erasure,
    unload_erasure,
)
from diffusers_erase.edits import Edit, Label
from diffusers_erase.sites import family_of, sites, widths
from diffusers_erase.text import Fingerprint

TEXT, POOLED = 24, 16


def flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=POOLED, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)


def sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=TEXT, caption_projection_dim=32, pooled_projection_dim=POOLED, out_channels=4,
    ).eval()  # fmt: skip
    rest = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **rest)


def states(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edit(space, width, seed):
    """One row of random states on an identity pack."""
    key, offset = states(1, width, seed=seed), states(1, width, seed=seed + 1)
    role = "subject" if space == "text" else "pooled"
    return Edit(
        (Label("cat", "cat", role, ("dog",)),), key, offset, torch.tensor([9.0]), key / 0.5, "identity", "identity"
    )


ADAPTER = ErasureAdapter(
    {"text": edit("text", TEXT, 1), "pooled": edit("pooled", POOLED, 3)}, Fingerprint(TEXT, "", ()), ()
)


def forward(pipe, text, pooled, positional=False):
    """One pass of the transformer on given embeddings."""
    flat = family_of(pipe.transformer).name == "FLUX.1"
    noise = states(1, 16, 4) if flat else states(1, 4, 8, 8)
    more = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(7, 3), "guidance": None} if flat else {}
    given = {} if positional else {"encoder_hidden_states": text, "pooled_projections": pooled}
    with torch.no_grad():
        return pipe.transformer(
            noise, *((text, pooled) if positional else ()), timestep=torch.tensor([0.5]), **given, **more
        ).sample


def run(pipe, text, pooled):
    """The pipeline's own call on given embeddings; SD3 is guided, with embeddings for both halves."""
    more = {}
    if family_of(pipe.transformer).name == "SD3":
        more = {"negative_prompt_embeds": text * 0.5, "negative_pooled_prompt_embeds": pooled * 0.5}
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text, pooled_prompt_embeds=pooled, num_inference_steps=2, height=64, width=64, output_type="latent",
        generator=torch.Generator().manual_seed(0), **more,
    ).images  # fmt: skip


@pytest.mark.parametrize("make", [flux, sd3])
def test_given_embeddings_are_mapped_in_every_form(make):
    pipe = make()
    text, pooled = states(1, 7, TEXT), states(1, POOLED)
    mapped = by_hand(text, ADAPTER.edits["text"]), by_hand(pooled, ADAPTER.edits["pooled"])
    before, only_text, hand = forward(pipe, text, pooled), forward(pipe, mapped[0], pooled), forward(pipe, *mapped)
    assert error(hand, before) > 0.01 and error(hand, only_text) > 1e-3  # control: both paths are read
    kept, looks = bits(pipe.transformer), look(pipe.transformer)
    assert widths(pipe.transformer) == {"text": TEXT, "pooled": POOLED}
    load_erasure(pipe, ADAPTER, strict=False)
    assert error(forward(pipe, text, pooled), hand) < AGREE
    assert error(forward(pipe, text, pooled, positional=True), hand) < AGREE
    fuse_erasure(pipe)
    assert error(forward(pipe, text, pooled), hand) < AGREE
    changed = {name for name, weight in kept.items() if not torch.equal(pipe.transformer.state_dict()[name], weight)}
    assert changed == {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}  # no bias
    unfuse_erasure(pipe)
    assert same_bits(pipe.transformer, kept)
    unload_erasure(pipe)
    assert torch.equal(forward(pipe, text, pooled), before) and look(pipe.transformer) == looks


@pytest.mark.parametrize("make", [flux, sd3])
def test_the_pipelines_own_call(make):
    pipe = make()
    text, pooled = states(1, 7, TEXT), states(1, POOLED)
    before = run(pipe, text, pooled)
    hand = run(pipe, by_hand(text, ADAPTER.edits["text"]), by_hand(pooled, ADAPTER.edits["pooled"]))
    load_erasure(pipe, ADAPTER, strict=False)
    assert error(run(pipe, text, pooled), hand) < 10 * AGREE and error(hand, before) > 1e-3
    unload_erasure(pipe)
    assert torch.equal(run(pipe, text, pooled), before)


@pytest.mark.parametrize("make", [flux, sd3])
def test_the_twin_loads_in_stock_diffusers(make):
    pipe = make()
    text, pooled = states(1, 7, TEXT), states(1, POOLED)
    hand = forward(pipe, by_hand(text, ADAPTER.edits["text"]), by_hand(pooled, ADAPTER.edits["pooled"]))
    twin = ADAPTER.to_lora(pipe)
    assert all(key.startswith("transformer.") for key in twin) and len(twin) == 4
    with pytest.raises(EraseError, match="kohya"):
        ADAPTER.to_kohya(pipe)
    assert error(forward(pipe, text, pooled), hand) > 0.01
    pipe.load_lora_weights(twin)
    assert error(forward(pipe, text, pooled), hand) < AGREE


@pytest.mark.parametrize("make", [flux, sd3])
def test_marked_experimental(make):
    pipe = make()
    assert family_of(pipe.transformer).experimental
    with pytest.raises(EraseError, match="is not read by this version"):
        erase(pipe, "cat")
    with pytest.raises(EraseError, match="strict=False"):
        load_erasure(pipe, ADAPTER)
    load_erasure(pipe, ADAPTER, strict=False)
    assert "experimental" in str(erasure_status(pipe)) and "strict=False" in str(erasure_status(pipe))


def test_what_does_not_fit_is_refused():
    pipe = flux()
    narrow = ErasureAdapter({"text": edit("text", 20, 1)}, Fingerprint(20, "", ()), ())
    with pytest.raises(MismatchError, match="width 20"):
        load_erasure(pipe, narrow, strict=False)
    load_erasure(pipe, ErasureAdapter({"text": ADAPTER.edit}, Fingerprint(TEXT, "", ()), ()), strict=False)
    assert "does not act on pooled states" in str(erasure_status(pipe))
    assert list(sites(pipe.transformer, "pooled")) == ["time_text_embed.text_embedder.linear_1"]
