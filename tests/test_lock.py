"""Lock files and signatures: a set is what was written down, by whom it was signed, or it is refused."""

import json
import shutil

import pytest
import torch
from attaching import adapter, forward, look
from conftest import make_pipe
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from diffusers_erase import (
    EraseError,
    ErasureAdapter,
    ErasurePolicy,
    MismatchError,
    disable_erasure,
    enforce_policy,
    erasing,
    erasure_status,
    load_erasure,
    lock_erasures,
    release_policy,
    set_erasures,
    sign_erasure,
    unload_erasure,
)


@pytest.fixture(scope="module")
def home(tokenizer):
    return make_pipe(tokenizer)


@pytest.fixture
def clean(home):
    """The pipeline of this file, clean before and after."""
    bits, before = look(home.unet), forward(home)
    yield home
    unload_erasure(home)
    assert look(home.unet) == bits and torch.equal(forward(home), before)


@pytest.fixture
def saved(home, tmp_path):
    for name in ("cat", "gogh"):
        adapter(home, name).save_pretrained(tmp_path / "set" / name)
    return tmp_path / "set"


def refused(pipe, source, message, kind=MismatchError, **options):
    before = forward(pipe)
    with pytest.raises(kind, match=message) as caught:
        load_erasure(pipe, source, **options)
    assert "\n" not in str(caught.value) and torch.equal(forward(pipe), before)


# --- lock files ---


def test_a_lock_file_brings_back_the_set(clean, saved, tmp_path):
    load_erasure(clean, [saved / "gogh", saved / "cat"], ["b", "a"], strength=0.8)
    requested, erased = erasure_status(clean).requested, forward(clean)
    path = lock_erasures(clean, saved / "erasures.lock")
    assert [e["source"] for e in json.loads(path.read_text())["erasures"]] == [
        "cat",
        "gogh",
    ]  # relative: both can move
    unload_erasure(clean)
    shutil.move(saved, tmp_path / "elsewhere")
    load_erasure(clean, str(tmp_path / "elsewhere" / "erasures.lock"))
    now = erasure_status(clean).requested
    assert torch.equal(forward(clean), erased)
    assert {n: e | {"origin": ""} for n, e in now.items()} == {n: e | {"origin": ""} for n, e in requested.items()}


def test_only_what_is_in_force_and_has_a_place_is_locked(clean, saved, tmp_path):
    load_erasure(clean, [saved / "cat", adapter(clean, "ship")])
    with pytest.raises(EraseError, match="'ship' was made here"):
        lock_erasures(clean, tmp_path / "erasures.lock")
    unload_erasure(clean)
    load_erasure(clean, saved / "cat")
    with pytest.raises(EraseError, match=r"ends in \.lock"):
        lock_erasures(clean, tmp_path / "erasures.json")
    disable_erasure(clean)
    with pytest.raises(EraseError, match="no erasure is in force"):
        lock_erasures(clean, tmp_path / "erasures.lock")
    assert list(tmp_path.glob("*.lock")) == []


EDITS = {
    "a digest": (lambda e: e | {"digest": "0" * 64}, "it was replaced"),
    "another place": (lambda e: e | {"source": "gogh"}, "it was replaced"),
    "no place": (lambda e: e | {"source": "nowhere"}, "no erasure at"),
    "a way out": (lambda e: e | {"subfolder": "../gogh"}, "relative path inside"),
    "a branch": (lambda e: e | {"source": "user/cat", "commit": "main"}, "40 hex digits"),
    "a path with a commit": (lambda e: e | {"commit": "0" * 40}, "40 hex digits"),
    "a strength": (lambda e: e | {"strength": 2}, "between 0 and 1"),
    "a field too many": (lambda e: e | {"trust": True}, "exactly the fields"),
    "a field too few": (lambda e: {k: v for k, v in e.items() if k != "digest"}, "exactly the fields"),
    "a number for a name": (lambda e: e | {"name": 3}, "exactly the fields"),
    "an entry that is none": (lambda e: "cat", "exactly the fields"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_lock_file_is_refused(clean, saved, case):
    edit, message = EDITS[case]
    load_erasure(clean, saved / "cat")
    path = lock_erasures(clean, saved / "erasures.lock")
    unload_erasure(clean)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data))
    load_erasure(clean, path)  # control: written otherwise it says the same
    unload_erasure(clean)
    path.write_text(json.dumps(data | {"erasures": [edit(data["erasures"][0])]}))
    refused(clean, path, message, EraseError)


