"""Sets for one call, receipts and policies: each row of a batch gets its own, and a request only ever adds."""

import asyncio
import json
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch
from attaching import AGREE, adapter, all_bits, by_hand, error, forward, look, states
from conftest import make_pipe, same_bits, sample
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline

import diffusers_erase
from diffusers_erase import (
    ConflictError,
    EraseError,
    ErasurePolicy,
    delete_erasures,
    disable_erasure,
    enable_erasure,
    enforce_policy,
    erase,
    erasing,
    erasure_status,
    fuse_erasure,
    get_active_erasures,
    load_erasure,
    release_policy,
    set_erasures,
    unfuse_erasure,
    unload_erasure,
)

PROMPTS = ["a photo of a cat", "a painting by van gogh", "a photo of a cat by van gogh"]
ROWS = [["cat"], ["van-gogh", "cat"], []]
CLOSE = 1e-4
"""Two guided steps and a larger batch add to the rounding of one pass."""


def refused(message, act, *args, **kwargs):
    with pytest.raises(EraseError, match=message) as caught:
        act(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture
def served(sd1):
    """A pipeline with two erasures loaded."""
    load_erasure(sd1, [adapter(sd1, "cat"), adapter(sd1, "gogh")])
    return sd1


def draw(pipe, prompts=PROMPTS, **kwargs):
    """Latents of a batch, each picture with its own seed."""
    n = len(prompts) * kwargs.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    size = {"height": 16, "width": 16} if not isinstance(pipe, StableDiffusionImg2ImgPipeline) else {}
    return pipe(prompts, num_inference_steps=2, generator=generators, output_type="latent", **size, **kwargs).images


def one_by_one(pipe, **kwargs):
    """The same pictures, each with its set alone in force for the whole pipeline; lists of `kwargs` have one value a picture."""
    pictures = []
    for i, (row, prompt) in enumerate(zip(ROWS, PROMPTS, strict=True)):
        set_erasures(pipe, row)
        own = {name: value[i] if isinstance(value, list) else value for name, value in kwargs.items()}
        pictures.append(sample(pipe, prompt, seed=i, **own))
    set_erasures(pipe, ["cat", "van-gogh"])
    return torch.cat(pictures)


# --- rows ---


@pytest.mark.parametrize(
    "kwargs", [{}, {"guidance_scale": 1.0}, {"negative_prompt": ["a cat", "a boat", ""]}], ids=str
)
def test_each_row_of_a_batch_has_its_own_set(served, kwargs):
    expected, all_active = one_by_one(served, **kwargs), draw(served, **kwargs)
    with erasing(served, rows=ROWS):
        found = draw(served, **kwargs)
    assert error(found, expected) < CLOSE
    assert torch.equal(draw(served, **kwargs), all_active)  # afterwards it is as before
    assert min(error(found[i], all_active[i]) for i in (0, 2)) > 20 * CLOSE  # control: the sets differ


def test_rows_of_one_forward_pass(served):
    """At the denoiser itself: one part, so as many rows as sets."""
    text = states(served, PROMPTS)
    edits = [[adapter(served, n).edit for n in names] for names in (["cat"], ["cat", "gogh"], [])]
    mapped = torch.cat([by_hand(text[i : i + 1], *e) if e else text[i : i + 1] for i, e in enumerate(edits)])
    with erasing(served, rows=ROWS):
        found = forward(served, text)
        refused("draws 2 rows in 1 parts of guidance, erasing.* names 3", forward, served, text[:2])
        refused("draws 6 rows", forward, served, torch.cat([text, text]))
    with disable_erasure(served):
        assert error(found, forward(served, mapped)) < AGREE < error(found, forward(served, text))


def test_a_gate_is_kept_in_a_row(sd1):
    load_erasure(sd1, [adapter(sd1, "gated"), adapter(sd1, "cat")])
    text = states(sd1, ["a painting by monet", "a painting by monet", "a photo of a cat"])
    set_erasures(sd1, "monet")
    gated = forward(sd1, text)
    with erasing(sd1, rows=[["monet"], ["cat"], ["monet"]]):
        found = forward(sd1, text)
    assert error(found[[0, 2]], gated[[0, 2]]) < AGREE < error(found[1], gated[1])
    load_erasure(sd1, adapter(sd1, "gated"), "again", mode="fused")  # control: the linear part is another picture
    set_erasures(sd1, "monet")
    assert error(forward(sd1, text)[0], gated[0]) > AGREE


def test_every_picture_of_a_prompt_counts(served):
    rows = [["cat"], [], ["van-gogh"], ["cat", "van-gogh"]]
    with erasing(served, rows=rows):
        found = draw(served, PROMPTS[:2], num_images_per_prompt=2)
    for i, row in enumerate(rows):
        with erasing(served, row):
            alone = draw(served, PROMPTS[:2], num_images_per_prompt=2)
        assert error(found[i], alone[i]) < CLOSE
    steps = []
    served.unet.register_forward_hook(lambda *_: steps.append(1))
    with erasing(served, rows=rows):
        refused("draws 4 rows in 2 parts of guidance, erasing.* names 4", draw, served, PROMPTS[:2])
        refused("draws 6 rows in 2 parts of guidance, erasing.* names 4", draw, served)
        refused(
            "draws 2 rows in 1 parts of guidance, erasing.* names 4", draw, served, PROMPTS[:2], guidance_scale=1.0
        )
    assert not steps  # before the first picture


def test_as_many_rows_as_the_batch_has_in_both_halves_are_no_match(served):
    """Two prompts with guidance make a batch of four: four rows must not pass for it."""
    with erasing(served, rows=[["cat"], ["cat"], [], []]):
        refused("draws 4 rows in 2 parts", draw, served, PROMPTS[:2])


def test_rows_with_perturbed_attention_guidance(served):
    """PAG makes three parts of a batch."""
    expected = {}
    pipe = StableDiffusionPAGPipeline.from_pipe(served, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    for guidance in (5.0, 1.0):
        with erasing(pipe, ["cat"]):
            expected = draw(pipe, PROMPTS[:2], guidance_scale=guidance, pag_scale=3.0)
        with erasing(pipe, rows=[["cat"], []]):
            found = draw(pipe, PROMPTS[:2], guidance_scale=guidance, pag_scale=3.0)
        assert error(found[0], expected[0]) < CLOSE < 10 * CLOSE < error(found[1], expected[1])


def test_rows_of_a_pipeline_that_shares_the_unet(served):
    """The number of parts is that of the pipeline that calls, not of the one that was loaded on."""
    other = StableDiffusionImg2ImgPipeline.from_pipe(served)
    other.set_progress_bar_config(disable=True)
    draw(served)  # with guidance: the first pipeline remembers it
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with erasing(other, rows=[["cat"], []]):
        found = draw(other, PROMPTS[:2], image=image, strength=1.0, guidance_scale=1.0)
    with erasing(other, ["cat"]):
        one = draw(other, PROMPTS[:2], image=image, strength=1.0, guidance_scale=1.0)
    assert error(found[0], one[0]) < CLOSE < 10 * CLOSE < error(found[1], one[1])


def test_a_pipeline_of_unknown_layout_is_refused(served):
    class Mine(type(served)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    mine = Mine(**served.components, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    draw(mine)  # control: one set for all is fine
    with erasing(mine, rows=ROWS):
        refused("Mine is not known to lay out a guided batch", draw, mine)


def test_names_for_a_whole_batch(served):
    set_erasures(served, "van-gogh")
    text = states(served)
    expected = forward(served, text)
    set_erasures(served, "cat")
    cat = forward(served, text)
    with erasing(served, ["van-gogh"]):
        assert torch.equal(forward(served, text), expected)
    assert torch.equal(forward(served, text), cat) and not torch.equal(cat, expected)
    with disable_erasure(served):
        plain = forward(served, text)
        with erasing(served, ["cat"]):  # a request is a request, also while nothing else is in force
            assert torch.equal(forward(served, text), cat)
        with erasing(served, []):
            assert torch.equal(forward(served, text), plain)


@pytest.mark.slow
def test_rows_through_a_compiled_denoiser(served):
    torch._dynamo.reset()
    text = states(served, PROMPTS)
    with erasing(served, rows=ROWS):
        expected = forward(served, text)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    served.unet.compile(backend=counting, fullgraph=True)
    plain = forward(served, text)
    bare = len(graphs)
    with erasing(served, rows=ROWS):
        assert error(forward(served, text), expected) < AGREE
    first = len(graphs)
    for rows in (ROWS[::-1], [["cat"], [], ["van-gogh"]]):
        with erasing(served, rows=rows):
            found = forward(served, text)
        assert error(found, expected) > AGREE  # control
    assert bare and first == bare + 1 and len(graphs) <= first + 1  # other sets, same shapes: at most one more
    assert error(forward(served, text), plain) < AGREE
    with erasing(served, rows=ROWS):
        refused("draws 2 rows", forward, served, text[:2])
    torch._dynamo.reset()


# --- what is refused ---


def test_wrong_requests_change_nothing(served):
    before, bits, clean = forward(served), all_bits(served), look(served.unet)
    refused("no erasure named 'dog'", erasing(served, rows=[["dog"]]).__enter__)
    refused("got both", erasing(served, ["cat"], rows=[["cat"]]).__enter__)
    refused("got a text", erasing(served, "cat").__enter__)
    refused("got a text", erasing(served, rows=["cat"]).__enter__)
    refused("no rows", erasing(served, rows=[]).__enter__)
    with erasing(served, rows=ROWS):
        refused("is open", erasing(served, ["cat"]).__enter__)
        for act in (fuse_erasure, unfuse_erasure, enable_erasure, disable_erasure, unload_erasure):
            refused("is open", act, served)
        refused("is open", delete_erasures, served, "cat")
        refused("is open", set_erasures, served, "cat")
        refused("is open", load_erasure, served, adapter(served, "ship"))
    assert torch.equal(forward(served), before) and look(served.unet) == clean
    fuse_erasure(served)
    refused("in fused form, which is one for all calls", erasing(served, rows=ROWS).__enter__)
    with erasing(served) as receipt:  # nothing to change: any form will do
        assert receipt.mode == "fused" and receipt.in_force == (("cat", "van-gogh"),)
    unload_erasure(served)
    refused("no erasures are loaded", erasing(served, rows=ROWS).__enter__)
    assert all(same_bits(getattr(served, name), b) for name, b in bits.items())


def test_sets_are_held_to_the_rules_of_loading(sd1):
    load_erasure(sd1, erase(sd1, "cat", target="dog"), "cat")
    set_erasures(sd1, [])
    load_erasure(sd1, erase(sd1, "dog", target="wolf"), "dog")
    with pytest.raises(ConflictError, match="chains='follow'"):
        erasing(sd1, rows=[["cat"], ["cat", "dog"]]).__enter__()
    with erasing(sd1, rows=[["cat"], ["dog"]]):  # control: apart they contradict nothing
        pass


def test_an_error_inside_gives_back_what_was_in_force(served):
    before = forward(served)
    with pytest.raises(ZeroDivisionError), erasing(served, rows=ROWS):
        1 / 0  # noqa: B018
    assert torch.equal(forward(served), before)
    set_erasures(served, "cat")  # and nothing is held


def test_nothing_about_a_request_is_a_call_keyword(served):
    """F16: diffusers swallows what it does not know, so a keyword would be lost without a word."""
    before = draw(served)
    try:
        given = draw(served, rows=ROWS, erasing=ROWS, erasures=["cat"])
    except TypeError:  # a host that refuses them is fine too
        given = before
    assert torch.equal(given, before)


# --- threads ---


def test_threads_take_turns(served):
    text = states(served, PROMPTS)
    sets = [ROWS, ROWS[::-1]]
    alone = []
    for rows in sets:
        with erasing(served, rows=rows):
            alone.append(forward(served, text))
    found = [[], []]

    def work(i):
        for _ in range(4):
            with erasing(served, rows=sets[i]):
                found[i].append(forward(served, text))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [len(f) for f in found] == [4, 4] and not torch.equal(*alone)
    assert all(torch.equal(picture, alone[i]) for i in range(2) for picture in found[i])


def test_a_thread_without_a_request_does_not_draw_with_another_ones(served):
    text, caught = states(served, PROMPTS), []

    def work():
        try:
            forward(served, text)
        except EraseError as error:
            caught.append(str(error))

    with erasing(served, rows=ROWS):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        expected = forward(served, text)
        handed_on = asyncio.run(
            asyncio.to_thread(forward, served, text)
        )  # as a server does: it takes its context along
    assert len(caught) == 1 and "another thread" in caught[0]
    assert torch.equal(handed_on, expected)


# --- receipts ---


def test_a_receipt_says_what_was_in_force(served):
    with erasing(served, rows=ROWS) as receipt:
        pass
    assert receipt.requested == (("cat",), ("van-gogh", "cat"), ())
    assert receipt.in_force == (("cat",), ("cat", "van-gogh"), ())
    for name, made in (("cat", adapter(served, "cat")), ("van-gogh", adapter(served, "gogh"))):
        told = receipt.adapters[name]
        assert (told["digest"], told["strength"], told["verified"]) == (made.digest, 1.0, True)
    assert (receipt.mode, receipt.branch, receipt.components, receipt.mandatory) == ("map", "both", ("unet",), ())
    assert receipt.encoder == adapter(served, "cat").encoder.to_json()
    assert receipt.versions["diffusers-erase"] == diffusers_erase.__version__
    assert {"torch", "diffusers", "transformers", "python"} <= set(receipt.versions)
    with pytest.raises(FrozenInstanceError):
        receipt.mode = "none"
    data = json.loads(json.dumps(receipt.to_json()))
    assert data["in_force"] == [["cat"], ["cat", "van-gogh"], []] and len(data["digest"]) == 64
    with erasing(served, rows=ROWS) as again:
        pass
    with erasing(served, rows=ROWS[::-1]) as other:
        pass
    assert again.to_json()["digest"] == data["digest"] != other.to_json()["digest"]


def test_a_receipt_of_what_is_in_force_anyway(served):
    set_erasures(served, "cat", 0.5)
    with erasing(served) as receipt:
        pass
    assert receipt.requested is None and receipt.in_force == (("cat",),) and list(receipt.adapters) == ["cat"]
    assert receipt.adapters["cat"]["strength"] == 0.5


def test_what_was_waived_is_on_the_receipt(sd1, tokenizer):
    foreign = erase(make_pipe(tokenizer, seed=5), "cat", method="uce")
    load_erasure(sd1, foreign, strict=False, allow_text_changes=True)
    with erasing(sd1) as receipt:
        pass
    assert receipt.adapters["cat"]["verified"] is False
    assert any("strict=False" in note for note in receipt.notes)
    assert any("text side are allowed" in note for note in receipt.notes)


# --- policies ---


@pytest.fixture
def held(served):
    load_erasure(served, adapter(served, "ship"), residual_max=None)
    set_erasures(served, "van-gogh")
    enforce_policy(served, ErasurePolicy(mandatory=["van-gogh"], optional=["cat"]))
    return served


def test_a_request_adds_and_never_removes(held):
    text = states(held, PROMPTS)
    with erasing(held, rows=[["cat"], [], ["van-gogh", "cat"]]) as receipt:
        found = forward(held, text)
    assert receipt.in_force == (("cat", "van-gogh"), ("van-gogh",), ("cat", "van-gogh"))
    assert receipt.requested == (("cat",), (), ("van-gogh", "cat")) and receipt.mandatory == ("van-gogh",)
    assert error(found[1], forward(held, text)[1]) < AGREE  # an empty list is the mandatory set
    with erasing(held, []):
        assert error(forward(held, text), forward(held, text)) == 0
    refused("does not offer 'ship': expected one of cat", erasing(held, rows=[["ship"]]).__enter__)
    release_policy(held)
    with erasing(held, rows=[["ship"], [], []]) as receipt:  # control: without a policy it may be asked for
        assert receipt.in_force == (("ship",), (), ()) and receipt.mandatory == ()


def test_no_verb_weakens_what_is_mandatory(held):
    before = forward(held)
    for act in (unload_erasure, disable_erasure):
        refused("a policy keeps 'van-gogh' in force", act, held)
    refused("a policy keeps", delete_erasures, held, "van-gogh")
    refused("a policy keeps", set_erasures, held, "cat")
    refused("a policy keeps", set_erasures, held, "van-gogh", 0.9)
    assert get_active_erasures(held) == ["van-gogh"] and torch.equal(forward(held), before)
    set_erasures(held, ["van-gogh", "cat"])  # adding is what a policy leaves free
    load_erasure(held, adapter(held, "car"), residual_max=None)
    delete_erasures(held, ["cat", "car", "ship"])
    fuse_erasure(held)
    assert get_active_erasures(held) == ["van-gogh"]
    release_policy(held)
    unload_erasure(held)
    assert not torch.equal(forward(held), before)


def test_a_policy_holds_for_pipelines_that_share_the_unet(held):
    other = StableDiffusionImg2ImgPipeline.from_pipe(held)
    refused("a policy keeps", unload_erasure, other)
    refused("does not offer", erasing(other, rows=[["ship"]]).__enter__)


def test_a_policy_that_does_not_hold_now_is_not_enforced(served):
    refused("no erasure named 'ship'", enforce_policy, served, ErasurePolicy(["ship"]))
    refused("no erasure named 'ship'", enforce_policy, served, ErasurePolicy(["cat"], ["ship"]))
    set_erasures(served, "cat")
    refused("keeps 'van-gogh'", enforce_policy, served, ErasurePolicy(["van-gogh"]))
    with disable_erasure(served):
        refused("keeps 'cat'", enforce_policy, served, ErasurePolicy(["cat"]))
    unload_erasure(served)  # nothing was enforced
    for wrong, message in (("cat", "list of names"), ([1], "list of names")):
        refused(message, ErasurePolicy, wrong)
    refused("mandatory and optional", ErasurePolicy, ["cat"], ["cat"])


def test_the_status_is_that_of_the_pipeline_not_of_the_request(held):
    with erasing(held, rows=[["cat"]]):
        assert erasure_status(held).in_force == ("van-gogh",)
