"""Pictures by plan: same prompt, same seed, before and after; drawn once, cached, resumed after a kill.

A picture's file name is the hash of all that decides it: prompt, seed, settings, model, and the erasures in force. Whoever
asks for the same picture again, in this run or another, finds it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..attach import erasure_status
from ..sites import unwrapped
from ..text import Encoder
from .suites import Suite

BATCH = 16


def generate(
    pipe: Any, suite: Suite, folder: str | Path, on_picture: Callable[[int], Any] = lambda n: None
) -> list[Path]:
    """Every picture of `suite` as `pipe` draws it now, in the order of its prompts; those that exist are not drawn again.

    Args:
        folder: a cache that runs may share; files appear whole or not at all.
        on_picture: called with the number of pictures that were found or drawn, for progress.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = model_digest(pipe)
    paths = [folder / f"{_name(suite, i, model)}.png" for i in range(len(suite.prompts))]
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    on_picture(len(paths) - len(missing))
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        for i, image in zip(batch, _draw(pipe, suite, batch), strict=True):
            _save(image, paths[i])
        on_picture(len(batch))
    return paths


def read(paths: Sequence[Path]) -> list[Image.Image]:
    """The pictures at `paths`, in RGB."""
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures


@torch.no_grad()
def model_digest(pipe: Any) -> str:
    """Digest of what draws: the text encoder's answers, the UNet's and VAE's weights, the scheduler, and the erasures in force.

    Of each weight count its shape, sum and sum of squares: quick on large models, and different when anything was tuned.
    """
    status = erasure_status(pipe)
    told: list[Any] = [
        Encoder(pipe).states_digest(),
        type(pipe.scheduler).__name__,
        json.dumps(dict(pipe.scheduler.config), default=str),
    ]
    for module in (unwrapped(pipe.unet), pipe.vae):
        for name, weight in module.state_dict().items():
            told.append(
                [name, list(weight.shape), float(weight.double().sum()), float(weight.double().square().sum())]
            )
    told.append(
        [[n, status.requested[n]["digest"], status.requested[n]["strength"]] for n in sorted(status.in_force)]
        + [status.mode]
    )
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _draw(pipe: Any, suite: Suite, indices: Sequence[int]) -> list[Image.Image]:
    prompts, settings = [suite.prompts[i] for i in indices], suite.settings
    given = {name: getattr(settings, name) for name in ("height", "width") if getattr(settings, name) is not None}
    if settings.negative_prompt is not None:
        given["negative_prompt"] = [settings.negative_prompt] * len(prompts)
    return pipe(
        [prompt.text for prompt in prompts],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts],
        **given,
    ).images


def _name(suite: Suite, index: int, model: str) -> str:
    prompt = suite.prompts[index]
    told = [prompt.text, prompt.seed, asdict(suite.settings), model]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


def _save(image: Image.Image, path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.part")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
