"""What the denoiser makes of a name at first sight: its answer to pure noise. One forward for a name and a noise; no picture is drawn.

Text states may lie far apart and yet mean the same to the denoiser: it alone knows which names it draws alike. At the first step
of sampling its answer says which picture it is about to draw. As a share of the way to the empty prompt the distance of two
answers does not depend on what the model predicts (noise, v, the picture): the noise cancels, and so does the factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .errors import EraseError
from .sites import POOLED, TEXT, latent_shape, text_arguments, text_readers, working_copy
from .text import Encoder

NOISES = 2
"""Noises that every name is looked at through, each in another context."""

BATCH = 16
"""Forwards at a time."""

ALIKE = 1e-5
"""Two answers that are nearer than this, as a share of their length, are one but for rounding."""


@dataclass(frozen=True, eq=False)
class FirstGuess:
    """The answers of a pipeline's denoiser, as its weights are without erasures and LoRAs.

    Names are tuples, as targets are: one name, several for the mean of their text states, `()` for the empty prompt.
    """

    encoder: Encoder
    templates: tuple[str, ...]
    known: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    """Answers to names that were asked before."""

    @torch.no_grad()
    def distances(self, concept: str, targets: Sequence[tuple[str, ...]]) -> Tensor:
        """`[n]`: ‖ε(z, target) − ε(z, concept)‖ as a share of ‖ε(z, ∅) − ε(z, concept)‖ over all noises; 0 is the same picture.

        Raises:
            EraseError: a denoiser that cannot be asked (an inpainting model, quantised weights, weights that are not in memory, a
                scheduler without DDPM's times), or that answers with what is no number, or to the name as to none.
        """
        nothing, own, *answers = self._answers([(), (concept,), *targets])
        whole = (nothing - own).norm()
        if not whole > ALIKE * own.norm():  # NaN too
            raise EraseError(
                f"the denoiser answers {concept!r} as the empty prompt, or not by numbers ({float(whole):.2g} apart), so what it draws "
                f"alike cannot be told: name the target and the coreferences, or use float32 weights"
            )
        found = torch.tensor([float((answer - own).norm() / whole) for answer in answers], dtype=torch.float64)
        if not found.isfinite().all():
            name = " + ".join(targets[int(found.isfinite().logical_not().nonzero()[0])])
            raise EraseError(
                f"the denoiser's answer to {name!r} is no number: use float32 or bfloat16 weights, or name the target"
            )
        return found

    def _answers(self, asked: Sequence[tuple[str, ...]]) -> list[Tensor]:
        """Of each `[noises, c, h, w]`, float32 on the CPU."""
        new = [names for names in dict.fromkeys(asked) if names not in self.known]
        for start in range(0, len(new), BATCH // NOISES):
            some = new[start : start + BATCH // NOISES]
            self.known.update(zip(some, self._read(some), strict=True))
        return [self.known[names] for names in asked]

    def _read(self, asked: Sequence[tuple[str, ...]]) -> Tensor:
        states = [self._states(names) for names in asked]
        spaces = {space: torch.cat([each[space] for each in states]) for space in states[0]}
        noise = self._noise.repeat(len(asked), 1, 1, 1).to(next(self._unet.parameters()))
        answers = self._unet(noise, self._start, **text_arguments(self._unet, spaces), return_dict=False)[0]
        return answers.float().cpu().unflatten(0, (len(asked), NOISES))

    def _states(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Mean text states of the names, one for each noise."""
        contexts = [self.templates[i % len(self.templates)] for i in range(NOISES)]
        texts = [context.replace("{}", name) for name in names for context in contexts] or [""] * NOISES
        states = self.encoder.encode(texts)
        spaces = {TEXT: states.rows} | ({} if states.pooled is None else {POOLED: states.pooled})
        return {space: rows.unflatten(0, (-1, NOISES)).mean(0) for space, rows in spaces.items()}

    @cached_property
    def _unet(self) -> Any:
        pipe = self.encoder.pipe
        unet: Any = working_copy(next(iter(text_readers(pipe).values()))).to(
            pipe._execution_device
        )  # where offloaded weights work, too
        like = next(unet.parameters())
        # A CPU computes in half precision slowly, or not at all.
        return unet.float() if like.device.type == "cpu" and like.dtype == torch.float16 else unet

    @cached_property
    def _noise(self) -> Tensor:
        return torch.randn(NOISES, *latent_shape(self._unet), generator=torch.Generator().manual_seed(0))

    @property
    def _start(self) -> int:
        """The time at which latents are pure noise."""
        scheduler = self.encoder.pipe.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            raise EraseError(
                f"the denoiser is asked at the last of DDPM's times, which a {type(scheduler).__name__} does not count: search with the "
                f"model's own scheduler of noise or v prediction, or name the target"
            )
        return len(scheduler.alphas_cumprod) - 1
