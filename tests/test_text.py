"""From prompts to rows: which token a row is of, what an encoder is known by, and the base pack."""

import copy
import os
import re

import pytest
import torch
from torch.testing import assert_close

from diffusers_erase import EraseError, MismatchError, PackRecipe, erase
from diffusers_erase.text import (
    FINGERPRINT_TOLERANCE,
    PROBES,
    TEMPLATES,
    Encoder,
    background,
    base_pack,
    pack_digest,
    roles_of,
)
from tests.cases import PACK
from tests.conftest import make_pipe, make_sdxl, make_tokenizer


@pytest.fixture(scope="module")
def still(tokenizer):
    """A pipe that no test changes."""
    return make_pipe(tokenizer)


@pytest.fixture
def encoder(still):
    return Encoder(still)


@torch.no_grad()
def states(pipe, prompt):
    """Ids and states of one prompt, by the tokenizer and the text encoder alone."""
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return ids[0].tolist(), pipe.text_encoder(ids)[0][0].double()


def prefix_state(pipe, text):
    """State of the last token of `text`. The encoder is causal: it is the same whatever follows."""
    ids, rows = states(pipe, text)
    return rows[ids.index(pipe.tokenizer.eos_token_id) - 1]


@pytest.mark.parametrize("model", ["sd1", "sd2", "sdxl"])
def test_a_brief_encoder_gives_the_same_states(tokenizer, tokenizer_2, model):
    pipe = make_sdxl(tokenizer, tokenizer_2) if model == "sdxl" else make_pipe(tokenizer, family=model)
    names, roles = ["cat", "van gogh", "zq"], ("subject", "eot")
    encoder = Encoder(pipe)
    brief = encoder.brief(names)
    assert brief.encode(names).rows.shape[1] < 10 < encoder.encode(names).rows.shape[1]
    for asked in (roles, ("pooled",)) if model == "sdxl" else (roles,):
        whole = encoder.table(names, asked, ("{}",))
        assert_close(brief.table(names, asked, ("{}",)), whole, atol=1e-4, rtol=0)  # float32 encoder
        assert (whole[0] - whole[1]).abs().max() > 0.01  # control
    with pytest.raises(EraseError, match="give a shorter name"):
        brief.encode(["a photo of a cat in the street"])
    assert pipe.tokenizer.model_max_length == 77 and encoder.encode(names).rows.shape[1] == 77  # the pipe is as it was


def test_probe_prompts_are_read_once_a_call(tokenizer):
    from diffusers import StableDiffusionPipeline

    class Counting(StableDiffusionPipeline):
        read = []

        def encode_prompt(self, prompt, *args, **kwargs):
            self.read.append(prompt)
            return super().encode_prompt(prompt, *args, **kwargs)

    pipe = Counting(**make_pipe(tokenizer).components, requires_safety_checker=False)
    erase(pipe, "cat", pack=PACK)
    assert pipe.read.count(list(PROBES)) == 1
    erase(pipe, "dog", pack=PACK)  # another call asks again: the encoder may have changed meanwhile
    assert pipe.read.count(list(PROBES)) == 2


# --- Token roles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["cat", "van gogh", "zq"], ids=["one token", "several", "letters"])
def test_subject_is_the_last_token_of_the_name(still, encoder, name, template):
    row = encoder.rows(name, ("subject",), (template,))["subject"]
    assert_close(row, prefix_state(still, template.split("{}")[0] + name), atol=1e-5, rtol=0)  # float32 encoder


def test_subject_depends_on_the_words_before_and_not_on_those_after(encoder):
    def subject(template):
        return encoder.rows("cat", ("subject",), (template,))["subject"]

    assert_close(subject("{}"), subject("{} in a landscape"), atol=1e-5, rtol=0)
    assert (subject("{}") - subject("a photo of {}")).norm() > 0.1


def test_inner_tokens_of_a_name(still, encoder):
    """name:i is the state after the first i + 1 tokens; the last of them is the subject."""
    name, template = "old white cat", "a photo of {} in a landscape"
    rows = encoder.rows(name, ("name:0", "name:1", "name:2", "subject"), (template,))
    for i, part in enumerate(("old", "old white", "old white cat")):
        assert_close(rows[f"name:{i}"], prefix_state(still, f"a photo of {part}"), atol=1e-5, rtol=0)
    assert torch.equal(rows["name:2"], rows["subject"])
    assert not torch.equal(rows["name:1"], rows["subject"])


