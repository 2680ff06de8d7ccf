"""The artefact: exports, composition, the card."""

import copy

import pytest
import torch
from attaching import AGREE, adapter, all_bits, by_hand, error, forward, states
from conftest import make_pipe, make_unet, same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_erase import (
    EraseError,
    ErasureAdapter,
    MismatchError,
    compose,
    erase,
    fuse_erasure,
    load_erasure,
    unload_erasure,
)
from diffusers_erase.errors import ConflictError


@pytest.mark.parametrize("name", ["cat", "gogh", "pair", "ship", "uce"])
def test_the_twin_is_a_stock_lora(pipe, tmp_path, name):
    made = adapter(pipe, name)
    twin = made.to_lora(pipe)
    rank = int(made.edit.moving.sum())
    assert len(twin) == 2 * 8 and all(t.dtype == torch.float32 and t.is_contiguous() for t in twin.values())
    for key, tensor in twin.items():
        assert key.startswith("unet.") and ".attn2.to_" in key and key.endswith((".lora_A.weight", ".lora_B.weight"))
        assert tensor.shape[0 if "lora_A" in key else 1] == rank  # uniform rank: alpha = rank is what loaders assume
    folder = made.save_pretrained(tmp_path, model=pipe)
    assert load_file(folder / "pytorch_lora_weights.safetensors").keys() == twin.keys()
    before, bits = forward(pipe), all_bits(pipe)["unet"]
    expected = forward(pipe, by_hand(states(pipe), made.edit))
    assert error(expected, before) > 0.1
    pipe.load_lora_weights(folder)  # from disk, as a user of stock diffusers would
    assert error(forward(pipe), expected) < AGREE
    pipe.fuse_lora()
    assert error(forward(pipe), expected) < AGREE
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert error(forward(pipe), before) < AGREE and pipe.unet.state_dict().keys() == bits.keys()


def test_the_twin_is_made_for_the_weights_that_it_will_meet(pipe):
    """The twin of a model is the same for its UNet alone, beside an attached map, and under fp16; another model has another."""
    made = adapter(pipe, "cat")
    twin = made.to_lora(pipe)
    assert all(torch.equal(twin[k], v) for k, v in made.to_lora(pipe.unet).items())
    load_erasure(pipe, adapter(pipe, "gogh"))
    assert all(torch.equal(twin[k], v) for k, v in made.to_lora(pipe).items())
    fuse_erasure(pipe)
    with pytest.raises(EraseError, match="unfuse_erasure"):
        made.to_lora(pipe)
    with pytest.raises(EraseError, match="unfuse_erasure"):
        made.to_kohya(pipe.unet)
    unload_erasure(pipe)
    assert all(torch.equal(twin[k], v) for k, v in made.to_lora(pipe).items())
    pipe.fuse_qkv_projections()  # the host's copies are no layers of a LoRA
    assert made.to_lora(pipe).keys() == twin.keys()
    half = {k: v.half() for k, v in twin.items()}
    pipe.unet.half()
    assert all(torch.allclose(v.half(), half[k], atol=1e-2) for k, v in made.to_lora(pipe).items())


def test_the_twin_ignores_a_lora_that_wraps_the_layers(pipe):
    made = adapter(pipe, "cat")
    twin = made.to_lora(pipe)
    pipe.load_lora_weights(adapter(pipe, "gogh").to_lora(pipe))
    again = made.to_lora(pipe)
    assert again.keys() == twin.keys() and all(torch.equal(again[k], twin[k]) for k in twin)


def test_another_width_has_no_twin(pipe):
    with pytest.raises(MismatchError, match="width 32"):
        adapter(pipe, "cat").to_lora(make_unet(64))


def test_the_kohya_twin_is_the_same_lora(pipe, tmp_path):
    made = adapter(pipe, "gogh")
    kohya = made.to_kohya(pipe)
    assert len(kohya) == 3 * 8 and all(
        k.startswith("lora_unet_") and "." not in k.removeprefix("lora_unet_").split(".", 1)[0] for k in kohya
    )
    assert {float(v) for k, v in kohya.items() if k.endswith(".alpha")} == {float(made.edit.moving.sum())}
    save_file(kohya, tmp_path / "gogh_kohya.safetensors")
    expected = forward(pipe, by_hand(states(pipe), made.edit))
    assert error(expected, forward(pipe)) > 0.1
    pipe.load_lora_weights(tmp_path, weight_name="gogh_kohya.safetensors")
    assert error(forward(pipe), expected) < AGREE


