"""What every method in closed form promises, for every row of the table in cases.py; and UCE against its paper."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from diffusers_erase import (
    METHODS,
    EraseError,
    ErasureAdapter,
    compose,
    erase,
    fuse_erasure,
    load_erasure,
    solve,
    unload_erasure,
)
from diffusers_erase import edits as values
from diffusers_erase.mapping import EmbeddingMap, effect
from diffusers_erase.sites import sites
from diffusers_erase.task import Task
from diffusers_erase.text import TEMPLATES, Encoder
from tests.cases import CASES, PACK
from tests.conftest import VOCABULARY, bits, make_pipe, same_bits, sample

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def marks(pipe):
    """Everything that a method could leave behind: bits, attributes, hooks, modes, the global random state."""
    found = {"pipe": sorted(vars(pipe)), "random": torch.get_rng_state().tolist()}
    for name, part in pipe.components.items():
        found[name] = repr(part.config) if hasattr(part, "config") else repr(part)
        if isinstance(part, torch.nn.Module):
            state = b"".join(t.detach().contiguous().numpy().tobytes() for t in part.state_dict().values())
            found[f"{name} bits"] = hashlib.sha256(state).hexdigest()
            for path, module in part.named_modules():
                hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
                found[f"{name}.{path}"] = (sorted(vars(module)), *map(len, hooks), module.training, type(module))
                found[f"{name}.{path} grads"] = [p.requires_grad for p in module.parameters(recurse=False)]
    return found


def test_the_table_has_every_method():
    assert {case.method for case in CASES} == {name for name, method in METHODS.items() if method.training is None}


@each_case
def test_erase_leaves_the_pipe_as_it_was(sd1, case):
    before = marks(sd1)
    adapter = case.erase(sd1)
    assert marks(sd1) == before
    load_erasure(sd1, adapter)
    assert marks(sd1) != before  # control: attaching does leave a mark


@each_case
def test_the_name_lands_on_its_target(sd1, case):
    """Keys and targets encoded anew; the recorded residual is what is left; another concept's edit does not do it."""
    adapter, other = case.erase(sd1), case.erase(sd1, "boat", coreferences=())
    encoder, recipe = Encoder(sd1), adapter.recipes[0]
    moving = [label for label in adapter.edit.labels if label.targets is not None]
    keys = torch.stack([encoder.rows(m.name, (m.role,), recipe.templates or PACK.templates)[m.role] for m in moving])
    torch.testing.assert_close(keys.float(), adapter.edit.keys[adapter.edit.moving], atol=1e-6, rtol=0)
    goals = keys + adapter.edit.offsets[adapter.edit.moving].double()

    def left(edit):
        mapped = keys + (keys @ edit.detectors().mT) @ edit.offsets.double()
        return float((goals - mapped).norm() / (goals - keys).norm())

    assert left(adapter.edit) == pytest.approx(recipe.residual, abs=2e-3)  # three digits are recorded
    assert left(adapter.edit) < 0.35
    assert left(other.edit) > left(adapter.edit) + 0.2
    assert effect(encoder, adapter.edits, "cat") == pytest.approx(recipe.effect, abs=1e-4)
    assert (
        recipe.effect > 0.2
    )  # the bare name is one context of twelve, and this encoder's states depend much on theirs


@each_case
def test_the_pipe_draws_something_else(sd1, case):
    before, weights = sample(sd1, "a photo of a cat"), bits(sd1.unet)
    load_erasure(sd1, case.erase(sd1))
    assert not torch.equal(sample(sd1, "a photo of a cat"), before)
    unload_erasure(sd1)
    assert torch.equal(sample(sd1, "a photo of a cat"), before)
    assert same_bits(sd1.unet, weights)


@each_case
def test_fused_weights_come_back_to_the_bit(sd1, case):
    adapter, before = case.erase(sd1), bits(sd1.unet)
    load_erasure(sd1, adapter)
    fuse_erasure(sd1)
    assert not same_bits(sd1.unet, before)
    unload_erasure(sd1)
    assert same_bits(sd1.unet, before)


@each_case
def test_rank_is_the_number_of_moving_rows(sd1, case):
    edit = case.erase(sd1).edit
    for linear in sites(sd1.unet).values():
        change = solve.edited_weight(linear.weight, edit.offsets, edit.detectors()) - linear.weight.double()
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == int(edit.moving.sum()) > 0


@each_case
def test_saved_and_loaded_is_the_same(sd1, case, tmp_path):
    adapter, other = case.erase(sd1), case.erase(sd1, "boat")
    loaded = ErasureAdapter.from_pretrained(adapter.save_pretrained(tmp_path / "a"))
    assert loaded.digest == adapter.digest != other.digest
    assert (loaded.edit.labels, loaded.recipes, loaded.encoder) == (
        adapter.edit.labels,
        adapter.recipes,
        adapter.encoder,
    )
    for name, tensor in load_file(tmp_path / "a" / "erasure.safetensors").items():
        assert torch.equal(tensor, getattr(adapter.edit, name))


