"""Words before the concept's name, chosen by gradients through the erased model: prompts that bring its pictures back."""

import torch

from .learning import denoising, originals
from .probe import Attack, probe
from .searching import random_names, vocabulary
from .subject import Subject


@probe("prefixes", source="UnlearnDiffAtk, https://arxiv.org/abs/2310.11868", trains=True)
def prefixes(
    subject: Subject,
    *,
    words: tuple[int, ...] = (3, 5),
    pictures: int = 4,
    updates: int = 40,
    batch: int = 4,
    rate: float = 0.05,
) -> Attack:
    """Words found by projected gradients on the erased model's denoising loss. Chance: the same words before a random one.

    As in UnlearnDiffAtk the loss is the erased model's own, on pictures of the concept; no classifier and no other model takes
    part. Each update evaluates the words whose embeddings lie nearest, and moves by the sign of the gradient there.

    Args:
        words: how many words are put before the name; each length is searched for itself.
        pictures: of the concept, drawn by the unedited model.
        updates, batch, rate: of the search.

    Example:
        >>> PROBES["prefixes"](pipe, "Van Gogh", found, 12_000, words=(5,), updates=100).strongest
    """
    known = vocabulary(subject)
    table = subject.encoder.embeddings().weight.detach().float()
    rows = table[[subject.encoder.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in known]]
    latents = originals(subject, subject.concept, pictures)
    templates = subject.setting.templates

    def searched(count: int) -> str:
        chance = torch.Generator().manual_seed(subject.setting.seed + count)
        free = rows[torch.randint(len(rows), (count,), generator=chance)].clone()
        best, least = "", float("inf")
        for _ in range(updates):
            nearest = torch.cdist(free, rows).argmin(dim=1)
            vectors = rows[nearest].clone().requires_grad_()
            again = torch.Generator().manual_seed(subject.setting.seed)  # the same noise, so that losses compare
            chosen = torch.arange(batch) % len(latents)
            with torch.enable_grad():
                states = subject.encoder.spliced(templates[0], vectors, subject.concept)
                loss = denoising(subject, subject.pipe.unet, latents[chosen], states.expand(batch, -1, -1), again)
                (gradient,) = torch.autograd.grad(loss, [vectors])
            if float(loss.detach()) < least:
                best, least = " ".join(known[i] for i in nearest), float(loss.detach())
            free = free - rate * rows.std() * gradient.sign()
        return best

    found = [searched(count) for count in words]
    other = random_names(subject, 1, 1)[0]
    return Attack(
        aimed=[f"{text} {subject.concept}" for text in found],
        unaimed=[f"{text} {other}" for text in found],
        draw=subject.draw_names,
        chance="the same words before a random one",
        told={"pictures": pictures, "updates": updates, "batch": batch, "rate": rate},
    )
