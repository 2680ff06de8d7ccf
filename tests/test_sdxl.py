"""SDXL: two encoders side by side, and a pooled state by which a concept survives unless it is edited too."""

import copy
from dataclasses import replace

import diffusers
import pytest
import torch
from attaching import AGREE, all_bits, by_hand, error, look, solved
from cases import PACK
from conftest import make_pipe, make_sdxl, same_bits, sample
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_erase import (
    ConflictError,
    EraseError,
    ErasureAdapter,
    MismatchError,
    compose,
    delete_erasures,
    erase,
    erasure_status,
    fuse_erasure,
    get_active_erasures,
    load_erasure,
    set_erasures,
    unfuse_erasure,
    unload_erasure,
)
from diffusers_erase.sites import sites, widths
from diffusers_erase.text import Encoder

PROMPT = "a photo of a cat"
ASKED = {
    "cat": {"concept": "cat", "target": "dog"},
    "gogh": {"concept": "van gogh", "target": "null", "tokens": "name+eot"},
    "ship": {"concept": "ship", "target": "boat", "preserve": "car", "coreferences": "sea ship"},
    "gated": {"concept": "monet", "target": "old man", "gate": 0.7},
    "uce": {"concept": "cat", "target": "tree", "method": "uce"},
}
MADE = {}


def adapter(pipe, name="cat"):
    """The adapter of ASKED, made once: encoders are seeded."""
    if name not in MADE:
        MADE[name] = erase(pipe, **({"pack": PACK} if name != "uce" else {}), **ASKED[name])
    return MADE[name]


def encoded(pipe, prompt=PROMPT):
    """(text, negative text, pooled, negative pooled) as the pipeline's own encoders give them."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)


def expected(pipe, *adapters, pooled=True, prompt=PROMPT, **kwargs):
    """A run of the bare pipeline on states that were mapped by hand."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, encoded(pipe, prompt), strict=True))
    for name, states in given.items():
        space = "pooled" if "pooled" in name else "text"
        if space == "text" or pooled:
            given[name] = by_hand(states, *(a.edits[space] for a in adapters))
    return sample(pipe, None, **given, **kwargs)


# --- rows ---


def test_rows_are_those_of_both_encoders_and_of_the_pooled_state(sdxl):
    made = adapter(sdxl)
    templates = PACK.templates
    keys = {"subject": [], "eot": [], "pooled": []}
    for template in templates:
        prompt = template.replace("{}", "cat")
        text, _, pooled, _ = encoded(sdxl, prompt)
        ids = sdxl.tokenizer(prompt)["input_ids"]
        cat = sdxl.tokenizer("cat", add_special_tokens=False)["input_ids"][0]
        keys["subject"].append(text[0, ids.index(cat)])
        keys["eot"].append(text[0, ids.index(sdxl.tokenizer.eos_token_id)])
        keys["pooled"].append(pooled[0])
    assert [label.role for label in made.edits["text"].labels] == ["eot", "subject"]
    assert [label.role for label in made.edits["pooled"].labels] == ["pooled"]
    for edit in made.edits.values():
        for label, key in zip(edit.labels, edit.keys, strict=True):
            torch.testing.assert_close(key, torch.stack(keys[label.role]).mean(0), atol=1e-5, rtol=1e-5)
    assert made.edits["text"].width == 32 + 48 and made.edits["pooled"].width == 48
    assert len({edit.pack_digest for edit in made.edits.values()}) == 2  # a base pack for each space
    assert all(edit.residuals()["cat"] == pytest.approx(0.02, abs=1e-6) for edit in made.edits.values())


def test_the_empty_prompt_does_not_move(sdxl):
    """Hard rows in both spaces: what every guided image depends on."""
    made = adapter(sdxl, "gogh")
    text, zero, pooled, _ = encoded(sdxl, "")
    for space, rows in (("text", text[0, :2]), ("pooled", pooled)):
        A, _ = solved(made.edits[space])
        assert float((rows.double() @ A.T).abs().max()) < 1e-5  # keys are stored in float32
        own, _ = solved(made.edits[space])
        assert float((made.edits[space].keys.double() @ own.T).abs().max()) > 0.5  # control: its own keys do
    assert not bool(zero.any())  # SDXL's empty negative prompt is zero, and a map without bias leaves it so


