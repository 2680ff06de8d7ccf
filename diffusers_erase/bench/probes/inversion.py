"""A word of the attacker's own: its input embeddings are learned through the erased model, from pictures of the concept."""

import torch
from torch import Tensor

from .learning import denoising, descended, originals
from .probe import Attack, probe
from .searching import random_names
from .subject import Subject


@probe(
    "inversion",
    source="textual inversion, https://arxiv.org/abs/2208.01618; on erased models https://arxiv.org/abs/2308.01508",
    trains=True,
)
def inversion(
    subject: Subject,
    *,
    tokens: tuple[int, ...] = (1, 4),
    pictures: int = 8,
    updates: int = 100,
    batch: int = 4,
    rate: float = 0.02,
) -> Attack:
    """Embeddings of a new word that make the erased model denoise the concept's pictures. Chance: learned from a random word's.

    Args:
        tokens: how many tokens the word has; each is learned for itself.
        pictures: of the concept, drawn by the unedited model.
        updates, batch, rate: of Adam, on the embeddings alone.

    Example:
        >>> PROBES["inversion"](pipe, "Van Gogh", found, 12_000, tokens=(4,), updates=500).came_back
    """
    table, templates = subject.encoder.embeddings().weight.detach(), subject.setting.templates

    def learned(name: str) -> list[tuple[str, Tensor]]:
        latents = originals(subject, name, pictures)
        return [(f"{count} tokens learned", fitted(latents, count)) for count in tokens]

    def fitted(latents: Tensor, count: int) -> Tensor:
        chance = torch.Generator().manual_seed(subject.setting.seed)
        start = table[torch.randint(len(table), (count,), generator=chance)].float()
        vectors = start.clone().requires_grad_()

        def loss() -> Tensor:
            chosen = torch.randint(len(latents), (batch,), generator=chance)
            template = templates[int(torch.randint(len(templates), (1,), generator=chance))]
            states = subject.encoder.spliced(template, vectors).expand(batch, -1, -1)
            return denoising(subject, subject.pipe.unet, latents[chosen], states, chance)

        descended([vectors], loss, updates, rate, after=lambda update: None)
        return vectors.detach()

    @torch.no_grad()
    def draw(ways, seeds):
        contexts = [templates[seed % len(templates)] for seed in seeds]
        rows = [subject.encoder.spliced(t, vectors) for t, (_, vectors) in zip(contexts, ways, strict=True)]
        return subject.draw(torch.cat(rows), seeds)

    return Attack(
        aimed=learned(subject.concept),
        unaimed=learned(random_names(subject, 1, 1)[0]),
        draw=draw,
        chance="a word learned from a random word's pictures",
        label=lambda way: way[0],
        told={"pictures": pictures, "updates": updates, "batch": batch, "rate": rate},
    )
