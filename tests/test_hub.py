"""Files: what is saved comes back equal; whatever was damaged, shortened or edited is refused in one line, and nothing is attached."""

import json
import shutil
import struct

import pytest
import torch
from attaching import adapter, forward, look
from conftest import make_pipe
from safetensors.torch import load_file, save_file

from diffusers_erase import EraseError, ErasureAdapter, MismatchError, erase, hub, load_erasure
from diffusers_erase.adapter import TENSORS


@pytest.fixture(scope="module")
def home(tokenizer):
    """One pipeline for the whole file: nothing here changes it (every test that loads checks that it stayed clean)."""
    return make_pipe(tokenizer)


@pytest.fixture
def saved(home, tmp_path):
    """The folder of a saved adapter with preserved rows, coreferences and several words."""
    return adapter(home, "ship").save_pretrained(tmp_path / "ship")


def head_of(folder):
    with open(folder / hub.WEIGHTS, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(json.loads(file.read(size))["__metadata__"]["erasure"])


def rewrite(folder, head=None, tensors=None, seal=True):
    """The file again with another head or other tensors, as somebody with a text editor and our source would write it."""
    head = dict(head_of(folder) if head is None else head)
    if seal:
        head.pop("checksum", None)
        head["checksum"] = hub.digest(head)
    weights = hub.read_tensors(folder / hub.WEIGHTS)[0] if tensors is None else tensors
    save_file(weights, folder / hub.WEIGHTS, metadata={"erasure": hub.canonical(head)})
    (folder / hub.CONFIG).unlink(missing_ok=True)


def refused(pipe, source, message="", kind=MismatchError):
    clean, before = look(pipe.unet), forward(pipe)
    with pytest.raises(kind, match=message) as caught:
        load_erasure(pipe, source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    assert look(pipe.unet) == clean and torch.equal(forward(pipe), before)


# --- what is saved comes back ---


@pytest.mark.parametrize("name", ["cat", "gogh", "ship", "pair", "gated", "uce"])
def test_round_trip_gives_equal_tensors_and_digest(home, tmp_path, name):
    made = adapter(home, name)
    folder = made.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "erasure.safetensors", "erasure_config.json"]
    shutil.copy(folder / hub.WEIGHTS, tmp_path / "alone.safetensors")
    for source in (folder, str(folder), folder / hub.WEIGHTS, tmp_path / "alone.safetensors"):
        found = ErasureAdapter.from_pretrained(source)
        assert found.digest == made.digest
        assert all(torch.equal(getattr(found.edit, n), getattr(made.edit, n)) for n in TENSORS)
        assert (found.edit.labels, found.edit.pack, found.recipes, found.encoder) == (
            made.edit.labels,
            made.edit.pack,
            made.recipes,
            made.encoder,
        )


def test_the_same_adapter_gives_the_same_bytes(home, tmp_path):
    first = adapter(home, "pair").save_pretrained(tmp_path / "1")
    again = ErasureAdapter.from_pretrained(first).save_pretrained(tmp_path / "2")
    for name in (hub.WEIGHTS, hub.CONFIG, "README.md"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    other = adapter(home, "cat").save_pretrained(tmp_path / "2")  # over it
    assert (first / hub.WEIGHTS).read_bytes() != (other / hub.WEIGHTS).read_bytes()
    assert ErasureAdapter.from_pretrained(tmp_path / "2").digest == adapter(home, "cat").digest


def test_the_config_tells_people_what_the_file_tells_the_library(saved):
    assert json.loads((saved / hub.CONFIG).read_text(encoding="utf-8")) == head_of(saved)


def test_other_names_in_other_scripts_survive(home, tmp_path):
    made = erase(home, "Łódź “cat”\u2028dog", coreferences=["Кот robot"], method="uce")
    found = ErasureAdapter.from_pretrained(made.save_pretrained(tmp_path))
    assert found.concepts == made.concepts == ("Łódź “cat”\u2028dog",) and found.digest == made.digest


def test_a_file_is_no_place_for_a_folder(home, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EraseError, match="is a file"):
        adapter(home, "cat").save_pretrained(tmp_path / "file")


# --- what was damaged is refused ---


def test_nothing_there(home, tmp_path):
    refused(home, tmp_path / "nowhere", "no erasure at", kind=EraseError)
    refused(home, tmp_path, "no erasure at", kind=EraseError)  # an empty folder
    refused(home, {"lora": 1}, "got dict", kind=EraseError)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated(home, saved, share):
    data = (saved / hub.WEIGHTS).read_bytes()
    (saved / hub.WEIGHTS).write_bytes(data[: int(len(data) * share)])
    refused(home, saved)


def test_longer_than_promised(home, saved):
    with open(saved / hub.WEIGHTS, "ab") as file:
        file.write(b"\0" * 8)
    refused(home, saved)


def test_not_safetensors_at_all(home, saved):
    (saved / hub.WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 100)
    refused(home, saved, "safetensors")
    torch.save({"a": 1}, saved / hub.WEIGHTS)  # a pickle: never read
    refused(home, saved, "safetensors")


def test_a_lora_is_not_an_erasure(home, saved):
    save_file(adapter(home, "cat").to_lora(home), saved / hub.WEIGHTS)
    refused(home, saved, "no erasure in its metadata")


def test_a_flipped_byte_in_the_rows(home, saved):
    data = (saved / hub.WEIGHTS).read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for place in torch.linspace(start, len(data) - 1, 9).long().tolist():
        for mask in (0x01, 0x80):
            (saved / hub.WEIGHTS).write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            refused(home, saved, kind=EraseError)
    (saved / hub.WEIGHTS).write_bytes(data)
    ErasureAdapter.from_pretrained(saved)  # control


def flip_everywhere(folder, name, places):
    """Every one of `places` flipped, the file read, and the error's type returned (None: it loaded)."""
    data = (folder / name).read_bytes()
    for place in places(data):
        for mask in (0x01, 0x10):
            (folder / name).write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            try:
                ErasureAdapter.from_pretrained(folder)
                yield place, mask, None
            except Exception as error:  # noqa: BLE001 - the type is what is asked
                yield place, mask, type(error)
    (folder / name).write_bytes(data)


def test_a_flipped_byte_anywhere_in_the_header(home, saved):
    (saved / hub.CONFIG).unlink()  # the file alone must notice
    whole = ErasureAdapter.from_pretrained(saved).digest

    def places(data):
        header = 8 + struct.unpack("<Q", data[:8])[0]
        return [*range(12), *range(12, header, 7)]

    found = list(flip_everywhere(saved, hub.WEIGHTS, places))
    assert len(found) > 400
    assert [f for f in found if f[2] not in (MismatchError, EraseError)] == []
    assert ErasureAdapter.from_pretrained(saved).digest == whole  # control


def test_a_flipped_byte_in_the_config(home, saved):
    found = list(flip_everywhere(saved, hub.CONFIG, lambda data: range(0, len(data), 29)))
    # A changed blank between JSON's tokens says the same.
    assert {kind for _, _, kind in found} <= {MismatchError, EraseError, None} and sum(
        kind is None for *_, kind in found
    ) < len(found) / 4
    (saved / hub.CONFIG).write_text("[]")
    refused(home, saved, "describes another adapter")
    (saved / hub.CONFIG).write_bytes(b"\xff\xfe{")
    refused(home, saved, "readable JSON")
    (saved / hub.CONFIG).write_text("[" * 100_000)
    refused(home, saved, "readable JSON")


@pytest.mark.parametrize("place", ["concept", "recipe", "residual", "pack", "base_model"])
def test_an_edited_config_is_noticed(home, saved, place):
    config = json.loads((saved / hub.CONFIG).read_text())
    if place == "concept":
        config["labels"][0][0] = "boat"
    elif place in ("recipe", "residual"):
        config["recipes"][0]["residual" if place == "residual" else "concept"] = 0.5 if place == "residual" else "boat"
    else:
        config[place] = "other/model" if place == "base_model" else ["english-1", "0" * 64]
    (saved / hub.CONFIG).write_text(json.dumps(config))
    refused(home, saved, "describes another adapter")


HEADS = {
    "version 2": (lambda h: h | {"format": 2}, "format 2, this version reads 1"),
    "no version": (lambda h: {k: v for k, v in h.items() if k != "format"}, "format None"),
    "version as text": (lambda h: h | {"format": "1"}, "format '1'"),
    "another kind": (lambda h: h | {"kind": "maps"}, "'maps'"),
    "the other kind": (lambda h: h | {"kind": "factors"}, "lacks or garbles"),
    "a label's concept": (
        lambda h: h | {"labels": [["boat", *h["labels"][0][1:]], *h["labels"][1:]]},
        "changed after it was saved",
    ),
    "a label's target": (lambda h: h | {"labels": [[*h["labels"][0][:3], ["pear"], None], *h["labels"][1:]]}, ""),
    "a preserved row moves": (
        lambda h: h | {"labels": [[*label[:3], ["pear"], None] for label in h["labels"]]},
        "labels and offsets",
    ),
    "too few labels": (lambda h: h | {"labels": h["labels"][1:]}, "labels"),
    "a label too short": (lambda h: h | {"labels": [h["labels"][0][:2], *h["labels"][1:]]}, "garbles"),
    "labels are a number": (lambda h: h | {"labels": 3}, "garbles"),
    "a gate appears": (lambda h: h | {"labels": [[*h["labels"][0][:4], [0.7, 0.04]], *h["labels"][1:]]}, "changed"),
    "the recipe's residual": (lambda h: h | {"recipes": [h["recipes"][0] | {"residual": 0.5}]}, "changed"),
    "the recipe's effect": (lambda h: h | {"recipes": [h["recipes"][0] | {"effect": 0.0}]}, "changed"),
    "no recipes": (lambda h: h | {"recipes": []}, "changed"),
    "a recipe without concept": (lambda h: h | {"recipes": [{}]}, "garbles"),
    "a foreign recipe field": (lambda h: h | {"recipes": [h["recipes"][0] | {"run": "me"}]}, "garbles"),
    "the encoder": (lambda h: h | {"encoder": h["encoder"] | {"tokenizer": "0" * 16}}, "changed"),
    "the encoder's states": (lambda h: h | {"encoder": h["encoder"] | {"states": [0.0]}}, "changed"),
    "no encoder": (lambda h: h | {"encoder": None}, "garbles"),
    "another pack": (lambda h: h | {"pack": ["english-1", "0" * 64]}, "changed"),
    "more rows than there are": (lambda h: h | {"rows": 2**40}, "promises"),
    "another width": (lambda h: h | {"width": 768}, "promises"),
    "a digest of nothing": (lambda h: h | {"digest": None}, "None"),
    "a list": (lambda h: [h], "no erasure in its metadata"),
}


@pytest.mark.parametrize("case", HEADS)
def test_an_edited_head_is_refused(home, saved, case):
    edit, message = HEADS[case]
    head = edit(head_of(saved))
    data, _ = hub.read_tensors(saved / hub.WEIGHTS)  # copies: old safetensors map the file that is written over
    if isinstance(head, dict):
        rewrite(saved, head, data, seal=False)
        refused(home, saved)  # by the checksum, or by what is checked before it
        rewrite(saved, head, data)
    else:
        save_file(data, saved / hub.WEIGHTS, metadata={"erasure": hub.canonical(head)})
    refused(home, saved, message, kind=EraseError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "NaN",
        '{"format": NaN}',
        "[" * 50_000,
        '{"format": "\\ud800"}',
        '"' + "9" * 9000 + '"',
        "9" * 9000,
    ],
)
def test_a_head_that_is_no_json_is_refused(home, saved, text):
    save_file(load_file(saved / hub.WEIGHTS), saved / hub.WEIGHTS, metadata={"erasure": text})
    refused(home, saved)


def damaged(tensors, case):
    rows = {name: t.clone() for name, t in tensors.items()}
    if case == "missing row":
        rows = {name: t[1:].contiguous() for name, t in rows.items()}
    elif case == "missing row of one":
        rows["keys"] = rows["keys"][1:].contiguous()
    elif case == "missing tensor":
        del rows["pulled"]
    elif case == "foreign tensor":
        rows["lora_A.weight"] = torch.zeros(2, 2)
    elif case == "no tensors":
        rows = {"other": torch.zeros(1)}
    elif case == "NaN":
        rows["offsets"][0, 3] = float("nan")
    elif case == "infinity":
        rows["strengths"][0] = float("inf")
    elif case == "no strength":
        rows["strengths"][0] = 0
    elif case == "negative strength":
        rows["strengths"][0] *= -1
    elif case == "half precision":
        rows = {name: t.half() for name, t in rows.items()}
    elif case == "double precision":
        rows["keys"] = rows["keys"].double()
    elif case == "whole numbers":
        rows["keys"] = rows["keys"].view(torch.int32)
    elif case == "flat":
        rows["keys"] = rows["keys"].flatten()
    elif case == "swapped":
        rows["keys"], rows["pulled"] = rows["pulled"], rows["keys"]
    elif case == "narrower":
        rows = {name: t[..., :16].contiguous() if t.ndim == 2 else t for name, t in rows.items()}
    elif case == "rows in another order":
        rows = {name: t.flip(0).contiguous() for name, t in rows.items()}
    return rows


@pytest.mark.parametrize(
    "case",
    [
        "missing row", "missing row of one", "missing tensor", "foreign tensor", "no tensors", "NaN", "infinity", "no strength",
        "negative strength", "half precision", "double precision", "whole numbers", "flat", "swapped", "narrower", "rows in another order",
    ],
)  # fmt: skip
def test_other_tensors_than_promised_are_refused(home, saved, case):
    rewrite(saved, tensors=damaged(load_file(saved / hub.WEIGHTS), case))
    refused(home, saved, kind=EraseError)


def test_rewriting_alone_changes_nothing(home, saved):
    """Control of the tests above: the file as they write it, unedited, loads."""
    rewrite(saved)
    assert ErasureAdapter.from_pretrained(saved).digest == adapter(home, "ship").digest


# --- the cache and the model's own pack ---


def test_the_cache_makes_once_and_never_trusts_a_broken_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ERASE_CACHE", str(tmp_path / "new" / "cache"))
    made = []

    def make():
        made.append(1)
        return {"a": torch.arange(6.0).reshape(2, 3)}

    for _ in range(2):
        assert torch.equal(hub.cached("key", make)["a"], torch.arange(6.0).reshape(2, 3))
    assert len(made) == 1
    hub.cached("other", make)
    assert len(made) == 2
    path = tmp_path / "new" / "cache" / "key.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert torch.equal(hub.cached("key", make)["a"], torch.arange(6.0).reshape(2, 3))
        assert path.read_bytes() == whole
    assert len(made) == 6


def test_a_cache_that_cannot_be_written_stops_nobody(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFUSERS_ERASE_CACHE", str(tmp_path / "file" / "cache"))
    assert torch.equal(hub.cached("key", lambda: {"a": torch.ones(2)})["a"], torch.ones(2))


def test_a_model_brings_its_own_pack(home, tmp_path):
    from diffusers import StableDiffusionPipeline

    home.save_pretrained(tmp_path / "model")
    assert hub.own_pack(home) is None
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert hub.own_pack(plain) is None and erase(plain, "cat").edit.pack == "english-1"
    recipe = {
        "name": "pets",
        "prompts": ["a cat", "a dog in the park", "a wolf by the sea"],
        "ridge": 0.1,
        "templates": ["{}", "a photo of {}"],
    }
    (tmp_path / "model" / "erasure_pack.json").write_text(json.dumps(recipe))
    assert hub.own_pack(plain) == tmp_path / "model" / "erasure_pack.json"
    own, general = erase(plain, "cat"), erase(home, "cat")
    assert own.edit.pack == "pets" and general.edit.pack == "english-1"
    given = erase(home, "cat", pack=tmp_path / "model")
    assert given.edit.digest == own.edit.digest and own.recipes[0].templates == ("{}", "a photo of {}")
    (tmp_path / "model" / "erasure_pack.json").write_bytes(b'{"name": "pets\xff"}')
    with pytest.raises(EraseError, match="readable JSON"):
        erase(plain, "cat")
    (tmp_path / "model" / "erasure_pack.json").write_text('{"name": "pets"}')
    with pytest.raises(EraseError, match="not a base pack"):
        erase(plain, "cat")
