"""The verbs as methods: the same three lines of user code through functions, a mixin, one enabled pipeline, and all of them."""

import inspect
import json

import pytest
import torch
from attaching import adapter, forward
from conftest import make_pipe
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import diffusers_erase
from diffusers_erase import EraseError, ErasureLoaderMixin, disable, enable, mixin


class MyPipe(ErasureLoaderMixin, StableDiffusionPipeline):
    pass


@pytest.fixture(autouse=True)
def _classes_as_before():
    before = dict(vars(DiffusionPipeline))
    yield
    assert dict(vars(DiffusionPipeline)) == before


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model and an erasure on disk, and what the denoiser says without it and with it."""
    where = tmp_path_factory.mktemp("model")
    pipe = make_pipe(tokenizer)
    pipe.save_pretrained(where / "model")
    adapter(pipe, "cat").save_pretrained(where / "erase-cat")
    base = forward(pipe)
    diffusers_erase.load_erasure(pipe, adapter(pipe, "cat"))
    return where, base, forward(pipe)


def three_lines(pipe, where, verbs):
    verbs.load_erasure(where / "erase-cat")
    with verbs.disable_erasure():
        before = forward(pipe)
    after = forward(pipe)
    verbs.unload_erasure()
    return before, after, forward(pipe)


class Functions:
    """The functions of the package as if they were methods of a pipeline."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __getattr__(self, name):
        return lambda *args, **kwargs: getattr(diffusers_erase, name)(self.pipe, *args, **kwargs)


@pytest.mark.parametrize("way", ["functions", "mixin", "one pipeline", "every pipeline"])
def test_the_same_three_lines(folder, way):
    where, base, erased = folder
    pipe = (MyPipe if way == "mixin" else StableDiffusionPipeline).from_pretrained(where / "model")
    assert hasattr(pipe, "load_erasure") == (way == "mixin")
    if way == "every pipeline":
        enable()
    elif way == "one pipeline":
        enable(pipe)
    try:
        before, after, again = three_lines(pipe, where, Functions(pipe) if way == "functions" else pipe)
    finally:
        disable()
    assert not torch.equal(base, erased)  # control
    assert torch.equal(before, base) and torch.equal(after, erased) and torch.equal(again, base)


def test_every_verb_delegates_to_the_function_of_its_name(sd1, tmp_path):
    """Each method, called, does what its function does; and no verb is missing."""
    functions = {n for n in diffusers_erase.__all__ if n.endswith(("_erasure", "_erasures", "_status"))}
    functions -= {"import_erasure", "sign_erasure"}  # of files, not of a pipeline
    assert set(mixin.VERBS) == functions and len(functions) == 13
    enable(sd1)
    made = adapter(sd1, "cat"), adapter(sd1, "gogh")
    sd1.load_erasure(list(made), ["a", "b"], strength=0.5)
    assert sd1.get_active_erasures() == ["a", "b"] and sd1.get_list_erasures() == {"unet": ["a", "b"]}
    sd1.set_erasures(["a"], 1.0)
    assert sd1.erasure_status().requested["a"][
        "strength"
    ] == 1.0 and sd1.erasure_status() == diffusers_erase.erasure_status(sd1)
    sd1.fuse_erasure()
    assert sd1.erasure_status().mode == "fused"
    sd1.unfuse_erasure()
    assert sd1.erasure_status().mode == "map"
    sd1.disable_erasure()
    assert sd1.get_active_erasures() == []
    sd1.enable_erasure()
    assert sd1.save_erasure(tmp_path) == tmp_path and (tmp_path / "erasure.safetensors").is_file()
    sd1.delete_erasures("a")
    assert sd1.get_list_erasures() == {"unet": ["b"]}
    sd1.unload_erasure()
    assert sd1.get_list_erasures() == {}


def test_methods_take_what_functions_take():
    for name in mixin.VERBS:
        method = list(inspect.signature(getattr(ErasureLoaderMixin, name)).parameters)
        function = list(inspect.signature(getattr(diffusers_erase, name)).parameters)
        named = [p for p in method[1:] if p != "options"]
        assert function[1 : len(named) + 1] == named, name


def test_the_mixin_has_no_init_and_no_state():
    assert "__init__" not in vars(ErasureLoaderMixin) and "__call__" not in vars(ErasureLoaderMixin)
    assert list(inspect.signature(MyPipe.__init__).parameters) == list(
        inspect.signature(StableDiffusionPipeline.__init__).parameters
    )


def test_a_subclass_saves_and_loads_under_its_own_name(folder, tmp_path):
    where, base, _ = folder
    pipe = MyPipe.from_pretrained(where / "model")
    pipe.save_pretrained(tmp_path / "mine")
    assert json.loads((tmp_path / "mine" / "model_index.json").read_text())["_class_name"] == "MyPipe"
    assert torch.equal(forward(MyPipe.from_pretrained(tmp_path / "mine")), base)
    plain = StableDiffusionPipeline.from_pretrained(where / "model")
    enable(plain)
    plain.save_pretrained(tmp_path / "plain")
    assert (
        json.loads((tmp_path / "plain" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    )
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "plain")
    assert torch.equal(forward(again), base) and not hasattr(again, "load_erasure")


def test_one_enabled_pipeline_enables_no_other(sd1, tokenizer):
    other = make_pipe(tokenizer)
    enable(sd1)
    enable(sd1)
    assert (
        hasattr(sd1, "load_erasure")
        and not hasattr(other, "load_erasure")
        and not hasattr(DiffusionPipeline, "load_erasure")
    )
    shared = StableDiffusionImg2ImgPipeline.from_pipe(sd1)
    assert not hasattr(shared, "load_erasure")


def test_every_pipeline_until_disabled(sd1):
    enable()
    enable()
    try:
        sd1.load_erasure(adapter(sd1, "cat"))
        assert StableDiffusionImg2ImgPipeline.from_pipe(sd1).get_active_erasures() == ["cat"]
    finally:
        disable()
        disable()
    assert not hasattr(sd1, "load_erasure") and not hasattr(DiffusionPipeline, "load_erasure")
    assert diffusers_erase.get_active_erasures(sd1) == ["cat"]  # what is loaded stays in force
    assert ErasureLoaderMixin.load_erasure is mixin.VERBS["load_erasure"]


def test_existing_attributes_are_never_replaced(sd1):
    sd1.load_erasure = "mine"
    enable(sd1)
    assert sd1.load_erasure == "mine" and callable(sd1.unload_erasure)

    class Own(StableDiffusionPipeline):
        def fuse_erasure(self):
            return "own"

    enable()
    try:
        assert Own(**sd1.components, requires_safety_checker=False).fuse_erasure() == "own"
    finally:
        disable()
    DiffusionPipeline.erasure_status = "theirs"
    try:
        with pytest.raises(EraseError, match="its own 'erasure_status'"):
            enable()
        assert not hasattr(DiffusionPipeline, "load_erasure")  # nothing half-enabled
        disable()
        assert DiffusionPipeline.erasure_status == "theirs"
    finally:
        del DiffusionPipeline.erasure_status
