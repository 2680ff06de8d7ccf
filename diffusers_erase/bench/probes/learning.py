"""What the probes share that learn: the unedited model's own pictures of a name, and how well a denoiser knows them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...sites import TEXT, text_arguments, unwrapped
from .noise import ddim
from .probe import FRESH
from .subject import Subject


def originals(subject: Subject, name: str, count: int) -> Tensor:
    """Latents `[count, c, h, w]` of the unedited model's pictures of `name`, on seeds that no other part of a probe uses."""
    seeds = [subject.setting.seed + 2 * FRESH + i for i in range(count)]
    found = []
    with subject.unedited():
        for part in (seeds[i : i + subject.setting.batch] for i in range(0, count, subject.setting.batch)):
            found.append(subject.draw([subject.prompt(name, seed) for seed in part], part, latents=True))
    return torch.cat(found)


def denoising(subject: Subject, unet: Any, latents: Tensor, states: Tensor, chance: torch.Generator) -> Tensor:
    """Mean square error of a denoiser's answers to `latents` under noise of any level, given text states `[n, tokens, d]`.

    Counts as one forward for each of the latents; a backward pass, about twice the work, is not counted.
    """
    scheduler = ddim(subject.pipe.scheduler)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=chance).to(latents.device)
    noise = torch.randn(latents.shape, generator=chance).to(latents)
    noisy = scheduler.add_noise(latents, noise, times)
    subject.used += len(latents)
    answer = unet(noisy, times, return_dict=False, **text_arguments(unwrapped(unet), {TEXT: states}))[0]
    kind = scheduler.config.prediction_type
    goal = {"epsilon": noise, "sample": latents}.get(kind)
    goal = scheduler.get_velocity(latents, noise, times) if goal is None else goal
    return torch.nn.functional.mse_loss(answer.float(), goal.float())


def descended(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor], updates: int, rate: float, after: Callable[[int], Any]
) -> None:
    """Adam on `parameters` alone: no other tensor's gradient is touched. `after(i)` is called after the i-th update, from 1."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for update in range(1, updates + 1):
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        after(update)
