"""The demo's suite: a concept of the embedded model, and what an erasure of it should and should not touch."""

from .. import world
from ..errors import EraseError
from .suites import CONCEPT, NEIGHBOUR, PARAPHRASE, UNRELATED, Case, Suite, cases

UNRELATED_OBJECTS = 8
SEEDS = (1, 2, 3, 4)


def demo_suite(concept: str, neighbours: int = 4) -> Suite:
    """Every style of `concept` and of its paraphrases, its nearest neighbours, and objects that have nothing to do with it.

    For a style as the concept: objects in it, and the same objects in the other styles.
    """
    if concept in world.STYLES:
        drawn = _for_style(concept)
    elif concept in world.OBJECTS:
        drawn = _for_object(concept, neighbours)
    else:
        known = f"its objects ({', '.join(world.OBJECTS)}) or styles ({', '.join(world.STYLES)})"
        raise EraseError(f"emoji-sd does not know {concept!r}: choose one of {known}")
    return Suite(f"demo-{concept}", concept, tuple(drawn), steps=world.STEPS, guidance=world.GUIDANCE)


def _for_object(concept: str, neighbours: int) -> list[Case]:
    near = world.neighbours(concept, neighbours)
    words = world.paraphrases(concept)[:2]
    return [
        *cases(CONCEPT, _styled([concept]), SEEDS),
        *cases(
            PARAPHRASE,
            [(world.prompt(word, style), concept, style) for word in words for style in world.STYLES],
            SEEDS[:2],
        ),
        *cases(NEIGHBOUR, _styled(near), SEEDS[:2]),
        *cases(UNRELATED, _styled(_unrelated([concept, *world.neighbours(concept, 8)])), SEEDS[:1]),
    ]


def _for_style(concept: str) -> list[Case]:
    objects = _unrelated([])
    others = [style for style in world.STYLES if style != concept]
    return [
        *cases(CONCEPT, [(world.prompt(o, concept), o, concept) for o in objects], SEEDS),
        *cases(UNRELATED, [(world.prompt(o, style), o, style) for o in objects for style in others], SEEDS[:1]),
    ]


def _styled(objects: list[str]) -> list[tuple[str, str, str]]:
    return [(world.prompt(o, style), o, style) for o in objects for style in world.STYLES]


def _unrelated(near: list[str]) -> list[str]:
    """Objects spread over the list, which is ordered by kind, without those in `near`."""
    far = [o for o in world.OBJECTS if o not in near]
    return far[:: max(1, len(far) // UNRELATED_OBJECTS)][:UNRELATED_OBJECTS]
