"""The loader against hostile files: whatever is in a file, it is an adapter, or an `EraseError` in one line."""

import json
import os
import pickle
import random
import resource
import struct
import tracemalloc

import pytest
import torch
from attaching import adapter
from conftest import make_pipe
from safetensors.torch import save_file

from diffusers_erase import EraseError, ErasureAdapter, MismatchError, hub

FILES = ("erasure.safetensors", "erasure_config.json", "README.md")
MUTATED = 10_000
SAMPLE = 300
SLICES = 10


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A saved adapter with several kinds of rows."""
    return adapter(make_pipe(tokenizer), "ship").save_pretrained(tmp_path_factory.mktemp("whole"))


def header(data):
    """(bytes of the JSON header, what follows)."""
    size = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + size], data[8 + size :]


def packed(text, rest):
    return struct.pack("<Q", len(text)) + text + rest


def flipped(data, dice, at=None):
    place = dice.randrange(len(data)) if at is None else at
    return data[:place] + bytes([data[place] ^ dice.randrange(1, 256)]) + data[place + 1 :]


VALUES = [
    None,
    True,
    -1,
    0,
    1e308,
    2**63,
    10**30,
    "",
    "x",
    "\0",
    "../../x",
    [],
    {},
    [[]],
    [None] * 9,
    {"a": 1},
    "é\u2028",
]


def changed(value, dice):
    """JSON with one value somewhere in it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        if dice.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: changed(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.8:
        place = dice.randrange(len(value))
        middle = [[], [value[place]] * 2, [changed(value[place], dice)]][min(2, dice.randrange(8))]
        return value[:place] + middle + value[place + 1 :]
    return dice.choice(VALUES)


def with_head(data, dice, edit):
    """The file with another head, sealed again as its author could: what is behind the checksum is reached too."""
    text, rest = header(data)
    outer = json.loads(text)
    head = json.loads(outer["__metadata__"]["erasure"])
    head = edit(head, dice)
    if isinstance(head, dict):
        head.pop("checksum", None)
        head["checksum"] = hub.digest(head)
    outer["__metadata__"]["erasure"] = hub.canonical(head)
    return packed(json.dumps(outer, separators=(",", ":"), ensure_ascii=False).encode(), rest)


def with_header(data, dice):
    text, rest = header(data)
    outer = changed(json.loads(text), dice)
    return packed(json.dumps(outer, separators=(",", ":"), ensure_ascii=False).encode(), rest)


WAYS = (
    lambda d, dice: flipped(d, dice),
    lambda d, dice: flipped(d, dice, dice.randrange(8)),
    lambda d, dice: flipped(d, dice, 8 + dice.randrange(len(header(d)[0]))),
    lambda d, dice: d[: dice.randrange(len(d))],
    lambda d, dice: d + dice.randbytes(dice.randrange(1, 99)),
    lambda d, dice: d[: (i := dice.randrange(len(d)))] + d[i + dice.randrange(1, 99) :],
    lambda d, dice: d[: (i := dice.randrange(len(d)))] + dice.randbytes(dice.randrange(1, 99)) + d[i:],
    lambda d, dice: struct.pack("<Q", dice.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(d), len(d) - 8])) + d[8:],
    with_header,
    lambda d, dice: with_head(d, dice, changed),
    lambda d, dice: with_head(d, dice, lambda h, dice: changed(changed(h, dice), dice)),
    lambda d, dice: dice.randbytes(dice.randrange(0, 4000)),
)


def attack(folder, whole, seed):
    """One mutated folder; the error with which it was refused, or None where it says what the whole one says."""
    dice = random.Random(seed)
    target = FILES[0] if dice.random() < 0.85 else FILES[1]
    for name in FILES:
        (folder / name).write_bytes(whole[name])
    if target == FILES[0] and dice.random() < 0.7:
        (folder / FILES[1]).unlink()  # the file alone
    mutated = dice.choice(WAYS)(whole[target], dice) if target == FILES[0] else flipped(whole[target], dice)
    (folder / target).write_bytes(mutated)
    try:
        found = ErasureAdapter.from_pretrained(folder)
    except EraseError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000, str(error)[:300]
        return error
    assert found.digest == DIGEST[0]
    return None


DIGEST = []


def fuzz(whole, folder, seeds):
    DIGEST[:] = [ErasureAdapter.from_pretrained(whole).digest]
    data = {name: (whole / name).read_bytes() for name in FILES}
    passed = [seed for seed in seeds if attack(folder, data, seed) is None]
    unlike = sum(1 for _ in seeds)
    assert len(passed) < 0.2 * unlike  # blanks in the config, and edits of the head that change nothing
    assert {path.name for path in folder.iterdir()} <= set(FILES)


def test_a_seeded_sample_of_mutated_files(whole, tmp_path):
    fuzz(whole, tmp_path, range(SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SLICES))
def test_ten_thousand_mutated_files(whole, tmp_path, part):
    share = MUTATED // SLICES
    fuzz(whole, tmp_path, range(SAMPLE + part * share, SAMPLE + (part + 1) * share))