@each_case
def test_adapters_compose_in_any_order(sd1, case):
    a, b, c = (case.erase(sd1, name, coreferences=()) for name in ("cat", "boat", "flower"))

    def joined(*adapters):
        return compose(*adapters, residual_max=None)

    assert joined(a, b).digest == joined(b, a).digest != a.digest
    assert joined(joined(a, b), c).digest == joined(a, joined(b, c)).digest == joined(c, a, b).digest
    assert joined(a, a).digest == a.digest
    assert joined(joined(a, b), b).digest == joined(a, b).digest


@each_case
def test_erasing_twice_gives_the_same_bits(sd1, case, tokenizer):
    adapter = case.erase(sd1)
    torch.randn(3)  # whatever the global random state
    assert case.erase(make_pipe(tokenizer)).digest == adapter.digest
    assert case.erase(make_pipe(tokenizer, seed=1)).digest != adapter.digest


# --- Ridge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [0.5, 0.1, 0.02])
def test_ridge_reaches_the_residual_that_was_asked(sd1, residual):
    adapter = erase(sd1, "cat", target="dog", residual=residual, pack=PACK)
    assert adapter.edit.residuals()["cat"] == pytest.approx(residual, abs=1e-6)  # the strength is stored in float32


def test_softened_is_an_erasure_with_that_residual(sd1):
    strong = erase(sd1, "cat", target="dog", preserve="wolf", pack=PACK)
    for w in (0.9, 0.4):
        asked = erase(sd1, "cat", target="dog", preserve="wolf", residual=1 - w * (1 - 0.02), pack=PACK)
        torch.testing.assert_close(strong.edit.softened(w).detectors(), asked.edit.detectors(), atol=1e-5, rtol=1e-5)


def test_hard_rows_of_the_pack_do_not_move(sd1):
    """Start token, EOT and pads of the empty prompt; UCE has no hard rows and moves them."""
    states = sd1.encode_prompt([""], sd1._execution_device, 1, False)[0][0].detach()
    hard = torch.stack([states[0], states[1], states[2:].mean(0)])
    ridge, uce = (EmbeddingMap(erase(sd1, "cat", target="dog", method=m, pack=PACK).edit) for m in ("ridge", "uce"))
    scale = hard.norm()
    assert (ridge(hard) - hard).norm() < 1e-5 * scale  # float32
    assert (uce(hard) - hard).norm() > 1e-2 * scale


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_a_preserved_name_follows_by_its_share(sd1, share):
    """With q = (1/ρ − 1)/(pGpᵀ), the key's pull on p falls to ρ·pGcᵀ; all else equal, so does its movement."""
    edit = erase(sd1, "cat", target="dog", tokens="last", preserve="wolf", preserve_residual=share, pack=PACK).edit
    c, p = edit.keys[edit.moving].double(), edit.keys[~edit.moving].double()
    u = edit.pulled[edit.moving].double()  # c G
    s = edit.strengths[edit.moving].double()
    held = u - (u @ p.mT) * edit.pulled[~edit.moving].double() * (1 - share) / (
        edit.pulled[~edit.moving].double() @ p.mT
    )
    expected = share * (u @ p.mT) / (1 / s + held @ c.mT)
    torch.testing.assert_close(p @ edit.detectors()[edit.moving].mT, expected, rtol=1e-4, atol=1e-6)
    free = erase(sd1, "cat", target="dog", tokens="last", pack=PACK).edit.detectors()
    assert (p @ edit.detectors()[edit.moving].mT).abs() < 2 * share * (p @ free.mT).abs()


# --- UCE against its paper --------------------------------------------------------------------------------------------

ADJECTIVES = ("red", "blue", "old", "white")
NOUNS = "cat dog wolf church temple castle boat ship car tree flower apple pear monet picasso street night house sea beach bowl fruit table people park".split()  # noqa: E501
HUNDRED = [f"{adjective} {noun}" for noun in NOUNS for adjective in ADJECTIVES]
KEPT = ("robot", "black sea", "oil painting", "a man walking", "two apple")
TARGETS = ("man", "woman", "snoopy")


def uce_reference(weight, pairs, kept, lamb, erase_scale, preserve_scale):
    """W' = (λW + s_e Σ (W t)cᵀ + s_p Σ (W p)pᵀ)(λI + s_e Σ ccᵀ + s_p Σ ppᵀ)⁻¹ as it stands in the paper, in float64."""
    W = weight.detach().double()
    left, right = lamb * W, lamb * torch.eye(W.shape[1], dtype=torch.float64)
    for c, t in pairs:
        left = left + erase_scale * torch.outer(W @ t, c)
        right = right + erase_scale * torch.outer(c, c)
    for p in kept:
        left = left + preserve_scale * torch.outer(W @ p, p)
        right = right + preserve_scale * torch.outer(p, p)
    return left @ torch.linalg.inv(right)


@torch.no_grad()
def last_subject_state(pipe, text):
    """As the published script finds it: the state before the last token that the attention mask counts."""
    tokens = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
    states = pipe.text_encoder(tokens.input_ids)[0][0].double()
    at = int(tokens.attention_mask.sum()) - 2
    return states[1:].mean(0) if text == "" else states[at]  # our one deviation: '' is not the start token


