"""A plan decides every picture before one is drawn; shards divide it; names hold all that decides a picture."""

import json

import pytest
import torch
from attaching import style_lora
from conftest import make_pipe
from hypothesis import given
from hypothesis import strategies as st

from diffusers_erase import MismatchError, erase, load_erasure, set_erasures, unload_erasure
from diffusers_erase.bench.images import draw, generate, model_digest, paths, plan_for, undrawn
from diffusers_erase.bench.plan import Plan, Shard
from diffusers_erase.bench.suites import Prompt, Settings, Suite
from diffusers_erase.errors import EraseError

SETTINGS = Settings(steps=1, guidance=3.0)
ASKED = (("a photo of a cat", 0), ("a photo of a dog", 0), ("a red car", 1), ("a photo of a cat", 1), ("a boat", 2))
PROMPTS = [Prompt(*asked) for asked in ASKED]

plans = st.builds(
    lambda prompts, batch: Plan("m", (), SETTINGS, tuple(prompts), batch),
    st.lists(st.tuples(st.text(max_size=3), st.integers(0, 3)), min_size=1, max_size=40),
    st.integers(1, 9),
)


@given(plans, st.integers(1, 12))
def test_the_shards_of_a_plan_are_all_of_it_once_in_whole_batches(plan, n):
    shares = [Shard(i, n).of(plan.batches) for i in range(n)]
    drawn = sorted(i for share in shares for batch in share for i in batch)
    assert drawn == list(range(len(plan.items)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(plans)
def test_every_prompt_has_its_item(plan):
    assert [plan.items[i] for i in plan.places] == list(plan.prompts)
    assert len(set(plan.names)) == len(plan.names) == len(plan.items) == len(set(plan.prompts))


@given(st.integers(1, 5), st.integers(1, 5))
def test_processes_split_a_shard_as_shards_split_a_plan(n, world):
    units = range(60)
    split = [
        i
        for index in range(n)
        for rank in range(world)
        for i in Shard(index, n).split({"RANK": str(rank), "WORLD_SIZE": str(world)}).of(units)
    ]
    assert sorted(split) == list(units)


def test_a_shard_is_written_from_1():
    assert Shard.parse("1/1") == Shard() and Shard.parse("3/8") == Shard(2, 8) and str(Shard(2, 8)) == "3/8"
    assert Shard(2, 8).split({}) == Shard(2, 8)
    for wrong in ("0/4", "5/4", "1/0", "1", "a/b", "-1/2", "1/2/3", ""):
        with pytest.raises(EraseError, match="i/n with i from 1 to n"):
            Shard.parse(wrong)
    with pytest.raises(EraseError, match="RANK=2 of WORLD_SIZE=2"):
        Shard().split({"RANK": "2", "WORLD_SIZE": "2"})


@given(plans)
def test_a_plan_is_read_back_as_it_was_written(tmp_path_factory, plan):
    path = plan.save(tmp_path_factory.mktemp("plan"))
    again = Plan.load(path)
    assert again == plan and again.names == plan.names and again.digest == plan.digest


def test_a_changed_plan_is_refused(tmp_path):
    path = Plan("m", (), SETTINGS, ASKED).save(tmp_path)
    told = json.loads(path.read_text())
    for change in ({"batch": 3}, {"format": 99}, {"prompts": [["a wolf", 0]]}):
        path.write_text(json.dumps(told | change))
        with pytest.raises(MismatchError):
            Plan.load(path)
    path.write_text("{")
    with pytest.raises(MismatchError, match="is not a plan"):
        Plan.load(path)


def test_a_name_holds_all_that_decides_a_picture(sd1, tokenizer):
    def named(pipe, prompts=PROMPTS, settings=SETTINGS, batch=2):
        return plan_for(pipe, prompts, settings, batch).names[0]

    plain = named(sd1)
    assert named(sd1, [PROMPTS[0], PROMPTS[2]]) == plain  # not its neighbours: base pictures are shared by suites
    assert named(make_pipe(tokenizer)) == plain
    others = [
        named(sd1, [Prompt("a photo of a cat", 5), PROMPTS[1]]),
        named(sd1, settings=Settings(2, 3.0)),
        named(sd1, settings=Settings(1, 3.0, negative_prompt="blue")),
        named(sd1, batch=3),
        named(make_pipe(tokenizer, seed=1)),
    ]
    load_erasure(sd1, erase(sd1, "cat", target="dog"), "cat")
    others.append(named(sd1))
    set_erasures(sd1, "cat", 0.5)
    others.append(named(sd1))
    load_erasure(sd1, erase(sd1, "boat"))
    others.append(named(sd1))
    unload_erasure(sd1)
    sd1.scheduler = type(sd1.scheduler).from_config(sd1.scheduler.config, beta_schedule="scaled_linear")
    others.append(named(sd1))
    assert len({plain, *others}) == 1 + len(others)


def test_the_plan_under_an_erasure_is_known_before_it_is_attached(sd1):
    adapter = erase(sd1, "cat", target="dog")
    foreseen = plan_for(sd1, PROMPTS, SETTINGS).erased([(adapter.digest, 1.0)])
    load_erasure(sd1, adapter)
    assert plan_for(sd1, PROMPTS, SETTINGS) == foreseen


def test_the_model_is_known_by_its_bits(sd1):
    before = model_digest(sd1)
    weight = sd1.vae.decoder.conv_out.weight
    with torch.no_grad():
        weight.neg_()
        assert model_digest(sd1) != before
        weight.neg_()
    assert model_digest(sd1) == before
    sd1.load_lora_weights(style_lora(sd1.unet), adapter_name="style")
    strong = model_digest(sd1)
    sd1.set_adapters("style", 0.5)
    assert len({before, strong, model_digest(sd1)}) == 3


def test_pictures_are_not_drawn_under_a_wrong_name(sd1, tokenizer, tmp_path):
    plan = plan_for(sd1, PROMPTS, SETTINGS)
    with pytest.raises(MismatchError, match="made for another model"):
        draw(make_pipe(tokenizer, seed=1), plan, tmp_path)
    load_erasure(sd1, erase(sd1, "cat"))
    with pytest.raises(MismatchError, match="other erasures"):
        draw(sd1, plan, tmp_path)
    unload_erasure(sd1)
    assert not list(tmp_path.iterdir())
    draw(sd1, plan, tmp_path)  # control


def test_shards_draw_the_same_bits_as_one_worker(sd1, tmp_path):
    plan = plan_for(sd1, PROMPTS, SETTINGS, batch=2)
    draw(sd1, plan, tmp_path / "one")
    for i in (2, 0, 1):
        assert undrawn(plan, tmp_path / "three", Shard(i, 3)) == len(plan.batches[i])
        draw(sd1, plan, tmp_path / "three", Shard(i, 3))
    assert undrawn(plan, tmp_path / "three") == 0
    pictures = [[p.read_bytes() for p in paths(plan, tmp_path / f)] for f in ("one", "three")]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) == len(PROMPTS)


def test_a_half_saved_batch_is_drawn_again_to_the_same_bits(sd1, tmp_path):
    plan = plan_for(sd1, PROMPTS, SETTINGS, batch=3)
    draw(sd1, plan, tmp_path)
    files = paths(plan, tmp_path)
    before, times = [p.read_bytes() for p in files], [p.stat().st_mtime_ns for p in files]
    files[1].unlink()
    assert undrawn(plan, tmp_path) == 3
    draw(sd1, plan, tmp_path)
    assert [p.read_bytes() for p in files] == before
    assert [i for i, p in enumerate(files) if p.stat().st_mtime_ns != times[i]] == [1]


def test_generate_is_the_plan_of_a_whole_suite(sd1, tmp_path):
    suite = Suite("small", "1", "a test", "Apache-2.0", tuple(PROMPTS), {}, SETTINGS)
    files = generate(sd1, suite, tmp_path)
    assert files == paths(plan_for(sd1, PROMPTS, SETTINGS), tmp_path) and all(file.is_file() for file in files)


def test_sdxl_is_drawn_by_plan(sdxl, tmp_path):
    """Two encoders, two tokenizers and a pooled path: the model's digest and the pictures know them all."""
    settings = Settings(steps=1, guidance=3.0, height=16, width=16)
    plan, adapter = plan_for(sdxl, PROMPTS[:2], settings), erase(sdxl, "cat", target="dog")
    draw(sdxl, plan, tmp_path)
    load_erasure(sdxl, adapter)
    erased = plan.erased([(adapter.digest, 1.0)])
    draw(sdxl, erased, tmp_path)
    before, after = paths(plan, tmp_path)[0].read_bytes(), paths(erased, tmp_path)[0].read_bytes()
    assert before != after
    with torch.no_grad():
        next(sdxl.text_encoder_2.parameters()).neg_()
    assert model_digest(sdxl) != plan.model