def test_composition_of_adapters(pipe):
    a, b, c = (adapter(pipe, name) for name in ("cat", "gogh", "ship"))
    digests = {
        compose(*order).digest
        for order in ((a, b, c), (c, a, b), (compose(b, c), a), (a, b, c, a), (compose(a, b), compose(b, c)))
    }
    assert len(digests) == 1 and digests != {compose(a, b).digest}
    assert compose(a).digest == a.digest
    assert set(compose(a, b, c).concepts) == {"cat", "van gogh", "ship"} and len(compose(a, b, a).recipes) == 2
    assert (
        erase(pipe, ["cat", "apple"], target="tree").digest
        == compose(erase(pipe, "cat", target="tree"), erase(pipe, "apple", target="tree")).digest
    )
    with pytest.raises(EraseError, match="at least one"):
        compose()


def test_adapters_of_other_encoders_do_not_compose(pipe, tokenizer):
    other = make_pipe(tokenizer, seed=5)
    wide = make_pipe(tokenizer, width=64)
    for model in (other, wide):
        with pytest.raises(EraseError) as caught:
            compose(adapter(pipe, "uce"), erase(model, "gogh", method="uce"))
        assert isinstance(caught.value, (MismatchError, ConflictError)) and "\n" not in str(caught.value)


def test_the_digest_covers_what_the_adapter_does(pipe):
    from dataclasses import replace

    made = adapter(pipe, "ship")
    changed = [
        replace(made, edits={"text": replace(made.edit, keys=made.edit.keys * (1 + 1e-6))}),
        replace(made, edits={"text": replace(made.edit, strengths=made.edit.strengths * 2)}),
        replace(made, edits={"text": replace(made.edit, pack_digest="0" * 64)}),
        replace(
            made,
            edits={"text": replace(made.edit, labels=(made.edit.labels[0]._replace(name="x"), *made.edit.labels[1:]))},
        ),
        replace(made, recipes=(replace(made.recipes[0], effect=0.0),)),
        replace(made, encoder=replace(made.encoder, tokenizer="0" * 16)),
    ]
    assert len({made.digest, *(other.digest for other in changed)}) == 1 + len(changed)
    assert copy.deepcopy(made).digest == made.digest  # and nothing else


def test_erasing_leaves_the_pipe_as_it_was(pipe):
    before = all_bits(pipe)
    erase(pipe, "apple", target="pear")
    assert all(same_bits(getattr(pipe, name), bits) for name, bits in before.items())


def test_the_card_says_what_was_not_tested(pipe, tmp_path):
    from dataclasses import replace

    made = replace(adapter(pipe, "ship"), base_model="maker/model")
    card = (made.save_pretrained(tmp_path) / "README.md").read_text(encoding="utf-8")
    for part in (
        "base_model: maker/model",
        "base_model_relation: adapter",
        "| ship | boat | ridge |",
        "Preserved: car",
        made.digest,
        "Not tested",
    ):
        assert part in card
    assert "base_model:" not in replace(made, base_model="/home/me/model").card()  # no path of somebody's machine
    assert "base_model:" not in replace(made, base_model="").card()


def test_the_linear_part_is_what_the_twin_of_a_gated_adapter_is(sd1, tmp_path):
    gated, plain = adapter(sd1, "gated"), adapter(sd1, "cat")
    assert gated.gated and not gated.linear.gated and gated.linear.digest != gated.digest
    load_erasure(sd1, gated.linear)
    linear = forward(sd1)
    unload_erasure(sd1)
    load_erasure(sd1, gated)
    assert error(forward(sd1), linear) > 0.01  # control: the gate does something
    unload_erasure(sd1)
    sd1.load_lora_weights(gated.to_lora(sd1))
    assert error(forward(sd1), linear) < AGREE
    assert plain.linear is plain
    sd1.unload_lora_weights()
    for made, told in ((gated, f"{gated.digest} (linear part)"), (plain, plain.digest)):
        folder = made.save_pretrained(tmp_path / made.name, model=sd1)
        with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as opened:
            assert opened.metadata() == {"erasure_twin": told}


def test_size_is_the_bytes_of_the_rows(pipe):
    made = adapter(pipe, "cat")
    assert made.size == 2 * (3 * 32 + 1) * 4
    assert isinstance(made, ErasureAdapter)
