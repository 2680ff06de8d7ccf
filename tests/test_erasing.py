"""`erase` from the outside: what it refuses, what it promises about several concepts, size and the state of the pipe."""

from itertools import combinations

import pytest
import torch

from diffusers_erase import EraseError, compose, disable_erasure, erase, fuse_erasure, load_erasure, search_targets
from tests.cases import PACK
from tests.conftest import make_pipe


@pytest.fixture(scope="module")
def still(tokenizer):
    """A pipe that no test changes."""
    return make_pipe(tokenizer)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"concept": ""}, "an empty name was given"),
        ({"concept": "  "}, "an empty name was given"),
        ({"concept": []}, "no concept was given: expected its name"),
        ({"concept": ["cat", ""]}, "an empty name was given"),
        ({"concept": "漢字"}, "knows no part of '漢字'"),
        ({"concept": "cat " * 80}, "has 8[0-9] tokens, the text encoder reads 75"),
        ({"concept": 7}, "a name is a text such as 'Van Gogh'.*got 7"),
        ({"concept": [7]}, "an empty name was given"),
        ({"target": ["auto"]}, "'auto' is no name and stands alone"),
        ({"preserve": ["auto", "dog"]}, "'auto' is no name and stands alone"),
        ({"coreferences": ["auto"]}, "'auto' is no name and stands alone"),
        ({"target": "dog", "candidates": ["wolf"]}, "nothing is searched among these candidates"),
        ({"method": "uce", "candidates": ["wolf", "dog"]}, "nothing is searched among these candidates"),
        ({"target": "auto", "candidates": []}, "no candidate is left for 'cat'"),
        ({"concept": ["cat", "dog"], "target": ["Dog", "boat"]}, "'cat' would be sent to 'Dog', which is erased too"),
        ({"target": "cat"}, "'cat' would be sent to 'cat', itself: choose a target"),
        ({"target": " CAT "}, "would be sent to 'CAT', itself"),
        ({"target": ["dog", "cat"]}, "itself"),
        ({"target": "kitten", "coreferences": "kitten"}, "would be sent to 'kitten', itself"),
        ({"target": "漢字"}, "knows no part"),
        ({"target": 5}, "a name is a text"),
        ({"target": "auto", "candidates": ["cats"]}, "no candidate is left for 'cat'"),
        ({"target": "auto", "preserve": ["Cat"]}, "'Cat' is to be erased and preserved"),
        ({"concept": " ", "preserve": "auto"}, "an empty name was given"),
        (
            {"concept": "cat 漢", "target": "cat 字"},
            "'cat 漢' has the same text state as its target.*choose another target",
        ),
        ({"preserve": "cat"}, "'cat' is to be erased and preserved: take it out"),
        ({"preserve": ["dog", "Cat"]}, "'Cat' is to be erased and preserved"),
        ({"preserve": "kitten", "coreferences": ["kitten"]}, "erased and preserved"),
        ({"preserve": ""}, "an empty name"),
        ({"coreferences": "Cat"}, "'cat' is the concept itself: leave it out of coreferences"),
        ({"method": "uce", "tokens": "last+eot"}, "'uce' decides tokens itself: leave it out, or use method='ridge'"),
        ({"method": "uce", "residual": 0.1}, "'uce' decides residual itself"),
        ({"method": "uce", "templates": ["a photo of {}"]}, "'uce' decides templates itself"),
        ({"method": "unknown"}, "unknown method 'unknown': expected one of .*ridge, uce"),
        ({"strength": 0.5}, "method 'ridge' has no option 'strength': its options are preserve_residual"),
        (
            {"method": "uce", "preserve_residual": 0.5},
            "no option 'preserve_residual': its options are lamb, erase_scale",
        ),
        ({"residual": 0}, "residual is the share of the concept that is left, between 0 and 1.*got 0"),
        ({"residual": 1}, "residual is the share.*got 1"),
        ({"residual": float("nan")}, "residual is the share.*got nan"),
        ({"residual": -0.1}, "residual is the share"),
        ({"gate": 0}, "gate is the resemblance.*got 0"),
        ({"gate": float("nan")}, "gate is the resemblance.*got nan"),
        ({"gate": 1.5}, "gate is the resemblance"),
        ({"tokens": "first"}, "unknown token policy 'first'"),
        ({"tokens": ""}, "unknown token policy ''"),
        ({"templates": []}, "templates are a list of texts"),
        ({"templates": ["a photo"]}, "holds the name once"),
        ({"templates": "a photo of {}"}, "templates are a list of texts"),
        (
            {"concept": ["cat", "boat"], "target": ["dog"]},
            "2 concepts but 1 targets: give one target, or a list with one for each",
        ),
        ({"concept": ["cat"], "target": ["dog", "tree"]}, "1 concepts but 2 targets"),
        ({"concept": ["cat", "dog"], "target": ["dog", "tree"]}, "'cat' would be sent to 'dog', which is erased too"),
        ({"concept": ["cat", "cat"], "target": ["dog", "tree"]}, "one key with two targets"),
        ({"pack": "no/such/pack.json"}, "no base pack at no/such/pack.json"),
    ],
    ids=lambda value: ",".join(f"{k}={v}"[:30] for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_one_clear_line(still, arguments, told):
    with pytest.raises(EraseError, match=told) as error:
        erase(still, **({"concept": "cat", "pack": PACK} | arguments))
    assert "\n" not in str(error.value)
    assert 30 < len(str(error.value)) < 400


def test_a_pipe_whose_parts_do_not_fit_is_refused(tokenizer):
    pipe = make_pipe(tokenizer)
    pipe.register_modules(unet=make_pipe(tokenizer, width=64).unet)
    with pytest.raises(EraseError, match="gives states of width 32 .text., the denoiser reads 64"):
        erase(pipe, "cat", pack=PACK)


# --- Several concepts and names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ridge", "uce"])
@pytest.mark.parametrize("targets", ["null", "dog", ["dog", "tree"], [("dog", "wolf"), ""]], ids=str)
def test_erasing_several_is_composing(still, method, targets):
    def one(name, target):
        return erase(still, name, target=target, method=method, pack=PACK)

    each = [targets] * 2 if isinstance(targets, str) else targets
    a, b = one("cat", each[0]), one("boat", each[1])
    together = erase(still, ["cat", "boat"], target=targets, method=method, pack=PACK)
    assert together.digest == compose(a, b).digest == compose(b, a).digest
    assert together.concepts == ("boat", "cat")
    assert together.digest != a.digest


def test_a_crowded_set_is_refused_with_both_numbers(still):
    """Two mild erasures that pull one another apart: `erase` refuses as `compose` does, and `compose` can be told not to."""
    told = {"residual": 0.3, "pack": PACK}
    names = ("cat", "boat", "church", "flower", "street", "robot")
    each = {name: erase(still, name, target="dog" if i % 2 else "tree", **told) for i, name in enumerate(names)}
    left = {
        pair: compose(*(each[n] for n in pair), residual_max=None).edit.residuals() for pair in combinations(names, 2)
    }
    pair = max(
        left, key=lambda p: max(left[p].values())
    )  # which names crowd one another depends on the random encoder
    assert max(left[pair].values()) > 0.4  # control
    share = "|".join(f"{r:.0%} of '{name}'" for name, r in left[pair].items())
    said = rf"in this set ({share}) would be left \(alone: 30%, allowed: 20%\)"
    with pytest.raises(EraseError, match=said):
        erase(still, list(pair), target=[each[name].recipes[0].targets[0] for name in pair], **told)
    compose(*(each[name] for name in pair), residual_max=0.99)


def test_one_concept_in_a_list_is_that_concept(still):
    assert (
        erase(still, ["cat"], target=["dog"], pack=PACK).digest == erase(still, "cat", target="dog", pack=PACK).digest
    )
    assert erase(still, " cat ", target="null", pack=PACK).digest == erase(still, "cat", target="", pack=PACK).digest


def test_names_given_twice_count_once(still):
    once = erase(still, "cat", coreferences="old cat", preserve="wolf", pack=PACK)
    twice = erase(still, "cat", coreferences=["old cat", "old cat"], preserve=["wolf", "wolf "], pack=PACK)
    assert once.digest == twice.digest
    assert once.digest != erase(still, "cat", preserve="wolf", pack=PACK).digest


def test_several_targets_are_their_mean(still):
    """One row sent to the mean of two states, read off the adapters that go to each."""
    mean, dog, tree = (
        erase(still, "cat", target=target, tokens="last", pack=PACK).edit
        for target in (("dog", "tree"), "dog", "tree")
    )
    torch.testing.assert_close(mean.offsets, (dog.offsets + tree.offsets) / 2, atol=1e-6, rtol=0)
    assert mean.labels[0].targets == ("dog", "tree")


def test_the_recipe_tells_how_it_was_made(still):
    recipe = erase(still, "Van Gogh", target="a man", preserve="monet", method="uce", lamb=0.25).recipes[0]
    assert (recipe.concept, recipe.targets, recipe.preserve, recipe.method) == (
        "Van Gogh",
        ("a man",),
        ("monet",),
        "uce",
    )
    assert recipe.options == {"lamb": 0.25, "erase_scale": 1.0, "preserve_scale": 1.0}
    assert (recipe.tokens, recipe.templates) == ("last", ("{}",))
    again = erase(
        still, recipe.concept, target=recipe.targets, preserve=recipe.preserve, method=recipe.method, **recipe.options
    )
    assert again.recipes == (recipe,)


# --- Targets that are searched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "searched"), [("ridge", True), ("uce", False)])
def test_ridge_searches_its_target_and_papers_send_to_the_empty_prompt(still, method, searched):
    recipe = erase(still, "cat", method=method, pack=PACK if method == "ridge" else None).recipes[0]
    best = search_targets(still, "cat", pack=PACK)[0].names
    assert recipe.targets == (best if searched else ()) and best != ()


def test_auto_is_the_best_of_the_ranking(still):
    told = {"pack": PACK, "templates": ["{}", "a {}"]}
    best = search_targets(still, "cat", ["dog", "tree", "boat"], **told)
    auto = erase(still, "cat", target="auto", candidates=["dog", "tree", "boat"], **told)
    assert auto.digest == erase(still, "cat", **told, **best.options).digest
    assert auto.recipes[0].targets == best[0].names and auto.recipes[0].preserve == best.options["preserve"]


def test_auto_of_several_sends_none_to_another(still):
    told = {"pack": PACK, "templates": ["{}", "a {}"], "candidates": ["dog", "cat", "tree"], "residual": 0.1}
    both = erase(still, ["cat", "dog"], target=["auto", "boat"], **told)
    assert {recipe.concept: recipe.targets for recipe in both.recipes} == {"cat": ("tree",), "dog": ("boat",)}


@pytest.mark.parametrize("target", ["null", "dog", "auto"])
def test_preserve_auto_keeps_who_would_be_hurt_most(still, target):
    told = {"pack": PACK, "templates": ["{}"], "candidates": ["dog", "tree"]}
    kept = erase(still, "cat", target=target, preserve="auto", **told).recipes[0]
    assert 0 < len(kept.preserve) <= 5 and "cat" not in kept.preserve
    assert erase(still, "cat", target="dog", pack=PACK, templates=["{}"]).recipes[0].preserve == ()


def test_auto_for_a_method_that_brings_its_own_settings(still):
    recipe = erase(still, "cat", target="auto", candidates=["dog", "tree"], method="uce", pack=PACK).recipes[0]
    assert recipe.targets in {("dog",), ("tree",)} and recipe.tokens == "last"


# --- The pipe as it may be --------------------------------------------------------------------------------------------


def test_another_erasure_in_force_changes_nothing(tokenizer):
    pipe = make_pipe(tokenizer)

    def made():
        return [erase(pipe, "cat", target=target, pack=PACK).digest for target in ("dog", "auto")]

    alone = made()
    load_erasure(pipe, erase(pipe, "boat", pack=PACK))
    assert made() == alone
    fuse_erasure(pipe)
    assert made() == alone
    with disable_erasure(pipe):
        assert made() == alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_pipe_in_half_precision(tokenizer, dtype):
    """Its adapter is its own, and it also fits the pipe in full precision: the checks at load hold."""
    full, half = make_pipe(tokenizer), make_pipe(tokenizer).to(dtype)
    adapter = erase(half, "cat", target="dog", pack=PACK)
    assert half.unet.dtype == dtype
    assert all(t.dtype == torch.float32 for t in (adapter.edit.keys, adapter.edit.offsets, adapter.edit.pulled))
    reference = erase(full, "cat", target="dog", pack=PACK).edit
    rounding = torch.finfo(dtype).eps
    error = (adapter.edit.keys - reference.keys).norm() / reference.keys.norm()
    assert 0 < error < 4 * rounding
    load_erasure(full, adapter)
    load_erasure(half, adapter)
    fuse_erasure(half)


@pytest.mark.parametrize("tokens", ["last+eot", "last"])
def test_a_concept_of_sd1_fits_in_twenty_thousand_bytes(tokenizer, tokens, tmp_path, record_property):
    """Width 768 and realistic names; the file's other numbers do not grow with the model."""
    pipe = make_pipe(tokenizer, width=768)
    pipe.config._name_or_path = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    adapter = erase(pipe, "Vincent van Gogh", target="a famous painter", tokens=tokens, pack=PACK)
    file = adapter.save_pretrained(tmp_path) / "erasure.safetensors"
    record_property("bytes", file.stat().st_size)
    assert adapter.base_model == pipe.config._name_or_path
    assert file.stat().st_size <= 20_000
    assert adapter.size <= file.stat().st_size