def uce_task(encoder, concept, target, kept):
    return Task(
        encoder=encoder,
        concept=concept,
        coreferences=(),
        targets=(target,) if target else (),
        preserve=kept,
        tokens="last",
        templates=("{}",),
        residual=None,
        gate=None,
        pack=lambda: pytest.fail("UCE brings its own pack"),
    )


def error_of(found, reference):
    return float((found.detach().double() - reference).norm() / reference.norm())


OTHERS = {"lamb": 0.1, "erase_scale": 2.1, "preserve_scale": 0.3}


@pytest.mark.parametrize(
    ("n", "kept", "options"),
    [(1, (), {}), (1, KEPT, OTHERS), (10, (), OTHERS), (10, KEPT, {}), (100, (), {}), (100, KEPT, OTHERS)],
    ids=lambda value: (
        f"{len(value)}kept" if isinstance(value, tuple) else "-".join(value) if isinstance(value, dict) else None
    ),
)
def test_uce_is_the_published_formula(tokenizer, n, kept, options, record_property):
    pipe = make_pipe(tokenizer, width=96, family="sd2" if n == 10 else "sd1")
    names = HUNDRED[:: 100 // n]
    targets = ["", *TARGETS] if n > 1 else ["man"]
    targets = [targets[i % len(targets)] for i in range(n)]
    pairs = [(last_subject_state(pipe, c), last_subject_state(pipe, t)) for c, t in zip(names, targets, strict=True)]
    kept_states = [last_subject_state(pipe, p) for p in kept]
    scales = {"lamb": 0.5, "erase_scale": 1.0, "preserve_scale": 1.0} | options
    references = {
        path: uce_reference(linear.weight, pairs, kept_states, **scales) for path, linear in sites(pipe.unet).items()
    }

    encoder = Encoder(pipe)
    edits = [METHODS["uce"].run(uce_task(encoder, c, t, kept), **options) for c, t in zip(names, targets, strict=True)]
    edit = values.compose(*edits, residual_max=None)
    A = edit.detectors()
    exact = [
        error_of(solve.edited_weight(sites(pipe.unet)[path].weight, edit.offsets, A), ref)
        for path, ref in references.items()
    ]
    assert len(exact) == len(references) >= 8
    assert max(exact) <= 1e-9
    untouched = [error_of(sites(pipe.unet)[path].weight, ref) for path, ref in references.items()]
    assert min(untouched) > 1e-3  # control: there is something to agree about

    load_erasure(
        pipe, ErasureAdapter({"text": edit.to(torch.float32)}, Encoder(pipe).fingerprint(), ()), residual_max=None
    )
    fuse_erasure(pipe)
    cast = [error_of(linear.weight, references[path]) for path, linear in sites(pipe.unet).items()]
    assert max(cast) <= 1e-5
    for key, value in {"float64": max(exact), "float32": max(cast), "untouched": min(untouched)}.items():
        record_property(key, value)


def test_uce_through_the_front_door_is_the_published_formula(sd1):
    """The same by `erase` and `load_erasure`, at saturated rank: 40 concepts in 32 dimensions."""
    names = HUNDRED[:40]
    pairs = [(last_subject_state(sd1, c), last_subject_state(sd1, "man")) for c in names]
    references = {
        path: uce_reference(linear.weight, pairs, [], 0.5, 1.0, 1.0) for path, linear in sites(sd1.unet).items()
    }
    joined = compose(*(erase(sd1, name, target="man", method="uce") for name in names), residual_max=None)
    load_erasure(sd1, joined, residual_max=None)
    fuse_erasure(sd1)
    assert max(error_of(linear.weight, references[path]) for path, linear in sites(sd1.unet).items()) <= 1e-5


def test_names_of_the_test_are_a_hundred_different_ones(tokenizer):
    assert {word for name in HUNDRED for word in name.split()} <= set(VOCABULARY)
    assert len({tuple(tokenizer(name)["input_ids"]) for name in HUNDRED}) == 100


@pytest.mark.parametrize(
    "options", [{"lamb": 0}, {"erase_scale": -1}, {"preserve_scale": float("nan")}, {"lamb": float("inf")}], ids=str
)
def test_uce_weights_are_positive(sd1, options):
    with pytest.raises(EraseError, match="are positive: got"):
        erase(sd1, "cat", method="uce", **options)


def test_uce_adapters_with_one_lambda_compose_however_it_is_written(sd1):
    a, b = erase(sd1, "cat", method="uce", lamb=1), erase(sd1, "boat", method="uce", lamb=1.0)
    compose(a, b, residual_max=None)
    with pytest.raises(EraseError, match="different base packs"):
        compose(a, erase(sd1, "boat", method="uce", lamb=0.5))


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_preserve_residual_is_a_share(sd1, share):
    with pytest.raises(EraseError, match="preserve_residual is a share between 0 and 1"):
        erase(sd1, "cat", preserve="dog", preserve_residual=share, pack=PACK)


def test_templates_by_default_are_the_packs(sd1):
    assert erase(sd1, "cat", pack=PACK).recipes[0].templates is None
    assert PACK.templates == TEMPLATES
