"""A few steps of tuning on pictures of the concept: was it gone, or only asleep?"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...sites import sites, unwrapped
from ...status import get_active_erasures
from .learning import denoising, descended, originals
from .probe import Attack, probe
from .searching import random_names
from .subject import Subject, grouped


@probe("relearning", source="Erased or Dormant?, https://arxiv.org/abs/2505.16174 (fine-tuning)", trains=True)
def relearning(
    subject: Subject,
    *,
    updates: tuple[int, ...] = (2, 5, 10, 20, 40),
    pictures: int = 8,
    batch: int = 4,
    rate: float = 1e-4,
) -> Attack:
    """Tune keys and values of a copy of the erased model on pictures of the concept. Chance: on the same, for words it never knew.

    The chance is the control of the paper: the same pictures are taught under a name that means nothing to the model. A concept
    that comes back by its own name in fewer steps than it is learned under another was dormant, not erased. The column
    `control` is the unedited model, not tuned.

    Args:
        updates: numbers of steps after which pictures are drawn.
        pictures: of the concept, drawn by the unedited model.
        batch, rate: of Adam.

    Example:
        >>> [f"{way.label}: {way.share}" for way in PROBES["relearning"](pipe, "Van Gogh", found).tried]
    """
    tuned: Any = copy.deepcopy(unwrapped(subject.pipe.unet))
    weights = [layer.weight for layer in sites(tuned).values()]
    start = [weight.detach().clone() for weight in weights]
    latents = originals(subject, subject.concept, pictures)
    other = random_names(subject, 1, 2, "never known")[0]

    def taught(name: str) -> list[tuple[str, int, list[Tensor]]]:
        chance, kept = torch.Generator().manual_seed(subject.setting.seed), []
        states = subject.encoder.encode([t.replace("{}", name) for t in subject.setting.templates]).rows
        _load(weights, start)

        def loss() -> Tensor:
            chosen = torch.randint(len(latents), (batch,), generator=chance)
            contexts = torch.randint(len(states), (batch,), generator=chance)
            return denoising(subject, tuned, latents[chosen], states[contexts], chance)

        def keep(update: int) -> None:
            if update in updates:
                kept.append((name, update, [weight.detach().clone() for weight in weights]))

        descended(weights, loss, max(updates), rate, after=keep)
        return kept

    ways = {name: taught(name) for name in (subject.concept, other)}

    def draw(ways_: Sequence[tuple[str, int]], seeds: Sequence[int]) -> list[Image.Image]:
        return grouped(ways_, seeds, tuned_draw)

    def tuned_draw(way: tuple[str, int], seeds: Sequence[int]) -> list[Image.Image]:
        name, count = way
        if not get_active_erasures(subject.pipe):  # the control is the unedited model as it is
            return subject.draw_names([subject.concept] * len(seeds), seeds)
        _load(weights, next(kept for _, update, kept in ways[name] if update == count))
        own, subject.pipe.unet = subject.pipe.unet, tuned
        try:
            return subject.draw_names([name] * len(seeds), seeds)
        finally:
            subject.pipe.unet = own

    return Attack(
        aimed=[(subject.concept, count) for count in updates],
        unaimed=[(other, count) for count in updates],
        draw=draw,
        chance=f"the same pictures taught under {other!r}",
        label=lambda way: f"{way[1]} updates",
        told={"pictures": pictures, "batch": batch, "rate": rate},
    )


@torch.no_grad()
def _load(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
