"""Other erasers' files, made here from tiny real UNets in their published layouts, come back as adapters that do the same."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from attaching import AGREE, adapter, all_bits, error, forward, style_lora
from conftest import make_pipe, same_bits, sample
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffusers_erase import (
    EraseError,
    ErasureAdapter,
    MismatchError,
    compose,
    erase,
    erasure_status,
    fuse_erasure,
    import_erasure,
    load_erasure,
    unload_erasure,
)
from diffusers_erase.errors import ConflictError
from diffusers_erase.importing import shared_map
from diffusers_erase.sites import sites

IMPORTED = 1e-3
"""What an imported map may differ by in a forward pass, as a share of the output's spread; for exact rows it is rounding."""


def matrices(unet, parts=("to_k", "to_v")):
    """The UNet's cross-attention weights under the names that UCE and ESD save."""
    return {
        name: weight.detach().clone()
        for name, weight in unet.named_parameters()
        if ".attn2." in name and any(f".{part}." in name for part in parts)
    }


def uce_file(pipe, path, concept="cat", **asked):
    """UCE's weights as its release saves them, the edited model's output, and our own adapter of the same edit."""
    made = erase(pipe, concept, method="uce", **asked)
    load_erasure(pipe, made, mode="fused")
    save_file(matrices(pipe.unet), path)
    after = forward(pipe)
    unload_erasure(pipe)
    return made, after


def esd_file(pipe, path, parts=("to_k", "to_v"), size=0.05, dtype=torch.float32):
    """A trained eraser's file: every matrix changed at random in full rank."""
    generator = torch.Generator().manual_seed(1)
    state = matrices(pipe.unet, parts)
    state = {k: w + size * w.std() * torch.randn(w.shape, generator=generator) for k, w in state.items()}
    save_file({k: w.to(dtype) for k, w in state.items()}, path)
    return state


def with_weights(pipe, state):
    """One forward pass with these weights in place."""
    before = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    pipe.unet.load_state_dict(state, strict=False)
    after = forward(pipe)
    pipe.unet.load_state_dict(before, strict=False)
    return after


@pytest.mark.parametrize(
    "asked",
    [{"target": "dog"}, {"concept": ["cat", "ship", "van gogh"]}, {"target": "tree", "preserve": ("wolf", "car")}],
)
def test_uce_comes_back_as_the_rows_that_it_was(pipe, tmp_path, asked):
    before, bits = forward(pipe), all_bits(pipe)["unet"]
    made, after = uce_file(pipe, tmp_path / "uce.safetensors", **asked)
    assert error(after, before) > 0.01
    found = import_erasure(
        pipe, tmp_path / "uce.safetensors", asked.get("concept", "cat"), preserve=asked.get("preserve", ())
    )
    with pytest.raises(EraseError, match="'auto' is no name and stands alone"):
        import_erasure(pipe, tmp_path / "uce.safetensors", asked.get("concept", "cat"), preserve="auto")
    assert same_bits(pipe.unet, bits)  # computes only
    assert found.kind == "rows" and set(found.concepts) == set(made.concepts)
    own, expected = found.edit, made.edit
    assert {row[:3] for row in own.labels} == {row[:3] for row in expected.labels}
    order = [[row[:3] for row in own.labels].index(row[:3]) for row in expected.labels]
    assert_close(own.keys[order], expected.keys)
    assert_close(own.offsets[order], expected.offsets, atol=1e-2 * float(expected.offsets.std()), rtol=0)
    assert own.pack_digest == expected.pack_digest  # so it composes with everything else on UCE's pack
    told = found.recipes[0].options
    assert told["error"] < 1e-2 and told["one_map_residual"] < 1e-2
    load_erasure(pipe, found)
    assert error(forward(pipe), after) < IMPORTED
    fuse_erasure(pipe)
    assert error(forward(pipe), after) < IMPORTED


def test_imported_rows_compose_exactly_with_uces_own(sd1, tmp_path):
    uce_file(sd1, tmp_path / "cat.safetensors", "cat", target="dog")
    found = import_erasure(sd1, tmp_path / "cat.safetensors", "cat")
    both = compose(found, erase(sd1, "ship", method="uce", target="boat"))
    load_erasure(sd1, erase(sd1, ["cat", "ship"], target=["dog", "boat"], method="uce"))
    expected = forward(sd1)
    unload_erasure(sd1)
    load_erasure(sd1, both)
    assert error(forward(sd1), expected) < IMPORTED


