"""The demo's suite: a concept of the embedded model, and what an erasure of it should and should not touch."""

from collections.abc import Iterable, Sequence

from .. import world
from ..errors import EraseError
from .suites import Prompt, Settings, Suite

UNRELATED_OBJECTS = 8
SEEDS = (1, 2, 3, 4)


def demo_suite(concept: str, neighbours: int = 4) -> Suite:
    """Every style of `concept` and of its paraphrases, its nearest neighbours, and objects that have nothing to do with it.

    For a style as the concept: objects in it, and the same objects in the other styles.
    """
    if concept in world.STYLES:
        drawn, near = _for_style(concept), ()
    elif concept in world.OBJECTS:
        near = tuple(world.neighbours(concept, neighbours))
        drawn = _for_object(concept, near)
    else:
        known = f"its objects ({', '.join(world.OBJECTS)}) or styles ({', '.join(world.STYLES)})"
        raise EraseError(f"emoji-sd does not know {concept!r}: choose one of {known}")
    return Suite(
        name=f"demo-{concept}", version="1", source="emoji-sd's own words (world/objects.json)", licence="Apache-2.0",
        prompts=tuple(drawn), relations={concept: {"visual": near}}, settings=Settings(world.STEPS, world.GUIDANCE),
    )  # fmt: skip


def _for_object(concept: str, near: Sequence[str]) -> list[Prompt]:
    words = world.paraphrases(concept)[:2]
    said = [(world.prompt(word, style), concept, style) for word in words for style in world.STYLES]
    return [
        *_prompts(_styled([concept]), SEEDS),
        *_prompts(said, SEEDS[:2], kind="paraphrase"),
        *_prompts(_styled(near), SEEDS[:2]),
        *_prompts(_styled(_unrelated([concept, *world.neighbours(concept, 8)])), SEEDS[:1]),
    ]


def _for_style(concept: str) -> list[Prompt]:
    objects = _unrelated([])
    others = [style for style in world.STYLES if style != concept]
    return [
        *_prompts([(world.prompt(o, concept), o, concept) for o in objects], SEEDS),
        *_prompts([(world.prompt(o, style), o, style) for o in objects for style in others], SEEDS[:1]),
    ]


def _prompts(drawn: Iterable[tuple[str, str, str]], seeds: Sequence[int], kind: str = "name") -> list[Prompt]:
    return [Prompt(text, seed, shows, style, kind) for text, shows, style in drawn for seed in seeds]


def _styled(objects: Iterable[str]) -> list[tuple[str, str, str]]:
    return [(world.prompt(o, style), o, style) for o in objects for style in world.STYLES]


def _unrelated(near: Sequence[str]) -> list[str]:
    """Objects spread over the list, which is ordered by kind, without those in `near`."""
    far = [o for o in world.OBJECTS if o not in near]
    return far[:: max(1, len(far) // UNRELATED_OBJECTS)][:UNRELATED_OBJECTS]