def test_target_and_preserved_names_have_pooled_rows_too(sdxl):
    made = adapter(sdxl, "ship")
    assert made.edits["pooled"].preserved == ("car",) and len(made.edits["pooled"].labels) == 3
    null = adapter(sdxl, "gogh").edits["pooled"]
    torch.testing.assert_close((null.keys + null.offsets)[0], encoded(sdxl, "")[2][0], atol=1e-5, rtol=1e-5)


# --- in force ---


@pytest.mark.parametrize("names", [("cat",), ("gogh", "ship"), ("uce",)], ids="+".join)
def test_map_weights_and_lora_twin_agree_on_both_paths(sdxl, names):
    adapters = [adapter(sdxl, name) for name in names]
    before, hand = sample(sdxl, PROMPT), expected(sdxl, *adapters)
    bits, looks = all_bits(sdxl), look(sdxl.unet)
    assert error(hand, before) > 0.01  # control
    load_erasure(sdxl, adapters, residual_max=None)
    assert erasure_status(sdxl).notes == ()
    assert error(sample(sdxl, PROMPT), hand) < 10 * AGREE  # two steps, guided
    fuse_erasure(sdxl)
    assert error(sample(sdxl, PROMPT), hand) < 10 * AGREE
    unfuse_erasure(sdxl)
    assert all(same_bits(getattr(sdxl, n), b) for n, b in bits.items())
    unload_erasure(sdxl)
    assert torch.equal(sample(sdxl, PROMPT), before) and look(sdxl.unet) == looks
    sdxl.load_lora_weights(compose(*adapters, residual_max=None).to_lora(sdxl))
    assert error(sample(sdxl, PROMPT), hand) < 10 * AGREE


def test_without_the_pooled_map_the_concept_comes_through(sdxl):
    """What a peer's users complain of, and the status says."""
    made = erase(sdxl, "cat", target="dog", pack=PACK, templates=["{}"])
    text_only = replace(made, edits={"text": made.edits["text"]})
    seen = []
    sdxl.unet.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0][-1, :48].clone()))
    key, goal = (encoded(sdxl, name)[2][0] for name in ("cat", "dog"))

    def left():
        sample(sdxl, "cat")
        return float((seen[-1] - goal).norm() / (key - goal).norm())

    assert left() == pytest.approx(1, abs=1e-5)
    load_erasure(sdxl, text_only)
    assert left() == pytest.approx(1, abs=1e-5)  # untouched
    assert error(sample(sdxl, PROMPT), expected_bare(sdxl, made, pooled=False)) < 10 * AGREE
    assert "does not act on pooled states" in str(erasure_status(sdxl))
    unload_erasure(sdxl)
    load_erasure(sdxl, made)
    assert left() == pytest.approx(0.02, abs=1e-3)  # the residual that was asked for


def test_micro_conditioning_is_untouched(sdxl):
    seen = []
    sdxl.unet.add_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    sizes = {"original_size": (99, 7), "crops_coords_top_left": (3, 5)}
    plain, sized = sample(sdxl, PROMPT), sample(sdxl, PROMPT, **sizes)
    before = seen[-1]
    assert not torch.equal(plain, sized)  # control: they are read
    weight = sdxl.unet.add_embedding.linear_1.weight.detach().clone()
    load_erasure(sdxl, adapter(sdxl))
    sample(sdxl, PROMPT, **sizes)
    assert torch.equal(seen[-1][:, 48:], before[:, 48:]) and not torch.equal(seen[-1][:, :48], before[:, :48])
    fuse_erasure(sdxl)
    fused = sdxl.unet.add_embedding.linear_1.weight
    assert torch.equal(fused[:, 48:], weight[:, 48:]) and not torch.equal(fused[:, :48], weight[:, :48])
    unfuse_erasure(sdxl)
    assert torch.equal(sdxl.unet.add_embedding.linear_1.weight, weight)


def test_arguments_of_the_caller_are_not_changed(sdxl):
    text, _, pooled, _ = encoded(sdxl)
    added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
    kept = {name: tensor.clone() for name, tensor in added.items()}
    call = {"encoder_hidden_states": text, "added_cond_kwargs": added}
    with torch.no_grad():
        before = sdxl.unet(torch.zeros(1, 4, 8, 8), 500, **call).sample
        load_erasure(sdxl, adapter(sdxl))
        assert not torch.equal(sdxl.unet(torch.zeros(1, 4, 8, 8), 500, **call).sample, before)
        assert added["text_embeds"] is pooled and all(torch.equal(added[n], t) for n, t in kept.items())
        with pytest.raises(EraseError, match=r"no tensor 'added_cond_kwargs\.text_embeds'"):
            sdxl.unet(torch.zeros(1, 4, 8, 8), 500, encoder_hidden_states=text, added_cond_kwargs={"time_ids": 0})