def test_a_map_of_other_states_comes_back_as_principal_rows(pipe, tmp_path):
    """The same file under a name that does not explain it: as few rows as the map has ranks, on a pack of their own."""
    made, after = uce_file(pipe, tmp_path / "uce.safetensors", ["cat", "ship"])
    found = import_erasure(pipe, tmp_path / "uce.safetensors", "church")
    assert found.kind == "rows" and found.concepts == ("church",) and len(found.edit.labels) == 2
    assert [r.concept for r in found.recipes] == ["church"]
    assert found.recipes[0].residual is None and found.recipes[0].effect is None
    load_erasure(pipe, found)
    assert error(forward(pipe), after) < IMPORTED
    unload_erasure(pipe)
    half = with_weights(pipe, {k: (w + matrices(pipe.unet)[k]) / 2 for k, w in _edited(pipe, made).items()})
    load_erasure(pipe, found, strength=0.5)  # orthogonal keys: half the strength is half the map
    assert error(forward(pipe), half) < IMPORTED
    with pytest.raises(ConflictError, match="base packs"):
        compose(found, adapter(pipe, "uce"))


def test_uces_sdxl_files_leave_the_pooled_path(sdxl, tmp_path):
    """They hold keys and values alone: the rows act on the text states, and the status says what comes through."""
    asked = {"method": "uce", "target": "dog"}
    made = erase(sdxl, "cat", **asked)
    made = replace(made, edits={"text": made.edit}, recipes=(replace(made.recipes[0], effect=None),))
    before = sample(sdxl)
    load_erasure(sdxl, made, mode="fused")
    save_file(matrices(sdxl.unet), tmp_path / "uce.safetensors")
    after = sample(sdxl)
    unload_erasure(sdxl)
    found = import_erasure(sdxl, tmp_path / "uce.safetensors", "cat")
    assert found.kind == "rows" and set(found.edits) == {"text"} and found.edit.labels[0].role == "subject"
    load_erasure(sdxl, found)
    assert error(sample(sdxl), after) < IMPORTED < error(after, before)
    assert "pooled" in str(erasure_status(sdxl))