def test_eot_and_pads(still, encoder):
    ids, rows = states(still, "a painting of van gogh")
    end = ids.index(still.tokenizer.eos_token_id)
    found = encoder.rows("van gogh", ("eot", "pads"), ("a painting of {}",))
    assert_close(found["eot"], rows[end], atol=1e-5, rtol=0)
    assert_close(found["pads"], rows[end + 1 :].mean(0), atol=1e-5, rtol=0)
    assert (found["eot"] - found["pads"]).norm() > 0.1


def test_mean_rows_are_means_over_templates(still, encoder):
    found = encoder.rows("cat", ("subject", "eot"), TEMPLATES)
    each = [encoder.rows("cat", ("subject", "eot"), (template,)) for template in TEMPLATES]
    for role in ("subject", "eot"):
        assert_close(found[role], torch.stack([rows[role] for rows in each]).mean(0), atol=1e-6, rtol=0)
        assert max((rows[role] - found[role]).norm() for rows in each) > 0.1


def test_the_empty_target_never_uses_row_0(still, encoder):
    _, rows = states(still, "")
    null = encoder.null_rows(("subject", "name:0", "eot", "pads"))
    assert_close(null["subject"], rows[1:].mean(0), atol=1e-5, rtol=0)
    assert torch.equal(null["subject"], null["name:0"])
    assert_close(null["eot"], rows[1], atol=1e-5, rtol=0)
    assert_close(null["pads"], rows[2:].mean(0), atol=1e-5, rtol=0)
    assert (null["subject"] - rows.mean(0)).norm() > 1e-2  # control: with row 0 it would be another


def test_policies_and_their_roles():
    assert roles_of("last+eot", 3) == ("subject", "eot")
    assert roles_of("name", 3) == ("name:0", "name:1", "subject")
    assert roles_of("name", 1) == roles_of("last", 1) == ("subject",)
    assert roles_of("eot+pads", 2) == ("eot", "pads")
    assert roles_of("all", 2) == roles_of("name+eot+pads", 2) == ("name:0", "subject", "eot", "pads")
    for wrong in ("first", "last+", "", "last eot"):
        with pytest.raises(EraseError, match="unknown token policy"):
            roles_of(wrong, 1)


@pytest.mark.parametrize(
    ("templates", "told"),
    [
        (("a photo",), r"holds the name once, as \{\}: found 'a photo'"),
        (("{}", "{} and {}"), r"found '\{\} and \{\}'"),
        ((), "are a list of texts.*got \\(\\)"),
        ("a photo of {}", "are a list of texts"),
        (("{}s",), "'cat' merges with the words beside it in the template '{}s'"),
    ],
)
def test_templates_that_cannot_be_read_are_refused(encoder, templates, told):
    with pytest.raises(EraseError, match=told):
        encoder.rows("cat", ("subject",), templates)


def test_a_template_whose_words_merge_with_the_name_is_refused(encoder):
    with pytest.raises(
        EraseError, match="'tyle' merges with the words beside it in the template 's{}': put spaces around"
    ):
        encoder.rows("tyle", ("subject",), ("s{}",))  # "style" is one token
    encoder.rows("tyle", ("subject",), ("s {}",))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "an empty name was given: expected the concept in words"),
        (" \t\n", "an empty name"),
        (None, "an empty name"),
        ("漢字", "the tokenizer knows no part of '漢字'.*use another word"),
    ],
)
def test_names_that_cannot_be_read_are_refused(encoder, name, told):
    with pytest.raises(EraseError, match=told):
        encoder.check_name(name)
    encoder.check_name("Van Gogh")
    encoder.check_name("漢 cat")  # a part is known


def test_a_name_longer_than_the_window_is_refused(encoder):
    assert encoder.encode(["cat " * 75]).end(0) == 76
    with pytest.raises(EraseError, match="'cat cat.*has 76 tokens, the text encoder reads 75: give a shorter name"):
        encoder.encode(["cat " * 76])


def test_a_pipe_without_text_side_is_refused(tokenizer):
    pipe = make_pipe(tokenizer)
    pipe.text_encoder = None
    with pytest.raises(EraseError, match="StableDiffusionPipeline has no text encoder or tokenizer loaded"):
        Encoder(pipe)


