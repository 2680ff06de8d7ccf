"""What the benchmarks in pictures share: cases drawn before and after an erasure, what is counted of them, results line by line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_erase import ErasureAdapter, load_erasure, unload_erasure, world
from diffusers_erase.bench import images
from diffusers_erase.bench.metrics import Mean, Share, clustered
from diffusers_erase.bench.suites import Prompt, Settings, Suite


class Case(NamedTuple):
    """A picture to draw before and after, and the part it plays: concept, paraphrase, neighbour or unrelated."""

    role: str
    prompt: Prompt


SHARES = {
    "concept left": ("concept", "own"),
    "paraphrases left": ("paraphrase", "own"),
    "neighbours kept": ("neighbour", "object"),
    "unrelated kept": ("unrelated", "object"),
    "styles kept": ("unrelated", "style"),
}
"""What is counted: of which pictures, and whether it is the erased thing itself, the object or the style that is looked for."""


def cases(role: str, drawn: Iterable[tuple]) -> list[Case]:
    """A case for each (object, style, seed), or (object, style, seed, another word for the object)."""
    return [Case(role, Prompt(world.prompt(*(word or [o]), s), seed, o, s)) for o, s, seed, *word in drawn]


def draw(pipe: Any, adapter: ErasureAdapter, asked: Sequence[Case], pictures: Path) -> tuple[list[Path], list[Path]]:
    """Files of the cases' pictures without and with the adapter; what lies in `pictures` is not drawn again."""
    settings = Settings(world.STEPS, world.GUIDANCE)
    suite = Suite("paired", "1", "this file", "Apache-2.0", tuple(case.prompt for case in asked), {}, settings)
    before = images.generate(pipe, suite, pictures)
    load_erasure(pipe, adapter, residual_max=None)
    try:
        return before, images.generate(pipe, suite, pictures)
    finally:
        unload_erasure(pipe)


def count(
    asked: Sequence[Case], before: Sequence[tuple], after: Sequence[tuple], concept: str, shares: Mapping[str, tuple]
) -> dict[str, list[tuple[bool, int]]]:
    """Of each share the cases that were right before: whether they are right after, and which they are.

    Args:
        before, after: what the judge saw in each picture: object, style, and whether there is a seal, if that is asked for.
    """
    found = {}
    for share, (role, what) in shares.items():
        own = "style" if concept in world.STYLES else "object"
        k = ("object", "style", "seal").index(own if what == "own" else what)
        wanted = [(case.prompt.shows, case.prompt.style, True)[k] for case in asked]
        found[share] = [
            (after[i][k] == wanted[i], i)
            for i, case in enumerate(asked)
            if case.role == role and wanted[i] and before[i][k] == wanted[i]
        ]
    return found


def told(concepts: Mapping[str, Share] | Mapping[str, Mean], form: str = "{:.0%}") -> str:
    """A number over concepts with its interval by concept; of two, where there is nothing to resample, each one's own."""
    known = {name: part for name, part in concepts.items() if part.estimate().n}
    if not known:
        return "–"
    n = sum(part.estimate().n for part in known.values())
    if len(known) < 3:
        each = ", ".join(f"{name} {form.format(part.estimate().value)}" for name, part in known.items())
        return f"{each}, n = {n:,}"
    whole = clustered({name: (part,) for name, part in known.items()}, lambda part: part.estimate())
    value, low, high = (form.format(number) for number in (whole.value, whole.low, whole.high))
    return f"{value} [{low}, {high}], n = {n:,}"


def read(file: Path) -> list[dict[str, Any]]:
    """The results in a file of one JSON object a line; none where there is no file yet."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(file: Path, entry: Mapping[str, Any]) -> None:
    """Add a result, so that a killed run goes on after it."""
    with file.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")
