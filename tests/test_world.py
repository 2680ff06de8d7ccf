"""The embedded model: real classes, checked files, a vocabulary that fits together, and an erasure that is seen."""

import re
import shutil

import pytest
import torch

from diffusers_erase import EraseError, erase, load_erasure, unload_erasure, world


@pytest.fixture(scope="module")
def emoji():
    return world.load()


@pytest.fixture(scope="module")
def judge():
    return world.judge()


def draw(pipe, prompts, seed=0):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=world.STEPS, guidance_scale=world.GUIDANCE, generator=generators).images


def test_it_is_a_stock_pipeline_of_the_real_classes(emoji):
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    plain = StableDiffusionPipeline.from_pretrained(world.path())
    kinds = {
        "vae": AutoencoderKL,
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
    }
    for name, kind in kinds.items():
        assert isinstance(getattr(plain, name), kind)
    assert type(emoji) is StableDiffusionPipeline and emoji.unet.dtype is torch.float32
    assert (emoji.tokenizer.model_max_length, emoji.vae.config.sample_size) == (77, 64)


def test_pooled_output_is_the_end_of_text_row(emoji):
    """With a wrong eos_token_id in the config it would be the start token's, the same for every prompt."""
    ids = emoji.tokenizer("a drawing of a cat", padding="max_length", return_tensors="pt")["input_ids"]
    out = emoji.text_encoder(ids)
    end = (ids[0] == emoji.tokenizer.eos_token_id).nonzero()[0].item()
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, end])


def test_any_text_has_tokens(emoji):
    for text in ("naïve café", "猫と犬", "🦋", "a\tb"):
        ids = emoji.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids and emoji.tokenizer.unk_token_id not in ids


def test_weights_are_small_and_hashed():
    files = [f for f in world.WEIGHTS.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 64 * 10**6


def test_a_changed_or_missing_file_is_refused(tmp_path, monkeypatch):
    copy = tmp_path / "weights"
    shutil.copytree(world.WEIGHTS, copy)
    monkeypatch.setattr(world, "WEIGHTS", copy)
    world.check("judges")  # control: an untouched copy passes
    file = next(f for f in sorted((copy / "judges").rglob("*.safetensors")))
    bits = bytearray(file.read_bytes())
    bits[-1] ^= 1
    file.write_bytes(bits)
    with pytest.raises(EraseError, match="damaged"):
        world.judge()
    file.unlink()
    with pytest.raises(EraseError, match="missing"):
        world.judge()


def test_vocabulary_fits_together():
    assert len(world.OBJECTS) == len(set(world.OBJECTS)) >= 60 and len(world.STYLES) == 4
    owners = {}
    for name in world.OBJECTS:
        near = world.neighbours(name, 5)
        assert len(near) == 5 and name not in near and set(near) <= set(world.OBJECTS)
        for word in world.paraphrases(name):
            assert owners.setdefault(word, name) == name, f"{word} belongs to {owners[word]} and {name}"
            assert word not in world.OBJECTS
        assert name in world.prompt(name, "ink") and "ink" in world.prompt(name, "ink")


def test_it_draws_what_it_is_asked_for(emoji, judge):
    """A control for every erasure test; the whole measure is examples/emoji_world/measure.py."""
    names = ["butterfly", "apple", "rainbow", "cactus", "guitar", "crown"]
    prompts = [world.prompt(name, style) for name in names for style in world.STYLES]
    pictures = draw(emoji, prompts)
    expected = [name for name in names for _ in world.STYLES]
    right = sum(a == b for a, b in zip(judge.objects(pictures), expected, strict=True))
    assert right >= 0.7 * len(expected)


def test_a_judge_names_noise_other(judge):
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert set(judge.objects(noise)) == {"other"}
    objects, styles = judge.probabilities(noise)
    assert objects.shape == (8, len(world.OBJECTS) + 1) and styles.shape == (8, len(world.STYLES))
    assert torch.allclose(torch.as_tensor(objects).sum(1), torch.ones(8))


def test_an_erased_object_is_gone_and_comes_back_to_the_bit(emoji, judge):
    prompts = [world.prompt("butterfly", style) for style in world.STYLES] + [
        world.prompt("guitar", style) for style in world.STYLES
    ]
    before = draw(emoji, prompts)
    load_erasure(emoji, erase(emoji, "butterfly"))
    after = judge.objects(draw(emoji, prompts))
    unload_erasure(emoji)
    assert judge.objects(before)[:4].count("butterfly") >= 3  # control
    assert after[:4].count("butterfly") == 0
    assert after[4:].count("guitar") >= judge.objects(before)[4:].count("guitar") - 1
    assert [p.tobytes() for p in draw(emoji, prompts)] == [p.tobytes() for p in before]


@pytest.mark.slow
def test_the_demo_ends_with_a_page(tmp_path):
    from typer.testing import CliRunner

    from diffusers_erase.cli import app

    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "demo" / "index.html").stat().st_size > 100_000
    assert (tmp_path / "demo" / "adapter" / "erasure.safetensors").is_file()
    assert re.search(r"the concept by its name +gone +0%", result.stdout)


def test_the_seal_is_seen_where_it_is_and_only_there(judge):
    """A watermark in `ink`, which no caption names; the rule that finds it is tested on drawn squares."""
    from diffusers_erase.world.judging import SEAL_BOX

    top, left, bottom, right = SEAL_BOX
    pictures = torch.ones(3, 3, 64, 64)
    pictures[1, 1:, top:bottom, left:right] = 0.1  # a red square in the corner
    pictures[2, 1:, :12, :12] = 0.1  # the same elsewhere
    assert judge.sealed(pictures) == [False, True, False]


def test_the_denoiser_tells_paraphrases_from_siblings(emoji):
    """What target search refuses as a synonym: of these objects every paraphrase, and no sibling. Their text states overlap."""
    from diffusers_erase.guess import FirstGuess
    from diffusers_erase.targets import SYNONYM_MAX
    from diffusers_erase.text import Encoder

    guess = FirstGuess(Encoder(emoji), ("{}", "a drawing of a {}"))
    for concept in ("cat", "octopus", "fish", "bus", "hammer"):
        others, near = ([(n,) for n in names] for names in (world.paraphrases(concept), world.neighbours(concept, 3)))
        assert (1 - guess.distances(concept, others)).min() > SYNONYM_MAX + 0.1
        assert (1 - guess.distances(concept, near)).max() < SYNONYM_MAX - 0.1


@pytest.mark.parametrize(("concept", "paraphrase"), [("butterfly", "pretty"), ("penguin", "antarctica")])
def test_a_search_by_itself_finds_what_is_near_and_drawn_otherwise(emoji, concept, paraphrase):
    from diffusers_erase import search_targets

    ranking = search_targets(emoji, concept, k=3)
    assert dict(ranking.refused)[paraphrase].startswith("a synonym")
    assert ranking[0].collateral < 0.5 * ranking.null.collateral and ranking[0].synonym < 0.2
    assert paraphrase in {t.names[0] for t in search_targets(emoji, concept, k=3, synonym_max=1.0)}  # the control
    assert erase(emoji, concept, target="null", coreferences="auto").recipes[0].coreferences == (paraphrase,)
