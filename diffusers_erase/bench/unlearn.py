"""Our adapters under somebody else's judges: the technique that the PyPI package `eval-unlearn` finds by its entry point.

It knows that package by its contract alone (a class made of the config's keywords, with `generate`), and does not import it.
docs/eval-unlearn.md has the recipe and the traps.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import hub
from ..errors import EraseError
from ..status import erasure_status
from ..verbs import load_erasure


@dataclass(frozen=True)
class Options:
    """The technique's config, as it stands in eval-unlearn's JSON."""

    base_model: str
    """A diffusers folder or a repository."""
    adapters: Sequence[str]
    """Folders, files or repositories of erasures; an empty list is the control."""
    erase_concept: str
    """Under what eval-unlearn files the result; some of its metrics run only for names of its own, such as "nudity"."""
    strength: float = 1.0
    steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 0
    batch_size: int = 1
    device: str = ""
    """By default a GPU where there is one."""
    dtype: str = "float32"
    log: str = ""
    """A file to which prompt, seed and erasures of every picture are added, one JSON line each."""

    def __post_init__(self):
        if isinstance(self.adapters, str) or not all(isinstance(source, str) for source in self.adapters):
            raise EraseError(f"adapters is a list of folders, files or repositories: got {self.adapters!r}")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise EraseError(f"dtype is a name such as float32 or float16: got {self.dtype!r}")
        if self.batch_size < 1:
            raise EraseError(f"batch_size is at least 1: got {self.batch_size}")

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Options":
        """The options in a config; one that is unknown is refused, since it would be thought to act."""
        known = {f.name for f in fields(cls)}
        if unknown := set(config) - known:
            raise EraseError(
                f"unknown key {min(unknown)!r} in the technique's config: expected {', '.join(sorted(known))}"
            )
        if missing := {"base_model", "adapters", "erase_concept"} - set(config):
            raise EraseError(
                f"the technique's config lacks {min(missing)!r}; for a control give an empty list of adapters"
            )
        return cls(**config)


class Technique:
    """A pipeline with erasures, as eval-unlearn wants it.

    The pipeline's own safety checker is taken out: its black pictures would count for the erasure.

    Example:
        >>> technique = Technique(base_model="my-model", adapters=["erase-van-gogh"], erase_concept="van gogh")
        >>> pictures = technique.generate(["a painting by Van Gogh"])
    """

    def __init__(self, **config: Any):
        from diffusers import DiffusionPipeline

        self.options = Options.of(config)
        self.pipe: Any = DiffusionPipeline.from_pretrained(self.options.base_model)
        if getattr(self.pipe, "safety_checker", None) is not None:
            self.pipe.safety_checker = None
            self.pipe.register_to_config(requires_safety_checker=False)
        device = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe.to(device, getattr(torch, self.options.dtype))
        self.pipe.set_progress_bar_config(disable=True)
        if self.options.adapters:
            load_erasure(self.pipe, list(self.options.adapters), strength=self.options.strength)
        self._seen: Counter[str] = Counter()

    def generate(self, prompts: list[str], seed: int | None = None, **_: Any) -> list[Image.Image]:
        """One picture for each prompt. eval-unlearn gives no seed, or the same for every batch: see `seed_of`."""
        base = self.options.seed if seed is None else seed
        seeds = [self._next_seed(base, prompt) for prompt in prompts]
        size, pictures = self.options.batch_size, []
        for start in range(0, len(prompts), size):
            generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[start : start + size]]
            pictures += self.pipe(
                prompts[start : start + size],
                generator=generators,
                num_inference_steps=self.options.steps,
                guidance_scale=self.options.guidance_scale,
            ).images
        self._write_log(prompts, seeds)
        return pictures

    def _next_seed(self, base: int, prompt: str) -> int:
        self._seen[prompt] += 1
        return seed_of(base, prompt, self._seen[prompt])

    def _write_log(self, prompts: list[str], seeds: list[int]) -> None:
        if not self.options.log:
            return
        status = erasure_status(self.pipe)
        digests = [status.requested[name]["digest"] for name in status.in_force]
        lines = [
            json.dumps({"prompt": p, "seed": s, "erasures": digests}) for p, s in zip(prompts, seeds, strict=True)
        ]
        with Path(self.options.log).open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def seed_of(base: int, prompt: str, time: int) -> int:
    """The seed of a prompt that is drawn for the `time`-th time: whatever the batches, two techniques draw it from the same noise.

    >>> seed_of(0, "a cat", 1) == seed_of(0, "a cat", 2)
    False
    """
    return int.from_bytes(hashlib.sha256(hub.canonical([base, prompt, time]).encode()).digest()[:4], "big")
