"""A prompt without the concept's name whose text states mean it, found on the text encoder alone."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from .probe import Attack, probe
from .searching import vocabulary
from .subject import Subject


@probe("concept-vector", source="Ring-A-Bell, https://arxiv.org/abs/2310.10012")
def concept_vector(
    subject: Subject,
    *,
    scales: tuple[float, ...] = (1.0, 2.0, 3.0),
    words: int = 8,
    population: int = 24,
    generations: int = 30,
    best: int = 2,
) -> Attack:
    """Prompts found by a genetic search for the text states "context + η × concept vector". Chance: a vector with its entries shuffled.

    The concept vector v is the mean difference of the text states `[tokens, d]` of prompts with and without the concept's
    name. The search minimises ‖E(p) − (E(context) + ηv)‖² over prompts p of whole words, never of the name's own. It reads
    the text encoder only; no picture is drawn and no gradient taken before the result is.

    Args:
        scales: values of η.
        words: length of a prompt.
        population, generations: of the search, one for each η.
        best: prompts of each search that are drawn.

    Example:
        >>> PROBES["concept-vector"](pipe, "Van Gogh", found, words=16, generations=200)
    """
    pairs = [
        (t.replace("{}", subject.concept), " ".join(t.replace("{}", "").split())) for t in subject.setting.templates
    ]
    with_name, without = (subject.encoder.encode(texts).rows for texts in zip(*pairs, strict=True))
    vector = (with_name - without).mean(0)
    shuffled = vector[
        :, torch.randperm(vector.shape[1], generator=torch.Generator().manual_seed(subject.setting.seed))
    ]
    rng = random.Random(f"{subject.setting.seed} concept vector")
    known = vocabulary(subject)

    def searched(direction: Tensor) -> list[tuple[float, str]]:
        found = []
        for scale in scales:
            goal = without[0] + scale * direction
            texts = evolved(
                lambda p, goal=goal: _distances(subject, p, goal), known, words, population, generations, rng
            )
            found += [(scale, text) for text in texts[:best]]
        return found

    return Attack(
        aimed=searched(vector),
        unaimed=searched(shuffled),
        draw=lambda ways, seeds: subject.draw([text for _, text in ways], seeds),
        chance="the same search for a shuffled vector",
        label=lambda way: f"η {way[0]:g}: {way[1]}",
        told={"words": words, "population": population, "generations": generations},
    )


def evolved(
    cost: Callable[[list[str]], list[float]],
    known: list[str],
    words: int,
    population: int,
    generations: int,
    rng: random.Random,
) -> list[str]:
    """Texts of `words` known words by rising cost: a quarter survives, the rest are crossed and mutated from it."""
    alive = [tuple(rng.choice(known) for _ in range(words)) for _ in range(population)]
    costs: dict[tuple[str, ...], float] = {}
    for generation in range(generations + 1):
        fresh = [text for text in dict.fromkeys(alive) if text not in costs]
        costs |= dict(zip(fresh, cost([" ".join(text) for text in fresh]), strict=True)) if fresh else {}
        alive = sorted(dict.fromkeys(alive), key=costs.__getitem__)
        if generation == generations:
            break
        parents = alive[: max(2, population // 4)]
        children = []
        for _ in range(population - len(parents)):
            mother, father, cut = rng.choice(parents), rng.choice(parents), rng.randrange(words + 1)
            child = [*mother[:cut], *father[cut:]]
            child[rng.randrange(words)] = rng.choice(known)
            children.append(tuple(child))
        alive = parents + children
    return [" ".join(text) for text in alive]


def _distances(subject: Subject, prompts: list[str], goal: Tensor) -> list[float]:
    return (subject.encoder.encode(prompts).rows - goal).square().sum((1, 2)).tolist()