def test_what_is_no_lock_file_is_refused(clean, saved):
    path = saved / "erasures.lock"
    refused(clean, path, "no lock file at", EraseError)
    for text in ("", "[]", "{", '{"format": 2, "erasures": []}', '{"format": 1}', '{"format": 1, "erasures": {}}'):
        path.write_text(text)
        refused(clean, path, "lock")
    path.write_text('{"format": 1, "erasures": []}')
    refused(clean, path, "no erasure given", EraseError)


def test_a_lock_file_has_the_last_word(clean, saved):
    load_erasure(clean, saved / "cat")
    path = lock_erasures(clean, saved / "erasures.lock")
    unload_erasure(clean)
    for options in ({"strength": 0.5}, {"revision": "main"}, {"subfolder": "x"}):
        refused(clean, path, "pins places and strengths", EraseError, **options)
    refused(clean, path, "without adapter_name", EraseError, adapter_name="mine")
    refused(clean, [path, path], "as many different names", EraseError)
    load_erasure(clean, [path, saved / "gogh"])
    assert set(erasure_status(clean).requested) == {"cat", "van-gogh"}


def test_an_adapter_that_changed_under_its_lock_is_refused(clean, saved):
    load_erasure(clean, saved / "cat")
    path = lock_erasures(clean, saved / "erasures.lock")
    unload_erasure(clean)
    adapter(clean, "gogh").save_pretrained(saved / "cat")
    refused(clean, path, "it was replaced")


def test_a_policy_of_a_lock_file_holds_these_bits(clean, saved):
    load_erasure(clean, [saved / "gogh", saved / "cat"], strength=0.8)
    lock = lock_erasures(clean, saved / "erasures.lock")
    policy = ErasurePolicy.from_lock(lock, optional=["ship"])
    assert set(policy.mandatory) == {"van-gogh", "cat"}
    load_erasure(clean, adapter(clean, "ship"), residual_max=None)
    set_erasures(clean, ["van-gogh", "cat"])
    enforce_policy(clean, policy)
    with erasing(clean, []) as receipt:
        assert {name: e["digest"] for name, e in receipt.adapters.items()} == {
            name: pin.digest for name, pin in policy.pinned.items()
        }
    for names, strengths in ((["van-gogh"], None), (["van-gogh", "cat"], 0.7)):
        with pytest.raises(EraseError, match="with strength 0.8"):
            set_erasures(clean, names, strengths)
    release_policy(clean)
    set_erasures(clean, ["van-gogh", "cat"], 0.7)  # control: weaker than the file says
    with pytest.raises(EraseError, match="with strength 0.8"):
        enforce_policy(clean, policy)


def test_a_policy_of_a_lock_file_refuses_another_adapter_of_the_name(clean, saved):
    load_erasure(clean, saved / "cat")
    lock = lock_erasures(clean, saved / "erasures.lock")
    unload_erasure(clean)
    load_erasure(clean, adapter(clean, "uce"), "cat")
    with pytest.raises(MismatchError, match="the lock file of this policy pins") as caught:
        enforce_policy(clean, ErasurePolicy.from_lock(lock))
    assert "\n" not in str(caught.value)
    unload_erasure(clean)  # nothing was enforced
    with pytest.raises(EraseError, match="no lock file at"):
        ErasurePolicy.from_lock(saved / "none.lock")
    entries = json.loads(lock.read_text())
    lock.write_text(json.dumps(entries | {"erasures": entries["erasures"] * 2}))
    with pytest.raises(MismatchError, match="two erasures called 'cat'"):
        ErasurePolicy.from_lock(lock)


