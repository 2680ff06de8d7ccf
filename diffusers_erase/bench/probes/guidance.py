"""Guidance by a classifier of latents: the sampler is pushed to what the erased model was never asked for by name."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from .learning import originals
from .noise import ddim
from .probe import Attack, probe
from .searching import random_names
from .subject import Subject, grouped


@probe(
    "guidance", source="When are concepts erased?, https://arxiv.org/abs/2505.17013 (classifier guidance)", trains=True
)
def guidance(
    subject: Subject,
    *,
    scales: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4),
    pictures: int = 16,
    updates: int = 200,
) -> Attack:
    """Each step moves the latents up the gradient of log p(concept | latents, noise level). Chance: labels shuffled.

    The classifier is small, and learned here from the unedited model's latents of the concept and of random words, under noise
    of every level. The prompt is the concept's name, or empty.

    Args:
        scales: length of a move (root mean square), in units of the noise that is still in the latents.
        pictures: of the concept, and as many of other words.
        updates: of the classifier; they do not ask the denoiser.

    Example:
        >>> PROBES["guidance"](pipe, "Van Gogh", found, 12_000, scales=(0.2,)).came_back
    """
    others = random_names(subject, max(2, pictures // 4), 1, "guidance")
    each = -(-pictures // len(others))
    latents = torch.cat(
        [originals(subject, subject.concept, pictures), *(originals(subject, name, each) for name in others)]
    ).float()
    labels = (torch.arange(len(latents)) < pictures).float()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(subject.setting.seed))
    levels = ddim(subject.pipe.scheduler).alphas_cumprod.float()
    classifiers = {
        name: _classifier(latents, known, levels, updates, subject.setting.seed)
        for name, known in (("concept", labels), ("shuffled", labels[order]))
    }

    def draw(ways: Sequence[tuple[str, float, str]], seeds: Sequence[int]) -> list[Image.Image]:
        return grouped(ways, seeds, guided)

    def guided(way: tuple[str, float, str], seeds: Sequence[int]) -> list[Image.Image]:
        which, scale, name = way

        def pushed(step: int, now: Tensor) -> Tensor:
            later = subject.pipe.scheduler.timesteps[step + 1 :][:1]
            if not len(later):
                return now
            level = levels[later.long().cpu()]
            with torch.enable_grad():
                z = now.detach().float().requires_grad_()
                log = nn.functional.logsigmoid(classifiers[which](z, level.expand(len(z)))).sum()
                (gradient,) = torch.autograd.grad(log, [z])
            size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
            return now + (scale * (1 - level).sqrt().view(-1, 1, 1, 1).to(z) * gradient / size).to(now)

        prompts = [subject.prompt(name, seed) if name else "" for seed in seeds]
        return subject.draw(prompts, seeds, on_step=pushed)

    grid = [(scale, name) for scale in scales for name in (subject.concept, "")]
    return Attack(
        aimed=[("concept", *way) for way in grid],
        unaimed=[("shuffled", *way) for way in grid],
        draw=draw,
        chance="a classifier with shuffled labels, searched alike",
        label=lambda way: f"scale {way[1]:g}, {way[2]!r}" if way[2] else f"scale {way[1]:g}, no prompt",
        told={"pictures": pictures, "updates": updates},
    )


class _Classifier(nn.Module):
    """Logits `[n]` of latents `[n, c, h, w]` at noise levels ᾱ `[n]`, which come in as one more channel."""

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels + 1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, latents: Tensor, level: Tensor) -> Tensor:
        level = level.to(latents).view(-1, 1, 1, 1).expand(-1, 1, *latents.shape[-2:])
        return self.layers(torch.cat([latents, level], dim=1)).mean((1, 2, 3))


def _classifier(latents: Tensor, labels: Tensor, levels: Tensor, updates: int, seed: int) -> _Classifier:
    """Learned from `latents` under noise of every level."""
    chance = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # first values come from the global random state; ours replace them
        network = _Classifier(latents.shape[1])
    for parameter in network.parameters():
        first = torch.rand(parameter.shape, generator=chance) * 2 - 1
        parameter.data = first / max(1, parameter[0].numel()) ** 0.5
    network.to(latents.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    with torch.enable_grad():
        for _ in range(updates):
            chosen = torch.randint(len(latents), (32,), generator=chance)
            level = levels[torch.randint(len(levels), (32,), generator=chance)].to(latents)
            noise = torch.randn((32, *latents.shape[1:]), generator=chance).to(latents)
            shaped = level.view(-1, 1, 1, 1)
            noisy = shaped.sqrt() * latents[chosen] + (1 - shaped).sqrt() * noise
            loss = nn.functional.binary_cross_entropy_with_logits(network(noisy, level), labels[chosen].to(latents))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.requires_grad_(False)
