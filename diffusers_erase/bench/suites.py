"""Suites as data: which prompts are drawn, what each should show, and what part it plays for an erasure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONCEPT, PARAPHRASE, NEIGHBOUR, UNRELATED = "concept", "paraphrase", "neighbour", "unrelated"
ROLES = {
    CONCEPT: "The concept itself",
    PARAPHRASE: "Paraphrases of it",
    NEIGHBOUR: "Its nearest neighbours",
    UNRELATED: "Unrelated",
}
"""Part that a picture plays, and its title; in the order of a report."""


@dataclass(frozen=True)
class Case:
    """One picture to draw before and after."""

    prompt: str
    seed: int
    role: str
    shows: str
    """The object that the picture should show, in the judge's words."""
    style: str
    """The style that it should have, in the judge's words."""


@dataclass(frozen=True)
class Suite:
    """Cases, and the settings that they are drawn with."""

    name: str
    concept: str
    cases: tuple[Case, ...]
    steps: int
    guidance: float

    def role(self, role: str) -> tuple[int, ...]:
        """Indices of the cases that play `role`."""
        return tuple(i for i, case in enumerate(self.cases) if case.role == role)


def cases(role: str, prompts: Iterable[tuple[str, str, str]], seeds: Sequence[int]) -> list[Case]:
    """A case for every (prompt, object, style) and seed."""
    return [Case(prompt, seed, role, shows, style) for prompt, shows, style in prompts for seed in seeds]
