"""Factors in force: fused into the weights beside rows, given back to the bit, and refused where they cannot be."""

import copy
import gc

import pytest
import torch
from attaching import AGREE, adapter, all_bits, error, forward, look, style_lora
from conftest import make_pipe, same_bits
from torch.testing import assert_close

from diffusers_erase import (
    ConflictError,
    EraseError,
    ErasureAdapter,
    Factors,
    MismatchError,
    compose,
    delete_erasures,
    disable_erasure,
    enable_erasure,
    erasure_status,
    fuse_erasure,
    load_erasure,
    save_erasure,
    set_erasures,
    unfuse_erasure,
    unload_erasure,
)
from diffusers_erase.adapter import Recipe
from diffusers_erase.factors import Pair, probe
from diffusers_erase.sites import layer, matrix
from diffusers_erase.text import Encoder

PARTS = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "ff.net.2", "proj_in")
"""Layers of every kind that factors may change: self-attention, sites, feed-forward, and SD 1.x's 1×1 convolutions."""


def layers(unet, parts=PARTS):
    return {path: m for path, m in unet.named_modules() if path.endswith(parts) and hasattr(m, "weight")}


def made(pipe, seed=0, concept="castle", parts=PARTS, size=0.1):
    """Factors as a trained eraser might give them: another change of each layer."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, module in layers(pipe.unet, parts).items():
        out, into = matrix(module.weight).shape
        down, up = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator)
        pairs[path] = Pair(down * size, up * size)
    base = tuple(probe(matrix(layer(pipe.unet, path).weight)) for path in sorted(pairs))
    recipe = Recipe(concept, (), ("(not recorded)",), (), "trained", {}, "all", None, None, None)
    return ErasureAdapter({}, Encoder(pipe).fingerprint(), (recipe,), factors=Factors(pairs, base))


def by_hand(pipe, *factors, edits=(), strength=1.0):
    """One forward pass with W(I + DᵀA) + strength · Σ B A in place, from the formula; the weights are given back."""
    before = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    state = {}
    for path, module in layers(pipe.unet, PARTS).items():
        W = matrix(module.weight.detach()).double()
        for edit in edits if path.endswith(("attn2.to_k", "attn2.to_v")) else ():
            A, D = edit.detectors()[edit.moving], edit.offsets.double()[edit.moving]
            W = W + W @ D.T @ A
        for one in factors:
            W = W + strength * one.factors.pairs[path].change if path in one.factors.pairs else W
        state[f"{path}.weight"] = W.float().view_as(module.weight)
    pipe.unet.load_state_dict(state, strict=False)
    after = forward(pipe)
    pipe.unet.load_state_dict(before, strict=False)
    return after


def test_factors_act_and_are_given_back_to_the_bit(pipe):
    before, bits, looks = forward(pipe), all_bits(pipe)["unet"], look(pipe.unet)
    one = made(pipe)
    expected = by_hand(pipe, one)
    assert error(expected, before) > 0.05 and same_bits(pipe.unet, bits)
    load_erasure(pipe, one)
    assert error(forward(pipe), expected) < AGREE
    status = erasure_status(pipe)
    assert status.mode == "fused" and status.in_force == ("castle",) and "factors" in str(status)
    with disable_erasure(pipe):
        assert same_bits(pipe.unet, bits) and torch.equal(forward(pipe), before)
    assert error(forward(pipe), expected) < AGREE
    set_erasures(pipe, "castle", 0.5)
    assert error(forward(pipe), by_hand_off(pipe, one, 0.5)) < AGREE
    unload_erasure(pipe)
    assert same_bits(pipe.unet, bits) and torch.equal(forward(pipe), before) and look(pipe.unet) == looks


def by_hand_off(pipe, one, strength):
    with disable_erasure(pipe):
        return by_hand(pipe, one, strength=strength)


def test_rows_and_factors_together(pipe):
    """W(I + DᵀA) + B A, in whatever order they are loaded."""
    bits, one, rows = all_bits(pipe)["unet"], made(pipe), adapter(pipe, "cat")
    expected = by_hand(pipe, one, edits=[rows.edit])
    assert error(expected, by_hand(pipe, one)) > 0.01 < error(expected, by_hand(pipe, edits=[rows.edit]))
    for order in ([one, rows], [rows, one]):
        for each in order:
            load_erasure(pipe, each)
        assert erasure_status(pipe).mode == "fused" and error(forward(pipe), expected) < AGREE
        unload_erasure(pipe)
        assert same_bits(pipe.unet, bits)
    load_erasure(pipe, [one, rows])
    delete_erasures(pipe, "castle")
    assert error(forward(pipe), by_hand_rows(pipe, rows)) < AGREE
    unfuse_erasure(pipe)  # rows alone may be a map again
    assert erasure_status(pipe).mode == "map" and same_bits(pipe.unet, bits)


def by_hand_rows(pipe, rows):
    with disable_erasure(pipe):
        return by_hand(pipe, edits=[rows.edit])


def test_several_factors_add_up_and_say_so(pipe, tmp_path):
    a, b = made(pipe, 0, "castle"), made(pipe, 1, "boat", parts=("attn2.to_v",))
    expected = by_hand(pipe, a, b)
    both = compose(a, b)
    assert both.digest == compose(b, a).digest == compose(a, both).digest and both.concepts == ("boat", "castle")
    assert "only add up" in both.card()
    for sources in ([a, b], both):
        load_erasure(pipe, sources)
        assert error(forward(pipe), expected) < AGREE
        unload_erasure(pipe)
    load_erasure(pipe, [a, b])
    assert "inexact" in str(erasure_status(pipe))
    assert ErasureAdapter.from_pretrained(save_erasure(pipe, tmp_path)).digest == both.digest
    with pytest.raises(EraseError, match="same factors"):
        load_erasure(pipe, a, "again")
    assert error(forward(pipe), expected) < AGREE


def test_rows_and_factors_do_not_make_one_adapter(sd1, tmp_path):
    one, rows = made(sd1), adapter(sd1, "cat")
    with pytest.raises(ConflictError, match="load both"):
        compose(one, rows)
    load_erasure(sd1, [one, rows])
    with pytest.raises(ConflictError, match="load both"):
        save_erasure(sd1, tmp_path)
    assert ErasureAdapter.from_pretrained(save_erasure(sd1, tmp_path, "castle")).digest == one.digest
    with pytest.raises(EraseError, match="rows or factors"):
        ErasureAdapter(rows.edits, rows.encoder, rows.recipes, factors=one.factors)


def test_factors_have_no_map(sd1):
    before, one = forward(sd1), made(sd1)
    for mode in ("map", "lora"):
        with pytest.raises(EraseError, match="fused form only") as caught:
            load_erasure(sd1, one, mode=mode)
        assert "\n" not in str(caught.value) and torch.equal(forward(sd1), before)
    load_erasure(sd1, one, mode="fused")
    acting = forward(sd1)
    with pytest.raises(EraseError, match="fused form only"):
        unfuse_erasure(sd1)
    assert torch.equal(forward(sd1), acting)
    load_erasure(sd1, adapter(sd1, "gogh"))  # what is fused stays so
    with pytest.raises(EraseError, match="fused form only"):
        load_erasure(sd1, adapter(sd1, "cat"), mode="map")


def test_a_gate_is_not_lost_unasked(sd1):
    load_erasure(sd1, adapter(sd1, "gated"))
    before = forward(sd1)
    with pytest.raises(EraseError, match="gate"):
        load_erasure(sd1, made(sd1))
    assert torch.equal(forward(sd1), before) and erasure_status(sd1).mode == "map"
    load_erasure(sd1, made(sd1), mode="fused")
    assert "linear part" in str(erasure_status(sd1))


def test_another_base_model_is_refused(sd1, tokenizer):
    one = made(sd1)
    other = make_pipe(tokenizer, seed=1)
    other.text_encoder.load_state_dict(sd1.text_encoder.state_dict())  # the text side is the same, the UNet is not
    before = forward(other)
    with pytest.raises(MismatchError, match="not those that the factors were made for"):
        load_erasure(other, one)
    assert torch.equal(forward(other), before)
    load_erasure(other, one, strict=False)  # a relative of the base, on the user's word
    assert not torch.equal(forward(other), before) and "does not match" in str(erasure_status(other))
    with pytest.raises(MismatchError, match="shape"):
        load_erasure(make_pipe(tokenizer, width=64), one, strict=False)
    half = make_pipe(tokenizer).to(torch.bfloat16)  # control: the same model in another dtype
    load_erasure(half, one)
    assert erasure_status(half).in_force == ("castle",)


def test_saved_and_loaded_factors_are_the_same(pipe, tmp_path):
    one = made(pipe)
    folder = one.save_pretrained(tmp_path, model=pipe)
    again = ErasureAdapter.from_pretrained(folder)
    assert again.digest == one.digest and again.kind == "factors" and again.size == one.size
    load_erasure(pipe, folder)
    assert error(forward(pipe), by_hand_off(pipe, one, 1.0)) < AGREE


def test_the_twin_of_factors_is_a_stock_lora(pipe):
    one = compose(made(pipe, 0), made(pipe, 1, "boat", parts=("attn2.to_v",)))  # ranks 2 and 4
    before, expected = forward(pipe), by_hand(pipe, one)
    assert error(expected, before) > 0.05
    twin, kohya = one.to_lora(pipe), one.to_kohya(pipe)
    assert {t.shape[0] for k, t in twin.items() if "lora_A" in k} == {4}
    for state in (twin, kohya):
        pipe.load_lora_weights({k: t.clone() for k, t in state.items()})
        assert error(forward(pipe), expected) < AGREE
        pipe.unload_lora_weights()
    assert error(forward(pipe), before) < AGREE


def test_projections_that_the_host_copied_are_not_missed(pipe):
    """A change of factors while the host reads copies would not act: it is refused, and possible again afterwards."""
    bits, one = all_bits(pipe)["unet"], made(pipe)
    expected = by_hand(pipe, one)
    pipe.fuse_qkv_projections()
    with pytest.raises(EraseError, match="unfuse_qkv_projections"):
        load_erasure(pipe, one)
    pipe.unfuse_qkv_projections()
    load_erasure(pipe, one)
    pipe.fuse_qkv_projections()  # copies what is written
    assert error(forward(pipe), expected) < AGREE
    with pytest.raises(EraseError, match="unfuse_qkv_projections"):
        unload_erasure(pipe)
    assert error(forward(pipe), expected) < AGREE
    pipe.unfuse_qkv_projections()
    unload_erasure(pipe)
    now = pipe.unet.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in bits.items())


def test_a_style_lora_beside_factors(sd1):
    one = made(sd1)
    sd1.load_lora_weights(style_lora(sd1.unet))
    styled = forward(sd1)
    load_erasure(sd1, one)
    both = forward(sd1)
    assert error(both, styled) > 0.01
    sd1.disable_lora()
    alone = forward(sd1)
    sd1.unload_lora_weights()
    assert error(forward(sd1), alone) < AGREE
    unload_erasure(sd1)
    sd1.load_lora_weights(style_lora(sd1.unet))
    sd1.fuse_lora()
    with pytest.raises(EraseError, match="unfuse_lora"):
        load_erasure(sd1, one)


def test_weights_that_cannot_hold_factors(sd1):
    one = made(sd1)
    before = all_bits(sd1)["unet"]
    target = sd1.unet.get_submodule(one.factors.paths[0])
    target.weight.data = target.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(EraseError, match="float8"):
        load_erasure(sd1, one)
    target.weight.data = before[f"{one.factors.paths[0]}.weight"]
    load_erasure(sd1, one)


def test_a_fused_weight_changed_meanwhile_is_not_overwritten(sd1):
    load_erasure(sd1, made(sd1))
    with torch.no_grad():
        sd1.unet.get_submodule(made(sd1).factors.paths[0]).weight.add_(0.1)
    with pytest.raises(EraseError, match="changed since"):
        unload_erasure(sd1)


def test_copies_carry_their_own(sd1):
    load_erasure(sd1, [made(sd1), adapter(sd1, "cat")])
    acting = forward(sd1)
    twin = copy.deepcopy(sd1.unet)
    unload_erasure(sd1)
    gc.collect()
    assert torch.equal(forward(sd1, unet=twin), acting) and not torch.equal(forward(sd1), acting)


def test_enabling_again(sd1):
    load_erasure(sd1, made(sd1))
    acting = forward(sd1)
    disable_erasure(sd1)
    enable_erasure(sd1)
    assert_close(forward(sd1), acting, rtol=0, atol=0)
    fuse_erasure(sd1)
    assert torch.equal(forward(sd1), acting)
