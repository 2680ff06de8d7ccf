"""Suites from files that we may not ship: I2P, COCO captions; and the neighbours of a concept in the pipeline's own text space."""

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..edits import same_name
from ..errors import EraseError
from ..text import Encoder
from .suites import ALWAYS, OWN, Prompt, Settings, Suite

CHUNK = 256
"""Words that are encoded at a time: a noun list has eighty thousand."""

SD14 = Settings(steps=50, guidance=7.5, height=512, width=512)


def i2p(
    path: str | Path, *, category: str = "", nudity: float = 0.0, shows: str = "nudity", settings: Settings = SD14
) -> Suite:
    """Inappropriate image prompts (Schramowski et al., arXiv 2211.05105) from the published CSV, each with its own seed.

    Drawn at one setting; the guidance and size that the file gives for each prompt are not used.

    Args:
        path: the CSV, with the columns prompt, sd_seed, categories and nudity_percentage.
        category: only prompts of this category, such as "sexual"; "" for all.
        nudity: only prompts of which at least this percentage of published pictures were nude; ESD and UCE take 50.
        shows: the label that a judge finds in a picture of the concept, such as a detector's.

    Raises:
        EraseError: the file has other columns, or nothing in it is asked for.

    Example:
        >>> suite = i2p("i2p_benchmark.csv", nudity=50)
        >>> evaluate(pipe, erase(pipe, "nudity", coreferences=["naked"]), suite, {"shows": detector}, "out")
    """
    needed = {"prompt", "sd_seed", "categories", "nudity_percentage"}
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if lacking := needed - set(rows.fieldnames or ()):
            raise EraseError(
                f"{path} has no column {min(lacking)!r}: expected I2P's CSV, with {', '.join(sorted(needed))}"
            )
        prompts = [
            Prompt(row["prompt"], int(row["sd_seed"]), shows)
            for row in rows
            if category in ["", *(name.strip() for name in row["categories"].split(","))]
            and float(row["nudity_percentage"] or 0) >= nudity
        ]
    chosen = ", ".join(filter(None, [category, f"nudity from {nudity:g} %" if nudity else ""])) or "all prompts"
    return _suite("i2p", prompts, path, f"{chosen}, each with its published seed, all at one setting", settings)


def coco(path: str | Path, *, n: int = 1000, seed: int = 0, settings: Settings = SD14) -> Suite:
    """Captions of MS COCO from its annotations' JSON: what nobody erased, for text scores and FID to the unedited model.

    Args:
        path: such as `captions_val2014.json`.
        n: how many captions, drawn at random with `seed`, at most one of each image; fewer where the file has fewer.

    Raises:
        EraseError: the file is none, or is empty.

    Example:
        >>> suite = coco("captions_val2014.json", n=1000)
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["annotations"]
        first = {entry["image_id"]: " ".join(entry["caption"].split()) for entry in reversed(found)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EraseError(
            f"{path} is no file of COCO captions ({error!r}): expected annotations with image_id and caption"
        ) from error
    images = random.Random(seed).sample(sorted(first), min(n, len(first)))
    prompts = [Prompt(first[image], int(image) % 2**31, kind="caption") for image in images]
    return _suite(
        "coco",
        prompts,
        path,
        f"{len(prompts)} captions, drawn with seed {seed}; the image's number is the seed",
        settings,
    )


@torch.no_grad()
def pinpoint(
    pipe: Any, concept: str, words: Iterable[str], *, k: int = 100, seeds: Sequence[int] = range(1, 11),
    template: str = "a photo of {}", settings: Settings = SD14,
) -> Suite:  # fmt: skip
    """The `k` of `words` that are nearest to `concept` in the pipeline's text space: HUB's pinpointness (arXiv 2410.05664).

    HUB takes the nouns of WordNet; any list will do. Near is the cosine of the end-of-text states of the bare words.

    Raises:
        EraseError: no word is left beside the concept.

    Example:
        >>> suite = pinpoint(pipe, "Van Gogh", Path("nouns.txt").read_text().split())
    """
    others = list(dict.fromkeys(word for word in words if same_name(word) != same_name(concept)))
    if not others:
        raise EraseError(f"no words beside {concept!r}: expected a list to find its neighbours in")
    encoder = Encoder(pipe)
    ends = torch.cat([_ends(encoder, [concept, *others][i : i + CHUNK]) for i in range(0, len(others) + 1, CHUNK)])
    near = torch.cosine_similarity(ends[1:], ends[:1]).topk(min(k, len(others))).indices.tolist()
    names = [others[i] for i in near]
    prompts = [
        Prompt(template.format(name), seed, name, scope=OWN if name == concept else ALWAYS)
        for name in (concept, *names)
        for seed in seeds
    ]
    found = _suite(
        "pinpoint", prompts, "the text encoder", f"the {len(names)} nearest of {len(others)} words", settings
    )
    return replace(found, relations={concept: {"visual": tuple(names)}})


def _ends(encoder: Encoder, words: Sequence[str]) -> Tensor:
    """The end-of-text states `[n, d]` of bare words."""
    states = encoder.encode(words)
    return torch.stack([states.rows[i, states.end(i)] for i in range(len(words))])


def _suite(name: str, prompts: list[Prompt], source: Any, about: str, settings: Settings) -> Suite:
    if not prompts:
        raise EraseError(f"{source} has no prompt that was asked for: loosen the choice")
    return Suite(name, "your file", str(source), "as the file's", tuple(prompts), {}, settings, about=about)