# --- Fingerprint ------------------------------------------------------------------------------------------------------


def with_encoder(pipe, text_encoder):
    other = copy.copy(pipe)
    other.register_modules(text_encoder=text_encoder)
    return Encoder(other)


def quantised(module):
    engine = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"
    torch.backends.quantized.engine = engine
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(module).float(), {torch.nn.Linear}, torch.qint8)


COPIES = {
    "again": copy.deepcopy,
    "fp16": lambda encoder: copy.deepcopy(encoder).half(),
    "bf16": lambda encoder: copy.deepcopy(encoder).bfloat16(),
    "int8": quantised,
}


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize("kind", COPIES)
def test_fingerprint_knows_an_encoder_in_every_dtype(tokenizer, kind, width, record_property):
    pipe = make_pipe(tokenizer, width=width)
    with torch.no_grad():  # conftest's random weights amplify rounding as no trained encoder does
        for name, parameter in pipe.text_encoder.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                parameter.div_(4)
    own = Encoder(pipe).fingerprint()
    found = with_encoder(pipe, COPIES[kind](pipe.text_encoder)).fingerprint()
    record_property("distance", own.distance(found))
    own.check(found)
    assert own.distance(found) < FINGERPRINT_TOLERANCE / (1 if kind == "int8" else 3)
    assert (kind == "again") == (own == found)


@pytest.mark.parametrize("width", [32, 128])
def test_fingerprint_knows_another_encoder(tokenizer, width, record_property):
    own, others = (
        Encoder(make_pipe(tokenizer, width=width)).fingerprint(),
        [Encoder(make_pipe(tokenizer, width=width, seed=seed)).fingerprint() for seed in (1, 2, 3)],
    )
    record_property("distance", min(map(own.distance, others)))
    for other in others:
        assert own.distance(other) > 4 * FINGERPRINT_TOLERANCE
        with pytest.raises(
            MismatchError, match="answers differently.*relative error .*allowed 0.05.*erase again on this one"
        ):
            own.check(other)