def test_sets_strengths_and_deletion(sdxl):
    cat, ship = adapter(sdxl), adapter(sdxl, "ship")
    load_erasure(sdxl, [cat, ship], ["cat", "ship"], residual_max=None)
    both = sample(sdxl, PROMPT)
    status = erasure_status(sdxl)
    assert status.saturation == compose(cat, ship, residual_max=None).saturation > cat.saturation
    assert f"saturation {status.saturation:.2f}" in str(status)
    assert error(both, expected_bare(sdxl, cat, ship)) < 10 * AGREE
    set_erasures(sdxl, ["cat"], 0.5)
    half = replace(cat, edits={space: edit.softened(0.5) for space, edit in cat.edits.items()})
    assert error(sample(sdxl, PROMPT), expected_bare(sdxl, half)) < 10 * AGREE
    set_erasures(sdxl, ["cat", "ship"], 1.0)
    assert torch.equal(sample(sdxl, PROMPT), both)
    delete_erasures(sdxl, "ship")
    alone = sample(sdxl, PROMPT)
    assert error(alone, expected_bare(sdxl, cat)) < 10 * AGREE and not torch.equal(alone, both)


def expected_bare(pipe, *adapters, **kwargs):
    """`expected` beside what is attached: the weights and encoders are seeded."""
    bare = make_sdxl(pipe.tokenizer, pipe.tokenizer_2)
    return expected(bare, *adapters, **kwargs)


def test_a_gate_acts_in_both_spaces(sdxl):
    gated = adapter(sdxl, "gated")
    assert all(label.gate for edit in gated.edits.values() for label in edit.labels)
    linear = expected(sdxl, gated, prompt="a painting by monet")
    load_erasure(sdxl, gated)
    assert error(sample(sdxl, "a painting by monet"), linear) > 1e-3
    fuse_erasure(sdxl)
    assert error(sample(sdxl, "a painting by monet"), linear) < 10 * AGREE
    assert "linear part" in str(erasure_status(sdxl))


def test_a_copy_carries_its_own_erasure(sdxl):
    load_erasure(sdxl, adapter(sdxl))
    erased, other = sample(sdxl, PROMPT), copy.deepcopy(sdxl)
    unload_erasure(sdxl)
    assert torch.equal(sample(other, PROMPT), erased) and not torch.equal(sample(sdxl, PROMPT), erased)
    assert get_active_erasures(other) == ["cat"] and get_active_erasures(sdxl) == []


@pytest.mark.slow
def test_compiling_before_and_after(sdxl):
    eager = {}
    load_erasure(sdxl, adapter(sdxl))
    eager["on"] = sample(sdxl, PROMPT, steps=1)
    unload_erasure(sdxl)
    eager["off"] = sample(sdxl, PROMPT, steps=1)
    assert error(eager["on"], eager["off"]) > 0.01
    sdxl.unet = torch.compile(sdxl.unet, backend="eager")
    assert error(sample(sdxl, PROMPT, steps=1), eager["off"]) < AGREE
    load_erasure(sdxl, adapter(sdxl))
    assert error(sample(sdxl, PROMPT, steps=1), eager["on"]) < AGREE