@pytest.mark.parametrize(("dtype", "left"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_a_map_is_recognised_through_rounding(sd1, tmp_path, dtype, left):
    """Rounding of the file's dtype is no reason to call a map factors, nor to take its noise for directions."""
    made, after = uce_file(sd1, tmp_path / "exact.safetensors", ["cat", "ship"])
    save_file(
        {k: w.to(dtype) for k, w in load_file(tmp_path / "exact.safetensors").items()}, tmp_path / "coarse.safetensors"
    )
    for names, roles in ((["cat", "ship"], {"subject"}), (["church"], {"map:0", "map:1"})):
        found = import_erasure(sd1, tmp_path / "coarse.safetensors", names)
        assert found.kind == "rows" and {row.role for row in found.edit.labels} == roles
        assert 1e-4 < found.recipes[0].options["error"] < left
        before = forward(sd1)
        load_erasure(sd1, found)
        assert error(forward(sd1), after) < left * error(after, before)
        unload_erasure(sd1)


def _edited(pipe, made):
    clone = {k: w.clone() for k, w in matrices(pipe.unet).items()}
    A, D = made.edit.detectors()[made.edit.moving], made.edit.offsets.double()[made.edit.moving]
    return {k: (w.double() + w.double() @ D.T @ A).float() for k, w in clone.items()}


def test_the_shared_map_is_found_by_joint_least_squares(sd1):
    """Against the plain definition: stack all layers, solve, and measure what is left; noise is no map."""
    weights = {path: linear.weight for path, linear in sites(sd1.unet).items()}
    Y = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = {path: W.detach().double() @ Y for path, W in weights.items()}
    found = shared_map(weights, changes)
    assert_close(found.map, Y) and found.residual < 1e-9
    noise = {
        p: torch.randn(W.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for p, W in weights.items()
    }
    found = shared_map(weights, noise)
    W, E = torch.cat([w.detach().double() for w in weights.values()]), torch.cat(list(noise.values()))
    naive = torch.linalg.lstsq(W, E).solution
    assert_close(found.map, naive)
    assert_close(found.residual, float((W @ naive - E).norm() / E.norm()))
    assert found.residual > 0.5
    assert_close((found.root @ Y).norm(), torch.stack([(w.double() @ Y).norm() for w in weights.values()]).norm())
    one = dict(list(changes.items())[:1])  # one layer alone edited: the others must say so
    assert shared_map(weights, one).residual > 0.5


@pytest.mark.parametrize("parts", [("to_k", "to_v"), ("to_q", "to_k", "to_v", "to_out")])
def test_a_trained_eraser_comes_back_as_factors(pipe, tmp_path, parts):
    state = esd_file(pipe, tmp_path / "esd.safetensors", parts)
    before, after = forward(pipe), with_weights(pipe, state)
    biases = any(k.endswith("bias") for k in state)
    if biases:
        with pytest.raises(EraseError, match="biases"):
            import_erasure(pipe, tmp_path / "esd.safetensors", "cat")
        state = {k: w for k, w in state.items() if not k.endswith("bias")}
        after = with_weights(pipe, state)
    found = import_erasure(pipe, tmp_path / "esd.safetensors", "cat", tolerance=1e-6, drop_biases=biases)
    assert found.kind == "factors" and found.concepts == ("cat",)
    told = found.recipes[0].options
    assert (told["error"] > 1e-3) == biases  # what is dropped is counted
    assert (
        told["one_map_residual"] > 0.1
        and told["sha256"] == hashlib.sha256((tmp_path / "esd.safetensors").read_bytes()).hexdigest()
    )
    changed = {f"{p}.weight": pair.change for p, pair in found.factors.pairs.items()}
    base = matrices(pipe.unet, parts)
    for key, change in changed.items():
        assert_close(change, state[key].double() - base[key].double(), atol=1e-6, rtol=0)
    assert error(with_weights(pipe, {k: base[k] + c.float() for k, c in changed.items()}), after) < AGREE
    assert error(after, before) > 100 * AGREE


@pytest.mark.parametrize("rank", [1, 4])
def test_the_truncation_error_is_what_is_lost(sd1, tmp_path, rank):
    state = esd_file(sd1, tmp_path / "esd.safetensors")
    base = matrices(sd1.unet)
    found = import_erasure(sd1, tmp_path / "esd.safetensors", "cat", rank=rank)
    assert {len(pair.down) for pair in found.factors.pairs.values()} == {rank} == {found.recipes[0].options["rank"]}
    asked = {k: state[k].double() - base[k].double() for k in state}
    lost = math.hypot(*(float((asked[f"{p}.weight"] - pair.change).norm()) for p, pair in found.factors.pairs.items()))
    assert_close(
        found.recipes[0].options["error"],
        lost / math.hypot(*(float(c.norm()) for c in asked.values())),
        rtol=1e-2,
        atol=0,
    )
    finer = import_erasure(sd1, tmp_path / "esd.safetensors", "cat", tolerance=0.2)
    assert finer.recipes[0].options["error"] <= 0.2 < found.recipes[0].options["error"]


def test_a_coarse_file_is_compared_in_its_own_dtype(sd1, tmp_path):
    """ESD trains in bf16: what rounding alone changes is no edit."""
    base = {k: w.to(torch.bfloat16) for k, w in sd1.unet.state_dict().items()}
    save_file(base, tmp_path / "same.safetensors")
    with pytest.raises(EraseError, match="nothing to import"):
        import_erasure(sd1, tmp_path / "same.safetensors", "cat")
    key = next(k for k in base if k.endswith("attn2.to_v.weight"))
    save_file(base | {key: base[key] * 1.5}, tmp_path / "one.safetensors")
    found = import_erasure(sd1, tmp_path / "one.safetensors", "cat")
    assert found.factors.paths == (key.removesuffix(".weight"),)


def test_wrong_bases_and_unedited_files_are_refused(sd1, tokenizer, tmp_path):
    save_file(matrices(sd1.unet), tmp_path / "plain.safetensors")
    with pytest.raises(EraseError, match="nothing to import"):
        import_erasure(sd1, tmp_path / "plain.safetensors", "cat")
    esd_file(sd1, tmp_path / "esd.safetensors")
    assert import_erasure(sd1, tmp_path / "esd.safetensors", "cat", rank=1)  # control
    for other, told in (
        (make_pipe(tokenizer, seed=1), "do not resemble"),
        (make_pipe(tokenizer, width=64), "holds it as"),
    ):
        with pytest.raises(MismatchError, match=told):
            import_erasure(other, tmp_path / "esd.safetensors", "cat", rank=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s | {"model.diffusion_model.x.weight": torch.ones(2, 2)}, "no such weight"),
        (lambda s: s | {"conv_in.weight": torch.ones(32, 4, 3, 3)}, "convolution of 3×3"),
        (lambda s: s | {"conv_norm_out.weight": torch.zeros(32)}, "only linear layers"),
        (lambda s: {k: w * float("nan") for k, w in s.items()}, "NaN"),
        (lambda s: {k: w.int() for k, w in s.items()}, "no floating"),
    ],
)
def test_what_no_adapter_can_hold_is_refused(sd1, tmp_path, change, told):
    state = esd_file(sd1, tmp_path / "esd.safetensors")
    save_file(change(state), tmp_path / "odd.safetensors")
    with pytest.raises(EraseError, match=told) as caught:
        import_erasure(sd1, tmp_path / "odd.safetensors", "cat")
    assert "\n" not in str(caught.value)


def test_pickles_are_never_opened(sd1, tmp_path):
    state = matrices(sd1.unet)
    torch.save(state, tmp_path / "uce.pt")
    torch.save(state, tmp_path / "disguised.safetensors")
    torch.save(state, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("uce.pt", "disguised.safetensors", "old.safetensors"):
        with pytest.raises(EraseError, match="pickle.*weights_only=True") as caught:
            import_erasure(sd1, tmp_path / name, "cat")
        assert "\n" not in str(caught.value)
    (tmp_path / "junk.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(MismatchError, match="not a whole safetensors file"):
        import_erasure(sd1, tmp_path / "junk.safetensors", "cat")
    with pytest.raises(EraseError, match="no weights at"):
        import_erasure(sd1, tmp_path / "nothing.safetensors", "cat")


@pytest.mark.parametrize("size", [0x80, 0x280, 0x380])  # header lengths whose first bytes look like a pickle's
def test_a_safetensors_file_is_not_taken_for_a_pickle(sd1, tmp_path, size):
    head = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(size).encode()
    (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + head + b"\0" * 4)
    with pytest.raises(MismatchError, match="no such weight"):
        import_erasure(sd1, tmp_path / "x.safetensors", "cat")


# --- LoRAs ---

CONV_IN = ("lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight")


def layers(unet):
    """Every linear layer and 1×1 convolution inside the transformers, as SPM and LECO train them."""
    return {
        path: module
        for path, module in unet.named_modules()
        if ".attentions." in path and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


def random_lora(unet, rank=2, scale=0.05):
    generator = torch.Generator().manual_seed(5)
    found = {}
    for path, module in layers(unet).items():
        out, into = module.weight.shape[:2]
        ends = module.weight.shape[2:]
        found[path] = (
            torch.randn(rank, into, *ends, generator=generator) * scale,
            torch.randn(out, rank, *ends, generator=generator) * scale,
        )
    return found


def diffusers_layout(pairs, alpha):
    state = {f"unet.{p}.lora_{n}.weight": t for p, pair in pairs.items() for n, t in zip("AB", pair, strict=True)}
    told = {"unet.r": 2, "unet.lora_alpha": alpha, "unet.target_modules": sorted(pairs)}
    return state, {"format": "pt", "lora_adapter_metadata": json.dumps(told)}


def kohya_layout(pairs, alpha, prefix="lora_unet_", dtype=torch.float32):
    state = {}
    for path, (down, up) in pairs.items():
        stem = prefix + path.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down.to(dtype), f"{stem}.lora_up.weight": up.to(dtype)}
        state[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return state, {}


def spm_layout(pairs, alpha):
    state, _ = kohya_layout(pairs, alpha)
    return state, {"prompts": "cat", "rank": "2", "alpha": str(alpha)}


def old_diffusers_layout(pairs, alpha):
    return {
        f"unet.{p}.lora.{n}.weight": t for p, pair in pairs.items() for n, t in zip(("down", "up"), pair, strict=True)
    }, {}


def by_hand(unet, pairs, factor):
    """{weight's name: W + factor · B A}."""
    return {
        f"{p}.weight": (
            layers(unet)[p].weight + factor * (up.flatten(1) @ down.flatten(1)).view_as(layers(unet)[p].weight)
        ).detach()
        for p, (down, up) in pairs.items()
    }


@pytest.mark.parametrize("layout", [diffusers_layout, kohya_layout, spm_layout])
@pytest.mark.parametrize("alpha", [1, 2])
def test_loras_come_back_as_factors(pipe, tmp_path, layout, alpha):
    pairs = random_lora(pipe.unet)
    state, metadata = layout(pairs, alpha)
    save_file(state, tmp_path / "lora.safetensors", metadata)
    found = import_erasure(pipe, tmp_path / "lora.safetensors", "cat")
    assert found.kind == "factors" and set(found.factors.paths) == set(pairs)
    expected = by_hand(pipe.unet, pairs, alpha / 2)
    for path, pair in found.factors.pairs.items():
        change = expected[f"{path}.weight"] - layers(pipe.unet)[path].weight
        assert_close(pair.change.float(), change.detach().flatten(1), atol=1e-6, rtol=0)
    stronger = import_erasure(pipe, tmp_path / "lora.safetensors", "cat", multiplier=-2.0)
    for path, pair in stronger.factors.pairs.items():
        assert_close(pair.change, -2 * found.factors.pairs[path].change)


def test_a_lora_is_imported_as_diffusers_reads_it(pipe, tmp_path):
    """The host's own loader is the referee, for every layout that it reads."""
    pairs = {p: pair for p, pair in random_lora(pipe.unet).items() if pair[0].ndim == 2}
    from diffusers.loaders import lora_base

    reads_metadata = hasattr(lora_base, "LORA_ADAPTER_METADATA_KEY")  # older hosts take alpha = rank
    for layout, alpha in (
        (diffusers_layout, 1 if reads_metadata else 2),
        (kohya_layout, 1),
        (old_diffusers_layout, 2),
    ):
        state, metadata = layout(pairs, alpha)
        save_file(state, tmp_path / "lora.safetensors", metadata)
        found = import_erasure(pipe, tmp_path / "lora.safetensors", "cat")
        plain = forward(pipe)
        mine = with_weights(
            pipe,
            {
                f"{p}.weight": layers(pipe.unet)[p].weight.detach() + pair.change.float()
                for p, pair in found.factors.pairs.items()
            },
        )
        pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        assert error(forward(pipe), mine) < AGREE < error(mine, plain), layout.__name__
        pipe.unload_lora_weights()


def test_pefts_own_folder(sd1, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["attn2.to_v"], alpha_pattern={"mid_block.*to_v": 1}, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(make_pipe(sd1.tokenizer).unet, config)
    wrapped.save_pretrained(tmp_path)
    found = import_erasure(sd1, tmp_path, "cat")
    with torch.no_grad():
        expected = wrapped.merge_and_unload().state_dict()
    for path, pair in found.factors.pairs.items():
        change = expected[f"{path}.weight"] - layers(sd1.unet)[path].weight
        assert_close(pair.change.float(), change.detach(), atol=1e-6, rtol=0)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(EraseError, match="adapter_config"):
        import_erasure(sd1, tmp_path, "cat")


def test_compvis_names_of_kohya_files(sd1, tmp_path):
    """Kohya's files for SDXL, and some for SD 1.x, name CompVis' blocks."""
    pairs = {p: pair for p, pair in random_lora(sd1.unet).items() if "attn2" in p}
    ours, theirs = (
        ("down_blocks_0_attentions_0", "input_blocks_1_1"),
        ("up_blocks_1_attentions_1", "output_blocks_3_1"),
    )
    mid = ("mid_block_attentions_0", "middle_block_1")
    state, _ = kohya_layout(pairs, 2)
    renamed = {}
    for key, tensor in state.items():
        for before, after in (ours, theirs, mid, ("up_blocks_1_attentions_0", "output_blocks_2_1")):
            key = key.replace(before, after)
        renamed[key] = tensor
    assert not any("attentions" in key for key in renamed)
    save_file(state, tmp_path / "a.safetensors")
    save_file(renamed, tmp_path / "b.safetensors")
    one, other = (import_erasure(sd1, tmp_path / f"{n}.safetensors", "cat") for n in "ab")
    assert one.factors.digest == other.factors.digest


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s, k: s | {"text_encoder.x.lora_A.weight": torch.ones(1, 2)}, "text encoder"),
        (lambda s, k: s | {"lora_te_x.lora_down.weight": torch.ones(1, 2)}, "text encoder"),
        (lambda s, k: s | {f"{k}.dora_scale": torch.ones(2)}, "no part of a plain LoRA"),
        (lambda s, k: s | {f"{k}.hada_w1_a": torch.ones(2, 2)}, "no part of a plain LoRA"),
        (lambda s, k: s | {"lora_unet_nowhere.lora_down.weight": torch.ones(1, 2)}, "no such layer"),
        (lambda s, k: {n: t for n, t in s.items() if n != f"{k}.lora_up.weight"}, "not whole"),
        (lambda s, k: s | {f"{k}.lora_down.weight": torch.ones(2, 7)}, "another base model"),
        (
            lambda s, k: s | dict(zip(CONV_IN, (torch.ones(2, 4, 3, 3), torch.ones(32, 2, 1, 1)), strict=True)),
            "convolution of 3×3",
        ),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused(sd1, tmp_path, change, told):
    state, _ = kohya_layout({p: pair for p, pair in random_lora(sd1.unet).items() if "attn2" in p}, 2)
    save_file(state, tmp_path / "plain.safetensors")
    assert import_erasure(sd1, tmp_path / "plain.safetensors", "cat")  # control
    key = next(k for k in state if k.endswith("lora_up.weight")).split(".")[0]
    save_file(change(state, key), tmp_path / "odd.safetensors")
    with pytest.raises(EraseError, match=told) as caught:
        import_erasure(sd1, tmp_path / "odd.safetensors", "cat")
    assert "\n" not in str(caught.value)


def test_a_style_lora_may_be_loaded_meanwhile_but_not_fused(sd1, tmp_path):
    esd_file(sd1, tmp_path / "esd.safetensors")
    expected = import_erasure(sd1, tmp_path / "esd.safetensors", "cat", rank=2).digest
    sd1.load_lora_weights(style_lora(sd1.unet))
    assert import_erasure(sd1, tmp_path / "esd.safetensors", "cat", rank=2).digest == expected
    sd1.fuse_lora()
    with pytest.raises(EraseError, match="unfuse_lora"):
        import_erasure(sd1, tmp_path / "esd.safetensors", "cat", rank=2)


def test_an_erasure_may_be_fused_meanwhile(sd1, tmp_path):
    """Its original weights are kept, and they are what counts."""
    esd_file(sd1, tmp_path / "esd.safetensors")
    expected = import_erasure(sd1, tmp_path / "esd.safetensors", "cat", rank=2).digest
    load_erasure(sd1, adapter(sd1, "gogh"), mode="fused")
    assert import_erasure(sd1, tmp_path / "esd.safetensors", "cat", rank=2).digest == expected


@pytest.mark.parametrize(
    "wrong", [{"tolerance": 0}, {"tolerance": 2}, {"rank": 0}, {"multiplier": 0.0}, {"multiplier": float("nan")}]
)
def test_arguments_are_checked(sd1, tmp_path, wrong):
    with pytest.raises(EraseError, match="tolerance"):
        import_erasure(sd1, tmp_path / "x.safetensors", "cat", **wrong)


def test_imported_adapters_are_saved_with_their_provenance(sd1, tmp_path):
    esd_file(sd1, tmp_path / "esd.safetensors")
    uce_file(sd1, tmp_path / "uce.safetensors")
    for name, kind in (("esd", "factors"), ("uce", "rows")):
        found = import_erasure(sd1, tmp_path / f"{name}.safetensors", "cat", rank=2)
        again = ErasureAdapter.from_pretrained(found.save_pretrained(tmp_path / name))
        assert again.kind == kind and again.digest == found.digest and again.recipes == found.recipes
        card = (tmp_path / name / "README.md").read_text("utf-8")
        sha256 = hashlib.sha256((tmp_path / f"{name}.safetensors").read_bytes()).hexdigest()
        assert f"{name}.safetensors" in card and sha256 in card and "Not tested" in card
        assert str(tmp_path) not in card + (tmp_path / name / "erasure_config.json").read_text("utf-8")