def test_fingerprint_notices_a_tuned_encoder(tokenizer, record_property):
    """A tenth of noise on every weight is another encoder."""
    pipe = make_pipe(tokenizer)
    tuned = copy.deepcopy(pipe.text_encoder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    distance = Encoder(pipe).fingerprint().distance(with_encoder(pipe, tuned).fingerprint())
    record_property("distance", distance)
    assert distance > FINGERPRINT_TOLERANCE


def test_fingerprint_of_another_width_or_tokenizer(tokenizer, tmp_path):
    own = Encoder(make_pipe(tokenizer)).fingerprint()
    wide = Encoder(make_pipe(tokenizer, width=64)).fingerprint()
    with pytest.raises(MismatchError, match="width 32, this pipeline's encoder gives 64.*another base model"):
        own.check(wide)
    other = make_tokenizer(tmp_path)
    other.add_tokens(["photo of"])
    changed = Encoder(make_pipe(other)).fingerprint()
    assert changed.width == own.width
    with pytest.raises(
        MismatchError, match=f"tokenizer \\({changed.tokenizer[:8]}\\) is not the one .*{own.tokenizer[:8]}"
    ):
        own.check(changed)
    assert own.distance(wide) == own.distance(changed) == float("inf")


def test_fingerprint_is_part_of_the_file_format(encoder):
    found = encoder.fingerprint()
    assert PROBES == (
        "",
        "a photo of a cat",
        "an oil painting of a house by the sea, 1889",
        "Zwölf rote Äpfel & two robots",
    )
    assert len(found.states) == 7 * 4  # four EOT states, three last content states, four coefficients each
    assert re.fullmatch("[0-9a-f]{16}", found.tokenizer)
    assert all(float(f"{v:.4g}") == v for v in found.states)


# --- Base packs -------------------------------------------------------------------------------------------------------


def test_background_is_the_mean_square_of_other_prompts(still, encoder):
    """By a loop over every state of every prompt; the start token never counts."""
    moment, hard = background(encoder, PACK)["text"]
    total, count = torch.zeros_like(moment), 0
    for prompt in PACK.prompts:
        ids, rows = states(still, prompt)
        end = ids.index(still.tokenizer.eos_token_id)
        for row in (*rows[1 : end + 1], rows[end + 1 :].mean(0)):
            total, count = total + torch.outer(row, row), count + 1
    assert_close(moment, total / count, atol=1e-5, rtol=1e-5)
    _, empty = states(still, "")
    assert_close(hard, torch.stack([empty[0], empty[1], empty[2:].mean(0)]), atol=1e-5, rtol=0)
    pack = base_pack(PACK, encoder.fingerprint(), moment, hard)
    assert pack.ridge == pytest.approx(0.005 * float(moment.diagonal().mean()))


def test_background_cuts_prompts_as_the_host_does(still, encoder):
    long = "cat dog " * 60
    _, rows = states(still, "cat dog " * 37 + "cat")  # 75 tokens fill the window
    moment, _ = background(encoder, PackRecipe("long", (long,)))["text"]
    assert_close(moment, rows[1:].mT @ rows[1:] / 76, atol=1e-5, rtol=1e-5)


def test_pack_digest_knows_the_recipe_and_the_tokenizer_not_the_states(tokenizer, tmp_path):
    own, reseeded = (Encoder(make_pipe(tokenizer, seed=seed)).fingerprint() for seed in (0, 1))
    assert own != reseeded
    assert pack_digest(PACK, own) == pack_digest(PACK, reseeded)
    other = make_tokenizer(tmp_path)
    other.add_tokens(["photo of"])
    told = [
        pack_digest(PACK, own),
        pack_digest(PACK, Encoder(make_pipe(other)).fingerprint()),
        pack_digest(PackRecipe("other", PACK.prompts), own),
        pack_digest(PackRecipe("tiny", PACK.prompts[:-1]), own),
        pack_digest(PackRecipe("tiny", PACK.prompts, ridge=0.01), own),
    ]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"prompts": []}, "needs prompts"),
        ({"prompts": ["a cat", 3]}, "expected a list of texts"),
        ({"prompts": ["a cat"], "ridge": 0}, "positive ridge"),
        ({"prompts": ["a cat"], "ridge": float("nan")}, "positive ridge"),
        ({"prompts": ["a cat"], "templates": ["a photo"]}, "holds the name once"),
    ],
)
def test_a_recipe_checks_itself(recipe, told):
    with pytest.raises(EraseError, match=told):
        PackRecipe.from_json({"name": "own"} | recipe)


def counted(pipe, monkeypatch):
    """The batches that the pipe encodes from now on."""
    batches, original = [], pipe.encode_prompt

    def encode_prompt(prompts, *args, **kwargs):
        batches.append(list(prompts))
        return original(prompts, *args, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
    return batches


def test_background_states_are_computed_once_and_kept(sd1, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ERASE_CACHE", str(tmp_path))
    batches = counted(sd1, monkeypatch)

    def background_batches():
        found = [batch for batch in batches if PACK.prompts[0] in batch]
        batches.clear()
        return len(found)

    first = erase(sd1, "cat", pack=PACK)
    assert background_batches() == 1
    second = erase(sd1, "cat", pack=PACK)
    assert background_batches() == 0
    assert second.digest == first.digest
    erase(sd1, "cat", method="uce")
    assert background_batches() == 0  # a method with its own pack never asks
    erase(sd1, "cat", pack=PackRecipe("other", PACK.prompts))
    assert background_batches() == 1  # another recipe is another file
    with torch.no_grad():
        sd1.text_encoder.get_input_embeddings().weight.mul_(1.01)
    erase(sd1, "cat", pack=PACK)
    assert background_batches() == 1  # and so is another encoder


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None], ids=["empty", "garbage", "truncated"])
def test_a_broken_cache_file_is_made_again(sd1, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("DIFFUSERS_ERASE_CACHE", str(tmp_path))
    first = erase(sd1, "cat", pack=PACK)
    (path,) = tmp_path.glob("background-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert erase(sd1, "cat", pack=PACK).digest == first.digest
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == [path.name]


def test_one_erase_reads_a_target_once(sd1, monkeypatch):
    batches = counted(sd1, monkeypatch)
    erase(sd1, ["cat", "boat", "flower"], target="dog", pack=PACK, residual=0.3)
    assert sum("a photo of dog" in batch for batch in batches) == 1
    assert sum("a photo of cat" in batch for batch in batches) == 1
