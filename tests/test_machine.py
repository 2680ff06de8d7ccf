"""Long random sequences of operations, ours and the host's, against a model that is a dict: name -> adapter, strength, active.

After every step the denoiser's output is that of a twin pipeline which went through the same host calls, never knew us, and has
the composed edit applied by hand; bit for bit where nothing is in force. At the end everything comes off and every bit is compared.
"""

import copy

import pytest
import torch
from attaching import AGREE, adapter, error, forward, look, noise, solved, states, style_lora
from conftest import make_pipe
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from torch.func import functional_call

import diffusers_erase as de
from diffusers_erase import EraseError

SHARED = {}
"""The tokenizer, set by the test; and the states of the prompts, which no step changes."""

SOURCES = ("cat", "gogh", "mild", "robot")
STRENGTHS = st.sampled_from([0.0, 0.3, 0.8, 1.0])


class Operations(RuleBasedStateMachine):
    names = Bundle("names")

    @initialize()
    def start(self):
        self.pipe, self.twin = make_pipe(SHARED["tokenizer"]), make_pipe(SHARED["tokenizer"])
        self.clean = look(self.pipe.unet)
        self.speakers = [self.pipe]
        self.entries, self.enabled, self.fused = {}, True, False
        self.lora, self.joined, self.count = False, False, 0
        self.left_behind = []

    @property
    def speaker(self):
        """Any pipeline that shares the UNet may give the orders: they take turns."""
        self.count += 1
        return self.speakers[self.count % len(self.speakers)]

    # our verbs

    @rule(
        target=names,
        source=st.sampled_from(SOURCES),
        strength=STRENGTHS,
        mode=st.sampled_from(["auto", "auto", "map", "fused"]),
    )
    def load(self, source, strength, mode):
        self.count += 1
        name = f"{source}-{self.count}"
        made = adapter(self.pipe, source)
        de.load_erasure(self.speaker, made, name, strength=strength, mode=mode, residual_max=None)
        self.entries[name] = [made, strength, True]
        self.fused = {"auto": self.fused, "map": False, "fused": True}[mode]
        return name

    @rule(gone=st.lists(consumes(names), min_size=1, max_size=2, unique=True))
    def delete(self, gone):
        gone = [n for n in gone if n in self.entries]
        if not gone:
            return
        de.delete_erasures(self.speaker, gone)
        for name in gone:
            del self.entries[name]
        if not self.entries:
            self.enabled, self.fused = True, False

    @rule(chosen=st.lists(names, max_size=3, unique=True), strength=st.one_of(st.none(), STRENGTHS))
    def set(self, chosen, strength):
        chosen = [n for n in chosen if n in self.entries]
        if not self.entries:
            return
        de.set_erasures(self.speaker, chosen, strength)
        for name, entry in self.entries.items():
            entry[2] = name in chosen
            if entry[2] and strength is not None:
                entry[1] = strength

    @precondition(lambda self: self.entries)
    @rule(on=st.booleans())
    def toggle(self, on):
        (de.enable_erasure if on else de.disable_erasure)(self.speaker)
        self.enabled = on

    @precondition(lambda self: self.entries)
    @rule(fused=st.booleans())
    def fuse(self, fused):
        (de.fuse_erasure if fused else de.unfuse_erasure)(self.speaker)
        self.fused = fused

    @rule()
    def unload(self):
        de.unload_erasure(self.speaker)
        self.entries, self.enabled, self.fused = {}, True, False
        assert look(self.pipe.unet)[1:4] == self.clean[1:4]

    @precondition(lambda self: self.entries)
    @rule()
    def for_a_moment_without(self):
        with de.disable_erasure(self.speaker):
            assert torch.equal(self.found(), self.plain())

    @rule(source=st.sampled_from(["uce", "nowhere", "twice"]))
    def fail(self, source):
        """A request that is refused changes nothing; the invariants look."""
        try:
            if source == "uce" and self.in_force():  # another base pack
                de.load_erasure(self.speaker, adapter(self.pipe, "uce"))
            elif source == "twice" and self.entries:
                de.load_erasure(self.speaker, adapter(self.pipe, "cat"), next(iter(self.entries)))
            else:
                de.set_erasures(self.speaker, "nowhere")
        except EraseError:
            return
        raise AssertionError("was not refused")

    # the host's

    @rule(on=st.booleans())
    def style(self, on):
        if on == self.lora:
            return
        for pipe in (self.pipe, self.twin):
            pipe.load_lora_weights(style_lora(pipe.unet)) if on else pipe.unload_lora_weights()
        self.lora = on

    @precondition(lambda self: self.lora)
    @rule(on=st.booleans())
    def switch_style(self, on):
        for pipe in (self.pipe, self.twin):
            pipe.enable_lora() if on else pipe.disable_lora()

    @rule(on=st.booleans())
    def projections(self, on):
        if on == self.joined:  # the host itself breaks when it takes apart what is not joined
            return
        for pipe in (self.pipe, self.twin):
            pipe.fuse_qkv_projections() if on else pipe.unfuse_qkv_projections()
        self.joined = on

    @rule()
    def go_on_with_a_deep_copy(self):
        old, new = self.pipe.unet, copy.deepcopy(self.pipe.unet)
        before = self.found()
        self.pipe.unet = new
        assert torch.equal(self.found(), before)
        self.speakers = [self.pipe]
        self.left_behind = [(old, before)]

    @rule(kind=st.sampled_from([StableDiffusionImg2ImgPipeline, StableDiffusionPipeline]))
    def share(self, kind):
        self.speakers = [self.pipe, kind.from_pipe(self.pipe)]

    # what must be true

    def in_force(self):
        return [(made, w) for made, w, active in self.entries.values() if active and w > 0] if self.enabled else []

    def found(self):
        return forward(self.pipe, SHARED["text"])

    def plain(self):
        return forward(self.twin, SHARED["text"])

    def by_hand(self):
        edits = {(made.digest, w): made.edit.softened(w) for made, w in self.in_force()}.values()
        A, D = solved(*edits)
        text = SHARED["text"]
        if not self.fused:
            return forward(self.twin, (text.double() + text.double() @ A.T @ D).float())
        weights = {
            name: (w.double() + w.double() @ D.T @ A).float()
            for name, w in self.twin.unet.named_parameters()
            if any(f".attn2.{part}." in name for part in ("to_k", "to_v", "to_kv")) and "lora_" not in name
        }
        with torch.no_grad():
            return functional_call(self.twin.unet, weights, (noise(), 500), {"encoder_hidden_states": text}).sample

    @invariant()
    def the_output_is_that_of_the_edit_by_hand(self):
        if self.in_force():
            assert error(self.found(), self.by_hand()) < AGREE
        else:
            assert torch.equal(self.found(), self.plain())

    @invariant()
    def the_lists_are_those_of_the_model(self):
        for pipe in self.speakers:
            assert de.get_list_erasures(pipe) == ({"unet": list(self.entries)} if self.entries else {})
            acting = [n for n, (_, w, active) in self.entries.items() if active and w > 0] if self.enabled else []
            assert de.get_active_erasures(pipe) == acting
        status = de.erasure_status(self.pipe)
        assert status.mode == ("none" if not self.in_force() else "fused" if self.fused else "map")

    @invariant()
    def what_was_left_behind_is_unmoved(self):
        for unet, before in self.left_behind:
            assert torch.equal(forward(self.pipe, SHARED["text"], unet=unet), before)

    def teardown(self):
        if not hasattr(self, "pipe"):
            return
        de.unload_erasure(self.pipe)
        mine, untouched = self.pipe.unet.state_dict(), self.twin.unet.state_dict()
        assert mine.keys() == untouched.keys() and all(torch.equal(mine[n], untouched[n]) for n in mine)
        assert torch.equal(self.found(), self.plain()) and look(self.pipe.unet)[1:] == look(self.twin.unet)[1:]
        assert sorted(vars(self.pipe.unet)) == sorted(vars(self.twin.unet))


def run(tokenizer, examples, steps):
    from hypothesis.stateful import run_state_machine_as_test

    SHARED["tokenizer"] = tokenizer
    SHARED["text"] = states(make_pipe(tokenizer))
    profile = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=steps < 30,
        database=None,
        phases=[Phase.generate],  # a failing sequence is printed as it is: shrinking it takes minutes
    )
    run_state_machine_as_test(Operations, settings=profile)


def test_random_sequences_leave_no_trace(tokenizer):
    run(tokenizer, examples=6, steps=12)


@pytest.mark.slow
def test_long_random_sequences_leave_no_trace(tokenizer):
    run(tokenizer, examples=25, steps=40)