def regions(data):
    """Places in every region of a file: each byte of the length, of the header's ends and padding, and of the rows' ends."""
    text, rest = header(data)
    start = 8 + len(text)
    padding = len(text) - len(text.rstrip(b" "))
    spread = range(8, start, max(1, len(text) // 150))
    return sorted(
        {
            *range(8),
            *spread,
            *range(start - padding - 9, start + 9),
            *range(start, len(data), len(rest) // 60),
            len(data) - 1,
        }
    )


def test_no_byte_of_the_file_can_change(whole, tmp_path):
    """Every region, and every other value that JSON would read alike: blanks for blanks, letters of escapes."""
    data = (whole / FILES[0]).read_bytes()
    path = tmp_path / FILES[0]
    for place in regions(data):
        for other in {data[place] ^ 1, data[place] ^ 0x20, 0x20, 0x09, 0x0A, 0x0D, 0, 0xFF} - {data[place]}:
            path.write_bytes(data[:place] + bytes([other]) + data[place + 1 :])
            with pytest.raises(EraseError):
                ErasureAdapter.from_pretrained(tmp_path)
    path.write_bytes(data)
    ErasureAdapter.from_pretrained(tmp_path)  # control


def test_a_header_padded_otherwise_is_refused(whole, tmp_path):
    text, rest = header((whole / FILES[0]).read_bytes())
    for padded in (
        text + b"\t" * 8,
        b" " * 8 + text,
        text.replace(b'":', b'": ', 1) + b" " * 7,
        text.rstrip() + b"\n" * 8,
    ):
        (tmp_path / FILES[0]).write_bytes(packed(padded, rest))
        with pytest.raises(MismatchError):
            ErasureAdapter.from_pretrained(tmp_path)
    (tmp_path / FILES[0]).write_bytes(packed(text, rest))
    ErasureAdapter.from_pretrained(tmp_path)  # control


LIES = {
    "a header of 2^63 bytes": lambda d: struct.pack("<Q", 2**63) + d[8:],
    "a header as long as the file": lambda d: struct.pack("<Q", len(d) - 8) + d[8:],
    "rows without end": lambda d: with_head(d, None, lambda h, _: h | {"rows": 2**40, "width": 2**20}),
    "tensors of a terabyte": lambda d: packed(
        json.dumps(
            {"keys": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}}, separators=(",", ":")
        ).encode(),
        b"",
    ),
    "tensors over each other": lambda d: packed(
        json.dumps(
            {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}, separators=(",", ":")
        ).encode(),
        bytes(16),
    ),
    "shapes that overflow": lambda d: packed(
        json.dumps(
            {"keys": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}, separators=(",", ":")
        ).encode(),
        b"",
    ),
    "brackets without end": lambda d: packed(b"[" * 100_000, b""),
    "a number without end": lambda d: packed(b"9" * 100_000, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_takes_no_memory(whole, tmp_path, lie):
    (tmp_path / FILES[0]).write_bytes(LIES[lie]((whole / FILES[0]).read_bytes()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    with pytest.raises(EraseError):
        ErasureAdapter.from_pretrained(tmp_path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 20 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 2**10  # KiB


def test_a_file_too_long_is_not_read(whole, tmp_path):
    path = tmp_path / FILES[0]
    path.write_bytes((whole / FILES[0]).read_bytes())
    os.truncate(path, hub.MAX_BYTES + 1)  # sparse
    with pytest.raises(MismatchError, match="at most"):
        ErasureAdapter.from_pretrained(tmp_path)
    path.write_bytes((whole / FILES[0]).read_bytes())
    (tmp_path / FILES[1]).write_bytes(b"")
    os.truncate(tmp_path / FILES[1], hub.MAX_HEAD + 1)
    with pytest.raises(MismatchError, match="at most"):
        ErasureAdapter.from_pretrained(tmp_path)


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize(
    "name", ["erasure.safetensors", "adapter.bin", "adapter.pt", "erasure_config.json", "README.md"]
)
def test_nothing_in_a_file_is_run(whole, tmp_path, name):
    place = str(tmp_path / "ran")
    for dump in (lambda thing, path: path.write_bytes(pickle.dumps(thing)), torch.save):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        if name in FILES[1:]:
            (folder / FILES[0]).write_bytes((whole / FILES[0]).read_bytes())
        dump(Bomb(place), folder / name)
        source = folder if name in FILES else folder / name
        if name == "README.md":  # read as text for people, whatever it is
            ErasureAdapter.from_pretrained(source)
        else:
            with pytest.raises(EraseError):
                ErasureAdapter.from_pretrained(source)
        assert not os.path.exists(place)
    pickle.loads(pickle.dumps(Bomb(place)))
    assert os.path.exists(place)  # control: it would have


def test_tensor_names_are_only_names(whole, tmp_path):
    rows, metadata = hub.read_tensors(whole / FILES[0])
    for name in ("../evil", "/etc/passwd", "a\0b", "__class__"):
        save_file(rows | {name: torch.zeros(1)}, tmp_path / FILES[0], metadata=metadata)
        with pytest.raises(EraseError):
            ErasureAdapter.from_pretrained(tmp_path)
    assert [p.name for p in tmp_path.parent.iterdir() if "evil" in p.name] == []