# --- signatures ---


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """PEM files: a private key, its public key, somebody else's, one with a password, and one of another kind."""
    folder = tmp_path_factory.mktemp("keys")
    plain = serialization.NoEncryption()
    made = {"mine": ed25519.Ed25519PrivateKey.generate(), "other": ed25519.Ed25519PrivateKey.generate()}
    made["curve"] = ec.generate_private_key(ec.SECP256R1())
    for name, key in made.items():
        for locked, how in (("", plain), (".locked", serialization.BestAvailableEncryption(b"secret"))):
            data = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
            (folder / f"{name}{locked}.pem").write_bytes(data)
        public = key.public_key()
        data = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub.pem").write_bytes(data)
    return folder


def test_a_signed_adapter_is_held_to_its_signer(clean, saved, keys):
    folder = saved / "cat"
    refused(clean, folder, "is not signed", public_key=keys / "mine.pub.pem")
    signature = sign_erasure(folder, keys / "mine.pem")
    assert signature == folder / "erasure.sig"
    load_erasure(clean, folder, public_key=keys / "mine.pub.pem")
    unload_erasure(clean)
    refused(clean, folder, "no signature of this adapter", public_key=keys / "other.pub.pem")
    refused(clean, [folder, saved / "gogh"], "is not signed", public_key=keys / "mine.pub.pem")
    load_erasure(clean, folder)  # nobody asked
    unload_erasure(clean)
    sign_erasure(folder, keys / "other.locked.pem", "secret")
    load_erasure(clean, folder, public_key=keys / "other.pub.pem")


def test_a_signature_is_of_one_adapter(clean, saved, keys):
    """What a digest cannot tell: somebody changed the file and wrote a new digest."""
    sign_erasure(saved / "cat", keys / "mine.pem")
    shutil.copy(saved / "cat" / "erasure.sig", saved / "gogh")
    refused(clean, saved / "gogh", "no signature of this adapter", public_key=keys / "mine.pub.pem")
    kept = ErasureAdapter.from_pretrained(saved / "cat")
    kept.save_pretrained(saved / "cat")  # the same again: its signature stays good
    load_erasure(clean, saved / "cat", public_key=keys / "mine.pub.pem")
    adapter(clean, "gogh").save_pretrained(saved / "cat")  # another one: the signature goes
    assert not (saved / "cat" / "erasure.sig").exists()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"algorithm": "none", "signature": ""}', '{"algorithm": "ed25519"}']
)
def test_a_garbled_signature_is_refused(clean, saved, keys, text):
    path = sign_erasure(saved / "cat", keys / "mine.pem")
    path.write_text(text)
    refused(clean, saved / "cat", "signature|JSON", public_key=keys / "mine.pub.pem")


def test_every_byte_of_a_signature_counts(saved, keys):
    path = sign_erasure(saved / "cat", keys / "mine.pem")
    data = path.read_bytes()
    for place in range(len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(EraseError):
            ErasureAdapter.from_pretrained(saved / "cat", public_key=keys / "mine.pub.pem")
    path.write_bytes(data)
    assert ErasureAdapter.from_pretrained(saved / "cat", public_key=keys / "mine.pub.pem")


def test_keys_that_are_none(clean, saved, keys, tmp_path):
    for key, message in (
        ("none.pem", "no key at"),
        ("mine.pub.pem", "no private key"),
        ("curve.pem", "another kind"),
        ("mine.locked.pem", "no private key"),
    ):
        with pytest.raises(EraseError, match=message):
            sign_erasure(saved / "cat", keys / key)
    with pytest.raises(EraseError, match="no private key"):
        sign_erasure(saved / "cat", keys / "mine.locked.pem", "wrong")
    assert not (saved / "cat" / "erasure.sig").exists()
    sign_erasure(saved / "cat", keys / "mine.pem")
    for key, message in (("none.pem", "no key at"), ("mine.pem", "no public key"), ("curve.pub.pem", "another kind")):
        refused(clean, saved / "cat", message, EraseError, public_key=keys / key)
    refused(
        clean, adapter(clean, "cat"), "is for adapters that are read", EraseError, public_key=keys / "mine.pub.pem"
    )


def test_a_damaged_adapter_is_not_signed(saved, keys):
    path = saved / "cat" / "erasure.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(MismatchError):
        sign_erasure(saved / "cat", keys / "mine.pem")
