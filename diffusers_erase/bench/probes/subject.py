"""The pipeline under a probe: how it draws, what a picture costs, and that nothing of it is changed."""

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ...errors import EraseError
from ...status import erasure_status
from ...text import Encoder, check_templates
from ...verbs import disable_erasure

OnStep = Callable[[int, Tensor], Tensor]
"""Called after step i (from 0) with the latents `[n, c, h, w]`; returns those to go on with."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Setting:
    """How a probe draws, in the words and at the settings of the model that is probed."""

    templates: tuple[str, ...] = ("a photo of a {}", "a picture of a {}", "a drawing of a {}", "{}")
    """Contexts of the concept, each with one `{}`; pictures take them in turn, by seed."""
    names: tuple[str, ...] = ()
    """Other names of the concept, for the paraphrase sweep; searches may not use them."""
    steps: int = 30
    guidance: float = 7.5
    size: tuple[int, int] | None = None
    """Height and width in pixels; None for the model's own."""
    seed: int = 0
    batch: int = 8

    def __post_init__(self):
        check_templates(self.templates)
        if self.steps < 2 or self.batch < 1:
            raise EraseError(
                f"a probe draws with at least 2 steps, 1 picture at a time: got {self.steps} and {self.batch}"
            )


class Subject:
    """A pipeline with erasures in force, as probes see it.

    They draw through a shallow copy with a scheduler of its own, no progress bar and no safety checker (a blackened picture
    would pass for a clean one). The modules, and the erasures on them, are the pipe's.

    Raises:
        EraseError: no erasure is in force.
    """

    def __init__(self, pipe: Any, concept: str, setting: Setting):
        self.status = erasure_status(pipe)
        if not self.status.in_force:
            raise EraseError(
                "no erasure is in force on this pipeline, so there is nothing to probe: load_erasure(pipe, ...) first"
            )
        self.pipe = copy.copy(pipe)
        self.pipe.scheduler = copy.deepcopy(pipe.scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        if getattr(pipe, "safety_checker", None) is not None:
            self.pipe.safety_checker = None
        self.encoder = Encoder(self.pipe)
        self.encoder.check_name(concept)
        self.concept = concept
        self.setting = setting
        self.used = 0
        """Denoiser forwards so far."""

    def unedited(self) -> AbstractContextManager[None]:
        """Draw without the erasures inside of the `with`."""
        return disable_erasure(self.pipe)

    @property
    def steps(self) -> int:
        """Denoising steps of a picture, which some schedulers make more than were asked for."""
        self.pipe.scheduler.set_timesteps(self.setting.steps)
        return len(self.pipe.scheduler.timesteps)

    def forwards(self, guidance: float | None = None) -> int:
        """Denoiser forwards that a picture takes: one for each step, two where it is guided."""
        guided = (self.setting.guidance if guidance is None else guidance) > 1
        return self.steps * (2 if guided else 1)

    def prompt(self, name: str, seed: int) -> str:
        """`name` in the context that is this seed's turn."""
        return self.setting.templates[seed % len(self.setting.templates)].replace("{}", name)

    def draw_names(self, names: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of names, each in its seed's context."""
        return self.draw([self.prompt(name, seed) for name, seed in zip(names, seeds, strict=True)], seeds)

    def draw(
        self,
        prompts: Sequence[str] | Tensor,
        seeds: Sequence[int],
        *,
        negatives: Sequence[str] | None = None,
        guidance: float | None = None,
        on_step: OnStep | None = None,
        latents: bool = False,
        **options: Any,
    ) -> Any:
        """One batch by the host's own call, with the erasures that are in force now.

        Args:
            prompts: texts, or their embeddings `[n, tokens, d]`.
            seeds: one for each picture; its first latents depend on nothing else.
            latents: give the final latents `[n, c, h, w]` instead of pictures.
            options: more keywords of the host's call, such as `eta`.
        """
        texts: dict[str, Any] = (
            {"prompt_embeds": prompts} if isinstance(prompts, Tensor) else {"prompt": list(prompts)}
        )
        if negatives is not None:
            texts["negative_prompt"] = list(negatives)
        if self.setting.size:
            options["height"], options["width"] = self.setting.size

        def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"latents": on_step(step, tensors["latents"])} if on_step else {}

        self.used += len(seeds) * self.forwards(guidance)
        return self.pipe(
            **texts,
            num_inference_steps=self.setting.steps,
            guidance_scale=self.setting.guidance if guidance is None else guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent" if latents else "pil",
            callback_on_step_end=after,
            **options,
        ).images


def grouped(
    keys: Sequence[Key], seeds: Sequence[int], draw: Callable[[Key, Sequence[int]], Sequence[Image.Image]]
) -> list[Image.Image]:
    """`draw(key, seeds)` once for each different key: for ways that cannot share a batch. Pictures in the order of `seeds`."""
    found: dict[int, Image.Image] = {}
    for key in dict.fromkeys(keys):
        places = [i for i, other in enumerate(keys) if other == key]
        found |= zip(places, draw(key, [seeds[i] for i in places]), strict=True)
    return [found[i] for i in range(len(seeds))]
