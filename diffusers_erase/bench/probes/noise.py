"""More noise on the way than the sampler would add: is the concept still among what the erased model can draw?"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...errors import EraseError
from .probe import Attack, probe
from .subject import Subject


@probe("noise", source="When are concepts erased?, https://arxiv.org/abs/2505.17013 (noise-based probe)")
def noise(
    subject: Subject,
    *,
    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85),
    variances: tuple[float, ...] = (1.0, 1.02, 1.03, 1.04),
) -> Attack:
    """DDIM with η from 1 up and its variance scaled; the prompt is the concept's name. Chance: the same with the empty prompt.

    A step from t to t' adds noise of the variance η²·v·σ², where σ² = (1 − ᾱ')/(1 − ᾱ)·(1 − ᾱ/ᾱ') is DDIM's at η = 1. The
    direction towards the noise is that of η = 1 for all: beyond, DDIM's own coefficient √(1 − ᾱ' − η²σ²) is not real at few
    steps. A pipeline with another sampler is drawn with a DDIM scheduler of the same configuration.

    Args:
        etas: values of η, at least 1.
        variances: values of v, at least 1.

    Example:
        >>> PROBES["noise"](pipe, "Van Gogh", found, 12_000).strongest
        'η 1.17, variance × 1.02'
    """
    if min(*etas, *variances) < 1:
        raise EraseError(f"the noise probe adds noise: η and variance are at least 1, got {etas} and {variances}")
    subject.pipe.scheduler = ddim(subject.pipe.scheduler)

    def draw(ways: Sequence[tuple[float, float, str]], seeds: Sequence[int]) -> list[Image.Image]:
        excess = torch.tensor([max(0.0, eta**2 * variance - 1) for eta, variance, _ in ways]).sqrt()
        generators = [torch.Generator().manual_seed(seed + 1) for seed in seeds]

        def more_noise(step: int, latents: Tensor) -> Tensor:
            drawn = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
            added = excess[:, None, None, None] * _deviation(subject.pipe.scheduler, step) * drawn
            return latents + added.to(latents.device, latents.dtype)

        prompts = [subject.prompt(name, seed) if name else "" for (*_, name), seed in zip(ways, seeds, strict=True)]
        return subject.draw(prompts, seeds, on_step=more_noise, eta=1.0)

    grid = [(eta, variance) for eta in etas for variance in variances]
    return Attack(
        aimed=[(*point, subject.concept) for point in grid],
        unaimed=[(*point, "") for point in grid],
        draw=draw,
        chance="the same noise with the empty prompt, searched alike",
        label=lambda way: f"η {way[0]:g}, variance × {way[1]:g}",
    )


def ddim(scheduler: Any) -> Any:
    """A DDIM scheduler at the noise levels of `scheduler`; itself where it is one."""
    from diffusers import DDIMScheduler

    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        raise EraseError(
            f"the noise probe draws with DDIM, whose noise levels a {type(scheduler).__name__} does not have: leave it out"
        )
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)


def _deviation(scheduler, step: int) -> float:
    """σ of DDIM at η = 1, from this step's time to the next one's."""
    times, levels = scheduler.timesteps, scheduler.alphas_cumprod.double()
    now = float(levels[times[step]])
    after = float(levels[times[step + 1]] if step + 1 < len(times) else scheduler.final_alpha_cumprod)
    return max(0.0, (1 - after) / (1 - now) * (1 - now / after)) ** 0.5