PICTURE = Image.new("RGB", (16, 16), (200, 90, 30))
OTHERS = {
    "img2img": (StableDiffusionXLImg2ImgPipeline, {"image": PICTURE, "strength": 1.0}),
    "inpaint": (
        StableDiffusionXLInpaintPipeline,
        {"image": PICTURE, "mask_image": Image.new("L", (16, 16), 255), "strength": 0.99},
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_img2img_and_inpaint(sdxl, kind):
    cls, given = OTHERS[kind]
    pipe = cls.from_pipe(sdxl)
    pipe.set_progress_bar_config(disable=True)

    def run(**kwargs):
        generator = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 16} if kind == "inpaint" else {}
        return pipe(
            **kwargs, **given, **size, num_inference_steps=2, generator=generator, output_type="latent", guidance_scale=5.0
        ).images  # fmt: skip

    before = run(prompt=PROMPT)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    spaces = ("text", "text", "pooled", "pooled")
    edits = adapter(sdxl).edits
    mapped = {n: by_hand(e, edits[s]) for n, s, e in zip(names, spaces, encoded(sdxl), strict=True)}
    hand = run(**mapped)
    load_erasure(sdxl, adapter(sdxl))  # on the one, in force on the other: they share the UNet
    assert get_active_erasures(pipe) == ["cat"]
    assert error(run(prompt=PROMPT), hand) < 10 * AGREE and error(hand, before) > 0.01
    unload_erasure(pipe)
    assert torch.equal(run(prompt=PROMPT), before)


def test_a_controlnet_reads_both_spaces_and_is_mapped_in_both(sdxl):
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(sdxl.unet, conditioning_embedding_out_channels=(8, 16)).eval()
    with torch.no_grad():
        for parameter in net.controlnet_mid_block.parameters():
            parameter.normal_()
    pipe = StableDiffusionXLControlNetPipeline(**sdxl.components, controlnet=net, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    assert widths(net) == {"text": 80, "pooled": 48}
    before = sample(pipe, PROMPT, image=PICTURE)
    hand = expected(pipe, adapter(sdxl), image=PICTURE)
    assert error(hand, before) > 0.01
    load_erasure(pipe, adapter(sdxl))
    assert error(sample(pipe, PROMPT, image=PICTURE), hand) < 10 * AGREE
    fuse_erasure(pipe)
    assert error(sample(pipe, PROMPT, image=PICTURE), hand) < 10 * AGREE
    unload_erasure(pipe)
    assert torch.equal(sample(pipe, PROMPT, image=PICTURE), before)


# --- refused ---


def test_a_refiner_needs_its_own_adapter(sdxl, tokenizer, tokenizer_2):
    refiner = make_sdxl(tokenizer, tokenizer_2, refiner=True)
    assert widths(refiner.unet) == {"text": 48, "pooled": 48} and widths(sdxl.unet) == {"text": 80, "pooled": 48}
    before = all_bits(refiner)
    for strict in (True, False):
        with pytest.raises(MismatchError, match="refiner needs its own"):
            load_erasure(refiner, adapter(sdxl), strict=strict)
    assert all(same_bits(getattr(refiner, n), b) for n, b in before.items()) and not erasure_status(refiner).requested
    own = erase(refiner, "cat", target="dog", pack=PACK)

    def run():
        generator = torch.Generator().manual_seed(0)
        return refiner(PROMPT, image=PICTURE, num_inference_steps=4, generator=generator, output_type="latent").images

    plain = run()
    load_erasure(refiner, own)
    assert erasure_status(refiner).in_force == ("cat",) and error(run(), plain) > 1e-3
    unload_erasure(refiner)
    assert torch.equal(run(), plain)
    with pytest.raises(MismatchError):
        load_erasure(sdxl, own)


def test_either_encoder_and_the_pooled_state_alone_are_recognised(sdxl, tokenizer, tokenizer_2):
    made = adapter(sdxl)
    other = make_sdxl(tokenizer, tokenizer_2, seed=9)
    own = Encoder(sdxl).fingerprint()
    assert [part.width for part in own.parts] == [32, 48, 48] and own.width == 80
    for part in ("text_encoder", "text_encoder_2", "text_projection"):
        pipe = make_sdxl(tokenizer, tokenizer_2)
        load_erasure(pipe, made)  # control
        unload_erasure(pipe)
        if part == "text_projection":
            pipe.text_encoder_2.text_projection = other.text_encoder_2.text_projection
        else:
            pipe.register_modules(**{part: getattr(other, part)})
        with pytest.raises(MismatchError, match="answers differently"):
            load_erasure(pipe, made)
    half = copy.deepcopy(sdxl)
    half.text_encoder.bfloat16(), half.text_encoder_2.bfloat16()  # control: the same encoders in another dtype
    assert own.distance(Encoder(half).fingerprint()) < 0.05


def test_an_sd1_adapter_does_not_fit_and_the_other_way_round(sdxl, tokenizer):
    sd1 = make_pipe(tokenizer)
    with pytest.raises(MismatchError):
        load_erasure(sd1, adapter(sdxl))
    with pytest.raises(MismatchError):
        load_erasure(sdxl, erase(sd1, "cat", pack=PACK))
    wide = make_pipe(tokenizer, width=80)  # the text fits, the pooled states find no reader
    with pytest.raises(MismatchError, match="pooled states of width 48, unet reads"):
        load_erasure(wide, adapter(sdxl))


def test_what_is_missing_is_said(sdxl):
    made = adapter(sdxl)
    with pytest.raises(EraseError, match="edits the text states"):
        replace(made, edits={"pooled": made.edits["pooled"]})
    sdxl.register_modules(text_encoder=None)
    with pytest.raises(EraseError, match="do not fit"):
        erase(sdxl, "cat")
    sdxl.register_modules(text_encoder_2=None)
    with pytest.raises(EraseError, match="no text encoder"):
        erase(sdxl, "cat")


# --- files ---


@pytest.mark.parametrize("name", ASKED)
def test_saved_and_loaded_is_the_same(sdxl, tmp_path, name):
    made = adapter(sdxl, name)
    found = ErasureAdapter.from_pretrained(made.save_pretrained(tmp_path / "a"))
    assert found.digest == made.digest and found.encoder == made.encoder and list(found.edits) == ["text", "pooled"]
    assert set(load_file(tmp_path / "a" / "erasure.safetensors")) == {
        f"{space}{n}" for space in ("", "pooled.") for n in ("keys", "offsets", "pulled", "strengths")
    }
    load_erasure(sdxl, tmp_path / "a")
    erased = sample(sdxl, PROMPT)
    unload_erasure(sdxl)
    load_erasure(sdxl, made)
    assert torch.equal(sample(sdxl, PROMPT), erased)


def test_a_changed_pooled_row_is_refused(sdxl, tmp_path):
    made = adapter(sdxl)
    changed = {"pooled": replace(made.edits["pooled"], offsets=made.edits["pooled"].offsets * 1.01)}
    other = replace(made, edits={**made.edits, **changed})
    assert other.digest != made.digest != replace(made, edits={"text": made.edit}).digest
    folder = made.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(folder / "erasure.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file(other._tensors(), folder / "erasure.safetensors", metadata=metadata)
    with pytest.raises(MismatchError, match="digest"):
        ErasureAdapter.from_pretrained(folder)
    partial = {name: t for name, t in made._tensors().items() if name != "pooled.keys"}
    save_file(partial, folder / "erasure.safetensors", metadata=metadata)
    with pytest.raises(MismatchError, match=r"pooled\.keys"):
        ErasureAdapter.from_pretrained(folder)


def test_a_file_of_one_encoder_says_nothing_of_spaces_and_parts(tokenizer, tmp_path):
    """What SD 1.x wrote before there were spaces is what it writes now: digests stay valid."""
    made = erase(make_pipe(tokenizer), "cat", pack=PACK)
    head = made._head()
    assert "spaces" not in head and set(head["encoder"]) == {"width", "tokenizer", "states"}
    assert set(made._tensors()) == {"keys", "offsets", "pulled", "strengths"}


def test_composing_joins_each_space(sdxl):
    a, b, c = (adapter(sdxl, name) for name in ("cat", "gogh", "ship"))
    orders = ((a, b, c), (c, a, b), (compose(b, c), a), (a, b, c, a))
    digests = {compose(*order, residual_max=None).digest for order in orders}
    assert len(digests) == 1
    union = compose(a, b, c, residual_max=None)
    assert len(union.edits["pooled"].labels) == 1 + 1 + 3 and set(union.edits["pooled"].concepts) == set(
        union.concepts
    )
    with pytest.raises(ConflictError, match="two targets"):
        compose(a, erase(sdxl, "cat", target="boat", pack=PACK))
    text_only = replace(b, edits={"text": b.edit})
    assert compose(a, text_only, residual_max=None).edits["pooled"].concepts == ("cat",)


def test_the_twins_cover_the_pooled_path(sdxl, tmp_path):
    made = adapter(sdxl)
    twin = made.to_lora(sdxl)
    A, B = (twin[f"unet.add_embedding.linear_1.lora_{part}.weight"] for part in "AB")
    assert A.shape == (2, 96) and B.shape == (128, 2) and not bool(A[:, 48:].any()) and bool(A[:, :48].any())
    assert {t.shape["lora_B" in k] for k, t in twin.items()} == {2}  # one rank: alpha = rank is what loaders assume
    assert len(twin) == 2 * (len(sites(sdxl.unet)) + 1)
    hand = expected(sdxl, made)
    sdxl.load_lora_weights(twin)
    assert error(sample(sdxl, PROMPT), hand) < 10 * AGREE
    sdxl.unload_lora_weights()
    kohya = made.to_kohya(sdxl)
    assert "lora_unet_label_emb_0_0.lora_down.weight" in kohya
    if Version(diffusers.__version__) >= Version("0.40"):  # older ones do not read the pooled layer of such files
        save_file({name: tensor.contiguous() for name, tensor in kohya.items()}, tmp_path / "kohya.safetensors")
        sdxl.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
        assert error(sample(sdxl, PROMPT), hand) < 10 * AGREE
