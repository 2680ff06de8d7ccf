"""Through the Hub: the unmodified client, in a process of its own, against a Hub on loopback."""

import io
import json
import re
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from attaching import AGREE, adapter, error, forward
from conftest import make_pipe, make_tokenizer
from hub_double import TOKEN, Hub, client
from PIL import Image
from typer.testing import CliRunner

from diffusers_erase import (
    EraseError,
    ErasureAdapter,
    erasure_status,
    load_erasure,
    lock_erasures,
    set_erasures,
    unload_erasure,
)
from diffusers_erase.cli import app

ALWAYS = {".gitattributes", "README.md", "erasure.safetensors", "erasure_config.json"}


@pytest.fixture(scope="module")
def serving():
    with Hub().serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def online(serving, tmp_path_factory):
    with client(serving.url, tmp_path_factory.mktemp("online")) as run:
        yield run


@pytest.fixture
def hub(serving):
    """The Hub, empty and well."""
    for state in (serving.repositories, serving.requests, serving.faults):
        state.clear()
    return serving


# --- what is done in the client's process ---


@cache
def pipeline():
    with tempfile.TemporaryDirectory() as folder:
        return make_pipe(make_tokenizer(Path(folder)))


def push(name, repository, token=TOKEN, twin=False, base="maker/model", **options):
    made = replace(adapter(pipeline(), name), base_model=base)
    return made.push_to_hub(repository, token=token, model=pipeline() if twin else None, **options)


def digest(name):
    return adapter(pipeline(), name).digest


def fetch(source, **options):
    """The digest of an adapter, and where it was."""
    found = ErasureAdapter.from_pretrained(source, **options)
    return found.digest, found.origin


def load(sources, **options):
    """What is in force after loading, and that it acts; the pipe is clean again afterwards."""
    pipe = pipeline()
    before = forward(pipe)
    try:
        load_erasure(pipe, sources, **options)
        assert not torch.equal(forward(pipe), before)
        return erasure_status(pipe).requested, str(erasure_status(pipe))
    finally:
        unload_erasure(pipe)
        assert torch.equal(forward(pipe), before)


def move(source, target, **options):
    """Fetch an adapter and push it to another repository."""
    return ErasureAdapter.from_pretrained(source, **options).push_to_hub(target, token=TOKEN)


def stock_lora(repository):
    """How far the repository, loaded as a LoRA by stock diffusers, is from the erasure; and how far from nothing."""
    pipe = pipeline()
    plain = forward(pipe)
    load_erasure(pipe, repository)
    erased = forward(pipe)
    unload_erasure(pipe)
    pipe.load_lora_weights(repository)
    twin = forward(pipe)
    pipe.unload_lora_weights()
    return error(twin, erased), error(plain, erased)


def command(*words, **environment):
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "HF_TOKEN": TOKEN} | environment)
    return done.exit_code, done.output


def save_model(folder):
    pipeline().save_pretrained(folder)


def refused(run, *call, **options):
    """The message with which a call is refused: one line, and without the token."""
    with pytest.raises(EraseError) as caught:
        run(*call, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20 and TOKEN not in message
    return message


# --- there and back ---


def test_push_and_load(hub, online):
    pushed = online(push, "cat", "user/cat")
    assert set(hub.files("user/cat")) == ALWAYS and hub.repositories["user/cat"].find("main") == pushed.commit
    found, origin = online(fetch, "user/cat")
    assert found == online(digest, "cat") and origin == pushed
    requested, said = online(load, "user/cat")
    assert requested["cat"]["origin"] == f"user/cat@{pushed.commit}" and pushed.commit in said
    assert requested["cat"]["digest"] == found and requested["cat"]["verified"]


def test_several_in_one_call(hub, online, tmp_path):
    commits = [online(push, name, f"user/{name}").commit for name in ("cat", "gogh", "ship")]
    requested, _ = online(load, ["user/cat", f"user/gogh@{commits[1]}", "user/ship"])
    assert [entry["origin"].split("@")[1] for entry in requested.values()] == commits
    message = refused(
        online, load, ["user/cat", "user/nobody"]
    )  # all or none: `load` checks that the pipe stayed clean
    assert "user/nobody" in message


def test_one_commit_holds_all_files(hub, online):
    first = online(push, "cat", "user/cat")
    second = online(push, "gogh", "user/cat")
    assert first.commit != second.commit
    hub.requests.clear()
    assert online(fetch, "user/cat", revision=first.commit)[0] == online(digest, "cat")
    assert online(fetch, f"user/cat@{first.commit}")[1] == first
    assert online(fetch, "user/cat")[0] == online(digest, "gogh")
    files = {path for path in hub.seen("GET") if "/resolve/" in path}
    revisions = {
        path.split("/resolve/")[1].split("/")[0] for path in files if not path.endswith("erasure.safetensors")
    }
    assert revisions <= {first.commit, second.commit}  # never the name of a branch, which may move in between
    hub.repositories["user/cat"].refs["v1"] = first.commit
    assert online(fetch, "user/cat", revision="v1")[1] == first
    assert "give one of them" in refused(online, fetch, "user/cat@v1", revision="main")


def test_files_of_two_commits_do_not_pass(hub, online):
    """Control of the last test: an adapter put together from two commits is refused."""
    online(push, "cat", "user/cat")
    mixed = hub.files("user/cat")["erasure_config.json"]
    online(push, "gogh", "user/cat")
    hub.repositories["user/cat"].commit(hub.files("user/cat") | {"erasure_config.json": mixed})
    assert "describes another adapter" in refused(online, fetch, "user/cat")


def test_subfolders(hub, online, tmp_path):
    for name in ("cat", "gogh"):
        pushed = online(push, name, "user/set", subfolder=f"erasures/{name}")
        assert pushed.subfolder == f"erasures/{name}"
        assert online(fetch, "user/set", subfolder=f"erasures//{name}/") == (online(digest, name), pushed)
    assert "lacks a subfolder" in refused(online, fetch, "user/set")
    assert "holds no erasures/dog/erasure.safetensors" in refused(online, fetch, "user/set", subfolder="erasures/dog")
    for away in ("..", "../cat", "erasures/../../x", "/etc", "a\\..\\b", "a\0b"):
        hub.requests.clear()
        assert "relative path inside" in refused(online, fetch, "user/set", subfolder=away)
        assert "relative path inside" in refused(online, push, "cat", "user/set", subfolder=away)
        assert hub.requests == []


def test_a_folder_comes_before_the_hub(hub, online, tmp_path):
    online(push, "cat", "user/cat")
    hub.requests.clear()
    assert "no erasure at" in refused(online, fetch, str(tmp_path))
    assert "no erasure at" in refused(online, fetch, str(tmp_path / "user" / "cat"))
    assert "no erasure at" in refused(online, fetch, Path("user/cat"))  # a path is a path
    assert "is none" in refused(online, fetch, str(tmp_path), revision="main")
    assert "no erasure at" in refused(online, fetch, "erase-cat")
    assert "no erasure at" in refused(online, fetch, "user/cat/../cat")
    assert "no erasure at" in refused(online, fetch, "x" * 300)
    assert "no erasure at" in refused(online, fetch, "a\0b")
    assert hub.requests == []


# --- who may, and what is not there ---


def test_private_repositories_need_the_token(hub, online, tmp_path):
    online(push, "cat", "user/secret", private=True)
    assert hub.repositories["user/secret"].private
    cold = {"cache_dir": str(tmp_path)}
    assert "token=" in refused(online, fetch, "user/secret", token=False, **cold)
    assert "token=" in refused(online, load, "user/secret", token="hf_wrong", **cold)
    hub.requests.clear()
    assert online(fetch, "user/secret", token=TOKEN, **cold)[0] == online(digest, "cat")
    assert hub.requests and all(token == TOKEN for _, _, token in hub.requests)
    hub.requests.clear()
    online(push, "gogh", "user/open")
    hub.requests.clear()
    online(fetch, "user/open", token=False, **cold)
    assert hub.requests and not any(token for _, _, token in hub.requests)


def test_nothing_is_pushed_without_the_right(hub, online):
    assert "token" in refused(online, push, "cat", "user/cat", token=False)
    assert hub.repositories == {}
    online(push, "cat", "user/cat")
    was = hub.files("user/cat")
    assert "token" in refused(online, push, "gogh", "user/cat", token="hf_wrong")
    assert hub.files("user/cat") == was
    for name in ("cat", "a/b/c", "user/../cat", "user/cat@main", ""):
        assert "called user/name" in refused(online, push, "cat", name)


def test_what_is_not_there(hub, online, tmp_path):
    online(push, "cat", "user/cat")
    assert "no such repository" in refused(online, fetch, "user/nobody", token=TOKEN)
    assert "no such repository" in refused(online, fetch, "user/nobody")
    assert "no revision 'v9'" in refused(online, fetch, "user/cat", revision="v9")
    assert "no revision" in refused(online, fetch, "user/cat", revision="0" * 40)
    assert "no revision 'v9'" in refused(online, push, "cat", "user/cat", revision="v9")
    hub.repositories["user/cat"].gated = True
    assert "gated" in refused(online, load, "user/cat", cache_dir=str(tmp_path))
    hub.repositories["user/lora"] = type(hub.repositories["user/cat"])()
    hub.repositories["user/lora"].commit({"pytorch_lora_weights.safetensors": b"..."})
    assert "not an erasure" in refused(online, fetch, "user/lora")


# --- the cache, and no network ---


def test_a_cached_commit_needs_no_network(hub, online, tmp_path):
    cold = {"cache_dir": str(tmp_path)}
    pushed = online(push, "cat", "user/cat")
    first = online(fetch, "user/cat", **cold)
    hub.requests.clear()
    assert online(fetch, "user/cat", revision=pushed.commit, **cold) == first
    assert online(fetch, "user/cat", local_files_only=True, **cold) == first
    assert hub.requests == []
    online(push, "gogh", "user/cat")
    assert (
        online(fetch, "user/cat", local_files_only=True, **cold) == first
    )  # the branch as it was when it was fetched
    assert online(fetch, "user/cat", **cold) != first
    hub.requests.clear()
    assert "not reached" in refused(online, fetch, "user/other", local_files_only=True, **cold)
    assert hub.requests == []


def test_offline_mode_and_a_hub_that_is_gone(hub, online, tmp_path):
    cold = {"cache_dir": str(tmp_path)}
    first = online(fetch, f"user/cat@{online(push, 'cat', 'user/cat').commit}", **cold)
    online(fetch, "user/cat", **cold)
    hub.requests.clear()
    with client(hub.url, tmp_path / "home", HF_HUB_OFFLINE="1") as offline:
        assert offline(fetch, "user/cat", **cold) == first
        assert offline(fetch, "user/cat", revision=first[1].commit, **cold) == first
        assert "offline mode" in refused(offline, fetch, "user/cat", cache_dir=str(tmp_path / "empty"))
        assert "Hub" in refused(offline, push, "cat", "user/cat")
        assert hub.requests == []


# --- a set, pinned ---


def lock(sources, path):
    """Lock what is in force after loading; the file's text."""
    pipe = pipeline()
    try:
        load_erasure(pipe, sources)
        set_erasures(pipe, ["cat", "van-gogh"], [0.5, 1.0])
        return lock_erasures(pipe, path).read_text()
    finally:
        unload_erasure(pipe)


def test_a_lock_file_gives_the_same_bits_whatever_is_pushed_later(hub, online, tmp_path):
    pushed = {name: online(push, name, f"user/{name}") for name in ("cat", "gogh")}
    path = tmp_path / "erasures.lock"
    text = online(lock, ["user/gogh", "user/cat"], path)
    assert online(lock, ["user/cat", "user/gogh"], path) == text  # canonical
    for name, origin in pushed.items():
        assert origin.commit in text and online(digest, name) in text
        online(push, "ship", f"user/{name}")
    requested, _ = online(load, str(path))
    assert {name: (e["strength"], e["digest"]) for name, e in requested.items()} == {
        "cat": (0.5, online(digest, "cat")),
        "van-gogh": (1.0, online(digest, "gogh")),
    }
    assert online(fetch, "user/cat")[0] == online(digest, "ship")  # control: it moved
    path.write_text(text.replace(pushed["cat"].commit, hub.repositories["user/cat"].find("main")))
    assert "it was replaced" in refused(online, load, str(path))
    path.write_text(text.replace(pushed["cat"].commit, "main"))
    assert "commit of 40 hex digits" in refused(online, load, str(path))
    path.write_text(text)
    hub.repositories.clear()
    assert online(load, str(path), local_files_only=True)[0] == requested


# --- what goes wrong on the way ---


@pytest.mark.parametrize("fault", ["short", "corrupt", pytest.param(500, marks=pytest.mark.slow)])
def test_a_broken_transfer_is_refused(hub, online, tmp_path, fault):
    online(push, "cat", "user/cat")
    hub.faults["erasure.safetensors"] = fault
    cold = {"cache_dir": str(tmp_path / "cache")}
    assert refused(online, load, "user/cat", **cold)
    if fault == "corrupt":  # what is in the cache is not what was pushed: it stays refused
        assert "changed after it was saved" in refused(online, fetch, "user/cat", **cold)
        cold = {"cache_dir": str(tmp_path / "other")}
    hub.faults.clear()
    assert online(fetch, "user/cat", **cold)[0] == online(digest, "cat")


def test_a_transfer_that_is_cut_goes_on(hub, online, tmp_path):
    online(push, "cat", "user/cat")
    hub.faults["erasure.safetensors"] = "cut once"
    try:
        found, _ = online(fetch, "user/cat", cache_dir=str(tmp_path))
    except EraseError:  # old clients leave it to the next call
        found, _ = online(fetch, "user/cat", cache_dir=str(tmp_path))
    assert found == online(digest, "cat")
    assert hub.faults == {}


def test_somebody_else_pushed_meanwhile(hub, online):
    first = online(push, "cat", "user/cat")
    second = online(push, "gogh", "user/cat", parent_commit=first.commit)
    was = hub.files("user/cat")
    message = refused(online, push, "ship", "user/cat", parent_commit=first.commit)
    assert "changed in the meantime" in message and hub.files("user/cat") == was
    assert online(push, "ship", "user/cat", parent_commit=second.commit).commit != second.commit


def test_pushing_the_same_again_makes_no_commit(hub, online):
    assert online(push, "cat", "user/cat", twin=True) == online(push, "cat", "user/cat", twin=True)
    assert len(hub.repositories["user/cat"].commits) == 2


def test_a_pull_request_leaves_the_branch(hub, online):
    first = online(push, "cat", "user/cat")
    asked = online(push, "gogh", "user/cat", create_pr=True)
    assert hub.repositories["user/cat"].find("main") == first.commit
    assert online(fetch, "user/cat", revision="refs/pr/1") == (online(digest, "gogh"), asked)


# --- what the repository holds ---


def test_twins_load_in_stock_diffusers_and_go_with_their_adapter(hub, online):
    online(push, "cat", "user/cat", twin=True)
    assert set(hub.files("user/cat")) == ALWAYS | {"pytorch_lora_weights.safetensors", "cat_kohya.safetensors"}
    far, nothing = online(stock_lora, "user/cat")
    assert far < AGREE < 0.05 < nothing
    card = hub.files("user/cat")["README.md"].decode()
    assert "- lora\n" in card and "add up" in card and "cat_kohya.safetensors" in card
    hub.repositories["user/cat"].commit(
        hub.files("user/cat") | {"notes.txt": b"mine", "other/x_kohya.safetensors": b""}
    )
    online(push, "gogh", "user/cat")
    assert set(hub.files("user/cat")) == ALWAYS | {"notes.txt", "other/x_kohya.safetensors"}
    assert "lora" not in hub.files("user/cat")["README.md"].decode()


def test_pictures_are_shown(hub, online, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    images = {"a cat, erased": tmp_path / "a.png", "a dog": Image.new("RGB", (8, 8), "blue")}
    online(push, "cat", "user/cat", images=images)
    card = hub.files("user/cat")["README.md"].decode()
    shown = re.findall(r"url: (images/\S+)", card)
    assert len(shown) == 2 and "<Gallery />" in card and "text: a cat, erased" in card
    colours = [Image.open(io.BytesIO(hub.files("user/cat")[path])).getpixel((0, 0)) for path in shown]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    online(push, "cat", "user/cat", images={"a dog": tmp_path / "a.png"})  # again: replaced, not doubled
    assert re.findall(r"url: (images/\S+)", hub.files("user/cat")["README.md"].decode()) == shown
    for bad in (tmp_path / "none.png", __file__):
        assert "no picture at" in refused(online, push, "cat", "user/cat", images={"x": bad})


THEIRS = """---
license: cc-by-4.0
tags:
- art
- erasure
language: en
model-index:
- name: x
  results: []
thumbnail: null
base_model: first/model
---
# My erasure

Made with love.
"""


def test_no_field_of_a_card_is_lost(hub, online):
    online(push, "cat", "user/cat")
    hub.repositories["user/cat"].commit(hub.files("user/cat") | {"README.md": THEIRS.encode()})
    for name in ("cat", "gogh", "gogh"):
        online(push, name, "user/cat")
        card = hub.files("user/cat")["README.md"].decode()
        for kept in (
            "license: cc-by-4.0",
            "- art\n",
            "language: en",
            "results: []",
            "thumbnail: null",
            "# My erasure\n\nMade with love.",
        ):
            assert kept in card
        for added in (
            "base_model:\n- first/model\n- maker/model\n",
            "base_model_relation: adapter",
            "- concept-erasure\n",
            "Not tested",
        ):
            assert card.count(added) == 1
        assert card.count("# Erasure: ") == 1 and card.count("- erasure\n") == 1 and online(digest, name) in card
    assert 'load_erasure(pipe, "user/cat")' in card
    online(push, "cat", "user/cat", license="mit")  # said now, in so many words
    assert "license: mit" in hub.files("user/cat")["README.md"].decode()


def test_a_card_goes_with_its_adapter(hub, online):
    online(push, "cat", "user/cat", license="mit", images={"a": Image.new("RGB", (8, 8))})
    hub.repositories["user/cat"].commit(
        hub.files("user/cat") | {"README.md": hub.files("user/cat")["README.md"] + b"\nThanks to all.\n"}
    )
    online(move, "user/cat", "other/cat")
    card = hub.files("other/cat")["README.md"].decode()
    assert "license: mit" in card and "Thanks to all." in card
    assert "widget" not in card and 'load_erasure(pipe, "other/cat")' in card  # the pictures stayed where they are


def test_a_card_that_cannot_be_read_stops_the_push(hub, online):
    online(push, "cat", "user/cat")
    for broken in (b"---\na: [\n---\n", b"---\n- a\n---\n", b"---\n\xff: 1\n---\n"):
        hub.repositories["user/cat"].commit(hub.files("user/cat") | {"README.md": broken})
        was = hub.files("user/cat")
        refused(online, push, "gogh", "user/cat")
        assert hub.files("user/cat") == was


# --- by command ---


def test_commands(hub, online, tmp_path):
    model, cat, report = str(tmp_path / "model"), str(tmp_path / "cat"), tmp_path / "report"
    online(save_model, model)
    assert online(command, "erase", model, "cat", "--target", "tree", "--out", cat)[0] == 0
    Image.new("RGB", (8, 8)).save(tmp_path / "a=b.png")
    report.mkdir()
    share = {"value": 0.01, "low": 0.0, "high": 0.03, "n": 160}
    made = ErasureAdapter.from_pretrained(cat)
    trial = {"name": "cat", "adapter": {"digest": made.digest}}
    trial["dimensions"] = [{"title": "the concept", "should_be": "gone", "share": share}]
    numbers = {"suite": {"name": "emoji"}, "trials": [trial], "not_tested": ["other languages"]}
    (report / "report.json").write_text(json.dumps(numbers))
    words = ["--report", str(report), "--image", f"a cat={tmp_path / 'a=b.png'}", "--license", "mit", "--private"]
    status, said = online(command, "push", cat, "user/cat", *words)
    assert status == 2 and "no picture" in said  # PROMPT=FILE is divided at the last =
    words[3] = f"a cat = dog={tmp_path / 'ab.png'}"
    (tmp_path / "a=b.png").rename(tmp_path / "ab.png")
    status, said = online(command, "push", cat, "user/cat", *words)
    assert status == 0 and hub.repositories["user/cat"].find("main") in said
    files = hub.files("user/cat")
    assert len(files) == 7 and hub.repositories["user/cat"].private
    assert b"| the concept | gone | 1.0% | 0.0%" in files["README.md"] and b"license: mit" in files["README.md"]
    status, said = online(command, "load-check", model, "user/cat")
    assert status == 0 and "in force (map) on unet: cat" in said and hub.repositories["user/cat"].find("main") in said
    assert "digest" in online(command, "show", "user/cat@main")[1]
    pulled = tmp_path / "pulled"
    status, said = online(command, "pull", "user/cat", "--out", str(pulled))
    assert status == 0 and hub.repositories["user/cat"].find("main") in said
    there = {p.relative_to(pulled).as_posix(): p.read_bytes() for p in pulled.rglob("*") if p.is_file()}
    assert there == {name: data for name, data in files.items() if name != ".gitattributes"}
    assert "there already" in online(command, "pull", "user/cat", "--out", str(pulled))[1]
    status, said = online(command, "pull", "user/nobody", "--out", str(tmp_path / "x"), HF_TOKEN="hf_wrong")
    assert status == 2 and said.startswith("error: ") and not (tmp_path / "x").exists()
    assert online(command, "pull", cat, "--out", str(tmp_path / "x"))[0] == 2


def test_a_repository_cannot_write_elsewhere(hub, online, tmp_path):
    online(push, "cat", "user/cat")
    bad = {
        "images/../../../evil.png": b"x",
        "../evil.png": b"x",
        "images/a/../../b_kohya.safetensors": b"x",
        "run.py": b"x",
    }
    hub.repositories["user/cat"].commit(hub.files("user/cat") | bad)
    online(command, "pull", "user/cat", "--out", str(tmp_path / "deep" / "er" / "cat"))
    found = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert found <= {"README.md", "erasure.safetensors", "erasure_config.json"}
